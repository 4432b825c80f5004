"""UDP inside TCP: the dialects in which SOCKS servers carry datagrams on a stream, without I/O.

Their frames look alike and are not. The datagram `hi` to 1.2.3.4:53 is

    dialect           asked for by                      frame                             byte 2
    RFC 1928 on UDP   UDP ASSOCIATE (03)                0000 00 01 01020304 0035 6869     fragment number
    gost v1           03, on a tunnel                   0002 00 01 01020304 0035 6869     ignored
    gost v2, v3       F3                                0002 00 01 01020304 0035 6869     ignored; v3 writes FF
    hev               05                                0002 0a 01 01020304 0035 6869     length of the header
    UoT, unconnected  CONNECT to a name, see below           00 01020304 0035 0002 6869   types are 00, 01, 02
    UoT, connected    the same, with isConnect = 1                            0002 6869

Outside of this file a datagram is always a `header` (00 00 00 and the address as RFC 1928, 7 has it on UDP) and a
payload, or both in one piece. An object below is one end of one stream: `receive` takes the stream apart, `frame` makes
a piece of it. Broken input sets `error`, and nothing is understood any more: the stream must be closed.

The layouts were checked against gost 1.7, 1.8, 2.8.2, hev-socks5-server and sing's uot package.
"""

from typing import Final

from workers.socks.wire import IPV4, IPV6, NAME, ProtocolError, Readable, parse_address

# Commands, beside those of RFC 1928
HEV_UDP: Final = 0x05
GOST_UDP: Final = 0xF3

UOT_NAME: Final = "sp.udp-over-tcp.arpa"
UOT2_NAME: Final = "sp.v2.udp-over-tcp.arpa"

MAX_GOST: Final = 16384  # octets of header and payload: the buffer of gost 2.3 … 2.12, which panic on one more
MAX_HEV: Final = 1500  # octets of address and payload: hev's buffer; one more and it forwards nothing from then on
MAX_UOT: Final = 16000  # octets of payload; sing reads into 16 KiB less some headroom, one more ends the stream

_ZEROS: Final = b"\x00\x00\x00"  # RSV and FRAG
_UOT_KIND: Final = {IPV4: b"\x00", IPV6: b"\x01", NAME: b"\x02"}
_KIND_OF_UOT: Final = {0: IPV4, 1: IPV6, 2: NAME}


class Framing:
    """One end of a stream of datagrams; what all dialects share."""

    __slots__ = ("_held", "error")

    def __init__(self) -> None:
        self._held = b""  #: the beginning of a frame that is not complete, less than 66 KiB
        self.error: ProtocolError | None = None  #: why the stream cannot be read on

    @property
    def is_in_frame(self) -> bool:
        """Tell whether a frame has begun and not ended."""
        return bool(self._held)

    def receive(self, data: bytes) -> list[bytes]:
        """Take bytes of the stream in any pieces; return the datagrams that are complete now, headers in front."""
        datagrams: list[bytes] = []
        if self.error:
            return datagrams
        if self._held:
            data = self._held + data
        at = 0
        try:
            while end := self._take(data, at, datagrams):
                at = end
        except ProtocolError as error:
            self.error = error
            self._held = b""
            return datagrams
        self._held = data[at:]
        return datagrams

    def frame(self, header: bytes, payload: Readable) -> bytes:
        """Return a datagram as the next piece of the stream.

        Raises ProtocolError when the dialect has no such frame, or the peer is known to break on it: "datagram-empty",
        "datagram-oversize". The datagram is dropped then; nothing else is wrong.
        """
        raise NotImplementedError

    def _take(self, data: bytes, at: int, datagrams: list[bytes]) -> int:
        """Append the datagram of the frame at `at`; return the offset behind it, 0 while bytes are missing."""
        raise NotImplementedError


class GostFraming(Framing):
    """RSV as length: gost v1, v2 and v3.

    An empty datagram stops gost 2.3 … 2.12 for good, they read to the end of the stream, and one that does not fit
    their buffer is a slice out of bounds that ends their process (seen with gosocks5 v0.3.0); neither is written. v1
    writes frames from IPv6 sources without the address. With `by_message` (a carrier whose messages are the peer's
    writes) such a frame is recognised and left out, and `nameless` counts it; on a plain stream it cannot be told, and
    the address type of what seems to be the next frame ends it.
    """

    __slots__ = ("_by_message", "nameless")

    def __init__(self, *, by_message: bool = False) -> None:
        super().__init__()
        self._by_message = by_message
        self.nameless = 0  #: frames without an address

    def receive(self, data: bytes) -> list[bytes]:
        """Take bytes of the stream; with `by_message`, one message."""
        if self._by_message and not self._held and _is_nameless(data):
            self.nameless += 1
            return []
        return super().receive(data)

    def frame(self, header: bytes, payload: Readable) -> bytes:
        """Return `length 00 address payload`."""
        length = _bounded(payload, MAX_GOST - len(header))
        return b"".join((length.to_bytes(2), b"\x00", header[3:], payload))

    def _take(self, data: bytes, at: int, datagrams: list[bytes]) -> int:
        if len(data) < at + 5:
            return 0
        start = _end_of_address(data, at + 3, data[at + 3])
        end = start + (data[at] << 8 | data[at + 1])
        if len(data) < end:
            return 0
        datagrams.append(_ZEROS + data[at + 3 : end])
        return end


