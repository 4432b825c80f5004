"""A small name server behind the gateway: A and AAAA for every name, and one answer that is too large for UDP."""

import contextlib
import socket
import struct
import threading
from typing import Final

import dpkt

from tests.netns.traffic import Service, read_exactly
from tests.netns.world import TARGET4, TARGET6, Namespace

ANSWER4: Final = "203.0.113.77"
ANSWER6: Final = "2001:db8:1::77"
LARGE: Final = "large.test"  #: its TXT answer has 3,000 bytes: truncated over UDP, whole over TCP


def answer(query: bytes, over_tcp: bool) -> bytes:
    """Answer one query message; dpkt reads it, the answer is written by hand."""
    message = dpkt.dns.DNS(query)
    question = message.qd[0]
    truncated = False
    rdata = b""
    if question.type == dpkt.dns.DNS_A:
        rdata = socket.inet_aton(ANSWER4)
    elif question.type == dpkt.dns.DNS_AAAA:
        rdata = socket.inet_pton(socket.AF_INET6, ANSWER6)
    elif question.name == LARGE:
        truncated = not over_tcp
        rdata = b"" if truncated else (b"\xfa" + b"t" * 250) * 12
    # QR, AA, RA, the query's RD, and TC where it applies (RFC 1035, 4.1.1); one question, at most one answer, no EDNS.
    flags = 0x8480 | message.rd << 8 | truncated << 9
    reply = struct.pack(">HHHHHH", message.id, flags, 1, 1 if rdata else 0, 0, 0)
    # A name on the wire is one byte longer than its text at each end.
    reply += query[12 : 12 + len(question.name) + 2 + 4]
    if rdata:
        reply += b"\xc0\x0c" + struct.pack(">HHIH", question.type, 1, 60, len(rdata)) + rdata
    return reply


class NameServer:
    """Port 53 of one IPv4 and one IPv6 address; `asked` counts the queries for each transport."""

    def __init__(self, namespace: Namespace) -> None:
        self.asked = {"udp": 0, "tcp": 0}
        self._tcp = Service(namespace, self._over_tcp, "::", 53)
        self._sockets = []
        self._threads = []
        for family, address in ((socket.AF_INET, TARGET4), (socket.AF_INET6, TARGET6)):
            server = namespace.socket(family, socket.SOCK_DGRAM)
            server.bind((address, 53))
            thread = threading.Thread(target=self._over_udp, args=(server,), daemon=True)
            thread.start()
            self._sockets.append(server)
            self._threads.append(thread)

    def _over_udp(self, server: socket.socket) -> None:
        while True:
            query, sender = server.recvfrom(4096)
            if query == b"stop":
                return
            with contextlib.suppress(dpkt.Error):
                server.sendto(answer(query, over_tcp=False), sender)
                self.asked["udp"] += 1

    def _over_tcp(self, connection: socket.socket) -> None:
        while True:
            (length,) = struct.unpack(">H", read_exactly(connection, 2))
            query = read_exactly(connection, length)
            reply = answer(query, over_tcp=True)
            self.asked["tcp"] += 1
            connection.sendall(struct.pack(">H", len(reply)) + reply)

    def __enter__(self) -> "NameServer":
        return self

    def __exit__(self, *_: object) -> None:
        for server, thread in zip(self._sockets, self._threads, strict=True):
            server.sendto(b"stop", server.getsockname())
            thread.join(5)
            server.close()
        self._tcp.close()
