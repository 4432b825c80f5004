"""The Internet checksum (RFC 1071).

The ones' complement sum of 16-bit words is the number that the octets make, modulo 65,535: big integers do it in C
(1,460 octets: 5 µs; `sum(view.cast("H"))`: 14 µs).
"""


def ones_sum(data: bytes | memoryview) -> int:
    """Return the ones' complement sum of the 16-bit words of data (an odd last octet counts as the high one)."""
    number = int.from_bytes(data, "big")
    if len(data) & 1:
        number <<= 8
    return number % 65535


def checksum(data: bytes | memoryview, initial: int = 0) -> int:
    """Return the checksum field for data that holds 0 there; `initial` is the sum of a pseudo-header.

    A sum over data that includes a right checksum gives 0.
    """
    return 65535 - (ones_sum(data) + initial) % 65535 if data or initial else 65535


def pseudo_sum(source: bytes, destination: bytes, protocol: int, length: int) -> int:
    """Return the sum of the pseudo-header of IPv4 (RFC 9293, 3.1) or IPv6 (RFC 8200, 8.1); addresses are packed."""
    return (ones_sum(source) + ones_sum(destination) + protocol + length) % 65535


def verify(data: bytes | memoryview, initial: int = 0) -> bool:
    """Say whether data, which includes its checksum field, sums up with `initial` to a valid packet."""
    return (ones_sum(data) + initial) % 65535 == 0
