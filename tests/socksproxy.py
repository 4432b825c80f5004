"""A SOCKS5 server for tests that runs in the loop of the thing under test, and can be told to misbehave."""

import socket
import struct
from select import EPOLLIN


def socks_header(host, port):
    return b"\0\0\0" + (b"\x01" if len(host) == 4 else b"\x04") + host + port.to_bytes(2)


class Proxy:
    """Answers UDP ASSOCIATE and CONNECT; what it got is in lists. Echoes datagrams if `echo`."""

    def __init__(self, shard, family=socket.AF_INET):
        self._shard = shard
        self.family = family
        self.loopback = "127.0.0.1" if family == socket.AF_INET else "::1"
        self._listener = socket.create_server((self.loopback, 0), family=family)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self.relay = socket.socket(family, socket.SOCK_DGRAM)
        self.relay.bind((self.loopback, 0))
        self.relay.setblocking(False)
        self.relay_port = self.relay.getsockname()[1]
        shard.upstream.use_addresses([(self.loopback, self.port)])
        shard.watch(self._listener.fileno(), EPOLLIN, self._accept)
        shard.watch(self.relay.fileno(), EPOLLIN, self._datagram)
        self.reply = 0  #: REP; None: close instead
        self.replies = {}  #: the same for some commands
        self.stream = b""  #: what came behind a success
        self.bound = None  #: address in the reply, with ATYP
        self.silent = False  #: never reply
        self.garbage = b""  #: sent instead of the choice of a method
        self.resolver = None  #: called with each message that comes through CONNECT; returns what to send
        self.echo = False
        self.clients = []
        self.requests = []
        self.datagrams = []  #: (header, payload)
        self.source = None  #: of the last datagram
        self._states = {}

    def _accept(self, mask, now):
        client, _ = self._listener.accept()
        client.setblocking(False)
        self.clients.append(client)
        self._states[client] = [0, b""]
        self._shard.watch(client.fileno(), EPOLLIN, lambda mask, now: self._read(client))

    def _read(self, client):
        try:
            data = client.recv(65536)
        except OSError:
            data = b""
        if not data:
            self.close(client)
            return
        state = self._states[client]
        state[1] += data
        if state[0] == 0 and len(state[1]) >= 3:
            state[:] = [1, state[1][2 + state[1][1] :]]
            client.send(self.garbage or b"\x05\x00")
        if state[0] == 1 and len(state[1]) >= (10 if state[1][3:4] != b"\x03" else 7 + state[1][4]):
            self.requests.append(state[1])
            state[:] = [2, b""]
            reply = self.replies.get(self.requests[-1][1], self.reply)
            if self.silent:
                return
            if reply is None:
                self.close(client)
            else:
                host = b"\x01" + socket.inet_aton("127.0.0.1") if self.family == socket.AF_INET else b"\x04" + bytes(16)
                bound = (self.bound or host) + self.relay_port.to_bytes(2)
                client.send(b"\x05" + reply.to_bytes() + b"\0" + bound)
        elif state[0] == 2 and self.resolver is not None:
            while len(state[1]) >= 2 and len(state[1]) >= 2 + int.from_bytes(state[1][:2]):
                end = 2 + int.from_bytes(state[1][:2])
                message, state[1] = state[1][2:end], state[1][end:]
                answer = self.resolver(message)
                if answer is not None:
                    client.send(struct.pack(">H", len(answer)) + answer)

        elif state[0] == 2:
            self.stream += state[1]
            state[1] = b""

    def _datagram(self, mask, now):
        while True:
            try:
                data, self.source = self.relay.recvfrom(65535)
            except BlockingIOError:
                return
            cut = 10 if data[3] == 1 else 22
            self.datagrams.append((data[:cut], data[cut:]))
            if self.echo:
                self.relay.sendto(data, self.source)

    def answer(self, data):
        """Send the client's association a datagram as it is."""
        self.relay.sendto(data, self.source)

    def close(self, client):
        self._shard.forget(client.fileno())
        client.close()
        self.clients.remove(client)

    def stop(self):
        for client in list(self.clients):
            self.close(client)
        for each in (self._listener, self.relay):
            self._shard.forget(each.fileno())
            each.close()
