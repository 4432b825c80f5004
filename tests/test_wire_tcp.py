"""TCP headers: what is written is read back by dpkt; what is parsed never raises."""

import struct

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.segment_script import options_bytes
from workers.tcp.segment import ACK, FIN, PSH, RST, SYN, Segment
from workers.wire.checksum import ones_sum
from workers.wire.tcp import HEADER, USUAL_TIMESTAMPS, Headers, reply_addresses

MSS = 1460
END = 256

u16 = st.integers(0, 65535)
u32 = st.integers(0, 2**32 - 1)
versions = st.sampled_from((4, 6))
addresses = st.tuples(versions, st.binary(min_size=36, max_size=36)).map(
    lambda pair: (pair[0], pair[1] if pair[0] == 6 else pair[1][:12])
)


def make_out(seq, ack, flags, wnd, ts):
    out = Segment()
    out.seq, out.ack, out.flags, out.wnd = seq, ack, flags, wnd
    if ts is not None:
        out.ts_present = True
        out.ts_val, out.ts_ecr = ts
    return out


outs = st.builds(
    make_out,
    u32, u32, st.sampled_from((ACK, ACK | PSH, ACK | FIN, RST, RST | ACK)), u16, st.none() | st.tuples(u32, u32),
)  # fmt: skip


def write(version, key, out, text, mss=MSS):
    """Write a packet as the relay does; returns (virtio_net_hdr, IP packet)."""
    memory = bytearray(END + len(text))
    memory[END:] = text
    out.len = len(text)
    written = Headers(version, key, mss, out.ts_present).write(memoryview(memory), END, out)
    frame = bytes(memory[END - written :])
    assert not any(memory[: END - written])
    return frame[:10], frame[10:]


def complete(vnet, packet):
    """Do what a device does with NEEDS_CSUM: sum everything from csum_start on, the field included."""
    flags, _, _, _, start, offset = struct.unpack("<BBHHHH", vnet)
    assert flags == 1
    value = 65535 - ones_sum(packet[start:])
    at = start + offset
    return packet[:at] + value.to_bytes(2, "big") + packet[at + 2 :]


def same_checksum(a, b):
    """0x0000 and 0xFFFF are the same number in ones' complement."""
    return a % 65535 == b % 65535


@given(addresses, outs, st.binary(max_size=100) | st.binary(min_size=1400, max_size=1500))
def test_dpkt_reads_what_was_written(pair, out, text):
    version, key = pair
    vnet, packet = write(version, key, out, text)
    packet = complete(vnet, packet)
    if version == 4:
        read = dpkt.ip.IP(packet)
        assert (read.src, read.dst, read.p, read.ttl, read.df, read.hl, read.len) == (
            key[:4], key[4:8], 6, 64, 1, 5, len(packet)
        )  # fmt: skip
        assert same_checksum(read.sum, dpkt.in_cksum(packet[:10] + bytes(2) + packet[12:20]))
        pseudo = struct.pack(">4s4sBBH", read.src, read.dst, 0, 6, len(packet) - 20)
        tcp = packet[20:]
    else:
        read = dpkt.ip6.IP6(packet)
        assert (read.src, read.dst, read.nxt, read.hlim, read.plen) == (key[:16], key[16:32], 6, 64, len(packet) - 40)
        pseudo = struct.pack(">16s16sII", read.src, read.dst, len(packet) - 40, 6)
        tcp = packet[40:]
    assert same_checksum(read.data.sum, dpkt.in_cksum(pseudo + tcp[:16] + bytes(2) + tcp[18:]))
    segment = read.data
    assert isinstance(segment, dpkt.tcp.TCP)
    assert (segment.sport, segment.dport) == struct.unpack(">HH", key[-4:])
    assert (segment.seq, segment.ack, segment.flags, segment.win) == (out.seq, out.ack, out.flags, out.wnd)
    assert segment.urp == 0
    assert segment.data == text
    expected = [(dpkt.tcp.TCP_OPT_NOP, b"")] * 2 + [
        (dpkt.tcp.TCP_OPT_TIMESTAMP, struct.pack(">II", out.ts_val, out.ts_ecr))
    ]
    assert dpkt.tcp.parse_opts(segment.opts) == (expected if out.ts_present else [])


@given(addresses, outs, st.sampled_from((0, 1, 1459, 1460, 1461, 65_000)))
def test_more_than_one_mss_is_a_super_segment(pair, out, length):
    version, key = pair
    vnet, packet = write(version, key, out, bytes(length))
    _, gso_type, header, gso_size, start, offset = struct.unpack("<BBHHHH", vnet)
    assert (start, offset) == (20 if version == 4 else 40, 16)
    if length > MSS:
        assert (gso_type, gso_size) == ({4: 1, 6: 4}[version], MSS)
        assert header == len(packet) - length
    else:
        assert (gso_type, header, gso_size) == (0, 0, 0)


