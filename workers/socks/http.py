r"""The client's side of HTTP CONNECT, without I/O (RFC 9110, 9.3.6; RFC 9112).

    CONNECT host:port HTTP/1.1 \r\n Host: host:port \r\n [Proxy-Authorization: Basic …\r\n] \r\n
    HTTP/1.x 2xx … \r\n fields \r\n \r\n   first octets of the tunnel

What a success says in its fields means nothing: Content-Length and Transfer-Encoding are to be ignored (RFC 9110,
9.3.6), and pproxy says "Connection: close". What is sent before the answer is lost by some proxies (gost 2, privoxy),
so nothing is. A library would cost more than the rest of a connection: h11 checks this parser in the tests.
"""

import re
import socket
from base64 import b64encode
from typing import Final

from workers.socks.handshake import NOWHERE, Handshake, Refused
from workers.socks.wire import (
    COMMAND_NOT_SUPPORTED,
    CONNECT,
    GENERAL_FAILURE,
    HOST_UNREACHABLE,
    NOT_ALLOWED,
    TTL_EXPIRED,
    Host,
    ProtocolError,
)

MAX_HEAD: Final = 16 * 1024  #: octets of the heads before the tunnel begins, 1xx answers among them
#: the second is for proxies; the first is what tinyproxy 1.11 says to a wrong password
UNAUTHORIZED: Final = (401, 407)
#: status → REP; other 5xx: the proxy could not reach the host, other codes: general failure
REPLIES: Final = {
    400: GENERAL_FAILURE,
    403: NOT_ALLOWED,
    405: COMMAND_NOT_SUPPORTED,
    451: NOT_ALLOWED,
    501: COMMAND_NOT_SUPPORTED,
    504: TTL_EXPIRED,
}
_BEGINNING: Final = b"HTTP/1."
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})(?: [^\r\n\0]*)?\r?\n")
# A line may end with LF alone (RFC 9112, 2.2), so an empty one may as well.
_END_OF_HEAD: Final = re.compile(rb"\n\r?\n")


def basic_credentials(username: str, password: str) -> str:
    """Return what stands behind "Proxy-Authorization: " (RFC 7617, with UTF-8)."""
    return "Basic " + b64encode(f"{username}:{password}".encode("utf-8", "surrogateescape")).decode()


def http_handshake(command: int, host: Host, port: int, credentials: str = "") -> Handshake:
    """Ask for a tunnel; `credentials` as basic_credentials() returns them. There is nothing but CONNECT."""
    if command != CONNECT:
        return Refused(COMMAND_NOT_SUPPORTED)
    if isinstance(host, str):
        name = host.encode("idna").decode()
    elif len(host) == 4:
        name = socket.inet_ntop(socket.AF_INET, host)
    else:
        name = f"[{socket.inet_ntop(socket.AF_INET6, host)}]"
    return HttpHandshake(f"{name}:{port}", credentials)


class HttpHandshake:
    """One request; see workers.socks.handshake.Handshake."""

    __slots__ = ("_authorized", "_held", "_searched", "_taken", "bound", "done", "first_bytes", "reply", "surplus")

    requested: bool = True

    def __init__(self, target: str, credentials: str) -> None:
        authorization = f"Proxy-Authorization: {credentials}\r\n" if credentials else ""
        self.first_bytes = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{authorization}\r\n".encode("ascii")
        self._authorized = bool(credentials)
        self._held = b""  # the beginning of an answer
        self._searched = 0  # octets of it that hold no end of a head
        self._taken = 0  # octets of heads that are over: 1xx
        self.done = False
        self.reply = -1
        self.bound: tuple[Host, int] | None = None
        self.surplus = b""

    def receive(self, data: bytes) -> bytes:
        """Take the answer, in any pieces; there is never anything more to send."""
        if self.done:
            if self.bound is not None:
                self.surplus += data
            return b""
        data = self._held + data
        while True:
            if not data.startswith(_BEGINNING[: len(data)]):
                raise ProtocolError("http-status-line", "the proxy answers what is no HTTP/1.x: no HTTP proxy")
            end = _END_OF_HEAD.search(data, self._searched)
            if self._taken + (end.end() if end else len(data)) > MAX_HEAD:
                raise ProtocolError("http-head-long", f"the proxy's answer has a head of more than {MAX_HEAD} octets")
            if end is None:
                self._held = bytes(data)
                self._searched = max(0, len(data) - 2)
                return b""
            line = _STATUS_LINE.match(data)
            if line is None:
                raise ProtocolError("http-status-line", "the proxy's answer begins with no status line of HTTP/1.x")
            status = int(line[1])
            rest = bytes(data[end.end() :])
            if status >= 200:
                self._answered(status, rest)
                return b""
            # An interim answer: the one that counts follows (RFC 9110, 15.2).
            self._taken += end.end()
            self._searched = 0
            data = rest

    def _answered(self, status: int, rest: bytes) -> None:
        self._held = b""
        if status in UNAUTHORIZED:
            verdict = "refuses the username or password" if self._authorized else "wants a username and password"
            raise ProtocolError("password-refused", f"the proxy {verdict} ({status})")
        self.done = True
        if status < 300:
            self.reply = 0
            self.bound = NOWHERE
            self.surplus = rest
        else:
            self.reply = REPLIES.get(status, HOST_UNREACHABLE if status >= 500 else GENERAL_FAILURE)
