"""The receive sequence space of a connection (RFC 9293, figure 4) and the reassembly queue behind it.

      nxt                        adv
───────┴──────────────────────────┴───────► sequence numbers
taken    may be sent by the peer     not yet allowed
"""

from math import inf

from workers.tcp.limits import DEFAULT_MSS, QUICK_ACKS
from workers.tcp.reassembly import Range, Reassembly
from workers.tcp.sequence import MASK
from workers.tcp.tuning import Tuning


class ReceiveSpace:
    """RCV.*; all sequence numbers modulo 2**32, sizes in octets."""

    __slots__ = (
        "ack_at",
        "adv",
        "again",
        "blocks_due",
        "buffer",
        "fin_at",
        "irs",
        "mss",
        "nxt",
        "pending",
        "pieces",
        "quick",
        "scale",
        "step",
        "taken",
        "text_at",
        "ts_ecr",
        "tuning",
        "unacked",
    )

    def __init__(self, irs: int, buffer: int, mss: int) -> None:
        """`buffer`: octets that may wait for the proxy at first; `mss`: what we announce."""
        self.irs = irs  #: IRS, the initial receive sequence number
        self.nxt = (irs + 1) & MASK  #: RCV.NXT, the next sequence number expected
        self.buffer = buffer  #: octets that may wait for the proxy; the largest window
        self.adv = (self.nxt + min(buffer, 65535)) & MASK  #: RCV.NXT + RCV.WND, the right edge as last advertised
        self.scale = 0  #: Rcv.Wind.Shift (RFC 7323)
        self.pending = 0  #: octets delivered that the proxy has not taken yet; the relay keeps it true
        self.step = 0  #: octets; the right edge moves by no less (RFC 9293, 3.8.6.2.2)
        self.mss = min(DEFAULT_MSS, mss)  #: octets of the largest segment seen, an estimate of the peer's Eff.snd.MSS
        self.quick = QUICK_ACKS  #: ACKs that do not wait for a second segment
        self.ack_at = inf  #: when the delayed ACK must go
        self.tuning = Tuning(buffer, mss)  #: lets the buffer grow
        self.ts_ecr = 0  #: SEG.TSecr of the segment that set TS.Recent
        self.unacked = 0  #: octets of text received since the last ACK was sent
        self.text_at = -1.0  #: when text last arrived
        self.taken = 0  #: octets of the stream delivered so far: the position of RCV.NXT, never wraps
        self.fin_at = -1  #: position of the peer's FIN when it came out of order, -1 = none
        self.pieces: Reassembly | None = None  #: text out of order
        self.blocks_due = False  #: the next ACK carries SACK blocks, and is a pure one
        self.again: Range | None = None  #: positions of text that came twice, for one D-SACK block (RFC 2883)

    @property
    def wnd(self) -> int:
        """RCV.WND."""
        return (self.adv - self.nxt) & MASK

    def take_ready(self) -> bytes:
        """Remove and return the text that has become in order, and advance RCV.NXT over it."""
        pieces = self.pieces
        if pieces is None:
            return b""
        ready = pieces.take(self.taken)
        self.taken += len(ready)
        self.nxt = (self.nxt + len(ready)) & MASK
        if not pieces:
            self.pieces = None
        return ready

    def sack_blocks(self, limit: int) -> tuple[tuple[int, int], ...]:
        """Return the blocks of the next SACK option (RFC 2018, 4): the newest first, before it a D-SACK (RFC 2883)."""
        first = self.irs + 1
        blocks = self.pieces.newest(limit) if self.pieces is not None else []
        if self.again is not None:
            blocks = [self.again, *blocks[: limit - 1]]
            self.again = None
        return tuple([((first + left) & MASK, (first + right) & MASK) for left, right in blocks])