@given(addresses, u32, u32, u16, st.none() | st.tuples(u32, u32), st.integers(-1, 14), u16, st.booleans())
def test_syn_options(pair, seq, ack, wnd, ts, scale, mss, sack):
    version, key = pair
    out = make_out(seq, ack, SYN | ACK, wnd, ts)
    out.mss, out.window_scale, out.sack_permitted = mss, scale, sack
    vnet, packet = write(version, key, out, b"")
    packet = complete(vnet, packet)
    read = dpkt.ip.IP(packet) if version == 4 else dpkt.ip6.IP6(packet)
    if version == 4:
        assert same_checksum(read.sum, dpkt.in_cksum(packet[:10] + bytes(2) + packet[12:20]))
    options = [option for option in dpkt.tcp.parse_opts(read.data.opts) if option[0] != dpkt.tcp.TCP_OPT_NOP]
    expected = [(dpkt.tcp.TCP_OPT_MSS, mss.to_bytes(2, "big"))]
    if scale >= 0:
        expected.append((dpkt.tcp.TCP_OPT_WSCALE, bytes([scale])))
    if sack:
        expected.append((dpkt.tcp.TCP_OPT_SACKOK, b""))
    if ts is not None:
        expected.append((dpkt.tcp.TCP_OPT_TIMESTAMP, struct.pack(">II", *ts)))
    assert options == expected
    parsed = Segment()
    parsed.parse_options(bytes(read.data.opts))
    assert (parsed.mss, parsed.window_scale, parsed.ts_present) == (mss, scale, ts is not None)
    assert parsed.sack_permitted == sack


blocks = st.lists(st.tuples(u32, u32), min_size=1, max_size=4).map(tuple)


@given(addresses, u32, u32, u16, st.none() | st.tuples(u32, u32), blocks)
def test_sack_blocks(pair, seq, ack, wnd, ts, sack):
    version, key = pair
    out = make_out(seq, ack, ACK, wnd, ts)
    out.sack = sack
    vnet, packet = write(version, key, out, b"")
    packet = complete(vnet, packet)
    read = dpkt.ip.IP(packet) if version == 4 else dpkt.ip6.IP6(packet)
    assert bytes(read.data) == packet[20 if version == 4 else 40 :]
    written = sack[: 3 if ts else 4]
    options = [option for option in dpkt.tcp.parse_opts(read.data.opts) if option[0] != dpkt.tcp.TCP_OPT_NOP]
    expected = [(dpkt.tcp.TCP_OPT_TIMESTAMP, struct.pack(">II", *ts))] if ts else []
    expected.append((dpkt.tcp.TCP_OPT_SACK, b"".join(struct.pack(">II", *block) for block in written)))
    assert options == expected
    parsed = Segment()
    parsed.parse_options(bytes(read.data.opts))
    assert (parsed.sack, parsed.ts_present) == (written, ts is not None)


@given(u32, u32, u32, u32, u16)
def test_the_usual_header_is_read_in_one_go(seq, ack, ts_val, ts_ecr, wnd):
    out = make_out(seq, ack, ACK, wnd, (ts_val, ts_ecr))
    _, packet = write(4, bytes(12), out, b"")
    got_seq, got_ack, bits, got_wnd, option, val, ecr = HEADER.unpack_from(packet, 20)
    assert (got_seq, got_ack, bits & 0x3F, bits >> 12, got_wnd) == (seq, ack, ACK, 8, wnd)
    assert (option, val, ecr) == (USUAL_TIMESTAMPS, ts_val, ts_ecr)


@given(st.binary(max_size=40))
def test_options_of_random_bytes_never_raise(options):
    seg = Segment()
    seg.parse_options(options)
    assert -1 <= seg.window_scale <= 14
    assert 0 <= seg.mss <= 65535


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mss 1400,nop,wscale 7,nop,nop,TS val 5 ecr 6", (1400, 7, True)),
        ("sackOK,TS val 5 ecr 6,mss 9", (9, -1, True)),
        ("eol,mss 1400", (0, -1, False)),
        ("wscale 255", (0, 14, False)),
        ("", (0, -1, False)),
    ],
)
def test_options(words, expected):
    seg = Segment()
    seg.parse_options(options_bytes(words))
    assert (seg.mss, seg.window_scale, seg.ts_present) == expected


@pytest.mark.parametrize(
    "cut",
    [b"\x02", b"\x05\x0a" + bytes(7), b"\x02\x00", b"\x02\x01\x05", b"\x02\x04\x05", b"\x08\x0a\x00", b"\x03\x09\x01"],
)
def test_reading_ends_at_a_malformed_option(cut):
    seg = Segment()
    seg.parse_options(b"\x03\x03\x05" + cut)
    assert (seg.window_scale, seg.mss, seg.ts_present) == (5, 0, False)
    assert seg.sack == ()


@pytest.mark.parametrize("length", [2, 3, 9, 11, 17, 38])
def test_sack_of_a_length_that_is_none_is_ignored(length):
    seg = Segment()
    seg.parse_options(bytes((5, length)) + bytes(length - 2) + b"\x04\x02")
    assert (seg.sack, seg.sack_permitted) == ((), True)


@given(addresses)
def test_reply_addresses_turn_around_and_back(pair):
    _, key = pair
    turned = reply_addresses(key)
    half = (len(key) - 4) // 2
    assert turned == key[half : 2 * half] + key[:half] + key[-2:] + key[-4:-2]
    assert reply_addresses(turned) == key
