"""The client's side of a SOCKS5 handshake, without I/O: bytes from the proxy in, bytes to the proxy out.

    handshake = SocksHandshake(CONNECT, address, port)
    send(handshake.first_bytes)
    while not handshake.done:
        send(handshake.receive(bytes that came))

    client                                   proxy              state that waits for it
    05 n methods                   ──►
                                   ◄──       05 method          _method
    01 n username n password       ──►                          (only if the method is 02)
                                   ◄──       01 status          _password
    05 command 00 address          ──►
                                   ◄──       05 REP 00 address  _reply

The state *is* a method; each returns early while bytes are missing. Every answer is awaited before the next
message goes out: servers that read greedily (gost, microsocks) lose what is pipelined; `pipelined` is for those that
are known not to. A connection that is kept warm stops after method and password (`warm`), until ask() gives it its
request. How the connection ends (EOF in the middle, or right after success) is the caller's to see.
"""

from collections.abc import Callable
from typing import Final

from workers.socks.wire import (
    NO_ACCEPTABLE_METHOD,
    NO_AUTHENTICATION,
    USERNAME_PASSWORD,
    VERSION,
    Host,
    ProtocolError,
    parse_address,
    write_address,
)

OFFER_NONE: Final = b"\x05\x01\x00"
OFFER_PASSWORD: Final = b"\x05\x01\x02"
OFFER_NONE_AND_PASSWORD: Final = b"\x05\x02\x00\x02"


