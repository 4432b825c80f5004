"""The byte formats of SOCKS5 (RFC 1928, RFC 1929): addresses, and the header in front of every UDP datagram.

    address:        ATYP  host  port          host: 4 bytes (ATYP 01), 16 bytes (04), or a length and a name (03)
    UDP datagram:   RSV RSV FRAG  address  payload        10, 22 or 7 + n bytes in front of the payload

A host is held as the wire has it: four or sixteen packed bytes, or a name as `str`.
"""

from typing import Final, TypeAlias

Host: TypeAlias = bytes | str  #: 4 or 16 packed bytes, or a name
Readable: TypeAlias = bytes | bytearray | memoryview

VERSION: Final = 5
PASSWORD_VERSION: Final = 1  # of the sub-negotiation, RFC 1929

# Methods
NO_AUTHENTICATION: Final = 0x00
USERNAME_PASSWORD: Final = 0x02
NO_ACCEPTABLE_METHOD: Final = 0xFF

# Methods of gost. The TLS ones begin a handshake behind the method's answer; the request follows inside, after
# RFC 1929 where there is a password. 82 has been AES before it was TLS (gost v1), 88 RC4.
GOST_TLS: Final = 0x80
GOST_TLS_PASSWORD: Final = 0x82
GOST1_TLS_PASSWORD: Final = 0x8A
GOST_CIPHERS: Final = {
    0x81: "aes-128-cfb",
    0x82: "aes-192-cfb",
    0x83: "aes-256-cfb",
    0x84: "des-cfb",
    0x85: "bf-cfb",
    0x86: "cast5-cfb",
    0x87: "rc4-md5",
    0x88: "rc4",
    0x89: "table",
}

# Commands
CONNECT: Final = 1
BIND: Final = 2
UDP_ASSOCIATE: Final = 3

# ATYP
IPV4: Final = 1
NAME: Final = 3
IPV6: Final = 4

# REP
SUCCEEDED: Final = 0
GENERAL_FAILURE: Final = 1
NOT_ALLOWED: Final = 2
NETWORK_UNREACHABLE: Final = 3
HOST_UNREACHABLE: Final = 4
CONNECTION_REFUSED: Final = 5
TTL_EXPIRED: Final = 6
COMMAND_NOT_SUPPORTED: Final = 7
ADDRESS_TYPE_NOT_SUPPORTED: Final = 8

REPLY_TEXT: Final = {
    SUCCEEDED: "succeeded",
    GENERAL_FAILURE: "general failure",
    NOT_ALLOWED: "not allowed by ruleset",
    NETWORK_UNREACHABLE: "network unreachable",
    HOST_UNREACHABLE: "host unreachable",
    CONNECTION_REFUSED: "connection refused",
    TTL_EXPIRED: "TTL expired",
    COMMAND_NOT_SUPPORTED: "command not supported",
    ADDRESS_TYPE_NOT_SUPPORTED: "address type not supported",
}

MAX_ADDRESS: Final = 1 + 1 + 255 + 2  # ATYP, length, the longest name, port
MAX_REPLY: Final = 3 + MAX_ADDRESS  # VER, REP, RSV in front of it: no answer is longer


class ProtocolError(Exception):
    """Report bytes that are no SOCKS5; `reason` is short and fixed, the name of a counter."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


def parse_address(data: Readable, at: int) -> tuple[Host, int, int] | None:
    """Return host, port and the offset behind them; None while bytes are missing.

    Raises ProtocolError ("address-type") for an ATYP that RFC 1928 does not have. The bytes of a name that are
    no UTF-8 survive as surrogates, so `write_address` gives back what was read.
    """
    have = len(data)
    if at >= have:
        return None
    kind = data[at]
    if kind == IPV4:
        end = at + 7
        if have < end:
            return None
        return bytes(data[at + 1 : at + 5]), data[at + 5] << 8 | data[at + 6], end
    if kind == IPV6:
        end = at + 19
        if have < end:
            return None
        return bytes(data[at + 1 : at + 17]), data[at + 17] << 8 | data[at + 18], end
    if kind == NAME:
        if at + 1 >= have:
            return None
        end = at + 4 + data[at + 1]
        if have < end:
            return None
        name = str(data[at + 2 : end - 2], "utf-8", "surrogateescape")
        return name, data[end - 2] << 8 | data[end - 1], end
    raise ProtocolError("address-type", f"address type {kind:#04x} is none of 1 (IPv4), 3 (name), 4 (IPv6)")


def write_address(host: Host, port: int) -> bytes:
    """Return ATYP, host and port as bytes; ValueError for a host or port that has no such form."""
    if isinstance(host, str):
        name = host.encode("utf-8", "surrogateescape")
        if len(name) > 255:
            raise ValueError(f"name of {len(name)} bytes does not fit 255")
        return b"\x03" + len(name).to_bytes() + name + _port(port)
    if len(host) == 4:
        return b"\x01" + host + _port(port)
    if len(host) == 16:
        return b"\x04" + host + _port(port)
    raise ValueError(f"address of {len(host)} bytes is neither 4 (IPv4) nor 16 (IPv6)")


def _port(port: int) -> bytes:
    try:
        return port.to_bytes(2)
    except OverflowError:
        raise ValueError(f"port {port} is not in 0…65535") from None


def datagram_header_length(data: Readable, at: int = 0) -> int:
    """Return how many bytes stand in front of the payload of the datagram at `at`; 0 if that cannot be a header.

    Looks at nothing but the type and length of the address: cheap, so that those bytes can be the key of a cache.
    """
    if len(data) < at + 7:
        return 0
    kind = data[at + 3]
    if kind == IPV4:
        length = 10
    elif kind == IPV6:
        length = 22
    elif kind == NAME:
        length = 7 + data[at + 4]
    else:
        return 0
    return length if len(data) >= at + length else 0


def parse_datagram(data: Readable) -> tuple[Host, int, int]:
    """Return the host and port in the header of a UDP datagram, and the offset of its payload.

    RSV is not judged (most servers do not). Raises ProtocolError: "datagram-short", "datagram-fragment"
    (reassembly is optional in RFC 1928, 7, and nobody has it), "address-type".
    """
    if len(data) < 4:
        raise ProtocolError("datagram-short", f"datagram of {len(data)} bytes has no SOCKS5 header")
    if data[2]:
        raise ProtocolError("datagram-fragment", f"fragment {data[2]} of a datagram; fragments are not reassembled")
    address = parse_address(data, 3)
    if address is None:
        raise ProtocolError("datagram-short", f"datagram of {len(data)} bytes ends within its SOCKS5 header")
    return address


def write_datagram_header(host: Host, port: int) -> bytes:
    """Return the header that goes in front of the payload of a datagram to, or from, `host` and `port`."""
    return b"\x00\x00\x00" + write_address(host, port)
