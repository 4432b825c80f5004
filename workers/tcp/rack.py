"""RACK: what was sent before something that has been delivered, and is not delivered itself soon, is lost (RFC 8985).

"Soon" is the reordering window: nothing before reordering was seen, then a part of the round-trip time, more after
each retransmission that turned out to be needless.
"""

from __future__ import annotations

from bisect import bisect_left
from math import inf
from typing import TYPE_CHECKING, Final

from workers.tcp.rtt import EPSILON
from workers.tcp.scoreboard import Scoreboard
from workers.tcp.sequence import HALF, MASK

if TYPE_CHECKING:
    from workers.tcp.rtt import RttEstimator
    from workers.tcp.segment import Segment
    from workers.tcp.send import SendSpace

DUPLICATE_ACKS: Final = 3  #: DupThresh (RFC 5681, 3.2; RFC 6675, 2)
MAX_STEPS: Final = 40  #: quarters of min_RTT; SRTT bounds the reordering window long before
NARROW_AFTER: Final = 16  #: recoveries without a D-SACK, until the reordering window is narrow again (RFC 8985, 6.2)


class Rack:
    """RACK's variables for one connection; positions as in its scoreboard."""

    __slots__ = ("_at", "_dsack_round", "_end", "_rtt", "_steps", "_steps_last", "fack", "reordered")

    def __init__(self) -> None:
        self._at = -inf  #: RACK.xmit_ts: when what was sent last, of all that was delivered, went out
        self._end = 0  #: RACK.end_seq: the position behind it
        self._rtt = 0.0  #: RACK.rtt
        self.fack = 0  #: RACK.fack: the highest position that was delivered
        self.reordered = False  #: RACK.reordering_seen
        self._steps = 1  #: RACK.reo_wnd_mult, quarters of min_RTT
        self._steps_last = 0  #: RACK.reo_wnd_persist
        self._dsack_round = -1  #: RACK.dsack_round, -1 = none

    def begin(self) -> None:
        """Begin with positions that start over; what was learnt of reordering stays."""
        self.forget_times()
        self._end = self.fack = 0
        self._dsack_round = -1

    def forget_times(self) -> None:
        """Forget what was delivered: nothing is judged before more is."""
        self._at = -inf

    def delivered(self, at: float, end: int, now: float) -> None:
        """Note that something sent at that time was delivered (step 2)."""
        if at > self._at or (at == self._at and end > self._end):
            self._at = at
            self._end = end
            self._rtt = now - at

    def delivered_again(self, at: float, end: int, una: int, seg: Segment, rtt: RttEstimator, now: float) -> None:
        """The same of a retransmission, unless it may have been the first transmission that was delivered.

        Timestamps tell of what SEG.ACK covers only: the echo stands still while there is a gap (RFC 7323, 4.3).
        """
        if end <= una and seg.ts_present and (seg.ts_ecr - int(at * 1000)) & MASK >= HALF:
            return
        if now - at >= rtt.least - EPSILON:
            self.delivered(at, end, now)

    def detect(self, board: Scoreboard, snd: SendSpace, window: float, now: float) -> tuple[int, float]:
        """Mark what is lost (step 5); return its octets, and when to look again (inf: with the next ACK)."""
        newest = self._at
        if newest == -inf:
            return 0, inf
        wait = self._rtt + window
        again_at = inf
        found = 0
        sent = snd.sent
        una = snd.una
        origin = board.una
        i = bisect_left(sent, board.lost_below - origin + 1, key=lambda record: (record[0] - una) & MASK)
        while i < len(sent):
            record_end, at = sent[i]
            if at > newest:
                break
            end = origin + ((record_end - una) & MASK)
            if at == newest and end > self._end:
                end = self._end
            if end <= board.lost_below:
                break
            if at + wait > now + EPSILON and board.sacked.missing(board.lost_below, end):
                again_at = at + wait
                break
            found += board.judge(end)
            i += 1
        resent = board.resent
        while resent:
            at, start, end = resent[0]
            if at > newest or (at == newest and end > self._end):
                break
            if at + wait > now + EPSILON:
                again_at = min(again_at, at + wait)
                break
            resent.popleft()
            found += board.deem_lost(start, end)
        return found, again_at

    def window(self, board: Scoreboard, rtt: RttEstimator, smss: int, recovering: bool) -> float:
        """Return for how long something may come late and not be lost (step 4), in seconds."""
        if not self.reordered and (recovering or board.sacked.total >= DUPLICATE_ACKS * smss):
            return 0.0
        return min(self._steps * rtt.least / 4, rtt.srtt) if rtt.srtt else 0.0

    def twice(self, board: Scoreboard) -> None:
        """Widen the window, once a round trip: something was sent again that had not been lost (step 4)."""
        if self._dsack_round < board.una:
            self._dsack_round = board.nxt
            self._steps = min(self._steps + 1, MAX_STEPS)
            self._steps_last = NARROW_AFTER

    def recovered(self) -> None:
        """Note that a recovery has ended."""
        self._steps_last -= 1
        if self._steps_last <= 0:
            self._steps = 1
