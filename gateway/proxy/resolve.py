"""Names to addresses without holding up the loop: getaddrinfo in a few threads, answers handed out by the loop."""

import encodings.idna  # noqa: F401  getaddrinfo's; imported before rights are dropped: later it might not be readable
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

Address = tuple[int, str]  #: family, and the address as text
Answer = Callable[[list[Address]], None]  #: is given the addresses in the order to try; none if there are none

MAX_THREADS: Final = 16  # a dead DNS server holds each for up to 30 s; more names than this wait in line
MAX_ADDRESSES: Final = 4  # of a name: each gets its share of the connect timeout
MAX_REMEMBERED: Final = 4096
REMEMBERED_FOR: Final = 10.0  # seconds; getaddrinfo tells no TTL, and a browser asks for one name many times at once


def parse_literal(name: str) -> Address | None:
    """Return the address that `name` spells out, if it does."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, name)
        except (OSError, ValueError):
            continue
        return family, name
    return None


class Resolver:
    """Ask for names in the loop's thread; the answers come in that thread as well, out of `deliver`."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """Take the call that makes the loop run `deliver`; it must be safe from any thread."""
        self._wake = wake
        self._questions: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._answers: deque[tuple[str, list[Address]]] = deque()
        self._asking: dict[str, list[Answer]] = {}
        self._remembered: dict[str, tuple[float, list[Address]]] = {}
        self._threads = 0

    def lookup(self, name: str, answer: Answer) -> None:
        """Call `answer` with the addresses of `name`: at once if they are known, else later."""
        literal = parse_literal(name)
        if literal:
            answer([literal])
            return
        remembered = self._remembered.get(name)
        if remembered and remembered[0] > time.monotonic():
            answer(list(remembered[1]))
            return
        waiting = self._asking.setdefault(name, [])
        waiting.append(answer)
        if len(waiting) > 1:
            return
        if self._threads < min(MAX_THREADS, len(self._asking)):
            self._threads += 1
            # Daemons: a getaddrinfo that hangs must not hold up the end of the process.
            threading.Thread(target=self._work, name=f"resolver-{self._threads}", daemon=True).start()
        self._questions.put(name)

    def deliver(self) -> None:
        """Hand out the answers that have come."""
        while self._answers:
            name, addresses = self._answers.popleft()
            if addresses:
                if len(self._remembered) >= MAX_REMEMBERED:
                    self._remembered.clear()
                self._remembered[name] = (time.monotonic() + REMEMBERED_FOR, addresses)
            for answer in self._asking.pop(name, ()):
                answer(list(addresses))

    def close(self) -> None:
        """Let the threads end; nobody gets an answer any more."""
        self._asking.clear()
        for _ in range(self._threads):
            self._questions.put(None)
        self._threads = 0

    def _work(self) -> None:
        while (name := self._questions.get()) is not None:
            self._answers.append((name, _resolve(name)))
            self._wake()


def _resolve(name: str) -> list[Address]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, ValueError):  # unknown, or not even a name: UnicodeError, embedded zeros
        return []
    addresses = dict.fromkeys((int(family), str(sockaddr[0])) for family, _, _, _, sockaddr in found)
    return list(addresses)[:MAX_ADDRESSES]
