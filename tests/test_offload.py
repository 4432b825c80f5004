"""SoftwareOffload against dpkt and a recomputation: what leaves is what the super-segment stood for."""

import os
import socket
import struct

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.device import SocketDevice
from gateway.offload import SoftwareOffload, tcp_segments, udp_segments
from workers.wire.checksum import ones_sum, pseudo_sum
from workers.wire.vnet import GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, HEADER, NEEDS_CSUM

V4 = (bytes([10, 0, 0, 1]), bytes([203, 0, 113, 9]))
V6 = (socket.inet_pton(socket.AF_INET6, "fd00::1"), socket.inet_pton(socket.AF_INET6, "2001:db8::9"))
FIN, PSH, ACK, CWR = 0x01, 0x08, 0x10, 0x80


def ip_header(version: int, protocol: int, transport: int, identification: int = 0) -> bytes:
    if version == 4:
        addresses = V4[0] + V4[1]
        return struct.pack("!BBHHHBBH", 0x45, 0, 20 + transport, identification, 0x4000, 64, protocol, 0) + addresses
    return struct.pack("!IHBB", 6 << 28, transport, protocol, 64) + V6[0] + V6[1]


def tcp_packet(
    version: int, payload: bytes, *, sequence: int = 1, flags: int = ACK, options: bytes = b"", ident: int = 0
):
    """Return (packet, start of the TCP header), its checksum field left as the kernel leaves it."""
    length = 20 + len(options) + len(payload)
    addresses = V4 if version == 4 else V6
    half = pseudo_sum(*addresses, 6, length)
    header = struct.pack("!HHIIBBHHH", 80, 5000, sequence, 7, (20 + len(options)) << 2, flags, 4096, half, 0)
    front = ip_header(version, 6, length, ident)
    return front + header + options + payload, len(front)


def udp_packet(version: int, payload: bytes):
    length = 8 + len(payload)
    half = pseudo_sum(*(V4 if version == 4 else V6), 17, length)
    front = ip_header(version, 17, length, 65530)
    return front + struct.pack("!HHHH", 53, 5000, length, half) + payload, len(front)


def parse(packet: bytes):
    """Parse with dpkt and check every checksum and length; return (ip, transport)."""
    if packet[0] >> 4 == 4:
        ip = dpkt.ip.IP(packet)
        assert ones_sum(packet[:20]) == 0
        assert ip.len == len(packet)
        protocol, source, destination = ip.p, ip.src, ip.dst
    else:
        ip = dpkt.ip6.IP6(packet)
        assert ip.plen == len(packet) - 40
        protocol, source, destination = ip.nxt, ip.src, ip.dst
    transport = packet[20 if packet[0] >> 4 == 4 else 40 :]
    assert (ones_sum(transport) + pseudo_sum(source, destination, protocol, len(transport))) % 65535 == 0
    return ip, ip.data


def whole(segment) -> bytes:
    headers, payload = segment
    return bytes(headers) + bytes(payload)


