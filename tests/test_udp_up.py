"""Datagrams from the device to the upstream: what leaves, how many at a time, and what is refused."""

import errno
import socket
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.shard import CLIENT4, CLIENT6, FROM_KERNEL, OWN4, Shard, udp_packet, unreachable
from tests.socksproxy import Proxy, socks_header
from workers import counts
from workers.udp import Udp
from workers.udp.association import Association

TARGET4 = b"\x08\x08\x08\x08"
TARGET6 = socket.inet_pton(socket.AF_INET6, "2001:4860:4860::8888")
HEADER4 = socks_header(TARGET4, 99)
HEADER6 = socks_header(TARGET6, 99)


@pytest.fixture
def shard():
    made = Shard(scheme="socks5")
    made.udp = Udp(made)
    made.proxy = Proxy(made)
    yield made
    made.proxy.stop()
    made.close()


@pytest.fixture
def ready(shard):
    """A shard with two associations that stand: of an IPv4 and of an IPv6 client."""
    shard.receive(udp_packet(b"first"), udp_packet(b"first", CLIENT6, destination=TARGET6))
    shard.run_until(lambda: len(shard.proxy.datagrams) == 2)
    shard.proxy.datagrams.clear()
    return shard


def calls(shard, monkeypatch):
    """Record what each association's socket is told to send."""
    log = []
    for association in shard.udp._associations.values():
        for name in ("send", "sendmsg"):
            real = getattr(association, name)

            def record(*args, name=name, real=real):
                log.append((name, len(args[0]), *args[1:2]))
                return real(*args)

            setattr(association, name, record)
    return log


def test_a_datagram_waits_for_the_association_and_arrives(shard):
    shard.receive(udp_packet(b"one"), udp_packet(b"two", dport=100))
    shard.run_until(lambda: len(shard.proxy.datagrams) == 2)
    assert shard.proxy.datagrams == [(HEADER4, b"one"), (socks_header(TARGET4, 100), b"two")]
    # Zeros in the request, of the control connection's family; and one association for one client socket.
    assert shard.proxy.requests == [b"\x05\x03\x00\x01" + bytes(6)]
    assert shard.counted(counts.UDP_ASSOCIATIONS) == 1


def test_an_ipv6_control_connection_asks_with_ipv6_zeros():
    shard = Shard(scheme="socks5")
    shard.udp = Udp(shard)
    proxy = Proxy(shard, socket.AF_INET6)
    shard.receive(udp_packet(b"one"))
    shard.run_until(lambda: proxy.datagrams)
    assert proxy.requests == [b"\x05\x03\x00\x04" + bytes(18)]
    assert proxy.datagrams == [(HEADER4, b"one")]
    proxy.stop()
    shard.close()


