"""DNS over UDP: the questions of all client sockets share one association with the proxy.

    client ── datagram ──► ask ── id rewritten, SOCKS header in front ──► relay of the proxy ──► resolver
    client ◄─ datagram ─── _answer ◄─ matched by resolver, id and question ──┘

A resolver's client asks each question from a new socket, and an association for each would cost the proxy a connection
and the client three round trips. What is no ordinary question goes through its socket's own association.

With a cache (workers.dns.cache) what is known is answered at once, and what a resolver answers is kept; then direct://
shares a socket for each IP version as well.

An association has one port at the proxy, so ids are all that a forger must guess (RFC 5452): they are drawn at random,
the question is compared, and the association is changed once a minute, and at once when answers come that nobody
asked for.
"""

from __future__ import annotations

from errno import EMFILE, ENFILE
from os import urandom
from socket import AF_INET, AF_INET6, inet_pton
from typing import TYPE_CHECKING, Final

from workers import counts
from workers.dns.message import HEADER, Query, parse_query
from workers.dns.over_tcp import question_of, without_records
from workers.proxyconnection import proxy_unreachable
from workers.socks.wire import ProtocolError, parse_datagram
from workers.udp.association import CLOSED, READY, Association
from workers.udp.availability import DOWN
from workers.udp.flow import Flow

if TYPE_CHECKING:
    from workers.dns.cache import DnsCache
    from workers.udp.datagrams import Udp

MAX_OUTSTANDING: Final = 4096  #: questions of one worker that wait for an answer; the oldest gives way
MAX_WAITING: Final = 512  #: of them, questions that wait for the association
MAX_RESOLVERS: Final = 256  #: whose SOCKS headers are prepared
LIFE: Final = 60.0  #: seconds that one association, and so one port at the proxy, is used for questions
MAX_UNASKED: Final = 16  #: answers that nobody waits for, before another association is used
FAIR_SHARE: Final = 64  #: answers in one event
_MAPPED: Final = bytes(10) + b"\xff\xff"


class Waiting:
    """One question that waits for its answer."""

    __slots__ = ("asked", "asked_at", "key", "message", "question", "told")

    def __init__(
        self, key: bytes, message: bytes, question: bytes, asked: Query | None, told: bool, now: float
    ) -> None:
        self.key = key  #: of the client's flow
        self.message = message  #: as the client sent it
        self.question = question  #: see question_of()
        self.asked = asked  #: the same as the cache has it; None: it keeps no answer to this
        self.told = told  #: the client has had an answer from the cache; a new one is only kept
        self.asked_at = now


