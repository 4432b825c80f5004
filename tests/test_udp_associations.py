"""The life of associations: set-up, the traps of real servers, refusals, timeouts, limits."""

import socket
import time

import pytest

from tests.shard import CLIENT4, CLIENT6, Shard, datagrams, udp_packet, unreachable
from tests.socksproxy import Proxy, socks_header
from workers import counts
from workers.udp import Udp
from workers.udp.association import WAITING_DATAGRAMS, WAITING_OCTETS
from workers.udp.datagrams import FLOWS_PER_ASSOCIATION
from workers.udp.relayaddress import relay_address

TARGET4 = b"\x08\x08\x08\x08"
PUBLIC6 = socket.inet_pton(socket.AF_INET6, "2606:4700::1111")


def make(**settings):
    shard = Shard(**{"scheme": "socks5", **settings})
    shard.udp = Udp(shard)
    shard.proxy = Proxy(shard)
    return shard


def end(shard):
    shard.proxy.stop()
    shard.close()


@pytest.fixture
def shard():
    made = make()
    yield made
    end(made)


def associations(shard):
    return shard.counted(counts.UDP_ASSOCIATIONS)


def later(shard, seconds, monkeypatch):
    """Let time pass for the shard's timers and packets."""
    monkeypatch.setattr("tests.shard.monotonic", lambda: time.monotonic() + seconds)


class TestRelayAddress:
    PEER = bytes([192, 168, 1, 1])

    @pytest.mark.parametrize(
        ("setting", "host", "expected"),
        [
            ("auto", bytes([192, 168, 1, 1]), bytes([192, 168, 1, 1])),
            ("auto", bytes(4), PEER),  # asyncio-socks-server, gera2ld.socks
            ("auto", bytes(16), PEER),
            ("auto", "localhost", PEER),  # dante echoes names on failure
            ("auto", bytes([10, 9, 9, 9]), PEER),  # v2ray's "ip": another private network
            ("auto", bytes([192, 168, 1, 77]), bytes([192, 168, 1, 77])),  # a relay beside the proxy
            ("auto", bytes([127, 0, 0, 1]), PEER),
            ("auto", bytes([169, 254, 0, 1]), PEER),
            ("auto", bytes([1, 2, 3, 4]), bytes([1, 2, 3, 4])),
            ("auto", PUBLIC6, PEER),  # the other IP version
            ("auto", bytes(10) + b"\xff\xff" + PEER, PEER),  # gost ≥ 2.11.5
            ("peer", bytes([1, 2, 3, 4]), PEER),
            ("as-told", bytes([127, 0, 0, 1]), bytes([127, 0, 0, 1])),
            ("as-told", bytes(4), PEER),
            ("as-told", "name", PEER),
            ("203.0.113.7", bytes([1, 2, 3, 4]), bytes([203, 0, 113, 7])),
            ("2606:4700::1111", bytes(4), PUBLIC6),
        ],
    )
    def test_with_a_private_proxy(self, setting, host, expected):
        assert relay_address(setting, (host, 4000), self.PEER) == (expected, 4000)

    @pytest.mark.parametrize(
        ("peer", "host", "right"),
        [
            ("127.0.0.1", "127.0.0.1", True),
            ("127.0.0.1", "10.9.9.9", False),  # v2ray with a wrong "ip"
            ("1.2.3.4", "10.0.0.1", False),  # behind NAT
            ("1.2.3.4", "5.6.7.8", True),
            ("::1", "::1", True),
            ("fe80::1", "fe80::2", True),
            ("::1", "fd00::2", False),
            ("127.0.0.1", "127.0.0.2", True),
            ("fe80::1", "fd00::2", False),
            ("2606:4700::1", "fd00::2", False),
            ("fd00::1", "fd00::2", True),
        ],
    )
    def test_scopes(self, peer, host, right):
        family = socket.AF_INET6 if ":" in peer else socket.AF_INET
        packed_peer, packed_host = socket.inet_pton(family, peer), socket.inet_pton(family, host)
        assert relay_address("auto", (packed_host, 1), packed_peer)[0] == (packed_host if right else packed_peer)


