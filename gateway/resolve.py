"""NameLookup: the proxy's addresses, looked up in a process of its own, because getaddrinfo cannot be hurried.

numeric    known at once, for ever
a name     looked up before the workers start (waited for at most 2 s), every five minutes, and when the proxy is
           unreachable; a failure keeps the old addresses and is tried again with back-off
"""

import ipaddress
import logging
import socket
import time
from collections.abc import Callable
from typing import Final

from gateway.loop import EventLoop, Timer, wait_readable
from gateway.process import Child, describe
from ipc.channel import Channel, ChannelClosed, Message

log = logging.getLogger("ringway")

Addresses = list[tuple[str, int]]
Fork = Callable[[str, Callable[[Channel], None]], Child]  #: (label, main) → a short-lived child

FIRST_WAIT: Final = 2.0  #: seconds that the start waits for a name
REFRESH: Final = 300.0  #: seconds; names move, and getaddrinfo tells no time to live
AT_MOST_EVERY: Final = 10.0  #: seconds between lookups that somebody asks for
BACK_OFF: Final = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)  #: seconds after failures
GIVE_UP: Final = 30.0  #: seconds for one lookup
MAX_ADDRESSES: Final = 16  #: of one name; more do not fit one attempt to connect


class NameLookup:
    """Keeps the addresses of one host; `addresses` is empty while none is known."""

    def __init__(
        self, loop: EventLoop, host: str, port: int, *, fork: Fork, on_change: Callable[[Addresses], None]
    ) -> None:
        """Look `host` up through children made by `fork`; `on_change` gets addresses that differ from the last ones."""
        self.addresses: Addresses = []
        self._loop = loop
        self._host = host
        self._port = port
        self._fork = fork
        self._on_change = on_change
        self._numeric = is_numeric(host)
        if self._numeric:
            self.addresses = [(host, port)]
        self._child: Child | None = None
        self._watched = False  # the child stands in the loop
        self._started_at = 0.0
        self._failures = 0
        self._timer: Timer | None = None

    # -- before the loop runs --

    def begin(self) -> None:
        """Start the first lookup; `wait` ends it."""
        if not self._numeric:
            self._start()

    def wait(self) -> Addresses:
        """Wait for the first lookup until FIRST_WAIT after its start; return what is known, maybe nothing."""
        if self._child is None:
            return self.addresses
        if wait_readable(self._child.pidfd, self._started_at + FIRST_WAIT - time.monotonic()):
            self._finish(self._child, first=True)
        else:
            log.warning("looking up the proxy %s takes long; starting without its address", self._host)
            self._watch()
        return self.addresses

    # -- in the loop --

    def refresh(self) -> None:
        """Look the name up again, because the proxy cannot be reached; not more often than AT_MOST_EVERY."""
        if not self._numeric and self._child is None and time.monotonic() - self._started_at >= AT_MOST_EVERY:
            self._start()
            self._watch()

    def close(self) -> None:
        """End a lookup that is under way."""
        if self._timer is not None:
            self._timer.cancel()
        if self._child is not None:
            child, self._child = self._child, None
            self._loop.unregister(child.pidfd)
            child.end()

    def close_in_child(self) -> None:
        """Close the descriptors of the lookup in a forked process."""
        if self._child is not None:
            self._child.close()

    def _start(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._started_at = time.monotonic()
        try:
            self._child = self._fork("lookup", lambda channel: channel.send(look_up(self._host, self._port)))
        except OSError as error:
            self._learn({"failed": describe(error)}, True)

    def _watch(self) -> None:
        child = self._child
        if child is None:
            return
        self._loop.register(child.pidfd, lambda: self._finish(child))
        self._timer = self._loop.call_later(GIVE_UP, child.kill)

    def _finish(self, child: Child, first: bool = False) -> None:
        if child.reap() is None:
            return
        try:
            answer = child.channel.receive()
        except (ChannelClosed, ValueError):
            answer = None
        if self._timer is not None:
            self._timer.cancel()
        self._loop.unregister(child.pidfd)
        child.close()
        self._child = None
        self._learn(answer or {"failed": "no answer"}, first)

    def _learn(self, answer: Message, first: bool) -> None:
        found = [(str(host), int(port)) for host, port in answer.get("addresses", ())]
        if found:
            if self._failures:
                log.warning("the name of the proxy, %s, resolves again", self._host)
            self._failures = 0
            changed, self.addresses = set(found) != set(self.addresses), found
            self._timer = self._loop.call_later(REFRESH, self._again)
            if changed and not first:
                self._on_change(found)
            return
        if not self._failures:
            kept = "; keeping its last addresses" if self.addresses else ""
            log.warning("the name of the proxy, %s, does not resolve: %s%s", self._host, answer.get("failed"), kept)
        delay = BACK_OFF[min(self._failures, len(BACK_OFF) - 1)]
        self._failures += 1
        self._timer = self._loop.call_later(delay, self._again)

    def _again(self) -> None:
        if self._child is None:
            self._start()
            self._watch()


def is_numeric(host: str) -> bool:
    """Tell whether a host is an address already, a zone ("fe80::1%eth0") included."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def look_up(host: str, port: int) -> Message:
    """Return {"addresses": [(host, port), …]}, best first, or {"failed": reason}; takes as long as it takes."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return {"failed": error.strerror or str(error)}
    except UnicodeError:
        return {"failed": "it is not a valid host name"}
    numeric = [address[:2] for _family, _type, _protocol, _canonical, address in found]
    return {"addresses": list(dict.fromkeys(numeric))[:MAX_ADDRESSES]}
