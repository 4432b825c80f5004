"""The embedded SOCKS5 server in a thread, and the steps of its clients that the tests of it share."""

import socket
import struct
import threading

import pytest
import socks

from gateway.proxy import Server
from workers.socks.client import SocksHandshake
from workers.socks.wire import CONNECT, write_address

PATIENCE = 5  # seconds that anything on loopback may take at most

RESET = struct.pack("ii", 1, 0)  # struct linger: close() sends RST


class Running:
    """A server in a thread."""

    def __init__(self, **options):
        self.server = Server(options.pop("listen", ("127.0.0.1", 0)), **options)
        self.thread = threading.Thread(target=self.server.serve_forever)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.stop()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()

    def connect(self):
        return socket.create_connection(self.server.address, timeout=PATIENCE)


def listening(host="127.0.0.1"):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, 0), family=family)
    except OSError as error:
        pytest.skip(f"this machine has no {host}: {error}")
    listener.settimeout(PATIENCE)
    return listener


def accept(listener):
    sock, _ = listener.accept()
    sock.settimeout(PATIENCE)
    return sock


def exactly(sock, count):
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        assert piece, f"EOF after {len(data)} of {count} bytes"
        data += piece
    return data


def to_eof(sock):
    data = bytearray()
    while piece := sock.recv(1 << 16):
        data += piece
    return bytes(data)


def request(command, address):
    host, port = address[:2]
    packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    return bytes((5, command, 0)) + write_address(packed, port)


def ask(sock, command, host, port, *credentials):
    """Run the handshake; return it once it is done."""
    handshake = SocksHandshake(command, host, port, *credentials)
    sock.sendall(handshake.first_bytes)
    while not handshake.done:
        data = sock.recv(4096)
        assert data, "EOF within the handshake"
        sock.sendall(handshake.receive(data))
    return handshake


def tunnel(proxy, listener):
    """Return both ends of a connection through the proxy."""
    host, port = listener.getsockname()[:2]
    client = proxy.connect()
    ask(client, CONNECT, socket.inet_aton(host), port)
    return client, accept(listener)


def pysocks(proxy, kind=socket.SOCK_STREAM, **options):
    sock = socks.socksocket(socket.AF_INET, kind)
    sock.set_proxy(socks.SOCKS5, *proxy.server.address, **options)
    sock.settimeout(PATIENCE)
    return sock
