"""A STUN server with two addresses and two ports, and a client that finds out how a NAT maps and filters (RFC 5780)."""

import os
import socket
import struct
import threading
from typing import Final

from tests.netns.world import Namespace

COOKIE: Final = b"\x21\x12\xa4\x42"
REQUEST: Final = 0x0001
SUCCESS: Final = 0x0101
CHANGE_REQUEST: Final = 0x0003
XOR_MAPPED_ADDRESS: Final = 0x0020
CHANGE_ADDRESS: Final = 4
CHANGE_PORT: Final = 2

ENDPOINT_INDEPENDENT: Final = "endpoint-independent"
ADDRESS: Final = "address"
ADDRESS_PORT: Final = "address-port"

Address = tuple[str, int]


class StunServer:
    """Answers Binding requests from the socket that CHANGE-REQUEST asks for."""

    def __init__(self, namespace: Namespace, hosts: tuple[str, str], ports: tuple[int, int] = (3478, 3479)) -> None:
        self.hosts = hosts
        self.ports = ports
        self.sockets = {}
        for host in hosts:
            for port in ports:
                end = namespace.socket(socket.AF_INET, socket.SOCK_DGRAM)
                end.bind((host, port))
                end.settimeout(0.2)
                self.sockets[host, port] = end
        self._stopping = False
        self._threads = [threading.Thread(target=self._serve, args=(name,), daemon=True) for name in self.sockets]
        for thread in self._threads:
            thread.start()

    def _serve(self, name: Address) -> None:
        while not self._stopping:
            try:
                data, sender = self.sockets[name].recvfrom(2048)
            except TimeoutError:
                continue
            if data[4:8] != COOKIE or struct.unpack_from(">H", data)[0] != REQUEST:
                continue
            change = struct.unpack_from(">I", data, 24)[0] if len(data) >= 28 else 0
            host = self.hosts[1 - self.hosts.index(name[0])] if change & CHANGE_ADDRESS else name[0]
            port = self.ports[1 - self.ports.index(name[1])] if change & CHANGE_PORT else name[1]
            mapped = bytes(
                a ^ b for a, b in zip(struct.pack(">H", sender[1]) + socket.inet_aton(sender[0]), b"\x21\x12" + COOKIE,
                                      strict=True)
            )  # fmt: skip
            answer = struct.pack(">HH", SUCCESS, 12) + data[4:20]
            answer += struct.pack(">HHBB", XOR_MAPPED_ADDRESS, 8, 0, 1) + mapped
            self.sockets[host, port].sendto(answer, sender)

    def close(self) -> None:
        self._stopping = True
        for thread in self._threads:
            thread.join(5)
        for end in self.sockets.values():
            end.close()


def binding(client: socket.socket, server: Address, change: int = 0, timeout: float = 2.0) -> Address | None:
    """Ask for the mapped address; None: no answer came."""
    transaction = os.urandom(12)
    attribute = struct.pack(">HHI", CHANGE_REQUEST, 4, change) if change else b""
    client.settimeout(timeout)
    client.sendto(struct.pack(">HH", REQUEST, len(attribute)) + COOKIE + transaction + attribute, server)
    while True:
        try:
            data, _ = client.recvfrom(2048)
        except TimeoutError:
            return None
        if data[8:20] == transaction:
            break
    mapped = bytes(a ^ b for a, b in zip(data[26:32], b"\x21\x12" + COOKIE, strict=True))
    return socket.inet_ntoa(mapped[2:]), struct.unpack(">H", mapped[:2])[0]


def mapping_of(client: socket.socket, server: StunServer) -> str:
    """Compare the ports (a proxy of many addresses takes any) that three destinations see; RFC 5780, 4.3."""
    (one, two), (first, second) = server.hosts, server.ports
    seen = [binding(client, where) for where in ((one, first), (two, first), (two, second))]
    assert None not in seen
    ports = [mapped[1] for mapped in seen if mapped]
    if ports[0] == ports[1]:
        return ENDPOINT_INDEPENDENT
    return ADDRESS if ports[1] == ports[2] else ADDRESS_PORT


def filtering_of(client: socket.socket, server: StunServer) -> str:
    """See whose answers come in; RFC 5780, 4.4. The socket must not have talked to anybody else before."""
    where = server.hosts[0], server.ports[0]
    assert binding(client, where)
    if binding(client, where, CHANGE_ADDRESS | CHANGE_PORT, 0.7):
        return ENDPOINT_INDEPENDENT
    return ADDRESS if binding(client, where, CHANGE_PORT, 0.7) else ADDRESS_PORT
