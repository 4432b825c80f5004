"""DnsCache: answers that were given before, kept for all workers in shared memory.

    question ──► answer ──► the answer, TTLs counted down                      (a hit: the proxy is not asked)
                       └──► None: somebody asks upstream ──► keep ──► SharedCache

An answer belongs to the question and to the resolver that was asked: two resolvers may know different worlds (a
company's, and the public one). Who asks near the end of an answer's life gets it, and has it asked for again, so that
a name in use never has to wait.
"""

from __future__ import annotations

from struct import Struct, unpack_from
from typing import Final

from ipc.cache import SharedCache
from workers import counts
from workers.dns.message import Query, retell, reusable

PREFETCH: Final = 0.1  #: of the lifetime; unbound's "prefetch" begins there as well
MIN_PREFETCHED: Final = 10.0  #: seconds of lifetime; for less, it would only double the questions
MAX_ANSWER: Final = 16 * 1024  #: octets; larger ones are rare, and would push out a hundred others
_NUMBER: Final = Struct(">H")


class DnsCache:
    """One worker's view of the cache that all share."""

    __slots__ = ("_count", "_shared")

    def __init__(self, shared: SharedCache, count: memoryview) -> None:
        self._shared = shared
        self._count = count

    def answer(self, resolver: bytes, query: Query, now: float) -> tuple[bytes, bool] | None:
        """Return an answer and whether it should be asked for again; None: nothing is known.

        `resolver` is its packed address. The answer may be longer than `query.limit`.
        """
        if not query.plain:
            return None
        entry = self._shared.get(resolver + query.key(), now)
        if entry is None:
            self._count[counts.DNS_CACHE_MISSES] += 1
            return None
        self._count[counts.DNS_CACHE_HITS] += 1
        value, stored_at, expires_at = entry
        number = _NUMBER.unpack_from(value)[0]
        positions = unpack_from(f">{number}H", value, 2)
        lived = expires_at - stored_at
        stale = lived >= MIN_PREFETCHED and expires_at - now < PREFETCH * lived
        return retell(value[2 + 2 * number :], positions, query, now - stored_at), stale

    def keep(self, resolver: bytes, query: Query, answer: bytes, now: float) -> None:
        """Keep an answer, if it is one that may be told again. It must have been matched with the question."""
        if not query.plain or len(answer) > MAX_ANSWER:
            return
        kept = reusable(answer)
        if kept is None:
            return
        positions = kept.positions
        value = b"".join([_NUMBER.pack(len(positions)), *map(_NUMBER.pack, positions), kept.message])
        self._shared.put(resolver + query.key(), value, now, now + kept.seconds)
