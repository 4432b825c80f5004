"""Answers from the upstream to the device: which packets they become, and what is dropped."""

import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc.layout import TX_LARGE, TX_SMALL
from tests.shard import CLIENT4, CLIENT6, Shard, all_datagrams, datagrams, udp_packet
from tests.socksproxy import Proxy, socks_header
from workers import counts
from workers.udp import Udp

TARGET4 = b"\x08\x08\x08\x08"
TARGET6 = socket.inet_pton(socket.AF_INET6, "2001:4860:4860::8888")
OTHER4 = b"\x09\x09\x09\x09"
OTHER6 = socket.inet_pton(socket.AF_INET6, "2001:4860:4860::8844")


class Client:
    """One client socket with an association that stands; `answer` has the upstream send it something."""

    def __init__(self, shard, version, kind):
        self.shard = shard
        self.version = version
        self.address = CLIENT4 if version == 4 else CLIENT6
        self.sources = [(TARGET4, 99), (OTHER4, 77)] if version == 4 else [(TARGET6, 99), (OTHER6, 77)]
        self.received = 0
        if kind == "direct":
            family = socket.AF_INET if version == 4 else socket.AF_INET6
            host = "127.0.0.1" if version == 4 else "::1"
            self._sockets = [socket.socket(family, socket.SOCK_DGRAM) for _ in range(2)]
            for each in self._sockets:
                each.bind((host, 0))
            packed = socket.inet_pton(family, host)
            self.sources = [(packed, each.getsockname()[1]) for each in self._sockets]
            shard.receive(udp_packet(b"first", self.address, destination=packed, dport=self.sources[0][1]))
            self._to = self._sockets[0].recvfrom(100)[1]
            self.proxy = None
        else:
            self.proxy = Proxy(shard)
            shard.receive(udp_packet(b"first", self.address, destination=self.sources[0][0]))
            shard.run_until(lambda: self.proxy.source)

    def answer(self, payload, source=0):
        if self.proxy is None:
            self._sockets[source].sendto(payload, self._to)
        else:
            self.proxy.answer(socks_header(*self.sources[source]) + payload)

    def expect(self, answers):
        """Run until all (payload, source) have come out of the device, in this order and with the right headers."""
        self.shard.run_until(lambda: len(all_datagrams(self.shard.sent)) >= len(answers))
        while self.shard.poll(0.02):
            pass
        came = all_datagrams(self.shard.sent)
        self.shard.sent.clear()
        assert came == [(*self.sources[source], self.address, 1000, payload) for payload, source in answers]

    def close(self):
        if self.proxy is not None:
            self.proxy.stop()
        else:
            for each in self._sockets:
                each.close()


def made(kind, version, **settings):
    shard = Shard(scheme="direct" if kind == "direct" else "socks5", **settings)
    shard.udp = Udp(shard)
    return shard, Client(shard, version, kind)


@pytest.fixture(params=["socks5", "direct"])
def kind(request):
    return request.param


@pytest.fixture(params=[4, 6])
def client(request, kind):
    shard, client = made(kind, request.param)
    yield client
    client.close()
    shard.close()


def test_a_single_answer(client):
    client.answer(b"answer")
    client.expect([(b"answer", 0)])
    assert client.shard.counted(counts.UDP_DATAGRAMS_DOWN) == 1


def test_full_cone(client):
    client.answer(b"from somebody else", source=1)
    client.expect([(b"from somebody else", 1)])


def test_an_empty_answer(client):
    client.answer(b"")
    client.answer(b"")
    client.expect([(b"", 0), (b"", 0)])


def test_many_equal_answers_become_super_frames(client):
    payloads = [b"%04d" % number * 300 for number in range(100)] + [b"the last"]
    for payload in payloads[:50]:
        client.answer(payload)
    client.shard.poll(0.1)
    for payload in payloads[50:]:
        client.answer(payload)
    client.shard.run_until(lambda: client.shard.counted(counts.UDP_DATAGRAMS_DOWN) == 101)
    assert len(client.shard.sent) < 12
    assert any(len(datagrams(frame)) > 30 for frame in client.shard.sent)
    client.expect([(payload, 0) for payload in payloads])


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["socks5", "direct"]),
    st.sampled_from([4, 6]),
    st.lists(st.tuples(st.sampled_from([0, 1, 2, 3, 700, 1400, 1472]), st.sampled_from([0, 0, 0, 1])), max_size=80),
)
def test_any_sequence_arrives_as_it_was(kind, version, answers):
    shard, client = made(kind, version)
    expected = []
    for number, (size, source) in enumerate(answers):
        payload = (b"%03d" % number * 500)[: min(size, 1452 if version == 6 else 1472)]
        expected.append((payload, source))
        client.answer(payload, source)
    client.expect(expected)
    client.close()
    shard.close()


