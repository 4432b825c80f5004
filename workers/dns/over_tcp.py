"""DNS over TCP: questions to port 53 go through a proxy that has no UDP (RFC 1035, 4.2.2; RFC 7766).

    client ── datagram ──► ask ── id rewritten, length in front ──► CONNECT resolver:53 through the proxy
    client ◄─ datagram ─── _answer ◄── matched by id and question ──┘  one connection for each resolver, pipelined

An answer that is too large for what the client said (EDNS, else 512 octets) or for the device goes out truncated, and
the client asks again over TCP, which is an ordinary flow.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import error as StructError
from typing import TYPE_CHECKING, Final

from dpkt import UnpackError
from dpkt.dns import DNS, DNS_OPT, DNS_QR, DNS_RA, DNS_RCODE_SERVFAIL, DNS_RD, DNS_TC, unpack_name

from workers import counts
from workers.dns.message import HEADER, PLAIN_LIMIT, parse_query
from workers.dns.message import Query as Asked
from workers.proxyconnection import CLOSED, ProxyConnection
from workers.socks.wire import CONNECT, Host
from workers.wire.udp import IPV4_OVERHEAD, IPV6_OVERHEAD, split_key

if TYPE_CHECKING:
    from workers.dns.cache import DnsCache
    from workers.worker import Worker

MAX_OUTSTANDING: Final = 512  #: questions to one resolver that have no answer yet
MAX_RESOLVERS: Final = 64  #: that are asked at a time
_OPCODE_AND_RD: Final = 0x7800 | DNS_RD

Deliver = Callable[[bytes, bytes], None]


class Query:
    """One question that waits for its answer."""

    __slots__ = ("asked", "asked_at", "key", "limit", "message", "question", "retried", "told")

    def __init__(
        self, key: bytes, message: bytes, question: bytes, asked: Asked | None, told: bool, limit: int, now: float
    ) -> None:
        self.key = key  #: of the client's flow
        self.message = message  #: as the client sent it
        self.question = question  #: the first of its question section, see question_of()
        self.asked = asked  #: the same as the cache has it; None: it keeps no answer to this
        self.told = told  #: the client has had an answer from the cache; a new one is only kept
        self.limit = limit  #: octets of the answer that the client and the device take
        self.asked_at = now
        self.retried = False


class DnsOverTcp:
    """The questions of one worker, by resolver."""

    def __init__(self, worker: Worker, deliver: Deliver, cache: DnsCache | None = None) -> None:
        """`deliver(key, payload)` sends a datagram back to the client of a flow; answers go into the cache as well."""
        self.worker = worker
        self.cache = cache
        self.deliver = deliver
        self._resolvers: dict[bytes, Resolver] = {}

    def ask(self, key: bytes, payload: bytes, now: float, told: bool = False) -> None:
        """Take the payload of a datagram to port 53; what is no question is dropped and counted.

        `told`: the client has had an answer from the cache, which is renewed.
        """
        count = self.worker.count
        question = question_of(payload)
        if question is None or payload[2] & 0x80:
            count[counts.DNS_OVER_TCP_FAILED] += 1
            return
        count[counts.DNS_OVER_TCP_QUERIES] += 1
        overhead = IPV4_OVERHEAD if len(key) == 12 else IPV6_OVERHEAD
        limit = min(answer_limit(payload), self.worker.settings.mtu - overhead)
        query = Query(key, payload, question, parse_query(payload) if self.cache else None, told, limit, now)
        _, _, host, port = split_key(key)
        name = host + port.to_bytes(2, "big")
        resolver = self._resolvers.get(name)
        if resolver is None:
            if len(self._resolvers) >= MAX_RESOLVERS:
                self.fail(query)
                return
            resolver = self._resolvers[name] = Resolver(self, host, port)
        resolver.ask(query, now)

    def fail(self, query: Query) -> None:
        """Answer SERVFAIL, so that the client goes on to its next resolver at once."""
        self.worker.count[counts.DNS_OVER_TCP_FAILED] += 1
        if not query.told:
            self.deliver(query.key, without_records(query.message, DNS_RCODE_SERVFAIL))

    def forget(self, resolver: Resolver) -> None:
        """Remove a resolver that nobody asks any more."""
        name = resolver.host + resolver.port.to_bytes(2, "big")
        if self._resolvers.get(name) is resolver:
            del self._resolvers[name]

    def stop(self) -> None:
        """Close all connections."""
        for resolver in list(self._resolvers.values()):
            resolver.close()
        self._resolvers.clear()


class Resolver:
    """One resolver: a connection to it through the proxy, and the questions on it by the id that they have there."""

    __slots__ = (
        "_active_at",
        "_armed",
        "_buffer",
        "_connection",
        "_dns",
        "_heard_at",
        "_is_open",
        "_next_id",
        "_outstanding",
        "host",
        "port",
    )

    def __init__(self, dns: DnsOverTcp, host: bytes, port: int) -> None:
        self._dns = dns
        self.host = host  #: packed address
        self.port = port
        self._connection: ProxyConnection | None = None
        self._is_open = False
        self._outstanding: dict[int, Query] = {}
        self._next_id = 0
        self._buffer = b""
        self._active_at = 0.0
        self._heard_at = 0.0  # when the resolver last sent anything
        self._armed = False

    def ask(self, query: Query, now: float) -> None:
        """Send a question, now or when the connection is there."""
        outstanding = self._outstanding
        for other in outstanding.values():
            if other.key == query.key and other.message == query.message and other.told == query.told:
                return  # asked again by an impatient client: one answer will do
        if len(outstanding) >= MAX_OUTSTANDING:
            self._dns.fail(query)
            return
        number = self._next_id
        while number in outstanding:
            number = number + 1 & 0xFFFF
        self._next_id = number + 1 & 0xFFFF
        outstanding[number] = query
        self._active_at = now
        if not self._armed:
            self._armed = True
            self._dns.worker.timers.call_at(now + self._dns.worker.settings.dns_timeout, self._timeout)
        if self._connection is None:
            self._connect(now)
        elif self._is_open:
            self._send(number, query)

    def _connect(self, now: float) -> None:
        try:
            self._connection = ProxyConnection(self._dns.worker, self, CONNECT, self.host, self.port)
        except OSError:
            self._fail_all()

    def _send(self, number: int, query: Query) -> None:
        message = query.message
        framed = len(message).to_bytes(2, "big") + number.to_bytes(2, "big") + message[2:]
        if self._connection is None or not self._connection.send(framed):
            del self._outstanding[number]
            self._dns.fail(query)

    # ── the connection ──────────────────────────────────────────────────────────────────────────────────────────

    def connected(self, bound: tuple[Host, int], now: float) -> None:
        """Send all questions that wait."""
        self._is_open = True
        for number, query in list(self._outstanding.items()):
            self._send(number, query)

    def refused(self, reply: int, now: float) -> None:
        """The proxy does not reach the resolver."""
        self._forget_connection()
        self._fail_all()

    def lost(self, why: int, now: float) -> None:
        """Ask again what had no answer, once: resolvers close idle connections when they like (RFC 7766, 6.2.3)."""
        self._forget_connection()
        if why == CLOSED:
            for number, query in list(self._outstanding.items()):
                if query.retried:
                    del self._outstanding[number]
                    self._dns.fail(query)
                query.retried = True
            if self._outstanding:
                self._connect(now)
        else:
            self._fail_all()

    def received(self, data: bytes, now: float) -> None:
        """Take bytes of the answers: each is two octets of length, and the message."""
        self._active_at = self._heard_at = now
        buffer = self._buffer + data
        at = 0
        while len(buffer) - at >= 2:
            end = at + 2 + (buffer[at] << 8 | buffer[at + 1])
            if end > len(buffer):
                break
            self._answer(buffer[at + 2 : end])
            at = end
        self._buffer = buffer[at:]

    def _answer(self, message: bytes) -> None:
        if len(message) < HEADER or not message[2] & 0x80:
            return
        number = message[0] << 8 | message[1]
        query = self._outstanding.get(number)
        if query is None:
            return  # it came too late
        question = question_of(message)
        if question != query.question and (question is not None or message[4:6] != b"\0\0"):
            return  # the answer to another question; one without any is how errors are reported
        del self._outstanding[number]
        cache = self._dns.cache
        if cache is not None and query.asked is not None:
            cache.keep(self.host + self.port.to_bytes(2, "big"), query.asked, message, self._heard_at)
        if query.told:
            return
        answer = query.message[:2] + message[2:]
        if len(answer) > query.limit:
            answer = without_records(query.message, message[3] & 15, truncated=True)
        self._dns.deliver(query.key, answer)

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _timeout(self, now: float) -> None:
        """Forget questions that got no answer in time (their clients have), and a connection that nobody uses."""
        self._armed = False
        dns = self._dns
        patience = dns.worker.settings.dns_timeout
        silent = False
        for number, query in list(self._outstanding.items()):
            if now - query.asked_at >= patience:
                del self._outstanding[number]
                dns.worker.count[counts.DNS_OVER_TCP_FAILED] += 1
                silent = silent or self._heard_at < query.asked_at
        if silent and self._connection is not None:  # dead, and nobody told us
            self._connection.close()
            self._forget_connection()
            if self._outstanding:
                self._connect(now)
        if not self._outstanding and now - self._active_at >= patience:
            self.close()
            dns.forget(self)
            return
        self._armed = True
        due_at = min([query.asked_at for query in self._outstanding.values()] or [self._active_at]) + patience
        dns.worker.timers.call_at(due_at, self._timeout)

    def _fail_all(self) -> None:
        failed = list(self._outstanding.values())
        self._outstanding.clear()
        for query in failed:
            self._dns.fail(query)

    def _forget_connection(self) -> None:
        self._connection = None
        self._is_open = False
        self._buffer = b""

    def close(self) -> None:
        """Close the connection; nobody is told."""
        self._outstanding.clear()
        if self._connection is not None:
            self._connection.close()
        self._forget_connection()


def question_of(message: bytes) -> bytes | None:
    """Return the first question of a message, in lower case, to compare; None if there is none."""
    if len(message) < HEADER or message[4:6] == b"\0\0":
        return None
    end = _end_of_question(message)
    return message[HEADER:end].lower() if end else None


def _end_of_question(message: bytes) -> int:
    """Return where the first question ends, 0 if it does not."""
    try:
        end = int(unpack_name(message, HEADER)[1])
    except (UnpackError, StructError, IndexError):
        return 0
    except UnicodeDecodeError:  # labels are octets, text only by custom
        end = _skip_labels(message)
    return end + 4 if end and end + 4 <= len(message) else 0


def _skip_labels(message: bytes) -> int:
    """Return where a name ends whose labels are no UTF-8; its labels have been found sound."""
    at = HEADER
    while message[at]:
        if message[at] & 0xC0:
            return at + 2
        at += 1 + message[at]
    return at + 1


def answer_limit(message: bytes) -> int:
    """Return how large an answer by UDP may be: what the question's EDNS says (RFC 6891, 6.2.3), or 512."""
    try:
        for record in DNS(message).ar:
            if record.type == DNS_OPT:
                return max(PLAIN_LIMIT, int(record.cls))
    except (UnpackError, StructError, IndexError, UnicodeDecodeError):
        pass  # records that dpkt does not know: nothing is known of the client then
    return PLAIN_LIMIT


def without_records(message: bytes, code: int, truncated: bool = False) -> bytes:
    """Return an answer to a question that has no records: SERVFAIL, or a truncated one."""
    end = _end_of_question(message)
    answer = DNS(id=message[0] << 8 | message[1])
    asked = message[2] << 8 | message[3]
    answer.op = DNS_QR | asked & _OPCODE_AND_RD | DNS_RA | (DNS_TC if truncated else 0) | code
    header: bytes = bytes(answer)[:HEADER]
    # The question goes back as it came: clients compare its capital letters (0x20), and names are not always text.
    return header[:4] + b"\0\1" + header[6:] + message[HEADER:end]
