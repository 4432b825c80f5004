"""The bad link of the namespace tests cuts super-segments at the segments that it loses, and nowhere else."""

import struct

import dpkt
import pytest

from tests.netns.link_process import GSO_TCPV4, GSO_TCPV6, VNET, VNET_SIZE, Direction, ones_sum, segments_of
from workers.wire.checksum import verify

MSS = 1000
OPTIONS = b"\x01\x01\x08\x0a" + struct.pack(">II", 1, 2)
FLAGS = dpkt.tcp.TH_ACK | dpkt.tcp.TH_PUSH | dpkt.tcp.TH_FIN | dpkt.tcp.TH_CWR
SEQ = 2**32 - 3000


def super_frame(version: int, length: int) -> bytes:
    """A super-segment as a kernel hands it over: the checksum field holds the sum of the pseudo-header."""
    payload = bytes(i * 7 & 255 for i in range(length))
    tcp = dpkt.tcp.TCP(sport=1, dport=2, seq=SEQ, ack=5, flags=FLAGS, win=9, off=8, opts=OPTIONS, data=payload)
    size = len(bytes(tcp))
    if version == 4:
        ip = dpkt.ip.IP(src=b"\x0a\0\0\1", dst=b"\x0a\0\0\2", p=6, id=65535, len=20 + size, data=tcp)
        headers = bytes(ip)[:20]
    else:
        ip = dpkt.ip6.IP6(src=bytes(15) + b"\1", dst=bytes(15) + b"\2", nxt=6, hlim=64, plen=size, data=tcp)
        headers = bytes(ip)[:40]
    tcp.sum = ones_sum(ip.src + ip.dst + struct.pack(">HH", 6, size))
    start = len(headers)
    kind = GSO_TCPV4 if version == 4 else GSO_TCPV6
    return VNET.pack(1, kind, start + 32, MSS, start, 16) + headers + bytes(tcp)


def completed(frame: bytes) -> dpkt.tcp.TCP:
    """Finish the checksum as a kernel would, have dpkt check all lengths and both checksums, return the segment."""
    _, _, _, _, start, offset = VNET.unpack_from(frame)
    packet = bytearray(frame[VNET_SIZE:])
    packet[start + offset : start + offset + 2] = struct.pack(
        ">H", 0xFFFF ^ ones_sum(packet[start:] + bytes(len(packet[start:]) % 2))
    )
    if packet[0] >> 4 == 4:
        ip = dpkt.ip.IP(bytes(packet))
        assert ip.len == len(packet)
        assert verify(memoryview(packet)[:20], 0)
    else:
        ip = dpkt.ip6.IP6(bytes(packet))
        assert ip.plen == len(packet) - 40
    segment = packet[start:]
    assert verify(memoryview(segment), ones_sum(ip.src + ip.dst + struct.pack(">HH", 6, len(segment))))
    return ip.data


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("length", [1001, 9500, 10_000, 60_000])
def test_what_a_cut_leaves(version: int, length: int) -> None:
    frame = super_frame(version, length)
    whole = completed(frame)
    segments = -(-length // MSS)
    assert segments_of(frame) == segments
    for seed in range(40):
        way = Direction(str(seed), loss=0.3)
        pieces = [piece for _, piece in way.cross(frame)]
        arrived = 0
        for piece in pieces:
            tcp = completed(piece)
            at = (tcp.seq - SEQ) % 2**32
            assert at % MSS == 0
            assert tcp.data == whole.data[at : at + len(tcp.data)]
            assert tcp.opts == OPTIONS
            assert bool(tcp.flags & dpkt.tcp.TH_FIN) == (at + len(tcp.data) == length)
            assert bool(tcp.flags & dpkt.tcp.TH_CWR) == (at == 0)
            assert bool(piece[1]) == (len(tcp.data) > MSS), "a super-segment has more than one segment"
            arrived += segments_of(piece)
        assert arrived == segments - way.lost


def test_loss_meets_segments_not_frames() -> None:
    """The same share is lost whether segments come alone or sixty at a time."""
    for frame, count in ((super_frame(4, 60_000), 1000), (super_frame(4, MSS), 60_000)):
        way = Direction("seed", loss=0.05)
        for _ in range(count):
            way.cross(frame)
        assert way.segments == 60_000
        assert 2_700 < way.lost < 3_300
    way = Direction("seed")
    assert way.cross(super_frame(6, 5000)) == [(0.0, super_frame(6, 5000))]