@pytest.mark.parametrize(
    ("source", "target", "header"), [(CLIENT4, TARGET4, HEADER4), (CLIENT6, TARGET6, HEADER6)], ids=["v4", "v6"]
)
class TestBatches:
    def send(self, shard, source, target, payloads, monkeypatch):
        log = calls(shard, monkeypatch)
        shard.receive(*[udp_packet(payload, source, destination=target) for payload in payloads], vnet=FROM_KERNEL)
        shard.run_until(lambda: len(shard.proxy.datagrams) == len(payloads))
        return log

    def test_a_single_one_leaves_by_send(self, ready, source, target, header, monkeypatch):
        log = self.send(ready, source, target, [b"payload"], monkeypatch)
        assert log == [("send", 7 + len(header))]
        assert ready.proxy.datagrams == [(header, b"payload")]

    def test_equal_ones_leave_together_and_a_shorter_may_be_last(self, ready, source, target, header, monkeypatch):
        payloads = [b"%03d" % number * 400 for number in range(40)] + [b"short"]
        log = self.send(ready, source, target, payloads, monkeypatch)
        assert log == [("sendmsg", 41, [(17, 103, struct.pack("=H", 1200 + len(header)))])]
        assert ready.proxy.datagrams == [(header, payload) for payload in payloads]

    def test_a_longer_one_begins_anew(self, ready, source, target, header, monkeypatch):
        payloads = [b"aa", b"bb", b"longer", b"longes", b"x", b"y", b"z"]
        log = self.send(ready, source, target, payloads, monkeypatch)
        assert [call[:2] for call in log] == [("sendmsg", 2), ("sendmsg", 3), ("sendmsg", 2)]
        assert ready.proxy.datagrams == [(header, payload) for payload in payloads]

    def test_at_most_64_segments_and_65487_octets(self, ready, source, target, header, monkeypatch):
        payloads = [b"%02d" % number * 700 for number in range(64)]
        log = self.send(ready, source, target, payloads, monkeypatch)
        assert [call[1] for call in log] == [65487 // (1400 + len(header)), 64 - 65487 // (1400 + len(header))]
        assert ready.proxy.datagrams == [(header, payload) for payload in payloads]

    def test_super_frames_are_cut_by_the_kernel(self, ready, source, target, header, monkeypatch):
        payload = bytes(range(256)) * 40 + b"tail"
        log = calls(ready, monkeypatch)
        vnet = struct.pack("<BBHHHH", 1, 5, 28, 512, 20, 6)
        ready.receive(udp_packet(payload, source, destination=target), vnet=vnet)
        ready.run_until(lambda: len(ready.proxy.datagrams) == 21)
        assert [call[:2] for call in log] == [("sendmsg", 42)]
        assert {head for head, _ in ready.proxy.datagrams} == {header}
        assert b"".join(cut for _, cut in ready.proxy.datagrams) == payload
        assert ready.counted(counts.UDP_DATAGRAMS_UP) == 23

    def test_a_super_frame_waits_for_the_association(self, shard, source, target, header, monkeypatch):
        vnet = struct.pack("<BBHHHH", 1, 5, 28, 4, 20, 6)
        shard.receive(udp_packet(b"abcdefghij", source, destination=target), vnet=vnet)
        shard.run_until(lambda: len(shard.proxy.datagrams) == 3)
        assert [cut for _, cut in shard.proxy.datagrams] == [b"abcd", b"efgh", b"ij"]

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO, errno.EMSGSIZE])
    def test_a_path_without_segmentation(self, ready, source, target, header, number, monkeypatch):
        for association in ready.udp._associations.values():

            def refuse(*args):
                raise OSError(number, "no")

            association.sendmsg = refuse
        payloads = [b"11", b"22", b"33"]
        self.send(ready, source, target, payloads, monkeypatch)
        assert ready.proxy.datagrams == [(header, payload) for payload in payloads]
        assert ready.counted(counts.UDP_GSO_REFUSED) == 1
        ready.proxy.datagrams.clear()
        log = self.send(ready, source, target, payloads, monkeypatch)
        assert log == [("send", 2 + len(header))] * 3
        assert ready.counted(counts.UDP_GSO_REFUSED) == 1
        vnet = struct.pack("<BBHHHH", 1, 5, 28, 2, 20, 6)
        ready.proxy.datagrams.clear()
        ready.receive(udp_packet(b"445566", source, destination=target), vnet=vnet)
        ready.run_until(lambda: len(ready.proxy.datagrams) == 3)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([1000, 1001]), st.sampled_from([99, 100]), st.binary(min_size=1, max_size=3)),
        max_size=60,
    )
)
def test_nothing_is_lost_changed_or_reordered_within_a_flow(frames):
    shard = Shard(scheme="socks5")
    shard.udp = Udp(shard)
    proxy = Proxy(shard)
    shard.receive(udp_packet(b"first", sport=1000), udp_packet(b"first", sport=1001))
    shard.run_until(lambda: len(proxy.datagrams) == 2)
    proxy.datagrams.clear()
    shard.receive(*[udp_packet(payload, sport=sport, dport=dport) for sport, dport, payload in frames])
    shard.run_until(lambda: len(proxy.datagrams) == len(frames))
    for port in (99, 100):
        came = [payload for header, payload in proxy.datagrams if header == socks_header(TARGET4, port)]
        sent = [(sport, payload) for sport, dport, payload in frames if dport == port]
        assert sorted(came) == sorted(payload for _, payload in sent)
        if len({sport for sport, _ in sent}) == 1:
            assert came == [payload for _, payload in sent]
    proxy.stop()
    shard.close()


