"""Server: the listening socket, the loop, the clock, and what all clients share."""

import errno
import logging
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Final, Protocol

from gateway.proxy.httpserver import HttpListener, HttpServerStream
from gateway.proxy.outbound import Direct, Outbound
from gateway.proxy.poll import READ, Handler, new_poller
from gateway.proxy.relay import COPY_SIZE, PipePool
from gateway.proxy.resolve import Resolver
from gateway.proxy.session import Session
from gateway.proxy.stream import Stream
from gateway.proxy.tls import ServerTls
from gateway.proxy.tunnelurl import HTTP, RAW, TLS, WS, WSS
from gateway.proxy.websocket import WebSocket
from workers.socks.wire import ProtocolError

BACKLOG: Final = 4096  # the kernel takes net.core.somaxconn if that is less
ACCEPTS_PER_BREATH: Final = 64  # those who are connected already get their turn as well
TICK: Final = 1.0  # seconds; how late a timeout may be noticed
BATCH_SIZE: Final = 1 << 19  # bytes of datagrams handled at once, see udp.py and egress.py

HANDSHAKE_TIMEOUT: Final = 10.0  # seconds from accept to a complete request
CONNECT_TIMEOUT: Final = 10.0  # seconds, name lookup not included, over all addresses of a name
BIND_TIMEOUT: Final = 120.0  # seconds that BIND waits for its connection
STALL_TIMEOUT: Final = 30.0  # seconds that a stream of datagrams may stop within a frame, or take nothing
IDLE_TIMEOUT: Final = 300.0  # seconds without a datagram after which such a stream is closed

# accept(2): the process, the system, or its memory has no room.
_NO_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

log = logging.getLogger(__name__)


class ListenError(Exception):
    """Say in one sentence why the server cannot listen where it was told to."""


class Waiting(Protocol):
    """What has a deadline."""

    def expire(self) -> None:
        """Do what is due now that the deadline has passed."""


