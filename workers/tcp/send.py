"""The send sequence space of a connection (RFC 9293, figure 3): plain state, no behaviour.

          una          nxt         end
    ───────┴─────────────┴───────────┴───────► sequence numbers
     acked    in flight    queued       (the FIN, once queued, stands at `end`)

`nxt` goes back to `una` when the retransmission timer fires; `max` remembers how far it has been.
"""

from workers.tcp.sequence import MASK


class SendSpace:
    """SND.*; all sequence numbers modulo 2**32, windows in octets."""

    __slots__ = ("end", "fin", "iss", "max", "max_wnd", "nxt", "recover", "scale", "una", "wl1", "wl2", "wnd")

    def __init__(self, iss: int) -> None:
        self.iss = iss  #: ISS, the initial send sequence number
        self.una = iss  #: SND.UNA, the oldest sequence number not yet acknowledged
        self.nxt = iss  #: SND.NXT, the next sequence number to be sent
        self.max = iss  #: the highest that SND.NXT has been
        self.end = (iss + 1) & MASK  #: the sequence number after the last octet queued
        self.fin = False  #: a FIN is queued behind the last octet
        self.wnd = 0  #: SND.WND, scaled
        self.wl1 = 0  #: SND.WL1, SEG.SEQ of the segment used for the last window update
        self.wl2 = 0  #: SND.WL2, its SEG.ACK
        self.max_wnd = 0  #: the largest window that the peer has offered
        self.scale = 0  #: Snd.Wind.Shift (RFC 7323)
        self.recover = iss  #: RFC 6582: SND.MAX when fast recovery began

    @property
    def flight_size(self) -> int:
        """Sequence numbers sent and not acknowledged."""
        return (self.nxt - self.una) & MASK
