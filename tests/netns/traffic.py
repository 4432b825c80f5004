"""Targets behind the proxy, and clients in front of the TUN, all on kernel sockets.

A TCP target does what the first byte of a connection says:

| byte | then comes | the target |
| --- | --- | --- |
| `U` | bytes until FIN | answers with their SHA-256, closes |
| `D` | u64 count | sends as many bytes of `stream()`, closes |
| `E` | bytes until FIN | echoes them as they come, closes |
| `R` | – | resets the connection |
| `S` | bytes | reads nothing until `target.read_on` is set, then as `U` |
| `H` | – | sends `bye`, closes its half, reads on and answers nothing (counted in `target.received_after_close`) |
"""

import contextlib
import hashlib
import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Final, Self

from tests.netns.world import TARGET4, TARGET6, Namespace

_BLOCK: Final = random.Random(9293).randbytes((1 << 18) + 4096)
CHUNK: Final = 1 << 18
_U64: Final = struct.Struct(">Q")
SO_RCVBUFFORCE: Final = 33  # asm-generic/socket.h; Python has no constant for it
_RESET: Final = struct.pack("ii", 1, 0)


def stream(count: int) -> Iterator[memoryview]:
    """Yield `count` bytes in chunks; no two neighbouring chunks are alike, so that a lost or doubled one shows."""
    block = memoryview(_BLOCK)
    position = 0
    while position < count:
        start = (position // CHUNK * 37) % 4096
        piece = block[start : start + min(CHUNK, count - position)]
        yield piece
        position += len(piece)


def digest_of_stream(count: int) -> bytes:
    digest = hashlib.sha256()
    for piece in stream(count):
        digest.update(piece)
    return digest.digest()


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def reset(connection: socket.socket) -> None:
    """Close with RST (SO_LINGER of zero)."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    connection.close()


def read_exactly(connection: socket.socket, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        piece = connection.recv(count - len(received))
        if not piece:
            raise EOFError(f"end of stream after {len(received)} of {count} bytes")
        received += piece
    return bytes(received)


def read_to_end(connection: socket.socket) -> bytes:
    received = bytearray()
    while piece := connection.recv(65536):
        received += piece
    return bytes(received)


class Service:
    """A listening socket and one thread for each connection, in a namespace of choice."""

    def __init__(
        self, namespace: Namespace, handler: Callable[[socket.socket], None], host: str = "::", port: int = 0
    ) -> None:
        self._handler = handler
        self.namespace = namespace
        self.listener = namespace.socket(family_of(host))
        if host == "::":
            self.listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind((host, port))
        self.listener.listen(4096)
        self.port: int = self.listener.getsockname()[1]
        self.accepted = 0
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with self._lock:
                self.accepted += 1
                self._connections.add(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(60)
            self._handler(connection)
        except (OSError, EOFError):
            pass  # the client's side of the test sees and judges it
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Target(Service):
    """The TCP target of the table above, on all addresses of the namespace."""

    def __init__(self, namespace: Namespace, port: int = 0) -> None:
        self.read_on = threading.Event()
        self.received_after_close = 0
        super().__init__(namespace, self._speak, "::", port)

    def _speak(self, connection: socket.socket) -> None:
        mode = connection.recv(1)
        if mode in (b"U", b"S"):
            if mode == b"S":
                self.read_on.wait(60)
            digest = hashlib.sha256()
            buffer = bytearray(CHUNK)
            view = memoryview(buffer)
            while count := connection.recv_into(buffer):
                digest.update(view[:count])
            connection.sendall(digest.digest())
        elif mode == b"D":
            (count,) = _U64.unpack(read_exactly(connection, _U64.size))
            for piece in stream(count):
                connection.sendall(piece)
        elif mode == b"E":
            while data := connection.recv(65536):
                connection.sendall(data)
        elif mode == b"R":
            reset(connection)
        elif mode == b"H":
            connection.sendall(b"bye")
            connection.shutdown(socket.SHUT_WR)
            while data := connection.recv(65536):
                self.received_after_close += len(data)


class UdpTarget:
    """A UDP echo on one address; `senders` remembers from where each payload came."""

    def __init__(self, namespace: Namespace, host: str = TARGET4, port: int = 0) -> None:
        self.socket = namespace.socket(family_of(host), socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        self.socket.bind((host, port))
        self.host = host
        self.port: int = self.socket.getsockname()[1]
        self.senders: dict[bytes, tuple[str, int]] = {}
        self._thread = threading.Thread(target=self._echo, daemon=True)
        self._thread.start()

    def _echo(self) -> None:
        while True:
            try:
                datagram, sender = self.socket.recvfrom(65536)
            except OSError:
                return
            if datagram == b"\0stop" and sender[1] == self.port:
                return
            self.senders[datagram[:32]] = sender[:2]
            with contextlib.suppress(OSError):
                self.socket.sendto(datagram, sender)

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.port

    def close(self) -> None:
        # shutdown() does not wake recvfrom() on an unconnected socket; a datagram to itself does.
        with contextlib.suppress(OSError):
            self.socket.sendto(b"\0stop", (self.host, self.port))
        self._thread.join(5)
        self.socket.close()

    def __enter__(self) -> "UdpTarget":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# -- clients --


def connect(namespace: Namespace, address: str, port: int, timeout: float = 20.0) -> socket.socket:
    """Open a TCP connection from the namespace; the caller closes it."""
    connection = namespace.socket(family_of(address))
    try:
        connection.settimeout(timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.connect((address, port))
    except BaseException:
        connection.close()
        raise
    return connection


def upload(namespace: Namespace, address: str, port: int, count: int, *, mode: bytes = b"U") -> None:
    """Send `count` bytes and compare the digest that the target answers after our FIN."""
    with connect(namespace, address, port, 60) as connection:
        connection.sendall(mode)
        for piece in stream(count):
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
        assert read_to_end(connection) == digest_of_stream(count)


def download(namespace: Namespace, address: str, port: int, count: int) -> None:
    """Receive `count` bytes and compare them with what the target must have sent."""
    digest = hashlib.sha256()
    received = 0
    with connect(namespace, address, port, 60) as connection:
        connection.sendall(b"D" + _U64.pack(count))
        buffer = bytearray(CHUNK)
        view = memoryview(buffer)
        while length := connection.recv_into(buffer):
            digest.update(view[:length])
            received += length
    assert received == count
    assert digest.digest() == digest_of_stream(count)


def echo(namespace: Namespace, address: str, port: int, payload: bytes = b"hello") -> None:
    """Send a short payload and expect it back; no half-close, which many proxies take for the end."""
    with connect(namespace, address, port) as connection:
        connection.sendall(b"E" + payload)
        assert read_exactly(connection, len(payload)) == payload


def udp_echo(
    namespace: Namespace, address: str, port: int, payload: bytes | None = None, tries: int = 3, timeout: float = 3.0
) -> None:
    """Send a datagram and expect it back; UDP may lose, so a few are sent."""
    payload = os.urandom(32) if payload is None else payload
    with namespace.socket(family_of(address), socket.SOCK_DGRAM) as client:
        client.settimeout(timeout)
        client.connect((address, port))
        for attempt in range(tries):
            client.send(payload)
            try:
                assert client.recv(65536) == payload
                return
            except TimeoutError:
                if attempt == tries - 1:
                    raise


def target_address(version: int) -> str:
    return TARGET6 if version == 6 else TARGET4
