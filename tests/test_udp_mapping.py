"""Mapping and filtering (RFC 4787): what shares a public port, who may answer, and the way back between two clients."""

import socket

import pytest

from tests.shard import CLIENT4, Shard, all_datagrams, udp_packet
from tests.socksproxy import Proxy, socks_header
from workers import counts
from workers.settings import ADDRESS, ADDRESS_PORT, ENDPOINT_INDEPENDENT
from workers.udp import Udp
from workers.udp.association import MAX_PERMITTED

LOOPBACK = b"\x7f\0\0\1"
TARGET = b"\x08\x08\x08\x08"


class Peers:
    """Sockets on loopback, 127.0.0.1 and 127.0.0.2, that a client of direct:// talks to."""

    def __init__(self, shard):
        self.shard = shard
        self.sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(3)]
        for each, host in zip(self.sockets, ("127.0.0.1", "127.0.0.1", "127.0.0.2"), strict=True):
            each.bind((host, 0))
            each.settimeout(2)

    def hear(self, which, payload=b"x", sport=1000):
        """Have the client send to one of them; return where it came from."""
        host, port = self.sockets[which].getsockname()
        self.shard.receive(udp_packet(payload, sport=sport, destination=socket.inet_aton(host), dport=port))
        data, sender = self.sockets[which].recvfrom(100)
        assert data == payload
        return sender

    def answer(self, which, to, payload):
        self.sockets[which].sendto(payload, to)

    def close(self):
        for each in self.sockets:
            each.close()


@pytest.fixture
def direct(request):
    shard = Shard(scheme="direct", **request.param)
    shard.udp = Udp(shard)
    peers = Peers(shard)
    yield peers
    peers.close()
    shard.close()


def came(shard):
    """Return the payloads that have come to the client, in order."""
    while shard.poll(0.02):
        pass
    payloads = [each[4] for each in all_datagrams(shard.sent)]
    shard.sent.clear()
    return payloads


@pytest.mark.parametrize("direct", [{}], indirect=True)
def test_one_client_socket_has_one_port_whatever_it_talks_to(direct):
    assert len({direct.hear(which) for which in (0, 1, 2, 0)}) == 1
    assert len({port for _, port in (direct.hear(0), direct.hear(0, sport=1001))}) == 2


@pytest.mark.parametrize("direct", [{"udp_mapping": ADDRESS_PORT, "udp_filtering": ADDRESS_PORT}], indirect=True)
def test_address_port_mapping(direct):
    ports = [direct.hear(which) for which in (0, 1, 2)]
    assert len(set(ports)) == 3
    assert [direct.hear(which) for which in (0, 1, 2)] == ports
    for which in (0, 1, 2):
        direct.answer(which, ports[which], b"%d" % which)
    assert sorted(came(direct.shard)) == [b"0", b"1", b"2"]
    direct.answer(1, ports[0], b"stranger")  # the kernel refuses it: the socket has one peer
    assert came(direct.shard) == []
    for number in range(100):
        direct.answer(0, ports[0], b"%d" % number)
    assert came(direct.shard) == [b"%d" % number for number in range(100)]


@pytest.mark.parametrize(
    ("direct", "may"),
    [
        ({"udp_filtering": ENDPOINT_INDEPENDENT}, {0, 1, 2}),
        ({"udp_filtering": ADDRESS}, {0, 1}),
        ({"udp_filtering": ADDRESS_PORT}, {0}),
    ],
    indirect=["direct"],
)
@pytest.mark.parametrize("many", [False, True])
def test_filtering(direct, may, many):
    mapped = direct.hear(0)
    direct.shard.udp._associations[CLIENT4 + b"\x03\xe8"].busy = many
    for which in (0, 1, 2, 0):
        direct.answer(which, mapped, b"%d" % which)
    assert came(direct.shard) == [b"%d" % which for which in (0, 1, 2, 0) if which in may]
    assert direct.shard.counted(counts.UDP_DROPPED_FILTERED) == 3 - len(may)
    direct.hear(2)
    direct.answer(2, mapped, b"now")
    assert came(direct.shard) == [b"now"]