class SocksHandshake:
    """Ask a SOCKS5 proxy for one command; without I/O, without a clock.

    `first_bytes` goes out as soon as the connection stands, then whatever `receive` returns. Once `done`, `reply` is
    the proxy's REP code; with REP 0 `bound` is BND.ADDR and BND.PORT, and `surplus` holds the bytes that came behind
    the reply (a server may speak first), which belong to the flow.
    """

    __slots__ = (
        "_credentials",
        "_held",
        "_pipelined",
        "_request",
        "_state",
        "bound",
        "done",
        "first_bytes",
        "ready",
        "reply",
        "requested",
        "surplus",
    )

    def __init__(
        self,
        command: int,
        address: Host,
        port: int,
        username: str | None = None,
        password: str | None = None,
        pipelined: bool = False,
    ) -> None:
        """Take the destination (for UDP ASSOCIATE: zeros of the control connection's family).

        Method 02 is offered only with a username: some servers pick it whenever it is there. `pipelined`: all three
        messages go out at once, with one method offered, for which one it would be is not known yet. ValueError if
        the address, or a username or password, does not fit its field.
        """
        self._request: bytes = b"\x05" + command.to_bytes() + b"\x00" + write_address(address, port)
        self._credentials: bytes
        self.first_bytes: bytes  #: the methods offered
        if username is None:
            self._credentials = b""
            self.first_bytes = OFFER_NONE
        else:
            self._credentials = b"\x01" + _field("username", username) + _field("password", password or "")
            self.first_bytes = OFFER_PASSWORD if pipelined else OFFER_NONE_AND_PASSWORD
        self._pipelined = pipelined
        if pipelined:
            self.first_bytes += self._credentials + self._request
        self.requested: bool = pipelined  #: the request has been handed out
        self.ready: bool = False  #: a warm connection that waits for its request
        self._held: bytes = b""  #: the beginning of an answer that is not complete, at most 261 bytes
        self._state: Callable[[SocksHandshake, bytes], bytes] = SocksHandshake._method
        self.done: bool = False  #: a reply has come
        self.reply: int = -1  #: its REP code
        self.bound: tuple[Host, int] | None = None  #: BND.ADDR and BND.PORT of a success
        self.surplus: bytes = b""  #: what came behind a success

    @classmethod
    def warm(cls, username: str | None = None, password: str | None = None) -> "SocksHandshake":
        """Return one that stops, `ready`, before the request, which ask() makes."""
        handshake = cls(0, b"\0\0\0\0", 0, username, password)
        handshake._request = b""
        return handshake

    def ask(self, command: int, address: Host, port: int) -> None:
        """Make the request of a `ready` handshake: `first_bytes` are to be sent. ValueError as in the constructor."""
        self._request = self.first_bytes = b"\x05" + command.to_bytes() + b"\x00" + write_address(address, port)
        self.ready = False
        self.requested = True

    @property
    def has_bare_reply(self) -> bool:
        """Tell whether a success may be complete but for its address: gost v1 leaves it out over IPv6."""
        return len(self._held) == 6 and self._held.startswith(b"\x05\x00\x00\x01")

    def receive(self, data: bytes) -> bytes:
        """Take bytes from the proxy, in any pieces; return what to send next, often nothing.

        Raises ProtocolError when the proxy speaks something else, or refuses method or password; then it is over.
        """
        if not data:
            return b""
        if self._held:
            data = self._held + data
        return self._state(self, data)

    def _method(self, data: bytes) -> bytes:
        if data[0] != VERSION:
            raise ProtocolError("socks-version", f"the proxy answers with version {data[0]}, not 5: no SOCKS5 proxy")
        if len(data) < 2:
            return self._hold(data)
        method = data[1]
        if method == NO_AUTHENTICATION and not (self._pipelined and self._credentials):
            return self._ask(data[2:])
        if method == USERNAME_PASSWORD and self._credentials:
            return self._next(SocksHandshake._password, self._credentials, data[2:])
        if method == NO_ACCEPTABLE_METHOD:
            raise ProtocolError("method-refused", "the proxy takes none of the authentication methods offered")
        raise ProtocolError("method-not-offered", f"the proxy chose method {method:#04x}, which was not offered")

    def _password(self, data: bytes) -> bytes:
        # The version is not judged: servers answer 01 01, 02 01, 05 01, 01 FF; only the second byte means something.
        if len(data) < 2:
            return self._hold(data)
        if data[1]:
            raise ProtocolError("password-refused", "the proxy refuses the username or password")
        return self._ask(data[2:])

    def _ask(self, rest: bytes) -> bytes:
        if not self._request:
            self._held = b""
            self._state = SocksHandshake._reply
            self.ready = True
            if rest:
                raise ProtocolError("socks-early", f"the proxy sent {len(rest)} octets before it was asked")
            return b""
        self.requested = True
        return self._next(SocksHandshake._reply, self._request, rest)

    def _reply(self, data: bytes) -> bytes:
        if data[0] != VERSION:
            raise ProtocolError("socks-version", f"the proxy replies with version {data[0]}, not 5")
        if len(data) < 2:
            return self._hold(data)
        if data[1]:  # a refusal says all in its code: servers cut the rest short, or echo a name
            self.reply = data[1]
            self.done = True
            self._held = b""
            self._state = SocksHandshake._ignored
            return b""
        address = parse_address(data, 3)
        if address is None:
            return self._hold(data)
        host, port, end = address
        self.reply = 0
        self.bound = (host, port)
        self.surplus = bytes(data[end:])
        self.done = True
        self._held = b""
        self._state = SocksHandshake._flow
        return b""

    def _flow(self, data: bytes) -> bytes:
        self.surplus += data
        return b""

    def _ignored(self, data: bytes) -> bytes:
        return b""

    def _hold(self, data: bytes) -> bytes:
        self._held = bytes(data)
        return b""

    def _next(self, state: Callable[["SocksHandshake", bytes], bytes], message: bytes, rest: bytes) -> bytes:
        self._held = b""
        self._state = state
        if self._pipelined:
            message = b""
        return message + state(self, rest) if rest else message


def _field(name: str, value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogateescape")
    if len(encoded) > 255:
        raise ValueError(f"{name} of {len(encoded)} bytes does not fit 255")
    return len(encoded).to_bytes() + encoded
