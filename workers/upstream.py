"""Upstream: the way out: sockets towards the proxy (or, for direct://, the targets), what is asked of it and how, and
whether it is there."""

import socket
from collections.abc import Callable
from functools import partial
from typing import Final

from workers.settings import Settings
from workers.socks.client import SocksHandshake
from workers.socks.handshake import Handshake, Refused
from workers.socks.http import basic_credentials, http_handshake
from workers.socks.socks4 import socks4_handshake
from workers.socks.wire import CONNECTION_REFUSED, Host, ProtocolError

Address = tuple[str, int]

TCP_FASTOPEN_CONNECT: Final = 30  # linux/tcp.h; Python 3.11 has no name for it

#: reasons of ProtocolError that mean: not with these credentials
AUTHENTICATION_REASONS: Final = ("method-refused", "password-refused")


class Upstream:
    """Makes sockets with the mark and interface of the configuration, and knows which proxy address is in use."""

    def __init__(self, settings: Settings, report: Callable[[dict[str, str]], None]) -> None:
        """`report` takes events for the supervisor: proxy-down, proxy-up, proxy-error, and what was learned of it."""
        scheme = settings.scheme
        self.direct = scheme == "direct"
        self.rejects = scheme == "reject"  #: everything is refused, nobody is asked
        self.associates = scheme in ("socks5", "socks5h")  #: UDP ASSOCIATE is worth asking for
        #: (command, host, port) → what to say to the proxy; one that is `done` at once has refused without asking.
        #: ValueError: the host does not fit
        self.handshake: Callable[[int, Host, int], Handshake]
        self.pipelined = False  #: the whole handshake goes out at once
        self.fast_open = settings.tcp_fast_open  #: a connection that stands may still be refused
        self._credentials = scheme, settings.username, settings.password
        self.use_pipelining(settings.pipelined)
        self._mark = settings.fwmark
        self._interface = settings.interface.encode()
        self._report = report
        self._is_down = False
        self._protocol_error = ""  # the last reason that was reported
        self._addresses: list[Address] = []
        self.proxy: Address | None = None  #: numeric host and port; None = its name is not resolved (or direct)
        self.proxy_family = socket.AF_INET
        self.use_addresses(settings.proxy_addresses)

    def use_addresses(self, addresses: list[Address]) -> None:
        """Take what the proxy's name was resolved to, best first."""
        self._addresses = addresses
        if addresses and self.proxy not in addresses:
            self._use(addresses[0])

    def _use(self, address: Address) -> None:
        self.proxy = address
        self.proxy_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET

    def use_pipelining(self, pipelined: bool) -> None:
        """Take what is known of the proxy: whether it reads what comes before it has answered."""
        self.pipelined = pipelined and self.associates
        self.handshake = handshakes(*self._credentials, self.pipelined)

    def pipelining_failed(self) -> None:
        """Note that the proxy did not answer a handshake in one go; the next ones go step by step."""
        if self.pipelined:
            self.use_pipelining(False)
            self._report({"event": "pipelining-failed"})

    def warm_handshake(self) -> SocksHandshake | None:
        """Return a handshake that stops before its request; None: the protocol has nothing to say before."""
        scheme, username, password = self._credentials
        return SocksHandshake.warm(username, password) if scheme in ("socks5", "socks5h") else None

    def open(self, family: int, kind: int, fast: bool = True) -> socket.socket:
        """Return a new non-blocking socket that leaves by the configured way; OSError when there is none.

        `fast`: TCP Fast Open, if the configuration wants it.
        """
        opened = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        if self._mark or self._interface or self.fast_open:
            try:
                if self.fast_open and fast and kind == socket.SOCK_STREAM and not self.direct:
                    opened.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
                if self._mark:
                    opened.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, self._mark)
                if self._interface:
                    opened.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self._interface)
            except OSError:
                opened.close()
                raise
        return opened

    def failed(self, reason: str) -> None:
        """Note that the proxy could not be reached; the next connection tries its next address."""
        if self.direct:
            return
        if len(self._addresses) > 1 and self.proxy in self._addresses:
            following = self._addresses.index(self.proxy) + 1
            self._use(self._addresses[following % len(self._addresses)])
        if not self._is_down:
            self._is_down = True
            self._report({"event": "proxy-down", "reason": reason})

    def answered(self) -> None:
        """Note that the proxy is there."""
        if self._is_down:
            self._is_down = False
            self._report({"event": "proxy-up"})

    def udp_learned(self, mode: str) -> None:
        """Report what was learned of datagrams: a mode, or "" when the proxy was asked for them in vain."""
        self._report({"event": "udp-found", "udp": mode} if mode else {"event": "udp-failed"})

    def broken(self, error: ProtocolError) -> bool:
        """Report what the proxy answered that is no answer, each kind once in a row; True: it refuses us."""
        if error.reason != self._protocol_error:
            self._protocol_error = error.reason
            self._report({"event": "proxy-error", "text": str(error)})
        return error.reason in AUTHENTICATION_REASONS


def handshakes(
    scheme: str, username: str | None, password: str | None, pipelined: bool = False
) -> Callable[[int, Host, int], Handshake]:
    """Return what makes the handshakes of a scheme; `pipelined` is for SOCKS5."""
    if scheme in ("socks4", "socks4a"):
        return partial(socks4_handshake, user=username or "", names=scheme == "socks4a")
    if scheme == "http":
        credentials = "" if username is None else basic_credentials(username, password or "")
        return partial(http_handshake, credentials=credentials)
    if scheme == "reject":
        return lambda command, host, port: Refused(CONNECTION_REFUSED)
    return partial(SocksHandshake, username=username, password=password, pipelined=pipelined)
