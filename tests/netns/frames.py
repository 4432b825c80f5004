"""Packets made by hand, right and wrong, thrown into the TUN past the kernel's own checks."""

import random
import socket
import struct
from collections.abc import Iterator
from typing import Final

from tests.netns.world import Namespace

ETH_P_ALL: Final = 3
TCP, UDP, ICMP, ICMP6 = 6, 17, 1, 58
SYN, ACK, RST, FIN = 2, 16, 4, 1


def checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total = int.from_bytes(data, "big") % 65535
    return 65535 - total if total else (0 if any(data) else 65535)


def ipv4(protocol: int, source: str, destination: str, payload: bytes, **wrong: int) -> bytes:
    """Build an IPv4 packet; `wrong` may set version_ihl, length, fragment, ttl, header_checksum."""
    fields = {"version_ihl": 0x45, "length": 20 + len(payload), "fragment": 0x4000, "ttl": 64} | wrong
    header = struct.pack(
        ">BBHHHBBH4s4s",
        fields["version_ihl"], 0, fields["length"], random.getrandbits(16), fields["fragment"], fields["ttl"], protocol,
        0, socket.inet_aton(source), socket.inet_aton(destination),
    )  # fmt: skip
    value = wrong.get("header_checksum", checksum(header))
    return header[:10] + struct.pack(">H", value) + header[12:] + payload


def ipv6(protocol: int, source: str, destination: str, payload: bytes, length: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    addresses = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, destination)
    return struct.pack(">IHBB", 6 << 28, size, protocol, 64) + addresses + payload


def pseudo(protocol: int, source: str, destination: str, length: int) -> bytes:
    if ":" in source:
        addresses = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, destination)
        return addresses + struct.pack(">II", length, protocol)
    return socket.inet_aton(source) + socket.inet_aton(destination) + struct.pack(">HH", protocol, length)


def tcp(
    source: tuple[str, int], destination: tuple[str, int], flags: int, *, payload: bytes = b"", data_offset: int = 5,
    good: bool = True, options: bytes = b"",
) -> bytes:  # fmt: skip
    """Build a whole packet with one TCP segment; `good=False` spoils the checksum."""
    offset = data_offset + len(options) // 4
    header = struct.pack(
        ">HHIIBBHHH", source[1], destination[1], random.getrandbits(32), random.getrandbits(32) if flags & ACK else 0,
        offset << 4, flags, 65535, 0, 0,
    )  # fmt: skip
    segment = header + options + payload
    value = checksum(pseudo(TCP, source[0], destination[0], len(segment)) + segment) ^ (0 if good else 0x5555)
    segment = segment[:16] + struct.pack(">H", value) + segment[18:]
    build = ipv6 if ":" in source[0] else ipv4
    return build(TCP, source[0], destination[0], segment)


def udp(source: tuple[str, int], destination: tuple[str, int], payload: bytes, length: int | None = None) -> bytes:
    size = 8 + len(payload) if length is None else length
    datagram = struct.pack(">HHHH", source[1], destination[1], size, 0) + payload
    value = checksum(pseudo(UDP, source[0], destination[0], len(datagram)) + datagram) or 65535
    datagram = datagram[:6] + struct.pack(">H", value) + datagram[8:]
    return (ipv6 if ":" in source[0] else ipv4)(UDP, source[0], destination[0], datagram)


