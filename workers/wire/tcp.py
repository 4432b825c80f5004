"""TCP packets: the headers in front of a text, written in one go, and read in one go.

A frame that carries more than one MSS is a super-segment: the device (or the kernel behind it) cuts it.
"""

from functools import lru_cache
from struct import Struct
from typing import Final

from workers.tcp.segment import SYN, Segment
from workers.wire import vnet
from workers.wire.checksum import ones_sum

#: SEQ, ACK, offset and flags, window, then the first three words of the options, for the usual "NOP NOP timestamps"
HEADER: Final = Struct(">4xIIHH4xIII")
USUAL_TIMESTAMPS: Final = 0x0101080A

_IP4: Final = b"\x45\x00"
_ID_DF_TTL_TCP: Final = b"\x00\x00\x40\x00\x40\x06"  # id 0 (RFC 6864: atomic), DF, TTL 64
_IP6: Final = b"\x60\x00\x00\x00"
_TCP_HOPS: Final = b"\x06\x40"
_NO_URGENT_TIMESTAMPS: Final = b"\x00\x00\x01\x01\x08\x0a"

_WRITE4 = Struct(">12sH6sH12sIIHHH6sII")  # prefix, total length, …, checksum, addresses and ports, seq …
_WRITE4_PLAIN = Struct(">12sH6sH12sIIHHHH")
_WRITE6 = Struct(">14sH2s36sIIHHH6sII")
_WRITE6_PLAIN = Struct(">14sH2s36sIIHHHH")
_SYN_OPTIONS = Struct(">BBHBBBB")
_SACK_BLOCK = Struct(">II")


def _vnet(gso_type: int, mss: int, ip_length: int, tcp_length: int) -> bytes:
    return vnet.HEADER.pack(
        vnet.NEEDS_CSUM, gso_type, ip_length + tcp_length if gso_type else 0, mss if gso_type else 0, ip_length, 16
    )


#: virtio_net_hdr and the beginning of the IP header of a packet that is not cut
_PLAIN4: Final = _vnet(vnet.GSO_NONE, 0, 20, 20) + _IP4
_PLAIN6: Final = _vnet(vnet.GSO_NONE, 0, 40, 20) + _IP6
_IP4_SUM: Final = ones_sum(_IP4 + _ID_DF_TTL_TCP)


@lru_cache(maxsize=64)
def _cut_prefix(version: int, mss: int, tcp_length: int) -> bytes:
    """Return the same of a packet that is cut; most flows have one of few."""
    if version == 4:
        return _vnet(vnet.GSO_TCPV4, mss, 20, tcp_length) + _IP4
    return _vnet(vnet.GSO_TCPV6, mss, 40, tcp_length) + _IP6


