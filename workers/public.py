"""Which addresses are public: a table of our own from the IANA special-purpose registries.

    https://www.iana.org/assignments/iana-ipv4-special-registry   (RFC 6890; as of 2025)
    https://www.iana.org/assignments/iana-ipv6-special-registry
    https://www.iana.org/assignments/ipv6-address-space           (only 2000::/3 is global unicast)
    https://www.iana.org/assignments/multicast-addresses          (224.0.0.0/4, ff00::/8)

An entry is public if its registry says "globally reachable: true". `ipaddress.is_global` says true of 224.0.0.1 and
ff02::1, and its answers change between releases. Addresses that carry an IPv4 address (mapped, 6to4, NAT64) are
judged by that one; a proxy that translates would otherwise reach what the table refuses.
"""

import socket
from bisect import bisect_right
from functools import lru_cache
from typing import Final

#: prefix, length, public; a longer prefix wins over a shorter one
_IPV4: Final = (
    ("0.0.0.0", 0, True),
    ("0.0.0.0", 8, False),  # "this network", RFC 791
    ("10.0.0.0", 8, False),  # private, RFC 1918
    ("100.64.0.0", 10, False),  # shared address space, RFC 6598
    ("127.0.0.0", 8, False),  # loopback, RFC 1122
    ("169.254.0.0", 16, False),  # link-local, RFC 3927
    ("172.16.0.0", 12, False),  # private, RFC 1918
    ("192.0.0.0", 24, False),  # IETF protocol assignments, RFC 6890
    ("192.0.0.9", 32, True),  # PCP anycast, RFC 7723
    ("192.0.0.10", 32, True),  # TURN anycast, RFC 8155
    ("192.0.2.0", 24, False),  # documentation, RFC 5737
    ("192.88.99.0", 24, False),  # 6to4 relay anycast, deprecated by RFC 7526: the tunnel's far end cannot be judged
    ("192.168.0.0", 16, False),  # private, RFC 1918
    ("198.18.0.0", 15, False),  # benchmarking, RFC 2544
    ("198.51.100.0", 24, False),  # documentation
    ("203.0.113.0", 24, False),  # documentation
    ("224.0.0.0", 4, False),  # multicast
    ("240.0.0.0", 4, False),  # reserved, RFC 1112; 255.255.255.255 is the limited broadcast
)
_IPV6: Final = (
    # Outside of 2000::/3 nothing is: ::, ::1, 64:ff9b:1::/48, 100::/64, 5f00::/16, fc00::/7, fe80::/10, fec0::/10 …
    ("::", 0, False),
    ("2000::", 3, True),  # global unicast
    ("2001::", 23, False),  # IETF protocol assignments, RFC 2928, with Teredo (2001::/32) and ORCHID (2001:10::/28)
    ("2001:1::1", 128, True),  # PCP anycast, RFC 7723
    ("2001:1::2", 128, True),  # TURN anycast, RFC 8155
    ("2001:1::3", 128, True),  # DNS-SD SRP anycast, RFC 9665
    ("2001:3::", 32, True),  # AMT, RFC 7450
    ("2001:4:112::", 48, True),  # AS112-v6, RFC 7535
    ("2001:20::", 28, True),  # ORCHIDv2, RFC 7343
    ("2001:30::", 28, True),  # drone remote ID, RFC 9374
    ("2001:db8::", 32, False),  # documentation, RFC 3849
    ("3fff::", 20, False),  # documentation, RFC 9637
)
#: forms that carry an IPv4 address: prefix in octets, and where the address stands
_EMBEDDING: Final = (
    (bytes(10) + b"\xff\xff", 12),  # ::ffff:0:0/96, mapped, RFC 4291
    (b"\x00\x64\xff\x9b" + bytes(8), 12),  # 64:ff9b::/96, NAT64, RFC 6052
    (b"\x20\x02", 2),  # 2002::/16, 6to4, RFC 3056
)


def _flatten(table: tuple[tuple[str, int, bool], ...], family: int, bits: int) -> tuple[list[int], list[bool]]:
    """Turn nested prefixes into the addresses where the verdict changes, and the verdict from each of them on."""
    ranges = []
    for text, length, public in table:
        first = int.from_bytes(socket.inet_pton(family, text), "big")
        ranges.append((length, first, first + (1 << bits - length), public))
    ranges.sort()  # the longest prefix last
    starts = sorted({edge for _, first, after, _ in ranges for edge in (first, after)})[:-1]
    verdicts = [[public for _, first, after, public in ranges if first <= at < after][-1] for at in starts]
    return starts, verdicts


_STARTS4, _PUBLIC4 = _flatten(_IPV4, socket.AF_INET, 32)
_STARTS6, _PUBLIC6 = _flatten(_IPV6, socket.AF_INET6, 128)


@lru_cache(maxsize=4096)
def is_public(packed: bytes) -> bool:
    """Say whether an address (4 or 16 octets) is globally reachable; ValueError for any other length."""
    if len(packed) == 4:
        return _PUBLIC4[bisect_right(_STARTS4, int.from_bytes(packed, "big")) - 1]
    if len(packed) != 16:
        raise ValueError(f"address of {len(packed)} octets is neither 4 (IPv4) nor 16 (IPv6)")
    for prefix, at in _EMBEDDING:
        if packed.startswith(prefix):
            return is_public(packed[at : at + 4])
    return _PUBLIC6[bisect_right(_STARTS6, int.from_bytes(packed, "big")) - 1]