class DnsOverUdp:
    """The questions of one worker, on their shared association; for direct:// those of one IP version."""

    def __init__(self, udp: Udp, cache: DnsCache | None = None) -> None:
        self._udp = udp
        self._count = udp.worker.count
        self._patience = udp.worker.settings.dns_timeout
        self._cache = cache
        self._direct = udp.worker.upstream.direct
        self._renewing: set[bytes] = set()  # keys of the cache that are asked for while it still has them
        self._queries: dict[bytes, Waiting] = {}  # by resolver (address, port) and id on the wire; the oldest first
        self._association: Association | None = None
        self._opened = 0  # associations so far: their keys in the table
        self._since = 0.0
        self._unasked = 0
        self._flows: dict[bytes, Flow] = {}  # by resolver, of this association
        self._scratch = bytearray(65536)

    def ask(self, key: bytes, message: bytes, now: float) -> bool:
        """Take a datagram to port 53; False: it is no question, and none of ours."""
        if self._direct and self._cache is None:
            return False
        asked = parse_query(message) if self._cache is not None else None
        # What the cache reads is a question; only what it does not must be looked at again.
        question = asked.question.lower() if asked else question_of(message) if is_query(message) else None
        if question is None:
            return False
        told = False
        if asked is not None:
            stale = self._tell(key, message, asked, now)
            if stale is False:
                return True
            told = stale is True
        self._ask(Waiting(key, message, question, asked, told, now), now)
        return True

    def _tell(self, key: bytes, message: bytes, asked: Query, now: float) -> bool | None:
        """Answer from the cache; return whether the answer is to be renewed, None if there is none."""
        assert self._cache is not None
        resolver = resolver_of(key)
        found = self._cache.answer(resolver, asked, now)
        if found is None:
            return None
        answer, stale = found
        if len(answer) > asked.limit:
            answer = without_records(message, answer[3] & 15, truncated=True)
        self._udp.answers.deliver(key, answer)
        name = resolver + asked.key()
        if not stale or name in self._renewing:
            return False
        self._renewing.add(name)
        self._count[counts.DNS_CACHE_RENEWED] += 1
        return True

    def _ask(self, query: Waiting, now: float) -> None:
        """Send a question to its resolver."""
        udp = self._udp
        key = query.key
        association = self._association
        if association is None or association.state == CLOSED or now - self._since > LIFE:
            code = udp.availability.refused(now)
            if code is not None:
                self._refused(query, code, now)
                return
            try:
                association = self._open(now, key)
            except OSError as error:
                if error.errno in (EMFILE, ENFILE):
                    self._count[counts.UDP_DROPPED_DESCRIPTORS] += 1
                    self._forget(query)
                else:
                    proxy_unreachable(udp.worker, error.strerror or str(error))
                    self._refused(query, udp.availability.is_down(now), now)
                return
        self._count[counts.DNS_QUERIES] += 1
        self._expire(now)
        resolver = resolver_of(key)
        number = urandom(2)
        while resolver + number in self._queries:
            number = urandom(2)
        self._queries[resolver + number] = query
        flow = self._flows.get(resolver)
        if flow is None:
            if len(self._flows) >= MAX_RESOLVERS:
                self._flows.clear()
            flow = self._flows[resolver] = Flow(association, key, self._direct)
        association.active_at = now
        if association.state == READY:
            udp.send_copy(flow, number + query.message[2:], now)
        else:
            association.wait(flow, number + query.message[2:])

    def _open(self, now: float, asking: bytes) -> Association:
        self._opened += 1
        if self._direct:  # the unspecified address of this IP version: no client socket has it
            key = client = bytes((len(asking) - 4) // 2) + (self._opened & 0xFFFF).to_bytes(2, "big")
        else:  # no client socket has a key of this length
            key, client = b"dns" + self._opened.to_bytes(8, "big"), b""
        association = self._udp.associations.open(key, client, now, self._answers_arrive, self._undelivered)
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
            self._forget(queries.pop(oldest))
            self._count[counts.DNS_UNANSWERED] += 1

    def _forget(self, query: Waiting) -> None:
        if query.told and query.asked is not None:
            self._renewing.discard(resolver_of(query.key) + query.asked.key())

    def _refused(self, query: Waiting, code: int, now: float) -> None:
        """Ask over TCP, or say that there is no way; a client that has an answer hears nothing of it."""
        self._forget(query)
        if not query.told:
            self._udp.undelivered(query.key, query.message, code, now)
        elif code != DOWN and not self._udp.worker.upstream.rejects:
            self._udp.dns.ask(query.key, query.message, now, told=True)

    def _undelivered(self, flow: Flow, payload: bytes, code: int, now: float) -> None:
        """Answer a question that waited for an association in vain."""
        query = self._queries.pop(resolver_of(flow.key) + payload[:2], None)
        if query is not None:
            self._refused(query, code, now)

    # ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _answers_arrive(self, association: Association, mask: int, now: float) -> None:
        """Take the answers that wait, of whatever resolver."""
        for _ in range(FAIR_SHARE):
            try:
                if self._direct:
                    size, source = association.receive_from(self._scratch)
                else:
                    size = association.receive(self._scratch)
            except BlockingIOError:
                return
            except OSError:  # about a datagram that was sent
                self._count[counts.UDP_DROPPED_SOCKET] += 1
                return
            association.active_at = now
            data = bytes(self._scratch[:size])
            if self._direct:
                host = inet_pton(AF_INET6 if ":" in source[0] else AF_INET, source[0].partition("%")[0])
                self._answer(association, host + source[1].to_bytes(2, "big"), data, now)
            else:
                self._unwrap(association, data, now)

    def _unwrap(self, association: Association, data: bytes, now: float) -> None:
        """Take an answer behind the SOCKS header that says whose it is."""
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
        self._answer(association, host + port.to_bytes(2, "big"), data[behind:], now)

    def _answer(self, association: Association, resolver: bytes, message: bytes, now: float) -> None:
        name = resolver + message[:2]
        query = self._queries.get(name)
        if query is not None and len(message) >= HEADER and message[2] & 0x80:
            question = question_of(message)
            if question == query.question or (question is None and message[4:6] == b"\0\0"):
                del self._queries[name]
                self._forget(query)
                if query.asked is not None and self._cache is not None:
                    self._cache.keep(resolver, query.asked, message, now)
                if not query.told:
                    self._udp.answers.deliver(query.key, query.message[:2] + message[2:])
                return
        self._count[counts.DNS_UNASKED] += 1
        if association is self._association:
            self._unasked += 1
            if self._unasked >= MAX_UNASKED:
                self._association = None  # it ends when it is idle


def resolver_of(key: bytes) -> bytes:
    """Return the destination of a flow: packed address, then the port's two octets."""
    half = (len(key) - 4) // 2
    return key[half : 2 * half] + key[-2:]


def is_query(message: bytes) -> bool:
    """Say whether a datagram looks like a standard query: one question, no answers (RFC 1035, 4.1.1)."""
    return len(message) > HEADER and not message[2] & 0xF8 and message[4:10] == b"\0\1\0\0\0\0"