def test_options_and_extension_headers_do_not_confuse(ready):
    packet = udp_packet(b"options")
    with_options = bytes([0x47]) + packet[1:20] + b"\x01" * 8 + packet[20:]
    ready.receive(with_options)
    packet = udp_packet(b"extension", CLIENT6, destination=TARGET6)
    extended = packet[:6] + b"\x3c" + packet[7:40] + b"\x11\0" + b"\x01\x04" + bytes(4) + packet[40:]
    ready.receive(extended, transport=48)
    ready.run_until(lambda: len(ready.proxy.datagrams) == 2)
    assert ready.proxy.datagrams == [(HEADER4, b"options"), (HEADER6, b"extension")]
    assert ready.counted(counts.UDP_ASSOCIATIONS) == 2


class TestMalformed:
    def damaged(self, at, value, **kind):
        packet = bytearray(udp_packet(b"payload", **kind))
        packet[at : at + len(value)] = value
        return bytes(packet)

    @pytest.mark.parametrize("length", [0, 7, 16, 65535])
    def test_lengths(self, ready, length):
        ready.receive(self.damaged(24, length.to_bytes(2)), vnet=FROM_KERNEL)
        assert ready.counted(counts.MALFORMED) == 1

    def test_too_short_for_a_header(self, ready):
        ready.receive(udp_packet(b"")[:-4], vnet=FROM_KERNEL)
        ready.receive(udp_packet(b"")[:22] + b"\0\0\0\6\0\0", vnet=FROM_KERNEL)
        assert ready.counted(counts.MALFORMED) == 2

    def test_padding_is_cut_off(self, ready):
        ready.receive(udp_packet(b"payload") + b"padding")
        ready.run_until(lambda: ready.proxy.datagrams)
        assert ready.proxy.datagrams == [(HEADER4, b"payload")]

    def test_checksums_of_frames_from_a_wire_are_verified(self, ready):
        ready.receive(self.damaged(30, b"!"))
        ready.receive(self.damaged(50, b"!", source=CLIENT6, destination=TARGET6))
        assert ready.counted(counts.BAD_CHECKSUM) == 2
        ready.receive(self.damaged(30, b"!"), vnet=FROM_KERNEL)
        ready.run_until(lambda: ready.proxy.datagrams)

    def test_no_checksum_is_right_for_ipv4_only(self, ready):
        ready.receive(self.damaged(26, b"\0\0"))
        ready.run_until(lambda: ready.proxy.datagrams)
        ready.receive(self.damaged(46, b"\0\0", source=CLIENT6, destination=TARGET6))
        assert ready.counted(counts.BAD_CHECKSUM) == 1

    @pytest.mark.parametrize("gso", [(3, 100), (1, 100), (5, 0)])
    def test_super_frames_of_another_kind(self, ready, gso):
        ready.receive(udp_packet(b"payload"), vnet=struct.pack("<BBHHHH", 1, gso[0], 28, gso[1], 20, 6))
        assert ready.counted(counts.MALFORMED) == 1

    @given(st.binary(min_size=28, max_size=80), st.sampled_from([0x45, 0x60]), st.binary(min_size=10, max_size=10))
    @settings(max_examples=60, deadline=None)
    def test_random_octets_are_accepted_or_counted(self, garbage, first, vnet):
        shard = Shard(public_only=True)
        shard.udp = Udp(shard)
        packet = bytes([first]) + garbage
        if len(packet) >= 48 or first == 0x45:
            shard.receive(packet, vnet=vnet)
        shard.close()