def test_what_is_above_the_mtu_leaves_in_fragments(client):
    limit = 1472 if client.version == 4 else 1452
    sizes = (limit + 1, 4000, 65_497 if client.version == 4 else 65_485)
    for size in sizes:
        client.answer(bytes([size & 0xFF]) * size)
        client.expect([(bytes([size & 0xFF]) * size, 0)])
    # Between answers that fit, too: each on its own, in order.
    client.answer(b"a" * limit)
    for size in sizes:
        client.answer(b"." * size)
    client.answer(b"b" * limit)
    client.expect([(b"a" * limit, 0), *[(b"." * size, 0) for size in sizes], (b"b" * limit, 0)])


def test_a_fragment_without_a_frame_ends_its_datagram(client):
    port = client.shard.port
    kept, port.small.free[:] = port.small.free[:], []
    client.answer(bytes(9000))
    client.shard.run_until(lambda: client.shard.counted(counts.NO_FRAMES))
    port.small.free.extend(kept)
    client.shard.sent.clear()
    client.answer(b"answer")
    client.expect([(b"answer", 0)])


@pytest.mark.parametrize("version", [4, 6])
def test_a_jumbo_device(kind, version):
    shard, client = made(kind, version, mtu=65535)
    sizes = [65000, 1000, 1000, 30000, 30000, 30000, 1, 9000, 9000]
    for number, size in enumerate(sizes):
        client.answer(bytes([number]) * size)
        if number % 3 == 2:
            shard.poll(0.01)
    client.expect([(bytes([number]) * size, 0) for number, size in enumerate(sizes)])
    client.close()
    shard.close()


def test_without_frames_answers_are_lost_and_counted(client):
    port = client.shard.port
    port.small.free.clear()
    port.large.free.clear()
    for _ in range(3):
        client.answer(b"lost")
    client.shard.run_until(lambda: client.shard.counted(counts.NO_FRAMES) == 3)
    port.small.reset()
    port.large.reset()
    client.answer(b"answer")
    client.expect([(b"answer", 0)])


def test_frames_are_conserved_when_the_last_one_is_used(client):
    port = client.shard.port
    kept = [port.large.take() for _ in range(TX_LARGE - 1)]
    real = port.transmit
    in_flight = []

    def slow_writer(at, length, more=False):
        port.sent.append(port.tx[at : at + length])
        in_flight.append((port.small if at >= port.small.base else port.large).frame_of(at))

    client.shard.udp.answers._transmit = slow_writer
    for number in range(30):
        client.answer(b"%04d" % number * (10 + number // 10))
    client.shard.run_until(lambda: not client.shard.poll(0.02))
    assert len(in_flight) == len(set(in_flight))
    client.shard.udp.answers._transmit = real
    for frame in in_flight:
        (port.small if frame >= port.small.base else port.large).give(frame)
    for frame in kept:
        port.large.give(frame)
    assert (len(port.large.free), len(port.small.free)) == (TX_LARGE, TX_SMALL)


class TestHeaders:
    @pytest.fixture
    def client(self):
        shard, client = made("socks5", 4)
        yield client
        client.close()
        shard.close()

    @pytest.mark.parametrize(
        "data",
        [
            b"\0",
            b"\0\0\0",
            b"\0\0\0\x01\x08\x08\x08\x08\0",
            b"\0\0\x01\x01\x08\x08\x08\x08\0\x63x",
            b"\0\0\0\x07" + bytes(20),
        ],
        ids=["one octet", "three", "cut short", "fragment", "address type"],
    )
    def test_wrong_ones(self, client, data):
        # In front of, between and behind good ones, so that every way down meets it, with old octets in the frame.
        client.answer(b"good")
        client.expect([(b"good", 0)])
        for _ in range(3):
            client.answer(b"good")
            client.proxy.answer(data)
        client.expect([(b"good", 0)] * 3)
        assert client.shard.counted(counts.UDP_DROPPED_BAD_HEADER) == 3

    @pytest.mark.parametrize(
        "header", [b"\0\0\0\x03\x07example\0\x63", socks_header(TARGET6, 99)], ids=["name", "other IP version"]
    )
    def test_sources_that_are_no_address_of_the_client_s_kind(self, client, header):
        client.proxy.answer(header + b"x")
        client.proxy.answer(header + b"y")
        client.answer(b"good")
        client.expect([(b"good", 0)])
        assert client.shard.counted(counts.UDP_DROPPED_UNMAPPABLE) == 2

    def test_a_mapped_address_is_the_address(self, client):
        header = socks_header(bytes(10) + b"\xff\xff" + TARGET4, 99)
        for payload in (b"one", b"two", b"three"):
            client.proxy.answer(header + payload)
        client.expect([(b"one", 0), (b"two", 0), (b"three", 0)])

    def test_rsv_is_not_judged(self, client):
        client.proxy.answer(b"\0\x05" + socks_header(TARGET4, 99)[2:] + b"x")
        client.expect([(b"x", 0)])

    @given(st.lists(st.binary(max_size=40), max_size=30))
    @settings(max_examples=30, deadline=None)
    def test_random_octets_are_accepted_or_counted(self, garbage):
        shard, client = made("socks5", 4)
        for data in garbage:
            client.proxy.answer(data)
        client.answer(b"good")
        shard.run_until(lambda: any(each[4] == b"good" for frame in shard.sent for each in datagrams(frame)))
        shard.sent.clear()
        client.close()
        shard.close()