class TestSettingUp:
    @pytest.mark.parametrize(
        "bound", [b"\x01" + bytes(4), b"\x01\x0a\x09\x09\x09", b"\x03\x07example", b"\x04" + bytes(16)]
    )
    def test_a_wrong_relay_address_is_replaced_by_the_peer_s(self, shard, bound):
        shard.proxy.bound = bound
        shard.receive(udp_packet(b"x"))
        shard.run_until(lambda: shard.proxy.datagrams)

    @pytest.mark.parametrize("unreachable", [b"\x01\xff\xff\xff\xff", b"\x01\x01\x02\x03\x04"])
    def test_no_way_to_the_relay_s_address(self, shard, unreachable, monkeypatch):
        real = socket.socket.connect

        def connect(self, address):
            if address[0] != "127.0.0.1":
                raise OSError(101, "no way")
            return real(self, address)

        monkeypatch.setattr("socket.socket.connect", connect)
        shard.proxy.bound = unreachable
        shard.receive(udp_packet(b"x"))
        shard.run_until(lambda: shard.proxy.datagrams)
        assert not shard.events

    def test_few_datagrams_wait(self, shard):
        for number in range(WAITING_DATAGRAMS + 3):
            shard.receive(udp_packet(b"%d" % number))
        shard.run_until(lambda: len(shard.proxy.datagrams) == WAITING_DATAGRAMS)
        assert shard.counted(counts.UDP_DROPPED_WAITING) == 3

    def test_few_octets_wait(self, shard):
        fit = WAITING_OCTETS // 30000
        shard.receive(*[udp_packet(bytes(30000)) for _ in range(fit + 1)])
        shard.run_until(lambda: len(shard.proxy.datagrams) == fit)
        assert shard.counted(counts.UDP_DROPPED_WAITING) == 1

    def test_each_client_socket_has_its_own(self, shard):
        shard.receive(udp_packet(b"a"), udp_packet(b"b", sport=1001), udp_packet(b"c", bytes([198, 18, 0, 9])))
        shard.run_until(lambda: len(shard.proxy.datagrams) == 3)
        assert associations(shard) == len(shard.proxy.clients) == 3


class TestRefusals:
    @pytest.mark.parametrize(("reply", "code"), [(7, 3), (None, 3), (1, 3), (8, 3), (2, 13), (3, 0), (4, 1)], ids=str)
    def test_what_waits_is_answered_by_icmp(self, shard, reply, code):
        shard.proxy.reply = reply
        shard.receive(udp_packet(b"one"), udp_packet(b"two", dport=100))
        shard.run_until(lambda: len(shard.sent) == 2)
        quoted = udp_packet(b"one")
        for frame, dport in zip(shard.sent, (99, 100), strict=True):
            kind, number, packet = unreachable(frame)
            assert (kind, number) == (3, code)
            assert packet[12:22] == quoted[12:22] and packet[22:24] == dport.to_bytes(2)
        assert shard.counted(counts.UDP_DROPPED_REFUSED) == 2
        assert associations(shard) == 0

    def test_ipv6_clients_get_icmpv6(self, shard):
        shard.proxy.reply = 7
        shard.receive(udp_packet(b"one", CLIENT6, destination=PUBLIC6))
        shard.run_until(lambda: shard.sent)
        assert unreachable(shard.sent[0])[:2] == (1, 4)

    def test_no_udp_is_remembered_and_asked_again(self, shard, monkeypatch):
        shard.proxy.reply = 7
        shard.receive(udp_packet(b"one"))
        shard.run_until(lambda: shard.sent)
        for sport in range(2000, 2010):
            shard.receive(udp_packet(b"more", sport=sport))
        assert len(shard.sent) == 11
        assert len(shard.proxy.requests) == 1
        shard.proxy.reply = 0
        later(shard, 61, monkeypatch)
        shard.receive(udp_packet(b"again"), udp_packet(b"meanwhile", sport=2000))
        assert len(shard.sent) == 12  # only one of them asks
        shard.run_until(lambda: shard.proxy.datagrams)
        shard.receive(udp_packet(b"again", sport=2001))
        shard.run_until(lambda: len(shard.proxy.datagrams) == 2)
        assert len(shard.proxy.requests) == 3

    def test_a_port_of_zero_is_no_association(self, shard):
        shard.proxy.relay_port = 0
        shard.receive(udp_packet(b"one"))
        shard.run_until(lambda: shard.sent)
        assert unreachable(shard.sent[0])[:2] == (3, 3)


