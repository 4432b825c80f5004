"""NewReno: slow start, congestion avoidance, fast recovery (RFC 5681, RFC 6582; initial window RFC 6928)."""

from typing import Final

INITIAL_SEGMENTS: Final = 10  # RFC 6928
DUPLICATE_ACKS: Final = 3  # RFC 5681, 3.2
UNLIMITED: Final = 1 << 30  # octets; ssthresh before the first loss


class NewReno:
    """The congestion window of one connection, in octets."""

    __slots__ = ("cwnd", "recovering", "smss", "ssthresh")

    def __init__(self, smss: int) -> None:
        self.smss = smss  #: SMSS, sender maximum segment size
        self.cwnd = INITIAL_SEGMENTS * smss  #: octets that may be in flight
        self.ssthresh = UNLIMITED  #: below it slow start, above it congestion avoidance
        self.recovering = False  #: in fast recovery

    def acknowledged(self, octets: int, flight_size: int) -> None:
        """Grow after an ACK of new data; flight_size is what was in flight before it.

        A window that the sender does not use does not grow (RFC 7661, 4.3.1, in its simplest form).
        """
        if flight_size * 2 < self.cwnd:
            return
        if self.cwnd < self.ssthresh:
            self.cwnd += octets  # RFC 3465 with L unlimited: an ACK for a super-segment counts for all of it
        else:
            self.cwnd += max(1, self.smss * octets // self.cwnd)

    def lost(self, flight_size: int) -> None:
        """Enter fast recovery after the third duplicate ACK."""
        self.ssthresh = max(flight_size // 2, 2 * self.smss)
        self.cwnd = self.ssthresh + DUPLICATE_ACKS * self.smss
        self.recovering = True

    def duplicate(self) -> None:
        """Inflate by the segment that has left the network (RFC 5681, 3.2, step 4)."""
        self.cwnd += self.smss

    def partial(self, octets: int) -> None:
        """Deflate after a partial ACK (RFC 6582, 3.2, step 3)."""
        self.cwnd = max(self.cwnd - octets + (self.smss if octets >= self.smss else 0), self.smss)

    def recovered(self) -> None:
        """Leave fast recovery."""
        self.cwnd = self.ssthresh
        self.recovering = False

    def timed_out(self, flight_size: int) -> None:
        """Start again with one segment (RFC 5681, 3.1, equation 4)."""
        self.ssthresh = max(flight_size // 2, 2 * self.smss)
        self.cwnd = self.smss
        self.recovering = False
