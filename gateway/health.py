"""ProxyHealth: whether the proxy can be reached, from what workers report and from a probe; said once a change."""

import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Hashable
from typing import Final

from gateway.loop import WRITE, EventLoop, Timer
from gateway.process import describe

log = logging.getLogger("ringway")

QUIET: Final = 10.0  #: seconds between two lines that say the proxy is unreachable, however it flaps
PROBE_AGAIN: Final = (1.0, 2.0, 5.0, 10.0, 30.0)  #: seconds; only while nobody but the probe knows that it is down


class ProxyHealth:
    """One opinion out of many: down when anybody says so, back when anybody who said so takes it back."""

    def __init__(self, loop: EventLoop, name: str, on_back: Callable[[], None] = lambda: None) -> None:
        """`on_back` is called when the proxy can be reached again."""
        self._loop = loop
        self._on_back = on_back
        self._name = name  # host:port, for the log
        self._reporters: set[Hashable] = set()  # who said that it is down
        self._reason = ""
        self._said = False  # the log has it as unreachable
        self._said_at = -QUIET
        self._timer: Timer | None = None
        self._error = ""

    @property
    def down(self) -> bool:
        """Whether somebody could not reach the proxy, and nobody has since."""
        return bool(self._reporters)

    def is_down(self, reporter: Hashable, reason: str) -> None:
        """Note that `reporter` could not reach the proxy."""
        self._reporters.add(reporter)
        self._reason = reason
        if self._said or self._timer is not None:
            return
        quiet_for = self._said_at + QUIET - time.monotonic()
        if quiet_for > 0:
            self._timer = self._loop.call_later(quiet_for, self._say_if_still_down)
        else:
            self._say_if_still_down()

    def is_up(self) -> None:
        """Note that somebody reached the proxy again."""
        was_down = self.down
        self._reporters.clear()
        if self._said:
            self._said = False
            log.warning("proxy %s is back", self._name)
        if was_down:
            self._on_back()

    def answers_wrong(self, error: str) -> None:
        """Say what the proxy answers instead of what it should; each kind once in a row, whoever saw it."""
        if error != self._error:
            self._error = error
            log.warning("proxy %s: %s", self._name, error)

    def forget(self, reporter: Hashable) -> None:
        """Note that a reporter died; its word counts until somebody knows better."""
        if reporter in self._reporters:
            self._reporters.discard(reporter)
            self._reporters.add(None)

    def only(self, reporters: set[Hashable]) -> bool:
        """Tell whether the proxy is down, and nobody else than these says so."""
        return bool(self._reporters) and self._reporters <= reporters

    def _say_if_still_down(self) -> None:
        self._timer = None
        if self._reporters and not self._said:
            self._said = True
            self._said_at = time.monotonic()
            log.warning("proxy %s is unreachable: %s; flows are refused until it is back", self._name, self._reason)


class ProxyProbe:
    """Connects to the proxy as a worker would, closes at once, and tells ProxyHealth how it went.

    At the start, so that a wrong address is seen before the first flow; then only while no worker can say "up",
    because none has said "down": workers report changes of what they saw themselves.
    """

    def __init__(
        self,
        loop: EventLoop,
        health: ProxyHealth,
        addresses: Callable[[], list[tuple[str, int]]],
        *,
        timeout: float,
        fwmark: int = 0,
        interface: str = "",
    ) -> None:
        """Probe what `addresses` returns at the time, first to last; `timeout` is for all of them, in seconds."""
        self._loop = loop
        self._health = health
        self._addresses = addresses
        self._timeout = timeout
        self._fwmark = fwmark
        self._interface = interface
        self._failures = 0
        self._waiting: list[tuple[str, int]] = []
        self._reason = ""
        self._socket: socket.socket | None = None
        self._timer: Timer | None = None

    def start(self) -> None:
        """Probe now, unless a probe is under way."""
        if self._socket is not None:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._waiting = list(self._addresses())
        self._reason = "its name has no address yet"
        self._timer = self._loop.call_later(self._timeout, self._timed_out)
        self._next()

    def close(self) -> None:
        """End a probe that is under way."""
        if self._timer is not None:
            self._timer.cancel()
        if self._socket is not None:
            self._loop.unregister(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def close_in_child(self) -> None:
        """Close the socket in a forked process."""
        if self._socket is not None:
            self._socket.close()

    def _next(self) -> None:
        while self._waiting:
            host, port = self._waiting.pop(0)
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            try:
                probe = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            except OSError as error:
                self._reason = describe(error)
                continue
            try:
                if self._fwmark:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, self._fwmark)
                if self._interface:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self._interface.encode() + b"\0")
                result = probe.connect_ex((host, port))
            except OSError as error:
                result = error.errno or errno.EIO
            if result in (0, errno.EINPROGRESS):
                self._socket = probe
                self._loop.register(probe.fileno(), self._connected, WRITE)
                return
            self._reason = os.strerror(result)
            probe.close()
        self._finish(False)

    def _connected(self) -> None:
        assert self._socket is not None
        probe, self._socket = self._socket, None
        self._loop.unregister(probe.fileno())
        result = probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        probe.close()
        if result == 0:
            self._finish(True)
        else:
            self._reason = os.strerror(result)
            self._next()

    def _timed_out(self) -> None:
        self.close()
        self._reason = f"no answer within {self._timeout:g} s"
        self._finish(False)

    def _finish(self, reached: bool) -> None:
        self.close()
        if reached:
            self._failures = 0
            if self._health.only({self, None}):
                self._health.is_up()
            return
        self._health.is_down(self, self._reason)
        delay = PROBE_AGAIN[min(self._failures, len(PROBE_AGAIN) - 1)]
        self._failures += 1
        self._timer = self._loop.call_later(delay, self._again)

    def _again(self) -> None:
        # A worker that said "down" will say "up", and it knows more: it speaks SOCKS.
        if self._health.only({self, None}):
            self.start()
        else:
            self._failures = 0