@pytest.mark.parametrize("filtering", [ENDPOINT_INDEPENDENT, ADDRESS, ADDRESS_PORT])
@pytest.mark.parametrize("many", [False, True])
def test_filtering_behind_a_proxy(filtering, many):
    shard = Shard(scheme="socks5", udp_filtering=filtering)
    shard.udp = Udp(shard)
    shard.proxy = Proxy(shard)
    shard.receive(udp_packet(b"x", destination=TARGET, dport=99))
    shard.run_until(lambda: shard.proxy.datagrams)
    shard.udp._associations[CLIENT4 + b"\x03\xe8"].busy = many
    sources = [(TARGET, 99), (TARGET, 98), (b"\x09\x09\x09\x09", 99)]
    for source in sources:
        shard.proxy.answer(socks_header(*source) + b"%d" % source[1])
    expected = {ENDPOINT_INDEPENDENT: 3, ADDRESS: 2, ADDRESS_PORT: 1}[filtering]
    assert len(came(shard)) == expected
    assert shard.counted(counts.UDP_DROPPED_FILTERED) == 3 - expected
    shard.proxy.stop()
    shard.close()


@pytest.mark.parametrize("direct", [{"udp_filtering": ADDRESS_PORT}], indirect=True)
def test_what_filtering_remembers_is_bounded(direct):
    for number in range(MAX_PERMITTED + 50):
        direct.shard.receive(udp_packet(b"x", destination=b"\x7f\0" + number.to_bytes(2), dport=9))
    [association] = direct.shard.udp._associations.values()
    assert len(association.permitted) == MAX_PERMITTED


def test_address_port_mapping_behind_a_proxy_has_an_association_for_each_destination():
    shard = Shard(scheme="socks5", udp_mapping=ADDRESS_PORT, udp_filtering=ADDRESS_PORT)
    shard.udp = Udp(shard)
    shard.proxy = Proxy(shard)
    shard.proxy.echo = True
    for port in (98, 99, 98):
        shard.receive(udp_packet(b"%d" % port, destination=TARGET, dport=port))
    shard.run_until(lambda: len(shard.sent) == 3)
    assert len(shard.proxy.clients) == 2
    shard.proxy.stop()
    shard.close()


@pytest.mark.parametrize("direct", [{}], indirect=True)
def test_hairpin(direct):
    """RFC 4787, REQ-9: a client reaches another one by its public address, and is seen by its own public one."""
    shard = direct.shard
    ports = {sport: direct.hear(0, sport=sport)[1] for sport in (1000, 2000)}
    shard.receive(udp_packet(b"hello", sport=1000, destination=LOOPBACK, dport=ports[2000]))
    shard.run_until(lambda: shard.sent)
    [(source, sport, destination, dport, payload)] = all_datagrams(shard.sent)
    assert (source, sport, destination, dport, payload) == (LOOPBACK, ports[1000], CLIENT4, 2000, b"hello")
    shard.sent.clear()
    shard.receive(udp_packet(b"and back", sport=2000, destination=source, dport=sport))
    shard.run_until(lambda: shard.sent)
    assert all_datagrams(shard.sent) == [(LOOPBACK, ports[2000], CLIENT4, 1000, b"and back")]


@pytest.mark.parametrize("direct", [{"block_quic": True}], indirect=True)
def test_block_quic(direct):
    shard = direct.shard
    shard.receive(udp_packet(b"initial", dport=443))
    [frame] = shard.sent
    assert frame[10 + 20 : 10 + 22] == b"\3\3"  # port unreachable
    assert shard.counted(counts.UDP_DROPPED_QUIC) == 1
    assert not shard.udp._associations
    shard.sent.clear()
    direct.hear(0)
