"""Datagrams inside a stream: a client that sends them so, and the way out through another server that takes them so.

Both are a framing (workers/socks/framing.py) on a Stream. A stream that does not keep up loses datagrams, as a full
network would; one that stops in the middle of a frame, or takes nothing, or says nothing for long, is closed. Nothing
is shared between streams, so none holds up another.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from gateway.proxy.datagrams import Client, Out
from gateway.proxy.stream import Layered, Owner
from workers.socks.framing import Framing, GostFraming
from workers.socks.wire import ProtocolError, datagram_header_length

if TYPE_CHECKING:
    from gateway.proxy.server import Server

USELESS: Final = 10.0  # seconds
MAX_BACKLOG: Final = 256 * 1024  # bytes that may wait for a stream that does not keep up: a second at 2 Mbit/s


class _Framed(Owner):
    """What both sides share: the stream, its framing, and the clock."""

    __slots__ = ("_active_at", "_backlog", "_framing", "_heard_at", "_is_closed", "_joins", "_server", "_stream")

    def __init__(self, server: "Server", stream: Layered, framing: Framing, *, joins: bool) -> None:
        self._server = server
        self._stream = stream
        self._framing = framing
        self._joins = joins  #: the reader takes several frames that come at once; gost v1 does not
        self._is_closed = False
        self._backlog = 0  #: at the last look at the clock
        self._heard_at = self._active_at = time.monotonic()  #: anything came; anything came or went
        stream.owner = self
        server.expect(self, server.stall_timeout)

    def ended(self) -> None:
        self.close()

    def lost(self, number: int) -> None:
        self.close()

    def expire(self) -> None:
        """Close a stream that is stuck, or of no use to anybody any more."""
        now = time.monotonic()
        server = self._server
        backlog = self._stream.backlog
        if self._framing.is_in_frame and now - self._heard_at >= server.stall_timeout:
            server.counters["tunnel-stalled-in-frame"] += 1
        elif backlog and backlog == self._backlog:
            server.counters["tunnel-stalled"] += 1
        elif now - self._active_at >= server.idle_timeout:
            server.counters["tunnel-idle"] += 1
        else:
            self._backlog = backlog
            server.expect(self, server.stall_timeout)
            return
        self.close()

    def close(self) -> None:
        """End the association."""
        raise NotImplementedError

    def _receive(self, data: bytes) -> list[bytes]:
        """Return the datagrams that are complete; close the stream after what cannot be understood."""
        self._heard_at = self._active_at = time.monotonic()
        datagrams = self._framing.receive(data)
        error = self._framing.error
        if error:
            reason = f"frame-{error.reason.removeprefix('frame-')}"
            self._server.complain(ProtocolError(reason, f"a stream of datagrams is closed: {error}"))
            self._server.soon(self.close)
        return datagrams

    def _send(self, frames: list[bytes]) -> None:
        """Send frames, unless too much waits already."""
        if not frames:
            return
        self._active_at = time.monotonic()
        if self._stream.backlog > MAX_BACKLOG:
            self._server.counters["tunnel-full"] += len(frames)
        elif self._joins:
            self._stream.write_each(frames)
        else:
            for frame in frames:
                self._stream.write(frame)

    def _frame(self, header: bytes, payload: memoryview, frames: list[bytes]) -> None:
        try:
            frames.append(self._framing.frame(header, payload))
        except ProtocolError as error:
            self._server.counters[error.reason] += 1

    def _quit(self) -> None:
        self._is_closed = True
        if isinstance(self._framing, GostFraming) and self._framing.nameless:
            self._server.counters["frame-nameless"] += self._framing.nameless
        self._server.settle(self)
        self._stream.close()


class FramedClient(_Framed):
    """A client whose datagrams come in frames: gost's F3 and 03, hev's 05, UoT."""

    __slots__ = ("_out",)

    def __init__(self, server: "Server", stream: Layered, framing: Framing, out: Out, *, joins: bool) -> None:
        super().__init__(server, stream, framing, joins=joins)
        self._out = out
        out.client = self

    def begin(self, early: bytes) -> None:
        """Read frames, the first of them in `early`."""
        if self._stream.has_ended:
            self.close()
            return
        self._stream.go_on()
        if early:
            self.received(early)

    def received(self, data: bytes) -> None:
        """Pass runs of datagrams with the same header and length on together."""
        header = b""
        length = 0
        run: list[memoryview] = []
        for datagram in self._receive(data):
            if len(datagram) != length or not datagram.startswith(header):
                if run:
                    self._out.pass_on(header, run)
                header = datagram[: datagram_header_length(datagram)]
                length = len(datagram)
                run = []
            run.append(memoryview(datagram)[len(header) :])
        if run:
            self._out.pass_on(header, run)

    def answer(self, datagrams: memoryview, length: int) -> None:
        """Send the client datagrams of equal length, which stand back to back, headers in front."""
        frames: list[bytes] = []
        for at in range(0, len(datagrams), length):
            datagram = datagrams[at : at + length]
            start = datagram_header_length(datagram)
            self._frame(bytes(datagram[:start]), datagram[start:], frames)
        self._send(frames)

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._out.close()
            self._quit()


class FramedOut(_Framed):
    """The way out through a server that has granted frames on a stream."""

    __slots__ = ("_made_at", "_was_useless", "client")

    def __init__(
        self,
        server: "Server",
        stream: Layered,
        framing: Framing,
        early: bytes,
        was_useless: Callable[[], None],
        *,
        joins: bool,
    ) -> None:
        """Take the stream over; `early` has come behind the reply.

        `was_useless` is called if the other server ends it soon and has sent nothing: it did not mean its success.
        """
        super().__init__(server, stream, framing, joins=joins)
        self.client: Client | None = None
        self._made_at = self._heard_at
        self._was_useless = was_useless
        if early:
            server.soon(lambda: self.received(early))

    def pass_on(self, header: bytes, run: list[memoryview]) -> None:
        """Send payloads of equal length, all with the same header."""
        frames: list[bytes] = []
        for payload in run:
            self._frame(header, payload, frames)
        self._send(frames)

    def received(self, data: bytes) -> None:
        """Give the client runs of datagrams of equal length."""
        if self._is_closed or not self.client:
            return
        run: list[bytes] = []
        for datagram in self._receive(data):
            if run and len(datagram) != len(run[0]):
                self._answer(run)
                run = []
            run.append(datagram)
        if run:
            self._answer(run)

    def ended(self) -> None:
        self._end()

    def lost(self, number: int) -> None:
        self._end()

    def close(self) -> None:
        """Close the stream; called by the client's side, and when the stream is of no use."""
        if not self._is_closed:
            self._quit()
            if self.client:
                self.client.close()

    def _end(self) -> None:
        if not self._is_closed:
            self._server.counters["tunnel-ended"] += 1
            if self._heard_at == self._made_at and time.monotonic() - self._made_at < USELESS:
                self._was_useless()
            self.close()

    def _answer(self, run: list[bytes]) -> None:
        if self.client:
            self.client.answer(memoryview(b"".join(run)), len(run[0]))
