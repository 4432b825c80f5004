"""The targets of the demonstration: TCP that takes, gives and echoes, each with a SHA-256, and UDP that echoes.

A TCP request is one line, then:

    up        the client sends until it closes its half; the answer is count and SHA-256 of what came
    down N    the server sends for N seconds, then the SHA-256 of what it sent, then closes
    echo      what comes goes back, until the client closes its half
"""

import hashlib
import os
import socket
import sys
import threading
import time
from typing import Final

from gateway.demo import TCP_PORT, UDP_PORT

BLOCK: Final = 1 << 20  #: octets of one send or receive
_PATIENCE: Final = 20.0  #: seconds for a client that says nothing


def numbered_blocks() -> "Blocks":
    """Return an endless source of blocks that differ, so that a lost, doubled or misplaced one changes the digest."""
    return Blocks(bytearray(os.urandom(BLOCK)))


class Blocks:
    """Random octets with a counter in front, the same buffer again and again."""

    def __init__(self, block: bytearray) -> None:
        self._block = block
        self._number = 0

    def next(self) -> bytearray:
        """Return the next block; it is valid until the next call."""
        self._number += 1
        self._block[:8] = self._number.to_bytes(8, "big")
        return self._block


def receive_all(connection: socket.socket) -> tuple[int, bytes]:
    """Receive to the end of the stream; return its length and SHA-256."""
    digest, count, buffer = hashlib.sha256(), 0, memoryview(bytearray(BLOCK))
    while length := connection.recv_into(buffer):
        digest.update(buffer[:length])
        count += length
    return count, digest.digest()


def _serve(connection: socket.socket) -> None:
    with connection:
        connection.settimeout(_PATIENCE)
        request = bytearray()
        while not request.endswith(b"\n"):
            octet = connection.recv(1)
            if not octet or len(request) > 64:
                return
            request += octet
        word, _, argument = bytes(request).strip().partition(b" ")
        if word == b"up":
            count, digest = receive_all(connection)
            connection.sendall(count.to_bytes(8, "big") + digest)
        elif word == b"down":
            end_at = time.monotonic() + min(float(argument), 60.0)
            sent, blocks = hashlib.sha256(), numbered_blocks()
            while time.monotonic() < end_at:
                block = blocks.next()
                connection.sendall(block)
                sent.update(block)
            connection.sendall(sent.digest())
        elif word == b"echo":
            while data := connection.recv(65536):
                connection.sendall(data)


def _attend(connection: socket.socket) -> None:
    try:
        _serve(connection)
    except OSError:
        pass  # the client is gone; its own check says why


def _accept(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_attend, args=(connection,), daemon=True).start()


def _echo(endpoint: socket.socket) -> None:
    buffer = memoryview(bytearray(65536))
    while True:
        length, source = endpoint.recvfrom_into(buffer)
        endpoint.sendto(buffer[:length], source)


def main() -> int:
    """Serve on every address until standard input ends: that is until whoever started this does."""
    for family in (socket.AF_INET, socket.AF_INET6):
        host = "::" if family == socket.AF_INET6 else ""
        try:
            listener = socket.create_server((host, TCP_PORT), family=family, backlog=256)
            endpoint = socket.socket(family, socket.SOCK_DGRAM)
            if family == socket.AF_INET6:
                endpoint.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            endpoint.bind((host, UDP_PORT))
        except OSError:
            if family == socket.AF_INET:
                raise
            break  # a kernel without IPv6
        threading.Thread(target=_accept, args=(listener,), daemon=True).start()
        threading.Thread(target=_echo, args=(endpoint,), daemon=True).start()
    print("ready", flush=True)
    sys.stdin.buffer.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