def malformed(seed: int, count: int) -> Iterator[bytes]:
    """Yield `count` packets, each wrong in a way of its own; the same ones for the same seed."""
    dice = random.Random(seed)
    client, target = ("198.18.0.1", 40000), ("203.0.113.10", 80)
    client6, target6 = ("fd72:6e67:7761:7900::1", 40000), ("2001:db8:1::10", 80)
    good = tcp(client, target, SYN)
    good6 = tcp(client6, target6, SYN)
    good_udp = udp(client, target, b"x" * 40)
    for _ in range(count):
        kind = dice.randrange(22)
        if kind == 0:
            yield dice.randbytes(dice.randrange(1, 1500))
        elif kind == 1:
            yield good[: dice.randrange(1, len(good))]
        elif kind == 2:
            yield good6[: dice.randrange(1, len(good6))]
        elif kind == 3:
            yield good_udp[: dice.randrange(1, len(good_udp))]
        elif kind == 4:
            yield ipv4(TCP, client[0], target[0], good[20:], version_ihl=0x40 | dice.randrange(16))
        elif kind == 5:
            yield ipv4(TCP, client[0], target[0], good[20:], length=dice.randrange(65536))
        elif kind == 6:
            yield ipv4(TCP, client[0], target[0], good[20:], header_checksum=dice.getrandbits(16))
        elif kind == 7:
            yield tcp(client, target, dice.randrange(256), good=False, payload=dice.randbytes(dice.randrange(100)))
        elif kind == 8:
            yield tcp(client, target, dice.randrange(256), data_offset=dice.randrange(16))
        elif kind == 9:
            yield tcp(client, target, SYN, options=dice.randbytes(4 * dice.randrange(11)))
        elif kind == 10:
            yield tcp(client6, target6, SYN, options=dice.randbytes(4 * dice.randrange(11)))
        elif kind == 11:
            yield udp(client, target, dice.randbytes(50), length=dice.randrange(65536))
        elif kind == 12:
            yield udp(client6, target6, dice.randbytes(50), length=dice.randrange(65536))
        elif kind == 13:
            yield ipv4(dice.randrange(256), client[0], target[0], dice.randbytes(dice.randrange(200)))
        elif kind == 14:
            yield ipv6(dice.randrange(256), client6[0], target6[0], dice.randbytes(dice.randrange(200)))
        elif kind == 15:
            yield ipv6(TCP, client6[0], target6[0], good6[40:], length=dice.randrange(65536))
        elif kind == 16:  # fragments that overlap, never end, or reach beyond 65,535
            yield ipv4(UDP, client[0], target[0], dice.randbytes(64), fragment=dice.getrandbits(14))
        elif kind == 17:
            yield ipv6(44, client6[0], target6[0], struct.pack(">BBHI", UDP, 0, dice.getrandbits(16), 7) + bytes(64))
        elif kind == 18:
            yield ipv4(ICMP, client[0], "198.18.0.2", dice.randbytes(dice.randrange(64)))
        elif kind == 19:
            yield ipv6(ICMP6, client6[0], "fd72:6e67:7761:7900::2", dice.randbytes(dice.randrange(64)))
        elif kind == 20:  # extension headers that chain into nothing
            chain = b"".join(bytes((dice.choice((0, 43, 60, 59)), dice.randrange(4))) + bytes(6) for _ in range(8))
            yield ipv6(0, client6[0], target6[0], chain)
        else:  # from and to addresses that no host has
            weird = dice.choice(("0.0.0.0", "255.255.255.255", "127.0.0.1", "224.0.0.1", "198.18.0.2"))
            yield tcp((weird, 1), (dice.choice((weird, "203.0.113.10")), 0), SYN)


def forged_syns(count: int, port: int, seed: int = 1) -> Iterator[bytes]:
    """Yield SYNs to a target from sources all over the Internet."""
    dice = random.Random(seed)
    for _ in range(count):
        source = f"{dice.randrange(1, 224)}.{dice.randrange(256)}.{dice.randrange(256)}.{dice.randrange(1, 255)}"
        yield tcp((source, dice.randrange(1024, 65536)), ("203.0.113.10", port), SYN, options=b"\x02\x04\x05\xb4")


class Injector:
    """A packet socket on the TUN: what is sent here is what the gateway's reader reads."""

    def __init__(self, namespace: Namespace, device: str = "tun0") -> None:
        self.socket = namespace.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.socket.bind((device, ETH_P_ALL))
        self.sent = 0

    def send(self, frame: bytes) -> bool:
        """Send one; False where the kernel would not take it (too short for any network header, queue full)."""
        try:
            self.socket.send(frame)
        except OSError:
            return False
        self.sent += 1
        return True

    def __enter__(self) -> "Injector":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
