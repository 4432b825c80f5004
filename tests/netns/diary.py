"""Diary: a socket whose every outcome is written down in words, so that two runs over two ways can be compared.

A scenario (scenarios.py, scenarios_of_resets.py) is a class with a `client` and, unless nobody listens, a `server`.
Each gets its `End`; `Steps` are agreements between the two in which the network has no part.
"""

import errno
import fcntl
import hashlib
import select
import socket
import struct
import threading
from collections.abc import Callable
from typing import Final

from tests.netns.traffic import stream
from tests.netns.world import eventually

WITHIN: Final = 10.0  # seconds; what takes longer is written down as TIMEOUT
TEXT: Final = bytes(range(256)) * 20  #: more than one segment, and less than any buffer
_FIONREAD: Final = 0x541B
_MASKS: Final = (
    (select.POLLIN, "IN"), (select.POLLPRI, "PRI"), (select.POLLOUT, "OUT"), (select.POLLERR, "ERR"),
    (select.POLLHUP, "HUP"), (select.POLLRDHUP, "RDHUP"),
)  # fmt: skip


class End:
    """One end of the connection, and its diary."""

    def __init__(self, make: Callable[[], socket.socket], address: tuple[str, int] = ("", 0)) -> None:
        self._make = make
        self.address = address  #: where a client connects to
        self.diary: list[str] = []
        self.renew()

    def renew(self) -> None:
        """Go on with a new socket."""
        self.socket = self._make()
        self.socket.settimeout(WITHIN)

    def _note(self, what: str, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self.diary.append(f"{what}: {_name(error)}")
        else:
            self.diary.append(what)

    def connect(self, timeout: float = WITHIN) -> None:
        self.socket.settimeout(timeout)
        self._note("connect", lambda: self.socket.connect(self.address))
        self.socket.settimeout(WITHIN)

    def send(self, data: bytes) -> None:
        self._note(f"send {len(data)}", lambda: self.socket.sendall(data))

    def send_stream(self, count: int) -> None:
        """Send that much, or less if an error comes in between: how much less is chance, and not written down."""
        try:
            for piece in stream(count):
                self.socket.sendall(piece)
        except OSError as error:
            self.diary.append(f"send {count}: {_name(error)} in the middle")
        else:
            self.diary.append(f"send {count}")

    def receive(self, count: int) -> None:
        """Read so many bytes, or to the end or an error before."""
        digest = hashlib.sha256()
        received = 0
        end = ""
        while received < count:
            try:
                data = self.socket.recv(min(65536, count - received))
            except OSError as error:
                end = f", {_name(error)}"
                break
            if not data:
                end = ", end"
                break
            digest.update(data)
            received += len(data)
        self.diary.append(f"receive: {received} bytes {digest.hexdigest()[:8]}{end}")

    def receive_all(self) -> None:
        self.receive(1 << 40)

    def poll(self, until: int) -> None:
        """Write down the poll mask once it has all the bits of `until`."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN | select.POLLPRI | select.POLLOUT | select.POLLRDHUP)

        def mask() -> int:
            ready = poll.poll(0)
            return ready[0][1] if ready else 0

        eventually(lambda: mask() & until == until, f"poll has {_names(until)}; diary: {self.diary}", WITHIN)
        self.diary.append(f"poll: {_names(mask())}")

    def arrived(self, count: int) -> None:
        """Wait until so many bytes can be read, without reading them."""

        def readable() -> int:
            return int(struct.unpack("i", fcntl.ioctl(self.socket, _FIONREAD, bytes(4)))[0])

        eventually(lambda: readable() >= count, f"{count} bytes arrive; diary: {self.diary}", WITHIN)

    def error(self) -> None:
        pending = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self.diary.append(f"SO_ERROR: {errno.errorcode[pending] if pending else 0}")

    def shutdown(self, how: int) -> None:
        self._note(f"shutdown {('RD', 'WR', 'RDWR')[how]}", lambda: self.socket.shutdown(how))

    def reset(self) -> None:
        """Close with SO_LINGER of zero: RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self.diary.append("close")
        self.socket.close()

    def option(self, level: int, name: int, value: int) -> None:
        self.socket.setsockopt(level, name, value)


class Steps:
    """Named moments; whoever waits for one fails after WITHIN seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: dict[str, threading.Event] = {}

    def _event(self, name: str) -> threading.Event:
        with self._lock:
            return self._events.setdefault(name, threading.Event())

    def done(self, name: str) -> None:
        self._event(name).set()

    def wait(self, name: str) -> None:
        assert self._event(name).wait(WITHIN), f"the other side never came to {name!r}"


def _name(error: OSError) -> str:
    return "TIMEOUT" if error.errno is None else errno.errorcode[error.errno]  # None: by the socket's own timeout


def _names(mask: int) -> str:
    return "|".join(name for bit, name in _MASKS if mask & bit) or "0"


class Scenario:
    """What the two do; the class's docstring says what it is about."""

    target: str = "host"  #: host, or unreachable, no-route, silent
    connections = 1  #: how many the server takes, one after the other
    accepts = True  #: the server's end is the connection, not the listener

    def client(self, end: End, steps: Steps) -> None:
        raise NotImplementedError

    server: Callable[[End, Steps], None] | None = None