class TestRefused:
    def test_empty_datagrams_are_not_sent_through_socks(self, ready):
        ready.receive(udp_packet(b""))
        assert ready.counted(counts.UDP_DROPPED_EMPTY) == 1

    def test_multicast_and_broadcast(self, shard):
        shard.receive(
            udp_packet(b"x", destination=bytes([224, 0, 0, 251])),
            udp_packet(b"x", destination=b"\xff" * 4),
            udp_packet(b"x", CLIENT6, destination=b"\xff\x02" + bytes(14)),
        )
        assert shard.counted(counts.UDP_DROPPED_MULTICAST) == 3
        assert not shard.sent and shard.counted(counts.UDP_ASSOCIATIONS) == 0

    def test_our_own_address_has_no_ports(self, shard):
        shard.receive(udp_packet(b"x", destination=OWN4))
        assert unreachable(shard.sent[0])[:2] == (3, 3)

    def test_public_only(self):
        shard = Shard(scheme="direct", public_only=True)
        shard.udp = Udp(shard)
        private = udp_packet(b"x" * 100, destination=bytes([10, 1, 2, 3]))
        shard.receive(private, udp_packet(b"x", CLIENT6, destination=bytes(15) + b"\1"))
        assert shard.counted(counts.NOT_PUBLIC) == 2
        assert [unreachable(frame)[:2] for frame in shard.sent] == [(3, 13), (1, 1)]
        quoted = unreachable(shard.sent[0])[2]
        assert (quoted[12:20], quoted[20:24]) == (private[12:20], private[20:24])
        assert shard.counted(counts.UDP_ASSOCIATIONS) == 0
        shard.close()

    def test_what_the_socket_does_not_take_is_counted(self, ready):
        def refuse(*args):
            raise BlockingIOError(errno.EAGAIN, "full")

        for association in ready.udp._associations.values():
            association.send = association.sendmsg = refuse
        ready.receive(udp_packet(b"one"))
        ready.receive(udp_packet(b"one"), udp_packet(b"two"))
        assert ready.counted(counts.UDP_DROPPED_SOCKET) == 3

    def test_an_error_of_our_own_leaves_nothing_behind(self, ready, monkeypatch):
        def broken(*args):
            raise RuntimeError

        monkeypatch.setattr(Association, "active_at", property(None, broken), raising=False)
        with pytest.raises(RuntimeError):
            ready.receive(udp_packet(b"one"), udp_packet(b"two", dport=100))
        monkeypatch.undo()
        ready.receive(udp_packet(b"three"), udp_packet(b"four", dport=100))
        ready.run_until(lambda: len(ready.proxy.datagrams) == 2)
        assert [payload for _, payload in ready.proxy.datagrams] == [b"three", b"four"]


class TestDirect:
    @pytest.fixture
    def shard(self):
        shard = Shard(scheme="direct")
        shard.udp = Udp(shard)
        yield shard
        shard.close()

    @pytest.fixture(params=[socket.AF_INET, socket.AF_INET6])
    def target(self, request):
        with socket.socket(request.param, socket.SOCK_DGRAM) as target:
            target.bind(("127.0.0.1" if request.param == socket.AF_INET else "::1", 0))
            target.settimeout(2)
            yield target

    def packet(self, target, payload):
        host, port = target.getsockname()[:2]
        packed = socket.inet_pton(target.family, host)
        return udp_packet(payload, CLIENT4 if len(packed) == 4 else CLIENT6, destination=packed, dport=port)

    def test_datagrams_of_all_sizes_arrive(self, shard, target):
        payloads = [b"", b"1", b"22", b"33", b"44", b"5", b"x" * 1400, b"y" * 1400, b""]
        shard.receive(*[self.packet(target, payload) for payload in payloads])
        assert [target.recv(2000) for _ in payloads] == payloads

    def test_super_frames(self, shard, target):
        vnet = struct.pack("<BBHHHH", 1, 5, 28, 1000, 20, 6)
        shard.receive(self.packet(target, bytes(2500)), vnet=vnet)
        assert [len(target.recv(2000)) for _ in range(3)] == [1000, 1000, 500]

    def test_no_way_is_said_by_icmp(self, shard, target):
        shard.receive(self.packet(target, b"first"))
        [association] = shard.udp._associations.values()

        def refuse(*args):
            raise OSError(errno.ENETUNREACH, "no way")

        association.sendto = refuse
        shard.receive(self.packet(target, b"second"))
        assert unreachable(shard.sent[0])[:2] == ((3, 0) if target.family == socket.AF_INET else (1, 0))
        assert shard.counted(counts.UDP_DROPPED_SOCKET) == 1
