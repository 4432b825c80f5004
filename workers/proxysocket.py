"""ProxySocket: the proxy's end of one TCP flow: its socket, the text that waits for it, and how it ends.

    dialing ──► connected ──► finished (the client's FIN) ─┬─► closed
       │            └───────► at its end (the proxy's FIN) ┘     └ or it outlives the flow, while text waits
       └─ reset (RST), at any time, when the flow ends badly

`send` and `recv_into` are the socket's own, so that a relay's text costs no call more; each is None while it must not
be called.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from select import EPOLLERR
from struct import pack
from typing import TYPE_CHECKING, Final

from workers import counts

if TYPE_CHECKING:
    from workers.dial import Dial
    from workers.flows import TcpFlows

LINGER_SECONDS: Final = 60.0  #: without progress, for text that outlives its flow; Linux tcp_fin_timeout
RESET_ON_CLOSE: Final = pack("ii", 1, 0)  # struct linger: close() sends RST


class ProxySocket:
    """Made before it is connected; edge-triggered and non-blocking from then on."""

    __slots__ = (
        "_flows",
        "_moved_at",
        "_socket",
        "at_end",
        "backlog",
        "broken",
        "dial",
        "finished",
        "recv_into",
        "send",
    )

    def __init__(self, flows: TcpFlows, dial: Dial) -> None:
        self._flows = flows
        self._socket: socket.socket | None = None
        self._moved_at = 0.0
        self.dial: Dial | None = dial  #: who connects it; None = done
        self.send: Callable[[memoryview | bytes], int] | None = None  #: None = text must wait
        self.recv_into: Callable[[memoryview], int] | None = None  #: None = there is nothing to read from
        self.backlog = bytearray()  #: text that the socket did not take yet; the receive window bounds it
        self.finished = False  #: no text comes behind the backlog: the client's FIN was taken
        self.at_end = False  #: the proxy's FIN was taken
        self.broken = False  #: it failed while text was sent; what can still be read is not followed by a clean end

    @property
    def is_open(self) -> bool:
        """Whether the socket is there, or will be."""
        return self._socket is not None or self.dial is not None

    def connected(self, opened: socket.socket) -> None:
        """Take over the socket that the dial has connected."""
        self.dial = None
        self._socket = opened
        self.recv_into = opened.recv_into
        if not self.backlog:
            self.send = opened.send

    # ── text ────────────────────────────────────────────────────────────────────────────────────────────────────

    def wait(self, text: memoryview | bytes) -> int:
        """Keep a copy of text that the socket does not take now; return its octets, 0 if nobody will ever want it."""
        if self.broken or not self.is_open:
            return 0
        self.send = None
        self.backlog += text
        return len(text)

    def send_backlog(self) -> int:
        """Send what waits; return how many octets the socket took. OSError: the socket has failed."""
        opened = self._socket
        sent = 0
        if opened is None:
            return 0
        backlog = self.backlog
        while backlog:
            try:
                taken = opened.send(backlog)
            except BlockingIOError:
                return sent
            del backlog[:taken]
            sent += taken
        if self.finished:
            self._finish()
        elif not self.broken:
            self.send = opened.send
        return sent

    def nothing_more(self) -> bool:
        """Say whether the end of file follows what was read, a clean one."""
        if self._socket is None or self.broken:
            return False
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            self.fail()  # the kernel says it once; the next read would find a clean end
            return False

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────

    def finish(self) -> None:
        """Pass the client's FIN on, behind what waits."""
        self.finished = True
        if not self.backlog and self._socket is not None:
            self._finish()

    def read_to_end(self) -> None:
        """Note that the proxy will send nothing more."""
        self.at_end = True
        self.recv_into = None
        if self.finished and not self.backlog:
            self.close()

    def _finish(self) -> None:
        assert self._socket is not None
        self.send = None
        if self.at_end:
            self.close()
            return
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has failed; its event says how

    def fail(self) -> None:
        """Note that text could not be sent: what waits is lost, what the proxy has sent before can still be read."""
        self.broken = True
        self.send = None
        self.backlog.clear()

    def reset(self) -> None:
        """Close with RST, or give the connecting up."""
        if self.dial is not None:
            self.dial.cancel()
        if self._socket is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            self.close()

    def close(self) -> None:
        """Close; what the kernel still holds goes to the proxy, what waits here does not."""
        if self._socket is not None:
            self._flows.forget_descriptor(self._socket.fileno())
            self._socket.close()
            self._socket = None
        self.send = self.recv_into = None
        self.backlog.clear()

    def outlive(self, now: float) -> None:
        """The flow has ended: close, or stay until the proxy has the text that the client believes delivered."""
        if not self.backlog or self._socket is None:
            self.close()
            return
        self._moved_at = now
        self._flows.handlers[self._socket.fileno()] = self._ready
        self._flows.timers.call_at(now + LINGER_SECONDS, self._linger)
        self._ready(0, now)  # an event of this breath would have gone to the relay

    def _ready(self, mask: int, now: float) -> None:
        """Send on; nobody is left who could be told of a failure."""
        try:
            if mask & EPOLLERR:
                raise ConnectionError
            if self.send_backlog():
                self._moved_at = now
        except OSError:
            self._flows.count[counts.TCP_RESET_BY_PROXY] += 1
            self.backlog.clear()
        if not self.backlog:
            self.close()

    def _linger(self, now: float) -> None:
        """Give up on a proxy that takes nothing more."""
        if self._socket is None:
            return
        if now - self._moved_at < LINGER_SECONDS:
            self._flows.timers.call_at(self._moved_at + LINGER_SECONDS, self._linger)
        else:
            self.reset()
