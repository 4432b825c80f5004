"""CONNECT granted: bytes from the client to the target and back, each End reading for the other.

    client ──► End ──(recv, send: through a shared buffer)──────────────► End ──► target
                   ──(splice, splice: through a pipe, without a copy)──►

Small reads are copied, which is the cheapest for requests and answers. A read that fills the shared buffer is bulk, and
from then on splice(2) moves page references. A pipe is borrowed for one round and goes back empty; only a flow whose
other side does not keep up holds one. An End that could not pass everything on stops reading until it has.
"""

import fcntl
import os
import socket
import struct
import sys
from typing import TYPE_CHECKING, Final

from gateway.proxy.poll import FAILED, READ, WRITE

if TYPE_CHECKING:
    from gateway.proxy.server import Server

COPY_SIZE: Final = 65536  # bytes; a read of so many is bulk
SPLICE_AGAIN: Final = 16384  # bytes; a splice of fewer goes back to copying
PIPE_SIZE: Final = 1 << 20  # bytes; /proc/sys/fs/pipe-max-size for an ordinary user
MAX_PIPES: Final = 60  # × PIPE_SIZE stays below the 64 MiB that pipe-user-pages-soft grants an ordinary user

RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # struct linger: close() sends RST


class Pipe:
    """A pipe for splice, and how much is in it."""

    __slots__ = ("held", "read_fd", "write_fd")

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe()
        self.held = 0  #: bytes in it
        if sys.platform == "linux":
            os.set_blocking(self.read_fd, False)
            os.set_blocking(self.write_fd, False)
            try:
                fcntl.fcntl(self.write_fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
            except OSError:
                pass  # 64 KiB by default: slower, nothing else

    def close(self) -> None:
        """Close both ends, with whatever is in it."""
        os.close(self.read_fd)
        os.close(self.write_fd)


class PipePool:
    """The pipes that nobody holds; last in, first out, so that warm ones are used."""

    def __init__(self, enabled: bool) -> None:
        self._free: list[Pipe] = []
        self._room = MAX_PIPES if enabled else 0  #: pipes that may still be made

    def take(self) -> Pipe | None:
        """Lend an empty pipe; None when there are no more, then copy."""
        if self._free:
            return self._free.pop()
        if not self._room:
            return None
        try:
            pipe = Pipe()
        except OSError:
            return None  # out of descriptors
        self._room -= 1
        return pipe

    def give(self, pipe: Pipe) -> None:
        """Take a pipe back; one with something left in it is closed."""
        if pipe.held:
            pipe.close()
            self._room += 1
        else:
            self._free.append(pipe)

    def close(self) -> None:
        """Close the pipes that nobody holds, and make no more."""
        self._room = 0
        while self._free:
            self._free.pop().close()


class End:
    """One of the two sockets of a relay: reads for its peer, and holds what could not be written to its own."""

    __slots__ = ("_bulk", "_fd", "_finished", "_interest", "_peer", "_pipe", "_server", "_sock", "_waiting")

    def __init__(self, server: "Server", sock: socket.socket, interest: int) -> None:
        self._server = server
        self._sock = sock
        self._fd = sock.fileno()
        self._peer: End | None = None  #: None once closed
        self._interest = interest  #: what the poller waits for
        self._waiting: bytes | memoryview = b""  #: to be written before more is read from the peer
        self._pipe: Pipe | None = None  #: the same, spliced
        self._bulk = False  #: the last reads were large
        self._finished = False  #: this side has sent its FIN

    def ready(self, events: int) -> None:
        """Read and write what can be; the first error resets both sides."""
        try:
            if events & WRITE and self._interest & WRITE:
                self._flush()
            if self._interest & READ:
                if events & ~WRITE:
                    self._read()
            elif events & FAILED:
                self._failed()
        except OSError:
            self._abort()

    def _read(self) -> None:
        peer = self._peer
        if peer is None:
            return
        if self._bulk:
            pipe = self._server.pipes.take()
            if pipe:
                self._splice(peer, pipe)
                return
        view = self._server.copy_view
        try:
            count = self._sock.recv_into(view)
        except BlockingIOError:
            return
        if not count:
            self._finish(peer)
            return
        try:
            sent = peer._sock.send(view[:count])
        except BlockingIOError:
            sent = 0
        if sent < count:
            peer._waiting = bytes(view[sent:count])
            self._wait_for(peer)
        self._bulk = count == COPY_SIZE

    def _splice(self, peer: "End", pipe: Pipe) -> None:
        if sys.platform == "linux":  # elsewhere the pool lends no pipes
            flags = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
            try:
                count = os.splice(self._fd, pipe.write_fd, PIPE_SIZE, flags=flags)
                pipe.held = count
                if count:
                    try:
                        pipe.held -= os.splice(pipe.read_fd, peer._fd, count, flags=flags)
                    except BlockingIOError:
                        pass
            except BlockingIOError:
                self._server.pipes.give(pipe)
                return
            except OSError:
                self._server.pipes.give(pipe)
                raise
            if pipe.held:
                peer._pipe = pipe
                self._wait_for(peer)
                return
            self._server.pipes.give(pipe)
            if not count:
                self._finish(peer)
            self._bulk = count >= SPLICE_AGAIN

    def _flush(self) -> None:
        """Write what waits for this socket; when all is gone the peer may read again."""
        if self._pipe and sys.platform == "linux":
            pipe = self._pipe
            try:
                pipe.held -= os.splice(pipe.read_fd, self._fd, pipe.held, flags=os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK)
            except BlockingIOError:
                return
            if pipe.held:
                return
            self._pipe = None
            self._server.pipes.give(pipe)
        elif self._waiting:
            try:
                sent = self._sock.send(self._waiting)
            except BlockingIOError:
                return
            self._waiting = self._waiting[sent:]
            if self._waiting:
                return
        self._want(self._interest & ~WRITE)
        if self._peer:
            self._peer._want(self._peer._interest | READ)

    def _wait_for(self, peer: "End") -> None:
        self._want(self._interest & ~READ)
        peer._want(peer._interest | WRITE)

    def _want(self, interest: int) -> None:
        self._interest = interest
        self._server.poller.change(self._fd, interest)

    def _finish(self, peer: "End") -> None:
        """Pass a FIN on; all that came before it is written, or there would have been no read."""
        self._finished = True
        if peer._finished:
            self._close()
        else:
            self._want(self._interest & ~READ)
            peer._sock.shutdown(socket.SHUT_WR)

    def _failed(self) -> None:
        """Judge a failure of a socket that is not read now: a reset ends both; a FIN each way may still hold data."""
        if self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._abort()
        elif not self._interest:
            self._server.poller.mute(self._fd)  # it would be reported again and again

    def _abort(self) -> None:
        """Reset both sides."""
        for end in (self, self._peer):
            if end and end._peer:
                try:
                    end._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                except OSError:
                    pass  # it is gone already
        self._close()

    def _close(self) -> None:
        for end in (self, self._peer):
            if end and end._peer:
                end._server.close(end._sock)
                if end._pipe:
                    end._server.pipes.give(end._pipe)
                    end._pipe = None
        if self._peer:
            self._peer._peer = None
            self._peer = None


def relay(server: "Server", client: socket.socket, target: socket.socket, early: bytes, interest: int) -> None:
    """Relay from now on between two connected sockets that the server knows; it owns them.

    `early` is what the client has sent already behind its request; `interest` is what the poller has for the client.
    """
    left = End(server, client, interest)
    right = End(server, target, READ)
    left._peer = right
    right._peer = left
    server.poller.handlers[left._fd] = left.ready
    server.poller.handlers[right._fd] = right.ready
    if early:
        right._waiting = early
        right._want(READ | WRITE)
        left._want(0)
        right.ready(WRITE)
    elif interest != READ:
        left._want(READ)
