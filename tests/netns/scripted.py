"""Proxies that misbehave on purpose: garbage, silence, one byte at a time, success and then nothing."""

import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import Final

from tests.netns.traffic import Service, read_exactly, reset

SUCCESS: Final = b"\x05\x00\x00\x01\x0a\x09\x09\x09\x04\x38"

Script = Callable[[socket.socket], None]


def read_request(connection: socket.socket) -> tuple[int, str, int]:
    """Read methods, choose "none", read the request; return command, address, port."""
    _, count = read_exactly(connection, 2)
    read_exactly(connection, count)
    connection.sendall(b"\x05\x00")
    _, command, _, kind = read_exactly(connection, 4)
    if kind == 1:
        address = socket.inet_ntoa(read_exactly(connection, 4))
    elif kind == 4:
        address = socket.inet_ntop(socket.AF_INET6, read_exactly(connection, 16))
    else:
        address = read_exactly(connection, read_exactly(connection, 1)[0]).decode()
    (port,) = struct.unpack(">H", read_exactly(connection, 2))
    return command, address, port


def garbage(connection: socket.socket) -> None:
    """Answer whatever comes with random bytes, without end, as fast as they are taken."""
    while True:
        connection.sendall(os.urandom(65536))


def http_error(connection: socket.socket) -> None:
    """Be a web server on the wrong port."""
    connection.recv(100)
    connection.sendall(b"HTTP/1.0 400 Bad Request\r\nContent-Type: text/html\r\n\r\n<h1>Bad Request</h1>" + b" " * 4096)


def silence(connection: socket.socket) -> None:
    """Accept and say nothing until the other side gives up."""
    while connection.recv(4096):
        pass


def silence_after_method(connection: socket.socket) -> None:
    read_exactly(connection, 2)
    connection.sendall(b"\x05\x00")
    while connection.recv(4096):
        pass


def no_method(connection: socket.socket) -> None:
    connection.recv(4096)
    connection.sendall(b"\x05\xff")
    connection.recv(1)


def end_at_once(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)


def reset_at_once(connection: socket.socket) -> None:
    reset(connection)


def reset_after_request(connection: socket.socket) -> None:
    read_request(connection)
    reset(connection)


def wrong_version(connection: socket.socket) -> None:
    connection.recv(4096)
    connection.sendall(b"\x04\x00")
    connection.recv(1)


def unknown_address_kind(connection: socket.socket) -> None:
    read_request(connection)
    connection.sendall(b"\x05\x00\x00\x09" + bytes(300))
    connection.recv(1)


def endless_domain(connection: socket.socket) -> None:
    """Promise 255 bytes of domain in the reply and never finish."""
    read_request(connection)
    connection.sendall(b"\x05\x00\x00\x03\xff" + b"a" * 200)
    while connection.recv(4096):
        pass


def refuse_with(code: int) -> Script:
    def refuse(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(bytes((5, code)) + b"\x00\x01" + bytes(6))
        connection.recv(1)

    refuse.__name__ = f"refuse_{code:02x}"
    return refuse


def honest(connection: socket.socket, *, byte_by_byte: bool = False, with_data: bool = False) -> None:
    """Do CONNECT as a server should, if need be in one-byte segments or with the target's data behind the reply."""
    _, address, port = read_request(connection)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as upstream:  # the thread is in the namespace: see ScriptedProxy
        upstream.settimeout(20)
        upstream.connect((address, port))
        if byte_by_byte:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in SUCCESS:
                connection.sendall(bytes((byte,)))
        elif with_data:
            upstream.sendall(b"Eearly")
            connection.sendall(SUCCESS + read_exactly(upstream, 5))
        else:
            connection.sendall(SUCCESS)
        back = threading.Thread(target=_copy, args=(upstream, connection))
        back.start()
        _copy(connection, upstream)
        back.join(30)


def byte_by_byte(connection: socket.socket) -> None:
    honest(connection, byte_by_byte=True)


def data_behind_the_reply(connection: socket.socket) -> None:
    honest(connection, with_data=True)


def _copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


class ScriptedProxy(Service):
    """A proxy that follows a script; its threads live in the namespace, so that the script may connect from there."""

    def _serve(self, connection: socket.socket) -> None:
        with self.namespace.inside():
            super()._serve(connection)


REFUSALS: Final = (
    garbage, http_error, silence, silence_after_method, no_method, end_at_once, reset_at_once, reset_after_request,
    wrong_version, unknown_address_kind, endless_domain,
)  # fmt: skip