@given(
    version=st.sampled_from([4, 6]),
    payload=st.binary(min_size=1, max_size=9000),
    size=st.integers(1, 1460),
    sequence=st.integers(2**32 - 10000, 2**32 - 1),
    flags=st.sampled_from([ACK, ACK | PSH, ACK | FIN, ACK | FIN | PSH | CWR]),
    options=st.sampled_from([b"", bytes([1, 1, 8, 10]) + bytes(range(8))]),
)
def test_tcp_segments_reassemble_to_the_stream(version, payload, size, sequence, flags, options):
    size = max(size, len(payload) // 40)
    packet, start = tcp_packet(version, payload, sequence=sequence, flags=flags, options=options, ident=65535)
    segments = [parse(whole(segment)) for segment in tcp_segments(memoryview(packet), size, start)]
    assert b"".join(tcp.data for _, tcp in segments) == payload
    assert len(segments) == -(-len(payload) // size)
    expected = sequence
    for number, (ip, tcp) in enumerate(segments):
        assert (tcp.seq, tcp.ack, tcp.opts) == (expected, 7, options)
        expected = (expected + len(tcp.data)) % 2**32
        assert bool(tcp.flags & CWR) == (bool(flags & CWR) and number == 0)
        is_last = number == len(segments) - 1
        assert tcp.flags & (FIN | PSH) == (flags & (FIN | PSH) if is_last else 0)
        if version == 4:
            assert ip.id == (65535 + number) % 65536


@given(version=st.sampled_from([4, 6]), payload=st.binary(min_size=1, max_size=5000), size=st.integers(1, 1472))
def test_udp_segments_are_the_datagrams(version, payload, size):
    size = max(size, len(payload) // 40)
    packet, start = udp_packet(version, payload)
    datagrams = [parse(whole(segment))[1] for segment in udp_segments(memoryview(packet), size, start)]
    assert [bytes(d.data) for d in datagrams] == [payload[i : i + size] for i in range(0, len(payload), size)]
    assert all(d.ulen == 8 + len(d.data) and d.sum != 0 for d in datagrams)


def test_a_udp_checksum_of_zero_is_written_as_ones():
    packet, start = udp_packet(4, b"\0\0")
    # Choose the payload so that the sum of the words, without it, is made up to 0xFFFF.
    rest = ones_sum(packet[start : start + 6]) + pseudo_sum(*V4, 17, 10)
    packet, start = udp_packet(4, struct.pack("!H", (65535 - rest) % 65535))
    ((_, datagram),) = [parse(whole(segment)) for segment in udp_segments(memoryview(packet), 100, start)]
    assert datagram.sum == 0xFFFF


@pytest.fixture
def wire():
    """A SoftwareOffload in front of one end of a socket pair; the other end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    device = SoftwareOffload(SocketDevice(ours.detach(), "test", 1500), header=False)
    os.set_blocking(device.fileno(), False)
    theirs.settimeout(5)
    yield device, theirs
    theirs.close()
    device.close()


def frame(packet: bytes, flags: int = 0, kind: int = GSO_NONE, size: int = 0, start: int = 0, offset: int = 0) -> bytes:
    return HEADER.pack(flags, kind, 0, size, start, offset) + packet


@given(version=st.sampled_from([4, 6]), payload=st.binary(max_size=1400), cut=st.integers(10, 90))
def test_a_checksum_is_completed_however_the_frame_lies(version, payload, cut):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        device = SoftwareOffload(SocketDevice(ours.detach(), "test", 1500), header=False)
        for packet, start, offset in [(*tcp_packet(version, payload), 16), (*udp_packet(version, payload), 6)]:
            data = bytearray(frame(packet, NEEDS_CSUM, start=start, offset=offset))
            if version == 4:
                struct.pack_into("!H", data, 20, 65535 - ones_sum(packet[:20]))
            before = bytes(data)
            pieces = [memoryview(data)[:cut], memoryview(data)[cut:]]
            for way in (pieces, [memoryview(data)]):
                assert device.writev(way) == len(data)
                received = theirs.recv(70000)
                _, transport = parse(received)
                assert bytes(transport.data) == payload
            assert data == before, "the frame may be sent again, so it stays as it was"
        device.close()


@pytest.mark.parametrize(("version", "kind"), [(4, GSO_TCPV4), (4, GSO_TCPV4 | GSO_ECN), (6, GSO_TCPV6)])
def test_a_super_segment_leaves_as_packets(wire, version, kind):
    device, theirs = wire
    payload = os.urandom(4000)
    packet, start = tcp_packet(version, payload, flags=ACK | PSH | CWR)
    device.write(memoryview(frame(packet, NEEDS_CSUM, kind, 1400, start, 16)))
    packets = [theirs.recv(70000) for _ in range(3)]
    assert b"".join(parse(p)[1].data for p in packets) == payload
    assert [bool(parse(p)[1].flags & CWR) for p in packets] == [True, False, False]


def test_a_udp_super_frame_leaves_as_datagrams(wire):
    device, theirs = wire
    packet, start = udp_packet(6, b"a" * 64 + b"b" * 64 + b"c" * 10)
    device.write(memoryview(frame(packet, NEEDS_CSUM, GSO_UDP_L4, 64, start, 6)))
    assert [parse(theirs.recv(2000))[1].data for _ in range(3)] == [b"a" * 64, b"b" * 64, b"c" * 10]


def test_an_ordinary_packet_passes_without_its_header(wire):
    device, theirs = wire
    device.write(memoryview(frame(b"\x45packet")))
    assert theirs.recv(100) == b"\x45packet"


def test_reading_adds_a_header_of_zeros(wire):
    device, theirs = wire
    theirs.send(b"packet")
    buffer = memoryview(bytearray(b"\xff" * 100))
    assert device.readv([buffer]) == 16
    assert bytes(buffer[:17]) == bytes(10) + b"packet\xff"
    with pytest.raises(BlockingIOError):
        device.readv([buffer])
    theirs.close()
    with pytest.raises(OSError, match="closed"):
        device.readv([buffer])


def test_headers_that_contradict_each_other_are_an_error(wire):
    device, _ = wire
    packet, start = tcp_packet(4, b"payload")
    for size, bad_start in ((0, start), (100, start + 12)):
        with pytest.raises(ValueError, match="super-segment"):
            device.write(memoryview(frame(packet, NEEDS_CSUM, GSO_TCPV4, size, bad_start, 16)))


class Listening:
    """A TUN with vnet header that lacks some offloads, as an old kernel is."""

    name, mtu, made = "tun9", 1500, True

    def __init__(self, features: int) -> None:
        self.features = features
        self.written: list[bytes] = []

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        pass

    def readv(self, buffers):
        return 0

    def write(self, frame):
        return self.writev([frame])

    def writev(self, pieces):
        self.written.append(b"".join(pieces))
        return 0


def test_only_what_is_missing_is_done_in_software():
    below = Listening(0x0F)  # everything but USO
    device = SoftwareOffload(below, header=True)
    tcp, start = tcp_packet(4, b"x" * 3000)
    whole_frame = frame(tcp, NEEDS_CSUM, GSO_TCPV4, 1400, start, 16)
    device.write(memoryview(whole_frame))
    assert below.written == [whole_frame]
    below.written.clear()
    udp, start = udp_packet(4, b"y" * 128)
    device.write(memoryview(frame(udp, NEEDS_CSUM, GSO_UDP_L4, 64, start, 6)))
    assert [f[:10] for f in below.written] == [bytes(10)] * 2
    assert [parse(f[10:])[1].data for f in below.written] == [b"y" * 64] * 2


def test_what_does_not_fit_is_lost_but_never_sent_twice():
    class Full(Listening):
        def writev(self, pieces):
            if len(self.written) == 2:
                raise BlockingIOError
            return super().writev(pieces)

    packet, start = tcp_packet(4, b"x" * 5000)
    below = Full(0)
    device = SoftwareOffload(below, header=False)
    data = memoryview(frame(packet, NEEDS_CSUM, GSO_TCPV4, 1000, start, 16))
    assert device.write(data) == len(data)
    assert len(below.written) == 2
    with pytest.raises(BlockingIOError):
        device.write(data)
