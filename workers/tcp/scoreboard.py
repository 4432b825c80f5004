"""What is known of the octets in flight: which the peer holds (SACK), which are lost, which were sent again.

          una                                             nxt
    ───────┴────▓▓▓▓▓▓──────────▓▓▓▓▓▓▓▓────▓▓▓▓──────────┴────► positions
            hole  sacked  hole            hole   not judged yet
                                  lost_below ┘

Positions count octets from where the disorder began, so they never wrap; a FIN takes one, as in sequence numbers. When
each octet was first sent stands in `SendSpace.sent`; here stand only the exceptions, so that a flow without losses
pays nothing.
"""

from bisect import bisect_left, bisect_right
from collections import deque
from typing import Final

from workers.tcp.sequence import HALF, MASK

Blocks = tuple[tuple[int, int], ...]  #: of a SACK option, sequence numbers

MAX_RANGES: Final = 1024  #: of what one peer has SACKed; blocks beyond wait for SND.UNA to advance


class Ranges:
    """A set of octets, kept as sorted ranges that neither overlap nor touch."""

    __slots__ = ("ends", "starts", "total")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.total = 0  #: octets in the set

    def __bool__(self) -> bool:
        return self.total > 0

    def add(self, start: int, end: int) -> list[tuple[int, int]]:
        """Add a range; return the parts of it that were not in the set."""
        fresh = self.missing(start, end)
        if fresh:
            first = bisect_left(self.ends, start)
            behind = bisect_right(self.starts, end)
            if first < behind:
                start = min(start, self.starts[first])
                end = max(end, self.ends[behind - 1])
            self.starts[first:behind] = [start]
            self.ends[first:behind] = [end]
            for a, b in fresh:
                self.total += b - a
        return fresh

    def discard(self, start: int, end: int) -> None:
        """Take a range out of the set, as far as it is in it."""
        first = bisect_right(self.ends, start)
        behind = bisect_left(self.starts, end)
        if first >= behind:
            return
        self.total -= self.common(start, end)
        head, tail = self.starts[first], self.ends[behind - 1]
        starts, ends = [], []
        if head < start:
            starts.append(head)
            ends.append(start)
        if end < tail:
            starts.append(end)
            ends.append(tail)
        self.starts[first:behind] = starts
        self.ends[first:behind] = ends

    def missing(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the parts of a range that are not in the set, lowest first."""
        parts = []
        ends = self.ends
        i = bisect_right(ends, start)
        while i < len(ends) and start < end:
            if self.starts[i] > start:
                parts.append((start, min(self.starts[i], end)))
            start = ends[i]
            i += 1
        if start < end:
            parts.append((start, end))
        return parts

    def common(self, start: int, end: int) -> int:
        """Return how many octets of a range are in the set."""
        return max(end - start, 0) - sum(b - a for a, b in self.missing(start, end))

    def clear(self) -> None:
        """Empty the set."""
        self.starts.clear()
        self.ends.clear()
        self.total = 0


class Scoreboard:
    """The exceptions of one flow (RFC 6675, 3; RFC 8985, 5)."""

    __slots__ = ("lost", "lost_below", "nxt", "resent", "sacked", "sent_again", "una")

    def __init__(self) -> None:
        self.una = 0  #: the position of SND.UNA
        self.nxt = 0  #: of SND.NXT
        self.sacked = Ranges()  #: held by the peer out of order
        self.lost = Ranges()  #: deemed lost, and not sent again since; never SACKed
        self.lost_below = 0  #: what was sent only once and stands before it was judged: it is SACKed, or deemed lost
        self.sent_again = Ranges()  #: sent more than once, whatever became of it
        #: retransmissions on their way, oldest first: (when, start, end)
        self.resent: deque[tuple[float, int, int]] = deque()

    def begin(self, in_flight: int) -> None:
        """Start over with `in_flight` octets of which nothing is known."""
        self.una = self.lost_below = 0
        self.nxt = in_flight
        self.sacked.clear()
        self.lost.clear()
        self.sent_again.clear()
        self.resent.clear()

    @property
    def pipe(self) -> int:
        """Octets that are still in the network (RFC 6675, 4)."""
        return self.nxt - self.una - self.sacked.total - self.lost.total

    def acknowledge(self, octets: int) -> list[tuple[int, int]]:
        """Advance SND.UNA; return what of that was not SACKed before."""
        una = self.una + octets
        fresh = self.sacked.missing(self.una, una)
        self.sacked.discard(self.una, una)
        self.lost.discard(self.una, una)
        self.una = una
        if self.lost_below < una:
            self.lost_below = una
        return fresh

    def sack(self, start: int, end: int) -> list[tuple[int, int]]:
        """Take a SACK block; return what of it is news."""
        if len(self.sacked.starts) >= MAX_RANGES:
            return []  # advisory (RFC 2018, 8): it is told again
        fresh = self.sacked.add(start, end)
        for a, b in fresh:
            self.lost.discard(a, b)
        return fresh

    def positions(self, blocks: Blocks, snd_una: int) -> list[tuple[int, int]]:
        """Return the SACK blocks that speak of octets in flight; others are of no use here."""
        result = []
        for left, right in blocks:
            length = (right - left) & MASK
            start = self.una + ((left - snd_una) & MASK)
            if length and start + length <= self.nxt:
                result.append((start, start + length))
        return result

    def delivered_again(self, start: int, end: int) -> list[tuple[float, int]]:
        """Take a range just delivered out of `resent`; return when, and up to where, its retransmissions were sent."""
        found = [entry for entry in self.resent if entry[1] < end and start < entry[2]]
        if not found:
            return []
        kept: deque[tuple[float, int, int]] = deque()
        for at, a, b in self.resent:
            if a < min(b, start):
                kept.append((at, a, min(b, start)))
            if max(a, end) < b:
                kept.append((at, max(a, end), b))
        self.resent = kept
        return [(at, min(b, end)) for at, _, b in found]

    def deem_lost(self, start: int, end: int) -> int:
        """Mark what is not SACKed of a range as lost; return its octets."""
        before = self.lost.total
        for a, b in self.sacked.missing(max(start, self.una), end):
            self.lost.add(a, b)
        return self.lost.total - before

    def judge(self, end: int) -> int:
        """Mark as lost what was sent only once and stands before `end`; return the octets."""
        start, self.lost_below = self.lost_below, end
        found = self.deem_lost(start, end)
        for _, a, b in self.resent:  # a probe that went out again before its first transmission was judged
            if b > start:
                self.lost.discard(a, b)
        return found

    def everything_lost(self) -> None:
        """Mark all that is not SACKed as lost: the retransmission timer has fired (RFC 8985, 6.3)."""
        if self.sacked.starts and self.sacked.starts[0] <= self.una:
            self.sacked.clear()  # the peer has dropped what it had SACKed (RFC 2018, 8): nothing can be relied on
        self.resent.clear()
        self.lost_below = self.nxt
        self.deem_lost(self.una, self.nxt)

    def sent_lost(self, start: int, end: int, now: float) -> None:
        """Note that a range was sent again."""
        self.lost.discard(start, end)
        self.sent_again.add(start, end)
        self.resent.append((now, start, end))

    @property
    def is_clean(self) -> bool:
        """Whether nothing in flight is an exception any more."""
        return not self.sacked and not self.lost and not self.resent


def duplicate_block(blocks: Blocks, ack: int, limit: int) -> int:
    """Return the octets that a D-SACK reports as received twice (RFC 2883, 4), 0 if the first block is none.

    It stands before SEG.ACK, by no more than `limit` octets, or within the second block.
    """
    left, right = blocks[0]
    length = (right - left) & MASK
    if not 0 < length <= limit:
        return 0
    if (ack - right) & MASK < HALF and (ack - left) & MASK <= limit:
        return length
    if len(blocks) > 1:
        outer_left, outer_right = blocks[1]
        if (left - outer_left) & MASK < HALF and (outer_right - right) & MASK < HALF:
            return length
    return 0
