"""Targets and proxies by hand, on loopback, for the flows of one worker (tests/one_worker.py)."""

import socket
import struct
from contextlib import closing

from tests.one_worker import OneWorker, RawClient
from workers.tcp.states import NAMES

LOOPBACK = {4: "127.0.0.1", 6: "::1"}
ALL_OPTIONS = "mss 1460,sackOK,TS val 1 ecr 0,nop,wscale 7"


def listener(version=4, backlog=128):
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    made = socket.create_server((LOOPBACK[version], 0), family=family, backlog=backlog)
    made.settimeout(5)
    return made


def connected(one, options="mss 1460", version=4, port=40000):
    """Return (client, the target's socket) of a flow through direct://."""
    with closing(listener(version)) as listening:
        client = RawClient(one, listening.getsockname()[:2], port)
        client.open(options)
        target, _ = listening.accept()
    target.setblocking(False)
    return client, target


def relay_of(one):
    [flow] = one.table.values()
    return flow


def state(one):
    return NAMES[relay_of(one).conn.state]


def received(one, target, octets):
    """Return what the target gets, at least so many octets, or all up to the end of file."""
    got = b""

    def enough():
        nonlocal got
        try:
            data = target.recv(1 << 20)
        except BlockingIOError:
            return False
        got += data
        return not data or len(got) >= octets

    one.run_until(enough)
    return got


def reset_received(one, target):
    def reset():
        try:
            return not target.recv(1 << 20) and False
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True

    return one.run_until(reset)


def slow(one, target):
    """Let the sockets of a flow hold little, so that text waits in the relay soon."""
    target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    relay_of(one)._proxy._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


def reset_by(target):
    target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    target.close()


class Proxy:
    """A SOCKS5 server by hand."""

    def __init__(self, reply=0, tail=b"", **settings):
        self.listening = listener()
        self.reply = bytes([5, reply, 0, 1]) + bytes(6) + tail
        settings = {"scheme": "socks5", "proxy_addresses": [self.listening.getsockname()], **settings}
        self.one = OneWorker(**settings)

    def serve(self, client, piece=1000):
        """Take the client's connection through the handshake; returns the proxy's socket and the request."""
        client.syn()
        return self.handshake(piece)

    def handshake(self, piece=1000):
        """The proxy's side of it."""
        upstream, _ = self.listening.accept()
        upstream.setblocking(False)
        greeting = received(self.one, upstream, 3)
        upstream.sendall(b"\x05\x00")
        rest = greeting[2 + greeting[1] :]
        request = rest or received(self.one, upstream, 10)
        for start in range(0, len(self.reply), piece):
            upstream.sendall(self.reply[start : start + piece])
            self.one.settle()
        return upstream, request

    def close(self):
        self.listening.close()
        self.one.close()
