"""Which sockets are ready: epoll where there is one, else the best of `selectors` (macOS: kqueue).

Level-triggered. Nearly every event is answered by one read that empties the socket, so there is nothing that
edges would save; a flow that cannot be written asks for other events, and one that has more to read is reported again
after all others had their turn, which is fairness for free.
"""

import select
import selectors
import sys
from collections.abc import Callable
from typing import Final, Protocol

READ: Final = 1  # EPOLLIN
WRITE: Final = 4  # EPOLLOUT
FAILED: Final = 0x18  # EPOLLERR | EPOLLHUP: reported whether asked for or not

Handler = Callable[[int], None]  #: is given what is ready: READ, WRITE, FAILED

MAX_EVENTS: Final = 256  # a breath; after it the dead are buried and the clock is looked at


class Poller(Protocol):
    """Descriptors, what each waits for, and whom to call."""

    handlers: dict[int, Handler]  #: replace an entry to hand a descriptor over

    def add(self, fd: int, interest: int, handler: Handler) -> None:
        """Call `handler` when `fd` is ready for `interest`."""

    def change(self, fd: int, interest: int) -> None:
        """Wait for something else; for 0, only for failures."""

    def mute(self, fd: int) -> None:
        """Report nothing of `fd`, not even failures, until the next `change`."""

    def forget(self, fd: int) -> None:
        """Drop a descriptor that is about to be closed."""

    def wait(self, timeout: float | None) -> list[tuple[int, int]]:
        """Return descriptors with what they are ready for, after at most `timeout` seconds."""

    def close(self) -> None:
        """Give back what the poller itself holds."""


if sys.platform == "linux":

    class EpollPoller:
        """The Poller of Linux."""

        def __init__(self) -> None:
            self.handlers: dict[int, Handler] = {}
            self._epoll = select.epoll()

        def add(self, fd: int, interest: int, handler: Handler) -> None:
            self._epoll.register(fd, interest)
            self.handlers[fd] = handler

        def change(self, fd: int, interest: int) -> None:
            try:
                self._epoll.modify(fd, interest)
            except FileNotFoundError:  # it was muted
                self._epoll.register(fd, interest)

        def mute(self, fd: int) -> None:
            self._epoll.unregister(fd)

        def forget(self, fd: int) -> None:
            del self.handlers[fd]  # close() takes it out of the epoll

        def wait(self, timeout: float | None) -> list[tuple[int, int]]:
            return self._epoll.poll(timeout, MAX_EVENTS)

        def close(self) -> None:
            self._epoll.close()


class PortablePoller:
    """The Poller of other systems."""

    def __init__(self) -> None:
        self.handlers: dict[int, Handler] = {}
        self._selector = selectors.DefaultSelector()

    def add(self, fd: int, interest: int, handler: Handler) -> None:
        self.handlers[fd] = handler
        self.change(fd, interest)

    def change(self, fd: int, interest: int) -> None:
        wanted = (selectors.EVENT_READ if interest & READ else 0) | (selectors.EVENT_WRITE if interest & WRITE else 0)
        registered = fd in self._selector.get_map()
        if not wanted:
            self.mute(fd)
        elif registered:
            self._selector.modify(fd, wanted)
        else:
            self._selector.register(fd, wanted)

    def mute(self, fd: int) -> None:
        if fd in self._selector.get_map():
            self._selector.unregister(fd)

    def forget(self, fd: int) -> None:
        del self.handlers[fd]
        self.mute(fd)

    def wait(self, timeout: float | None) -> list[tuple[int, int]]:
        return [
            (key.fd, (READ if ready & selectors.EVENT_READ else 0) | (WRITE if ready & selectors.EVENT_WRITE else 0))
            for key, ready in self._selector.select(timeout)
        ]

    def close(self) -> None:
        self._selector.close()


def new_poller(portable: bool) -> Poller:
    """Return this system's Poller; with `portable`, the one that runs everywhere."""
    if sys.platform == "linux" and not portable:
        return EpollPoller()
    return PortablePoller()
