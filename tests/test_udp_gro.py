"""UDP_GRO: answers that the kernel joins leave as one super-frame; where it joins none, it is given up."""

import socket
import struct

import pytest

from tests.shard import Shard, all_datagrams
from tests.socksproxy import socks_header
from tests.test_udp_down import Client
from workers import counts
from workers.udp import Udp
from workers.udp.answers import GRO_PATIENCE, GRO_TRAIN, GRO_TRAINS

UDP_SEGMENT = 103


def joined(client, payloads, sources=None):
    """Have the upstream send payloads of one length, the last perhaps shorter, in one call with UDP_SEGMENT."""
    sources = sources or [0] * len(payloads)
    if client.proxy is None:
        sender, to, prefix = client._sockets[0], client._to, lambda source: b""
    else:
        sender, to = client.proxy.relay, client.proxy.source
        prefix = lambda source: socks_header(*client.sources[source])  # noqa: E731
    data = b"".join(prefix(source) + payload for source, payload in zip(sources, payloads, strict=True))
    size = len(prefix(0)) + len(payloads[0])
    sender.sendmsg([data], [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", size))], 0, to)


@pytest.fixture(params=[("socks5", 4), ("socks5", 6), ("direct", 4), ("direct", 6)], ids=str)
def client(request):
    kind, version = request.param
    shard = Shard(scheme="direct" if kind == "direct" else "socks5")
    shard.udp = Udp(shard)
    client = Client(shard, version, kind)
    client.answer(b"first")
    client.expect([(b"first", 0)])
    yield client
    client.close()
    shard.close()


def association(client):
    [one] = client.shard.udp._associations.values()
    return one


def switched_on(client):
    association(client).coalesce(True, client.shard.udp.answers.coalesced)


def test_trains_switch_it_on_and_answers_that_come_alone_off_again(client):
    one = association(client)
    while not one.trains >= GRO_TRAINS - 1:
        payloads = [b"%03d" % number for number in range(GRO_TRAIN + 4)]
        for payload in payloads:
            client.answer(payload)
        client.expect([(payload, 0) for payload in payloads])
    payloads = [b"%03d" % number for number in range(GRO_TRAIN + 4)]
    for payload in payloads:
        client.answer(payload)
    client.expect([(payload, 0) for payload in payloads])
    assert one.trains == 0
    # The last ones of them are taken as they were queued; from here on they are joined.
    joined(client, payloads)
    client.shard.run_until(lambda: client.shard.sent)
    assert len(client.shard.sent) == 1
    client.expect([(payload, 0) for payload in payloads])
    for number in range(GRO_PATIENCE):
        client.answer(b"%d" % number)
    client.expect([(b"%d" % number, 0) for number in range(GRO_PATIENCE)])
    sent = len(client.shard.sent)
    assert client.shard.udp.answers._gro_again_at
    joined(client, payloads)
    client.expect([(payload, 0) for payload in payloads])
    assert sent == 0


@pytest.mark.parametrize("last", [0, 1, 600])
def test_joined_answers_leave_as_one_super_frame(client, last):
    switched_on(client)
    payloads = [b"%04d" % number * 300 for number in range(40)] + [b"x" * last] * bool(last)
    joined(client, payloads)
    client.shard.run_until(lambda: client.shard.sent)
    assert len(client.shard.sent) == 1
    client.expect([(payload, 0) for payload in payloads])


def test_answers_of_two_sources_joined_by_the_relay(client):
    if client.proxy is None:
        pytest.skip("what two sources send to one socket is never joined")
    switched_on(client)
    payloads = [b"%04d" % number for number in range(30)]
    sources = [number // 7 % 2 for number in range(30)]
    joined(client, payloads, sources)
    client.expect(list(zip(payloads, sources, strict=True)))
    joined(client, payloads, sources)
    client.expect(list(zip(payloads, sources, strict=True)))


def test_joined_answers_above_the_mtu_of_the_device(client):
    shard = Shard(scheme="socks5" if client.proxy else "direct", mtu=1280)
    shard.udp = Udp(shard)
    small = Client(shard, client.version, "socks5" if client.proxy else "direct")
    small.answer(b"first")
    small.expect([(b"first", 0)])
    switched_on(small)
    payloads = [b"%04d" % number * 330 for number in range(20)]
    joined(small, payloads)
    small.shard.run_until(lambda: shard.counted(counts.UDP_DATAGRAMS_DOWN) == 21)
    assert [each[4] for each in all_datagrams(shard.sent)] == payloads
    shard.sent.clear()
    small.close()
    shard.close()


def test_without_frames_joined_answers_are_lost_and_counted(client):
    switched_on(client)
    client.shard.port.large.free.clear()
    joined(client, [b"lost"] * 10)
    client.shard.run_until(lambda: client.shard.counted(counts.NO_FRAMES))
    client.shard.port.large.reset()
    client.answer(b"answer")
    client.expect([(b"answer", 0)])


def test_a_kernel_without_it(monkeypatch):
    shard = Shard(scheme="direct")
    shard.udp = Udp(shard)
    client = Client(shard, 4, "direct")
    one = association(client)

    class Refuses:
        def setsockopt(self, *_):
            raise OSError(92, "protocol not available")

    real, one._socket = one._socket, Refuses()
    one.coalesce(True, shard.udp.answers.coalesced)
    one._socket = real
    assert not one.may_coalesce
    client.answer(b"answer")
    client.expect([(b"answer", 0)])
    client.close()
    shard.close()
