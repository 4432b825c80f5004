"""Upstream: sockets towards the proxy (or, for direct://, the targets), and whether the proxy is there."""

import socket
from collections.abc import Callable

from workers.settings import Settings

Address = tuple[str, int]


class Upstream:
    """Makes sockets with the mark and interface of the configuration, and knows which proxy address is in use."""

    def __init__(self, settings: Settings, report: Callable[[dict[str, str]], None]) -> None:
        """`report` takes the events proxy-down and proxy-up for the supervisor."""
        self.direct = settings.scheme == "direct"
        self._mark = settings.fwmark
        self._interface = settings.interface.encode()
        self._report = report
        self._is_down = False
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

    def open(self, family: int, kind: int) -> socket.socket:
        """Return a new non-blocking socket that leaves by the configured way; OSError when there is none."""
        opened = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        if self._mark or self._interface:
            try:
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
