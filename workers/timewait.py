"""TimeWait: what is left of a connection that has ended well, until nothing of it can come any more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from workers.tcp.connection import Connection
from workers.tcp.events import ENDED
from workers.tcp.segment import FIN, Segment
from workers.tcp.sequence import HALF, MASK
from workers.wire.tcp import Headers

if TYPE_CHECKING:
    from workers.flows import TcpFlows

TIME_WAIT_SECONDS: Final = 60.0  # Linux TCP_TIMEWAIT_LEN; RFC 9293 says 2 × 2 minutes
BEHIND: Final = 65537  #: octets between two connections of one pair of sockets; Linux adds as much


class TimeWait:
    """A connection in TIME-WAIT: it acknowledges again what comes again."""

    __slots__ = ("conn", "ends_at", "flows", "headers", "key")

    def __init__(self, flows: TcpFlows, key: bytes, conn: Connection, headers: Headers, now: float) -> None:
        self.flows = flows
        self.key = key
        self.conn = conn
        self.headers = headers
        self.ends_at = now + TIME_WAIT_SECONDS

    def gives_way(self, syn: Segment) -> bool:
        """Say whether a SYN is newer than all of this connection (RFC 9293, 3.10.7.4; RFC 6191, 2)."""
        conn = self.conn
        newer = (syn.seq - conn.rcv.nxt) & MASK < HALF
        if not syn.ts_present:
            return newer
        if not conn.timestamps:
            return True
        later = (syn.ts_val - conn.ts_recent) & MASK
        return 0 < later < HALF or (newer and not later)

    def iss_behind(self, iss: int) -> int:
        """Return an ISS for the next connection that is behind all that this one sent (RFC 1122, 4.2.2.13).

        One that carried more than 250,000 octets a second has overtaken the clock of the initial sequence numbers.
        """
        used = self.conn.snd.nxt
        return iss if (iss - used) & MASK < HALF else (used + BEHIND) & MASK

    def segment_arrives(self, seg: Segment, now: float) -> None:
        """Answer what is left of the old connection; its FIN begins the time anew (RFC 9293, 3.10.7.4, eighth)."""
        conn = self.conn
        flows = self.flows
        fin = seg.flags & FIN and (seg.seq + seg.len + 1 - conn.rcv.nxt) & MASK == 0
        conn.segment_arrives(seg, flows.port.rx, now)
        if conn.take_events() & ENDED:  # by RST
            flows.remove(self.key, self)
        elif fin and now + TIME_WAIT_SECONDS - self.ends_at > 1.0:  # once a second will do
            self.ends_at = now + TIME_WAIT_SECONDS
            flows.wait(self)
        while conn.segment_to_send(flows.out, now):
            flows.transmit(self.headers, flows.out)

    def abort(self, now: float) -> None:
        """Nothing is left to reset."""
        self.flows.remove(self.key, self)