class HevFraming(Framing):
    """hev-socks5's FWD UDP: byte 2 is the length of everything in front of the payload.

    Its README calls the first field the total length; the code and the wire have the payload's. A frame that is empty,
    too big or whose header is longer than a byte can say stops hev-socks5-server for good, with the TCP connection
    open: none is written.
    """

    __slots__ = ()

    def frame(self, header: bytes, payload: Readable) -> bytes:
        """Return `length HDRLEN address payload`."""
        length = _bounded(payload, MAX_HEV + 3 - len(header))
        if len(header) > 255:
            raise ProtocolError("datagram-oversize", f"header of {len(header)} bytes does not fit 255")
        return b"".join((length.to_bytes(2), len(header).to_bytes(), header[3:], payload))

    def _take(self, data: bytes, at: int, datagrams: list[bytes]) -> int:
        if len(data) < at + 5:
            return 0
        start = _end_of_address(data, at + 3, data[at + 3])
        if start - at != data[at + 2]:
            raise ProtocolError(
                "frame-header", f"frame says its header has {data[at + 2]} bytes; its address makes it {start - at}"
            )
        end = start + (data[at] << 8 | data[at + 1])
        if len(data) < end:
            return 0
        datagrams.append(_ZEROS + data[at + 3 : end])
        return end


class UotFraming(Framing):
    """sing-box's UDP over TCP, version 1: an address of its own kind, length, payload."""

    __slots__ = ()

    def frame(self, header: bytes, payload: Readable) -> bytes:
        """Return `address length payload`; empty datagrams are legal here."""
        length = _bounded(payload, MAX_UOT, least=0)
        return b"".join((_UOT_KIND[header[3]], header[4:], length.to_bytes(2), payload))

    def _take(self, data: bytes, at: int, datagrams: list[bytes]) -> int:
        if len(data) < at + 2:
            return 0
        kind = _KIND_OF_UOT.get(data[at])
        if kind is None:
            raise ProtocolError("address-type", f"UoT address type {data[at]:#04x} is none of 0, 1, 2")
        middle = _end_of_address(data, at, kind)
        if len(data) < middle + 2:
            return 0
        end = middle + 2 + (data[middle] << 8 | data[middle + 1])
        if len(data) < end:
            return 0
        datagrams.append(b"".join((_ZEROS, kind.to_bytes(), data[at + 1 : middle], data[middle + 2 : end])))
        return end


class Uot2Framing(UotFraming):
    """UDP over TCP, version 2, the client's end: a request goes in front of the first frame.

    Its address says where the first datagram goes, as sing's own client has it: sing-box chooses a route by it, and
    has no socket of the other IP version from then on. The frames have addresses of their own (isConnect = 0).
    """

    __slots__ = ("_has_asked",)

    def __init__(self) -> None:
        super().__init__()
        self._has_asked = False

    def frame(self, header: bytes, payload: Readable) -> bytes:
        """Return the frame; the first one with the request in front."""
        frame = super().frame(header, payload)
        if self._has_asked:
            return frame
        self._has_asked = True
        return b"\x00" + header[3:] + frame


class Uot2ServerFraming(UotFraming):
    """UDP over TCP, version 2, the server's end: the client's request says whether frames have addresses."""

    __slots__ = ("_connected_to", "_has_request")

    def __init__(self) -> None:
        super().__init__()
        self._has_request = False
        self._connected_to = b""  #: header of the one peer; empty when frames have addresses

    def frame(self, header: bytes, payload: Readable) -> bytes:
        """Return the frame as the client asked for it."""
        if not self._connected_to:
            return super().frame(header, payload)
        return b"".join((_bounded(payload, MAX_UOT, least=0).to_bytes(2), payload))

    def _take(self, data: bytes, at: int, datagrams: list[bytes]) -> int:
        if not self._has_request:
            address = parse_address(data, at + 1)
            if address is None:
                return 0
            end = address[2]
            if data[at]:  # any non-zero byte reads as true
                self._connected_to = _ZEROS + data[at + 1 : end]
            self._has_request = True
            return end
        if not self._connected_to:
            return super()._take(data, at, datagrams)
        if len(data) < at + 2:
            return 0
        end = at + 2 + (data[at] << 8 | data[at + 1])
        if len(data) < end:
            return 0
        datagrams.append(self._connected_to + data[at + 2 : end])
        return end


def _is_nameless(message: bytes) -> bool:
    return len(message) >= 6 and message[3] == IPV4 and len(message) == 6 + (message[0] << 8 | message[1])


def _bounded(payload: Readable, most: int, least: int = 1) -> int:
    length = len(payload)
    if length < least:
        raise ProtocolError("datagram-empty", "an empty datagram has no frame in this dialect")
    if length > most:
        raise ProtocolError("datagram-oversize", f"datagram of {length} bytes does not fit {most}")
    return length


def _end_of_address(data: bytes, at: int, kind: int) -> int:
    """Return the offset behind the address at `at`, whose first two bytes are there."""
    if kind == IPV4:
        return at + 7
    if kind == IPV6:
        return at + 19
    if kind == NAME:
        return at + 4 + data[at + 1]
    raise ProtocolError("address-type", f"address type {kind:#04x} is none of 1 (IPv4), 3 (name), 4 (IPv6)")
