"""EventLoop: the supervisor's epoll, its timers and its signals; one thread, asleep while nothing happens."""

import heapq
import itertools
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType
from typing import Any, Self

Callback = Callable[[], object]

READ = select.EPOLLIN
WRITE = select.EPOLLOUT


class Timer:
    """A call that is due at a moment."""

    __slots__ = ("callback", "due_at")

    def __init__(self, due_at: float, callback: Callback) -> None:
        self.due_at = due_at  #: monotonic seconds
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        """Forget the call; harmless when it was made already."""
        self.callback = None


class EventLoop:
    """Calls back when a descriptor is ready, when a timer is due, and when a signal was noted."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callback] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()  # timers of one moment keep their order, and are never compared
        self._wake: tuple[socket.socket, socket.socket] | None = None
        self._previous: dict[int, Any] = {}
        self.wakeups = 0  #: times that the loop woke, for the test that says an idle one does not

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # -- descriptors --

    def register(self, fd: int, callback: Callback, events: int = READ) -> None:
        """Call back whenever the descriptor is ready; it must not be registered yet."""
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def modify(self, fd: int, callback: Callback, events: int) -> None:
        """Change what a registered descriptor is waited for."""
        self._epoll.modify(fd, events)
        self._callbacks[fd] = callback

    def unregister(self, fd: int) -> None:
        """Let go of a descriptor, before it is closed; harmless when it is not registered."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    # -- timers --

    def call_later(self, delay: float, callback: Callback) -> Timer:
        """Call once, `delay` seconds from now."""
        timer = Timer(time.monotonic() + delay, callback)
        heapq.heappush(self._timers, (timer.due_at, next(self._order), timer))
        return timer

    # -- signals --

    def catch(self, signals: Iterable[signal.Signals], callback: Callable[[signal.Signals], object]) -> None:
        """Note these signals from now on, and call back from the loop. Main thread only; `close` undoes it."""
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        self._wake = (reader, writer)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in signals:
            self._previous[number] = signal.signal(number, _noted)

        def read() -> None:
            try:
                numbers = reader.recv(64)
            except BlockingIOError:
                return
            for number in numbers:
                if number in self._previous:
                    callback(signal.Signals(number))

        self.register(reader.fileno(), read)

    # -- running --

    def run_once(self, limit: float | None = None) -> None:
        """Sleep until something is due or ready, at most `limit` seconds, and make the calls for it."""
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        timeout = limit
        if self._timers:
            due_in = max(self._timers[0][0] - time.monotonic(), 0.0)
            timeout = due_in if limit is None else min(limit, due_in)
        ready = self._epoll.poll(timeout)
        self.wakeups += 1
        for fd, _events in ready:
            # A callback before this one may have unregistered it.
            callback = self._callbacks.get(fd)
            if callback is not None:
                callback()
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            due, timer.callback = timer.callback, None
            if due is not None:
                due()

    # -- the end --

    def close(self) -> None:
        """Give the signals back to who had them, and close the descriptors of the loop (not the registered ones)."""
        if self._wake is not None:
            signal.set_wakeup_fd(-1)
            for number, previous in self._previous.items():
                signal.signal(number, previous)
            self._previous.clear()
        self.close_in_child()

    def close_in_child(self) -> None:
        """Close the loop's descriptors in a forked process; the registrations of the parent stay as they are."""
        if self._wake is not None:
            for end in self._wake:
                end.close()
            self._wake = None
        self._epoll.close()
        self._callbacks.clear()
        self._timers.clear()


def _noted(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: the interpreter has written the number to the wake-up descriptor."""


def wait_readable(fd: int, timeout: float) -> bool:
    """Wait for one descriptor outside of any loop; tell whether it became readable within `timeout` seconds."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(timeout, 0.0) * 1000))


def has_ended(fd: int) -> bool:
    """Tell whether the other end of a descriptor is gone, or the device behind it."""
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))