class Server:
    """A SOCKS5 server; it listens from the moment it is made, and answers while `serve_forever` runs.

    With a username, clients must authenticate. `outbound` is where their requests go, without one straight to the
    targets. `carrier` is what SOCKS5 comes in (tunnelurl.py), and `tls` what TLS is answered with, which some of them
    and gost's methods 80, 82 and 8A need. `open_socket` (family, kind) makes the sockets that leave this machine, so
    that they can be marked or bound to an interface. `portable` does without epoll, splice
    and UDP offloads, as on systems other than Linux. Timeouts are seconds. `counters` says what
    became of clients, by reason.
    """

    def __init__(
        self,
        listen: tuple[str, int] = ("127.0.0.1", 1080),
        *,
        username: str | None = None,
        password: str = "",
        handshake_timeout: float = HANDSHAKE_TIMEOUT,
        connect_timeout: float = CONNECT_TIMEOUT,
        bind_timeout: float = BIND_TIMEOUT,
        stall_timeout: float = STALL_TIMEOUT,
        idle_timeout: float = IDLE_TIMEOUT,
        outbound: Outbound | None = None,
        carrier: str = RAW,
        tls: ServerTls | None = None,
        open_socket: Callable[[int, int], socket.socket] = socket.socket,
        listener: socket.socket | None = None,
        counters: "Counter[str] | None" = None,
        reuse_port: bool = False,
        portable: bool = sys.platform != "linux",
    ) -> None:
        """Listen, or take the socket that listens; raises ListenError when the address cannot be had."""
        self.credentials: tuple[bytes, bytes] | None = None
        if username is not None:
            self.credentials = (username.encode(), password.encode())
        self.handshake_timeout = handshake_timeout
        self.connect_timeout = connect_timeout
        self.bind_timeout = bind_timeout
        self.stall_timeout = stall_timeout
        self.idle_timeout = idle_timeout
        self.outbound: Outbound = outbound or Direct()
        self.tls = tls
        self._carrier = carrier
        self._http = HttpListener(self, self._attend) if carrier == HTTP else None
        self.open_socket = open_socket
        self.portable = portable
        self.counters: Counter[str] = Counter() if counters is None else counters
        self._listener = listener or listen_at(listen, reuse_port)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]  #: where clients connect to
        self.poller = new_poller(portable)
        self.pipes = PipePool(enabled=not portable)
        self.copy_view = memoryview(bytearray(COPY_SIZE))  #: holds what one read brought, for the length of one call
        self.batch = bytearray(BATCH_SIZE)  #: the same for datagrams
        self.batch_view = memoryview(self.batch)
        self.resolver = Resolver(self._wake)
        self._sockets: dict[int, socket.socket] = {}
        self._closing: list[socket.socket] = []
        self._soon: list[Callable[[], None]] = []
        self._deadlines: dict[Waiting, float] = {}
        self._tick = min(TICK, handshake_timeout, connect_timeout, bind_timeout, stall_timeout, idle_timeout)
        self._next_tick = 0.0
        self._paused = False  #: not accepting, for want of descriptors
        self._stopping = False
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self.add(self._wake_reader, READ, self._woken)
        self.add(self._listener, READ, self._accept)

    def serve_forever(self) -> None:
        """Serve until `stop`; every socket is closed when this returns."""
        try:
            while not self._stopping:
                self._breathe()
        finally:
            self._close_all()

    def stop(self) -> None:
        """Make `serve_forever` return; from any thread, and from a signal handler."""
        self._stopping = True
        self._wake()

    def add(self, sock: socket.socket, interest: int, handler: Handler) -> None:
        """Take a socket over, call `handler` when it is ready; `close` is the way out."""
        fd = sock.fileno()
        self.poller.add(fd, interest, handler)
        self._sockets[fd] = sock

    def close(self, sock: socket.socket) -> None:
        """Close a socket at the end of this breath: until then its number must not come back as another one's."""
        fd = sock.fileno()
        self.poller.forget(fd)
        del self._sockets[fd]
        self._closing.append(sock)

    def expect(self, waiting: Waiting, timeout: float) -> None:
        """Have `waiting.expire` called in `timeout` seconds, instead of whenever it was before."""
        self._deadlines[waiting] = time.monotonic() + timeout

    def settle(self, waiting: Waiting) -> None:
        """Forget a deadline."""
        self._deadlines.pop(waiting, None)

    def soon(self, call: Callable[[], None]) -> None:
        """Call at the end of this breath: what an owner of something may not be told while it acts itself."""
        self._soon.append(call)

    def complain(self, error: ProtocolError) -> None:
        """Count what another program has said wrong; the first time of each kind is logged."""
        if not self.counters[error.reason]:
            log.warning("%s", error)
        self.counters[error.reason] += 1

    def _breathe(self) -> None:
        handlers = self.poller.handlers
        for fd, events in self.poller.wait(self._tick if self._deadlines or self._paused else None):
            handler = handlers.get(fd)
            if handler:
                try:
                    handler(events)
                except Exception:
                    self._bury(fd)
        if self._deadlines or self._paused:
            self._look_at_the_clock(time.monotonic())
        while self._soon:
            calls, self._soon = self._soon, []
            for call in calls:
                try:
                    call()
                except Exception:
                    self._count_internal_error()
        if self._closing:
            for sock in self._closing:
                sock.close()
            self._closing.clear()
            if self._paused:
                self._pause(False)

    def _look_at_the_clock(self, now: float) -> None:
        if now < self._next_tick:
            return
        self._next_tick = now + self._tick
        for waiting in [waiting for waiting, due_at in self._deadlines.items() if due_at <= now]:
            self._deadlines.pop(waiting, None)
            waiting.expire()
        if self._paused:
            self._pause(False)

    def _count_internal_error(self) -> None:
        log.exception("a client's connection is dropped after an internal error")
        self.counters["internal-error"] += 1

    def _bury(self, fd: int) -> None:
        """Give up one client after an error of our own; the others go on."""
        self._count_internal_error()
        if fd in self._sockets and self._sockets[fd] not in (self._listener, self._wake_reader):
            self.close(self._sockets[fd])

    def _accept(self, _: int) -> None:
        for _ in range(ACCEPTS_PER_BREATH):
            try:
                client, _peer = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _NO_ROOM:
                    self._pause(True)
                    return
                continue  # the client has gone already
            client.setblocking(False)
            self.counters["clients"] += 1
            self._admit(client)

    def _admit(self, client: socket.socket) -> None:
        if self._http:
            self._http.admit(client)
            return
        session = Session(self)
        stream = Stream(self, client, session)
        if self.tls and self._carrier in (TLS, WSS):
            stream.push(self.tls.serve())
        if self._carrier in (WS, WSS):
            stream.push(WebSocket())
        session.attend(stream)

    def _attend(self, stream: HttpServerStream) -> None:
        session = Session(self)
        stream.owner = session
        session.attend(stream)

    def _pause(self, pause: bool) -> None:
        """Stop accepting while there is no room for another client, else the full queue would be reported for ever."""
        if pause and not self._paused:
            if not self.counters["accept-paused"]:  # once; from then on it is only counted
                log.warning("out of descriptors or memory with %d sockets open: new clients wait", len(self._sockets))
            self.counters["accept-paused"] += 1
        self._paused = pause
        self.poller.change(self._listener.fileno(), 0 if pause else READ)

    def _woken(self, _: int) -> None:
        try:
            self._wake_reader.recv(4096)
        except BlockingIOError:
            pass
        self.resolver.deliver()

    def _wake(self) -> None:
        try:
            self._wake_writer.send(b"\0")
        except OSError:
            pass  # full, so it will wake up anyway; or closed, so there is nothing to wake

    def _close_all(self) -> None:
        self.resolver.close()
        self._deadlines.clear()
        for sock in [*self._sockets.values(), *self._closing, self._wake_writer]:
            sock.close()
        self._sockets.clear()
        self._closing.clear()
        self.pipes.close()
        self.poller.handlers.clear()
        self.poller.close()


def listen_at(listen: tuple[str, int], reuse_port: bool = False) -> socket.socket:
    """Return a socket that listens, for a Server. Raises ListenError."""
    host, port = listen
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, ValueError) as error:
        raise ListenError(f"cannot listen on {where}: {_reason(error)}") from error
    try:
        # The sockets that accept() makes inherit all of these.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if reuse_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ListenError(f"cannot listen on {where}: {_reason(error)}") from error
    return listener


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
