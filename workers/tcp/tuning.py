"""Tuning: the receive buffer of one connection grows while the proxy takes what the client sends (Linux's DRS).

In each round trip the octets that the proxy took are counted. A peer that is limited by our window cannot send more
than that in the next one, so when it was more than ever before, the buffer becomes twice that, and more while the rate
still rises. It never shrinks: the right edge of the window must not go back (RFC 9293, 3.8.6.2.2).
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Final

from workers.tcp.congestion import INITIAL_SEGMENTS
from workers.tcp.sequence import MASK
from workers.tcp.states import ESTABLISHED

if TYPE_CHECKING:
    from workers.tcp.connection import Connection
    from workers.tcp.policy import Policy

UNKNOWN_RTT: Final = 0.1  #: seconds; a round while nothing is known of the path
SHORTEST: Final = 0.0005  #: seconds; half of the timestamps' tick
LONGEST: Final = 1.0  #: seconds; an echo older than that came after a pause


class Tuning:
    """What is known of one connection's rate; sizes in octets."""

    __slots__ = ("copied", "ecr", "ends_at", "grown", "limit", "rtt", "taken")

    def __init__(self, limit: int, mss: int) -> None:
        self.limit = limit  #: to which the buffer may grow
        self.grown = 0  #: by how much it has
        self.copied = INITIAL_SEGMENTS * mss  #: the most that the proxy took in one round
        self.taken = 0  #: what it had taken when this round began
        self.ends_at = -1.0  #: when this round ends
        self.rtt = 0.0  #: round-trip time as the receiver sees it, seconds; 0 = not known
        self.ecr = 0  #: the echoed timestamp that was measured last

    def round_ends(self, conn: Connection, now: float) -> None:
        """Grow the buffer if this round brought more than any before, and begin the next.

        The first one begins behind the handshake, which measures the path.
        """
        if conn.state < ESTABLISHED:
            return
        rcv = conn.rcv
        taken = rcv.taken - rcv.pending
        copied = taken - self.taken
        self.taken = taken
        if copied > self.copied:
            wanted = 2 * copied + 16 * conn.announced_mss
            # While the rate rises as in slow start it will have doubled twice before the client hears of more.
            wanted += 2 * wanted * min(copied - self.copied, self.copied) // self.copied
            self.copied = copied
            self._grow(conn, min(wanted, self.limit) - rcv.buffer)
        if conn.timestamps and rcv.ts_ecr != self.ecr:
            self.ecr = rcv.ts_ecr
            self._measured(((int(now * 1000) - self.ecr) & MASK) / 1000)
        self.ends_at = now + (self.rtt or conn.rtt.srtt or UNKNOWN_RTT)

    def _grow(self, conn: Connection, octets: int) -> None:
        policy = conn.policy
        octets = min(octets, policy.growth)
        if octets > 0:
            policy.growth -= octets
            self.grown += octets
            conn.rcv.buffer += octets

    def _measured(self, rtt: float) -> None:
        """Take the least at once and what is more slowly: a pause of the sender looks like a long round trip."""
        rtt = min(max(rtt, SHORTEST), LONGEST)
        if rtt < self.rtt or not self.rtt:
            self.rtt = rtt
        else:
            self.rtt += (rtt - self.rtt) / 8

    def give_back(self, policy: Policy) -> None:
        """Return to the worker's budget what the buffer has grown by: the connection has ended."""
        policy.growth += self.grown
        self.grown = 0
        self.ends_at = inf  # TIME-WAIT still acknowledges: nothing grows any more
