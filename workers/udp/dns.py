"""DNS over UDP: the questions of all client sockets share one association with the proxy.

    client ── datagram ──► ask ── id rewritten, SOCKS header in front ──► relay of the proxy ──► resolver
    client ◄─ datagram ─── _answer ◄─ matched by resolver, id and question ──┘

A resolver's client asks each question from a new socket, and an association for each would cost the proxy a connection
and the client three round trips. What is no ordinary question goes through its socket's own association.

An association has one port at the proxy, so ids are all that a forger must guess (RFC 5452): they are drawn at random,
the question is compared, and the association is changed once a minute, and at once when answers come that nobody
asked for.
"""

from __future__ import annotations

from errno import EMFILE, ENFILE
from os import urandom
from typing import TYPE_CHECKING, Final

from workers import counts
from workers.dns.over_tcp import HEADER, question_of
from workers.proxyconnection import proxy_unreachable
from workers.socks.wire import ProtocolError, parse_datagram
from workers.udp.association import CLOSED, READY, Association
from workers.udp.flow import Flow

if TYPE_CHECKING:
    from workers.udp.datagrams import Udp

MAX_OUTSTANDING: Final = 4096  #: questions of one worker that wait for an answer; the oldest gives way
MAX_WAITING: Final = 512  #: of them, questions that wait for the association
MAX_RESOLVERS: Final = 256  #: whose SOCKS headers are prepared
LIFE: Final = 60.0  #: seconds that one association, and so one port at the proxy, is used for questions
MAX_UNASKED: Final = 16  #: answers that nobody waits for, before another association is used
FAIR_SHARE: Final = 64  #: answers in one event
_MAPPED: Final = bytes(10) + b"\xff\xff"


class Query:
    """One question that waits for its answer."""

    __slots__ = ("asked_at", "key", "message", "question")

    def __init__(self, key: bytes, message: bytes, question: bytes, now: float) -> None:
        self.key = key  #: of the client's flow
        self.message = message  #: as the client sent it
        self.question = question  #: see question_of()
        self.asked_at = now


class DnsOverUdp:
    """The questions of one worker, on their shared association."""

    def __init__(self, udp: Udp) -> None:
        self._udp = udp
        self._count = udp.worker.count
        self._patience = udp.worker.settings.dns_timeout
        self._queries: dict[bytes, Query] = {}  # by resolver (address, port) and id on the wire; the oldest first
        self._association: Association | None = None
        self._opened = 0  # associations so far: their keys in the table
        self._since = 0.0
        self._unasked = 0
        self._flows: dict[bytes, Flow] = {}  # by resolver, of this association
        self._scratch = bytearray(65536)

    def ask(self, key: bytes, message: bytes, now: float) -> bool:
        """Take a datagram to port 53; False: it is no question, and none of ours."""
        question = question_of(message) if is_query(message) else None
        if question is None:
            return False
        udp = self._udp
        association = self._association
        if association is None or association.state == CLOSED or now - self._since > LIFE:
            code = udp.availability.refused(now)
            if code is not None:
                udp.undelivered(key, message, code, now)
                return True
            try:
                association = self._open(now)
            except OSError as error:
                if error.errno in (EMFILE, ENFILE):
                    self._count[counts.UDP_DROPPED_DESCRIPTORS] += 1
                else:
                    proxy_unreachable(udp.worker, error.strerror or str(error))
                    udp.undelivered(key, message, udp.availability.is_down(now), now)
                return True
        self._count[counts.DNS_QUERIES] += 1
        self._expire(now)
        half = (len(key) - 4) // 2
        resolver = key[half : 2 * half] + key[-2:]
        number = urandom(2)
        while resolver + number in self._queries:
            number = urandom(2)
        self._queries[resolver + number] = Query(key, message, question, now)
        flow = self._flows.get(resolver)
        if flow is None:
            if len(self._flows) >= MAX_RESOLVERS:
                self._flows.clear()
            flow = self._flows[resolver] = Flow(association, key, direct=False)
        association.active_at = now
        if association.state == READY:
            udp.send_copy(flow, number + message[2:], now)
        else:
            association.wait(flow, number + message[2:])
        return True

    def _open(self, now: float) -> Association:
        self._opened += 1
        # No client socket has a key of this length.
        key = b"dns" + self._opened.to_bytes(8, "big")
        association = self._udp.associations.open(key, b"", now, self._answers_arrive, self._undelivered)
        association.waiting_most = MAX_WAITING
        self._association = association
        self._flows.clear()
        self._since = now
        self._unasked = 0
        return association

    def _expire(self, now: float) -> None:
        """Forget questions whose clients have given up, and the oldest when there are too many."""
        queries = self._queries
        while queries:
            oldest = next(iter(queries))
            if now - queries[oldest].asked_at < self._patience and len(queries) < MAX_OUTSTANDING:
                return
            del queries[oldest]
            self._count[counts.DNS_UNANSWERED] += 1

    def _undelivered(self, flow: Flow, payload: bytes, code: int, now: float) -> None:
        """Answer a question that waited for an association in vain."""
        half = (len(flow.key) - 4) // 2
        query = self._queries.pop(flow.key[half : 2 * half] + flow.key[-2:] + payload[:2], None)
        if query is not None:
            self._udp.undelivered(query.key, query.message, code, now)

    # ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _answers_arrive(self, association: Association, mask: int, now: float) -> None:
        """Take the answers that wait, of whatever resolver."""
        for _ in range(FAIR_SHARE):
            try:
                size = association.receive(self._scratch)
            except BlockingIOError:
                return
            except OSError:  # about a datagram that was sent
                self._count[counts.UDP_DROPPED_SOCKET] += 1
                return
            association.active_at = now
            self._answer(association, bytes(self._scratch[:size]))

    def _answer(self, association: Association, data: bytes) -> None:
        try:
            host, port, behind = parse_datagram(data)
        except ProtocolError:
            self._count[counts.UDP_DROPPED_BAD_HEADER] += 1
            return
        if isinstance(host, str):
            self._count[counts.UDP_DROPPED_UNMAPPABLE] += 1
            return
        if len(host) == 16 and host.startswith(_MAPPED):
            host = host[12:]
        message = data[behind:]
        name = host + port.to_bytes(2, "big") + message[:2]
        query = self._queries.get(name)
        if query is not None and len(message) >= HEADER and message[2] & 0x80:
            question = question_of(message)
            if question == query.question or (question is None and message[4:6] == b"\0\0"):
                del self._queries[name]
                self._udp.answers.deliver(query.key, query.message[:2] + message[2:])
                return
        self._count[counts.DNS_UNASKED] += 1
        if association is self._association:
            self._unasked += 1
            if self._unasked >= MAX_UNASKED:
                self._association = None  # it ends when it is idle


def is_query(message: bytes) -> bool:
    """Say whether a datagram looks like a standard query: one question, no answers (RFC 1035, 4.1.1)."""
    return len(message) > HEADER and not message[2] & 0xF8 and message[4:10] == b"\0\1\0\0\0\0"
