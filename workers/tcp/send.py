"""The send sequence space of a connection (RFC 9293, figure 3): plain state, no behaviour.

          una          nxt         end
    ───────┴─────────────┴───────────┴───────► sequence numbers
     acked    in flight    queued       (the FIN, once queued, stands at `end`)

What was lost is sent again from the scoreboard (scoreboard.py): `nxt` never goes back.
"""

from bisect import bisect_left
from collections import deque
from math import inf

from workers.tcp.limits import FIRST_FLIGHT
from workers.tcp.sequence import MASK


class SendSpace:
    """SND.*; all sequence numbers modulo 2**32, windows in octets."""

    __slots__ = ("end", "fin", "iss", "limit", "max_wnd", "nxt", "scale", "sent", "una", "wl1", "wl2", "wnd")

    def __init__(self, iss: int) -> None:
        self.iss = iss  #: ISS, the initial send sequence number
        self.una = iss  #: SND.UNA, the oldest sequence number not yet acknowledged
        self.nxt = iss  #: SND.NXT, the next sequence number to be sent
        self.end = (iss + 1) & MASK  #: the sequence number after the last octet queued
        self.fin = False  #: a FIN is queued behind the last octet
        self.wnd = 0  #: SND.WND, scaled
        self.wl1 = 0  #: SND.WL1, SEG.SEQ of the segment used for the last window update
        self.wl2 = iss  #: SND.WL2, its SEG.ACK
        self.max_wnd = 0  #: the largest window that the peer has offered
        self.limit = (
            FIRST_FLIGHT  #: octets in flight at the most; grows to SEND_BUFFER while the worker has some to give
        )
        self.scale = 0  #: Snd.Wind.Shift (RFC 7323)
        #: what is in flight, oldest first: (the sequence number behind it, when it was first sent)
        self.sent: deque[tuple[int, float]] = deque()

    def sent_at(self, distance: int) -> float:
        """Return when the octet was first sent that ends `distance` behind SND.UNA; -inf if it was not."""
        sent = self.sent
        una = self.una
        i = bisect_left(sent, distance, key=lambda record: (record[0] - una) & MASK)
        return sent[i][1] if i < len(sent) else -inf