class TestProxyAway:
    def test_nobody_listens(self, monkeypatch):
        shard = make()
        shard.proxy.stop()
        shard.receive(udp_packet(b"one"))
        shard.run_until(lambda: shard.sent)
        assert unreachable(shard.sent[0])[:2] == (3, 0)
        assert shard.counted(counts.PROXY_UNREACHABLE) == 1
        assert shard.counted(counts.UDP_DROPPED_PROXY_DOWN) == 1
        assert [event["event"] for event in shard.events] == ["proxy-down"]
        shard.receive(udp_packet(b"two", sport=1001))  # within the back-off nobody tries
        assert len(shard.sent) == 2 and shard.counted(counts.PROXY_UNREACHABLE) == 1
        shard.proxy = Proxy(shard)
        later(shard, 1.1, monkeypatch)
        shard.receive(udp_packet(b"three"))
        shard.run_until(lambda: shard.proxy.datagrams)
        assert [event["event"] for event in shard.events] == ["proxy-down", "proxy-up"]
        end(shard)

    def test_its_name_is_not_resolved(self):
        shard = Shard(scheme="socks5")
        shard.udp = Udp(shard)
        shard.receive(udp_packet(b"one"))
        assert shard.counted(counts.UDP_DROPPED_PROXY_DOWN) == 1
        shard.close()

    def test_it_never_replies(self, monkeypatch):
        shard = make()
        shard.proxy.silent = True
        shard.receive(udp_packet(b"one"))
        shard.run_until(lambda: shard.proxy.requests)
        later(shard, 2.1, monkeypatch)
        shard.run_until(lambda: shard.sent)
        assert unreachable(shard.sent[0])[:2] == (3, 0)
        assert associations(shard) == 0
        end(shard)

    @pytest.mark.parametrize(
        ("garbage", "counter"),
        [(b"HTTP/1.1 400", counts.PROXY_PROTOCOL_ERRORS), (b"\x05\xff", counts.PROXY_AUTH_FAILED)],
    )
    def test_it_answers_garbage(self, shard, garbage, counter):
        shard.proxy.garbage = garbage
        shard.receive(udp_packet(b"one"))
        shard.run_until(lambda: shard.sent)
        assert shard.counted(counter) == 1
        assert associations(shard) == 0

    def test_no_descriptors_are_left(self, shard, monkeypatch):
        def refuse(*args):
            raise OSError(24, "too many open files")

        monkeypatch.setattr(shard.upstream, "open", refuse)
        shard.receive(udp_packet(b"one"))
        assert shard.counted(counts.UDP_DROPPED_DESCRIPTORS) == 1
        assert associations(shard) == 0

    def test_no_descriptor_is_left_for_the_datagrams(self, shard, monkeypatch):
        real = shard.upstream.open

        def refuse(family, kind):
            if kind == socket.SOCK_DGRAM:
                raise OSError(24, "too many open files")
            return real(family, kind)

        monkeypatch.setattr(shard.upstream, "open", refuse)
        shard.receive(udp_packet(b"one"))
        shard.run_until(lambda: shard.counted(counts.UDP_DROPPED_DESCRIPTORS))
        assert associations(shard) == 0


class TestEnd:
    def test_the_control_connection_stays_open_both_ways_and_its_end_ends_all(self, shard):
        shard.receive(udp_packet(b"one"))
        shard.run_until(lambda: shard.proxy.datagrams)
        [control] = shard.proxy.clients
        control.send(b"noise")  # nothing is defined there
        shard.poll(0.05)
        assert associations(shard) == 1
        shard.proxy.close(control)
        shard.run_until(lambda: not associations(shard))
        shard.receive(udp_packet(b"two"))
        assert shard.proxy.datagrams[1:] == []

    def test_after_a_while_a_new_one_is_made(self, shard, monkeypatch):
        shard.receive(udp_packet(b"one"))
        shard.run_until(lambda: shard.proxy.datagrams)
        later(shard, 5, monkeypatch)
        shard.proxy.close(shard.proxy.clients[0])
        shard.run_until(lambda: not associations(shard))
        shard.receive(udp_packet(b"two"))
        shard.run_until(lambda: len(shard.proxy.datagrams) == 2)

    def test_idle(self, shard, monkeypatch):
        shard.receive(udp_packet(b"one"))
        shard.run_until(lambda: shard.proxy.datagrams)
        later(shard, 119, monkeypatch)
        shard.poll()
        assert associations(shard) == 1
        shard.proxy.answer(socks_header(TARGET4, 99) + b"answer")
        shard.run_until(lambda: shard.sent)
        later(shard, 230, monkeypatch)
        shard.poll()
        assert associations(shard) == 1
        later(shard, 240, monkeypatch)
        shard.run_until(lambda: not associations(shard))
        assert shard.counted(counts.UDP_IDLE_TIMEOUTS) == 1
        shard.run_until(lambda: not shard.proxy.clients)

    def test_idle_sooner_than_the_connect_timeout(self, monkeypatch):
        shard = make(udp_timeout=1.0, connect_timeout=10.0)
        shard.receive(udp_packet(b"one"))
        shard.run_until(lambda: shard.proxy.datagrams)
        later(shard, 1.1, monkeypatch)
        shard.run_until(lambda: not associations(shard))
        later(shard, 11, monkeypatch)
        shard.poll()
        assert shard.counted(counts.UDP_IDLE_TIMEOUTS) == 1
        end(shard)

    def test_idle_after_nothing_but_dns(self, shard, monkeypatch):
        shard.receive(
            udp_packet(b"one", dport=53), udp_packet(b"one", sport=1001), udp_packet(b"one", dport=53, sport=1001)
        )
        shard.run_until(lambda: len(shard.proxy.datagrams) == 3)
        later(shard, 11, monkeypatch)
        shard.run_until(lambda: associations(shard) == 1)
        assert shard.counted(counts.UDP_IDLE_TIMEOUTS) == 1

    def test_the_relay_says_port_unreachable(self, shard):
        shard.receive(udp_packet(b"one"))
        shard.run_until(lambda: shard.proxy.datagrams)
        shard.forget(shard.proxy.relay.fileno())
        shard.proxy.relay.close()
        for _ in range(4):
            shard.receive(udp_packet(b"two"), udp_packet(b"three"))
            shard.poll(0.01)
        assert shard.counted(counts.UDP_DROPPED_SOCKET) > 0
        assert associations(shard) == 1  # it ends with its control connection, not before
        shard.proxy.relay = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        shard.watch(shard.proxy.relay.fileno(), 0, None)


