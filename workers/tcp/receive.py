"""The receive sequence space of a connection (RFC 9293, figure 4) and the reassembly queue behind it.

      nxt                        adv
───────┴──────────────────────────┴───────► sequence numbers
taken    may be sent by the peer     not yet allowed
"""

from bisect import bisect_left
from typing import Final

from workers.tcp.sequence import MASK

MAX_PIECES: Final = 1024  #: out-of-order pieces kept for one connection; more are dropped and come again


class ReceiveSpace:
    """RCV.*; all sequence numbers modulo 2**32, sizes in octets."""

    __slots__ = (
        "adv",
        "buffer",
        "fin_at",
        "irs",
        "nxt",
        "pending",
        "pieces",
        "scale",
        "step",
        "taken",
        "text_at",
        "unacked",
    )

    def __init__(self, irs: int, buffer: int) -> None:
        self.irs = irs  #: IRS, the initial receive sequence number
        self.nxt = (irs + 1) & MASK  #: RCV.NXT, the next sequence number expected
        self.buffer = buffer  #: octets that may wait for the proxy; the largest window
        self.adv = (self.nxt + min(buffer, 65535)) & MASK  #: RCV.NXT + RCV.WND, the right edge as last advertised
        self.scale = 0  #: Rcv.Wind.Shift (RFC 7323)
        self.pending = 0  #: octets delivered that the proxy has not taken yet; the relay keeps it true
        self.step = buffer // 2  #: octets; the right edge moves by no less (RFC 9293, 3.8.6.2.2)
        self.unacked = 0  #: octets of text received since the last ACK was sent
        self.text_at = -1.0  #: when text last arrived
        self.taken = 0  #: octets of the stream delivered so far: the position of RCV.NXT, never wraps
        self.fin_at = -1  #: position of the peer's FIN when it came out of order, -1 = none
        self.pieces: list[tuple[int, bytes]] | None = None  #: (position, text) out of order, sorted, without overlaps

    @property
    def wnd(self) -> int:
        """RCV.WND."""
        return (self.adv - self.nxt) & MASK

    def insert(self, position: int, text: bytes) -> bool:
        """Keep text that is not in order yet; octets already kept win. False: there are too many pieces.

        Positions count octets of the stream from its beginning, so they never wrap.
        """
        pieces = self.pieces
        if pieces is None:
            pieces = self.pieces = []
        if len(pieces) >= MAX_PIECES:
            return False
        i = bisect_left(pieces, (position,))
        if i and (covered := pieces[i - 1][0] + len(pieces[i - 1][1]) - position) > 0:
            text = text[covered:]
            position += covered
        while text:
            if i == len(pieces):
                pieces.append((position, text))
                return True
            following, other = pieces[i]
            if position < following:
                part = text[: following - position]
                pieces.insert(i, (position, part))
                i += 1
            skip = following + len(other) - position
            text = text[skip:]
            position += skip
            i += 1
        return True

    def take_ready(self) -> list[bytes]:
        """Remove and return the text that has become in order, and advance RCV.NXT over it."""
        ready: list[bytes] = []
        pieces = self.pieces
        while pieces and pieces[0][0] <= self.taken:
            position, text = pieces.pop(0)
            text = text[self.taken - position :]
            if text:
                ready.append(text)
                self.taken += len(text)
                self.nxt = (self.nxt + len(text)) & MASK
        if not pieces:
            self.pieces = None
        return ready