class Headers:
    """What all packets of one flow towards the client have in common, prepared."""

    __slots__ = ("_addresses", "_cut", "_ip_sum", "_mss", "_pseudo_sum", "_tcp_length", "_version")

    def __init__(self, version: int, addresses: bytes, mss: int, timestamps: bool) -> None:
        """`addresses`: source, destination, ports, as they go out; `mss`: octets of text in a packet that is cut."""
        self._version = version
        self._addresses = addresses
        self._tcp_length = 32 if timestamps else 20
        addresses_sum = ones_sum(addresses[:-4])
        self._pseudo_sum = addresses_sum + 6
        self._ip_sum = addresses_sum + _IP4_SUM
        self.cut_at(mss)

    def cut_at(self, mss: int) -> None:
        """Let the device cut super-segments into packets with this many octets of text."""
        self._mss = mss
        self._cut = _cut_prefix(self._version, mss, self._tcp_length)

    def write(self, memory: memoryview, end: int, out: Segment) -> int:
        """Write the headers for `out` so that they end at `end`, where its text begins; return their length."""
        length = out.len
        flags = out.flags
        if flags & SYN or out.sack:
            return self._write_with_options(memory, end, out)
        if self._version == 4:
            prefix = self._cut if length > self._mss else _PLAIN4
            if out.ts_present:
                total = length + 52
                _WRITE4.pack_into(
                    memory, end - 62,
                    prefix, total, _ID_DF_TTL_TCP, 65535 - (self._ip_sum + total) % 65535, self._addresses,
                    out.seq, out.ack, 0x8000 | flags, out.wnd, (self._pseudo_sum + total - 20) % 65535,
                    _NO_URGENT_TIMESTAMPS, out.ts_val, out.ts_ecr,
                )  # fmt: skip
                return 62
            total = length + 40
            _WRITE4_PLAIN.pack_into(
                memory, end - 50,
                prefix, total, _ID_DF_TTL_TCP, 65535 - (self._ip_sum + total) % 65535, self._addresses,
                out.seq, out.ack, 0x5000 | flags, out.wnd, (self._pseudo_sum + total - 20) % 65535, 0,
            )  # fmt: skip
            return 50
        prefix = self._cut if length > self._mss else _PLAIN6
        if out.ts_present:
            _WRITE6.pack_into(
                memory, end - 82,
                prefix, length + 32, _TCP_HOPS, self._addresses,
                out.seq, out.ack, 0x8000 | flags, out.wnd, (self._pseudo_sum + length + 32) % 65535,
                _NO_URGENT_TIMESTAMPS, out.ts_val, out.ts_ecr,
            )  # fmt: skip
            return 82
        _WRITE6_PLAIN.pack_into(
            memory, end - 70,
            prefix, length + 20, _TCP_HOPS, self._addresses,
            out.seq, out.ack, 0x5000 | flags, out.wnd, (self._pseudo_sum + length + 20) % 65535, 0,
        )  # fmt: skip
        return 70

    def _write_with_options(self, memory: memoryview, end: int, out: Segment) -> int:
        """A SYN, or a pure ACK with SACK blocks: whatever options `out` has; there is no text."""
        options = b""
        if out.flags & SYN:
            options = _SYN_OPTIONS.pack(2, 4, out.mss, 1, 3, 3, max(out.window_scale, 0))
            if out.window_scale < 0:
                options = options[:4]
            if out.sack_permitted:
                options += b"\x04\x02" if out.ts_present else b"\x01\x01\x04\x02"
            elif out.ts_present:
                options += b"\x01\x01"
        elif out.ts_present:
            options = b"\x01\x01"
        if out.ts_present:
            options += b"\x08\x0a" + out.ts_val.to_bytes(4, "big") + out.ts_ecr.to_bytes(4, "big")
        if out.sack:
            blocks = out.sack[: 3 if out.ts_present else 4]  # 40 octets of options
            options += b"\x01\x01\x05" + bytes((2 + 8 * len(blocks),))
            for block in blocks:
                options += _SACK_BLOCK.pack(*block)
        tcp_length = 20 + len(options)
        offset_flags = tcp_length // 4 << 12 | out.flags
        start = end - len(options)
        memory[start:end] = options
        if self._version == 4:
            total = 20 + tcp_length
            _WRITE4_PLAIN.pack_into(
                memory, start - 50,
                _PLAIN4, total, _ID_DF_TTL_TCP, 65535 - (self._ip_sum + total) % 65535, self._addresses,
                out.seq, out.ack, offset_flags, out.wnd, (self._pseudo_sum + tcp_length) % 65535, 0,
            )  # fmt: skip
            return 50 + len(options)
        _WRITE6_PLAIN.pack_into(
            memory, start - 70,
            _PLAIN6, tcp_length, _TCP_HOPS, self._addresses,
            out.seq, out.ack, offset_flags, out.wnd, (self._pseudo_sum + tcp_length) % 65535, 0,
        )  # fmt: skip
        return 70 + len(options)


def reply_addresses(key: bytes) -> bytes:
    """Turn the addresses and ports of a packet around: those of its answer. 12 octets for IPv4, 36 for IPv6."""
    if len(key) == 12:
        return key[4:8] + key[:4] + key[10:12] + key[8:10]
    return key[16:32] + key[:16] + key[34:36] + key[32:34]