class TestLimits:
    def test_the_least_recently_used_goes_first(self, monkeypatch):
        shard = make(max_associations=3)
        for number in range(3):
            shard.receive(udp_packet(b"x", sport=2000 + number))
            shard.run_until(lambda number=number: len(shard.proxy.datagrams) == number + 1)
        later(shard, 1, monkeypatch)
        shard.receive(udp_packet(b"used again", sport=2000))
        later(shard, 2, monkeypatch)
        shard.receive(udp_packet(b"x", sport=3000))
        assert associations(shard) == 3
        left = {int.from_bytes(key[-2:]) for key in shard.udp._associations}
        assert left == {2000, 2002, 3000}
        assert shard.counted(counts.UDP_EVICTED) == 1
        end(shard)

    def test_a_flood_ends_what_is_idle_and_itself_not_what_is_used(self):
        shard = make(max_associations=20)
        for number in range(300):
            shard.receive(udp_packet(b"in use", sport=1999), udp_packet(b"x", sport=2000 + number))
            assert associations(shard) <= 20
        assert shard.counted(counts.UDP_EVICTED) == 301 - 20
        assert 1999 in {int.from_bytes(key[-2:]) for key in shard.udp._associations}
        shard.run_until(lambda: any(payload == b"in use" for _, payload in shard.proxy.datagrams))
        end(shard)

    def test_destinations_of_one_client_socket_are_bounded(self):
        shard = Shard(scheme="direct")
        shard.udp = Udp(shard)
        for number in range(3 * FLOWS_PER_ASSOCIATION):
            shard.receive(udp_packet(b"x", destination=b"\x7f\0" + number.to_bytes(2), dport=9))
        assert len(shard.udp._flows) <= FLOWS_PER_ASSOCIATION
        assert associations(shard) == 1
        shard.close()

    def test_all_flows_are_bounded(self):
        shard = Shard(scheme="direct", max_associations=4)
        shard.udp = Udp(shard)
        for number in range(300):
            shard.receive(udp_packet(b"x", destination=b"\x7f\0" + number.to_bytes(2), sport=1000 + number % 3))
        assert len(shard.udp._flows) <= 64
        assert sum(len(each.flow_keys) for each in shard.udp._associations.values()) == len(shard.udp._flows)
        shard.close()

    def test_a_flood_of_client_sockets_leaves_no_more_than_the_limit(self):
        shard = make(max_associations=8)
        for number in range(60):
            shard.receive(udp_packet(b"x", sport=10000 + number))
        assert associations(shard) == 8
        shard.run_until(lambda: not shard.poll(0.05))
        assert len(shard.proxy.clients) == 8
        end(shard)


def test_answers_reach_the_right_client(shard):
    shard.proxy.echo = True
    shard.receive(*[udp_packet(b"%d" % sport, CLIENT4, sport=sport) for sport in range(2000, 2020)])
    shard.run_until(lambda: len(shard.sent) == 20)
    assert sorted((each[3], each[4]) for frame in shard.sent for each in datagrams(frame)) == [
        (sport, b"%d" % sport) for sport in range(2000, 2020)
    ]


@pytest.mark.parametrize(("scheme", "question"), [("http", True), ("socks4", True), ("reject", False)])
def test_kinds_without_udp_say_so_at_once(scheme, question):
    """Nobody is asked for an association; a question to port 53 goes over TCP, unless everything is rejected."""
    shard = Shard(scheme=scheme, proxy_addresses=[("127.0.0.1", 9)])
    shard.udp = Udp(shard)
    shard.receive(udp_packet(b"quic", dport=443))
    [sent] = shard.sent
    assert unreachable(sent)[:2] == (3, 3)
    shard.sent.clear()
    shard.receive(udp_packet(b"\x12\x34\x01\0\0\1\0\0\0\0\0\0\1x\0\0\1\0\1", dport=53))
    assert shard.counted(counts.DNS_OVER_TCP_QUERIES) == question
    if not question:
        assert unreachable(shard.sent[0])[:2] == (3, 3)
    shard.close()
