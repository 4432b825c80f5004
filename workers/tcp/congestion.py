"""Congestion control: how many octets may be in flight. NewReno (RFC 5681); CUBIC, the default, is in cubic.py.

Loss recovery (recovery.py) decides when something was lost, and moves `cwnd` while it repairs that (RFC 9937); here
stands how the window grows, and what a loss makes of `ssthresh`.
"""

from typing import Final

INITIAL_SEGMENTS: Final = 10  # RFC 6928
UNLIMITED: Final = 1 << 30  # octets; ssthresh before the first loss


class NewReno:
    """The congestion window of one connection, in octets."""

    __slots__ = ("_before", "began_at", "cwnd", "smss", "ssthresh")

    def __init__(self, smss: int) -> None:
        self.smss = smss  #: SMSS, sender maximum segment size
        self.cwnd = INITIAL_SEGMENTS * smss  #: octets that may be in flight
        self.ssthresh = UNLIMITED  #: below it slow start, above it congestion avoidance
        self.began_at = -1.0  #: CUBIC: when the curve began, -1 = with the next ACK that finds the window used
        self._before: tuple[float, ...] = ()  #: what undo() brings back

    def acknowledged(self, octets: int, flight_size: int, srtt: float, now: float) -> None:
        """Grow after an ACK of new data; flight_size is what was in flight before it.

        A window that the sender does not use does not grow (RFC 7661, 4.3.1, in its simplest form).
        """
        if flight_size * 2 < self.cwnd:
            self.began_at = -1.0  # time in which the window is not used does not count (RFC 9438, 4.2)
        elif self.cwnd < self.ssthresh:
            self.cwnd += octets  # RFC 3465 with L unlimited: an ACK for a super-segment counts for all of it
        else:
            self.avoid(octets, srtt, now)

    def avoid(self, octets: int, srtt: float, now: float) -> None:
        """Grow in congestion avoidance: by one segment a round trip (RFC 5681, equation 3)."""
        self.cwnd += max(1, self.smss * octets // self.cwnd)

    def lost(self, flight_size: int) -> None:
        """Lower ssthresh after a loss (RFC 5681, equation 4); the caller moves the window there."""
        self._before = self.state()
        self.reduce(min(flight_size, self.cwnd))

    def reduce(self, window: int) -> None:
        """Set ssthresh for a loss that happened with so much in flight."""
        self.ssthresh = max(window // 2, 2 * self.smss)

    def restart(self) -> None:
        """Begin again with the initial window after an idle time longer than the RTO (RFC 5681, 4.1)."""
        self.cwnd = min(self.cwnd, INITIAL_SEGMENTS * self.smss)
        self.began_at = -1.0

    def state(self) -> tuple[float, ...]:
        """Return what a loss changes."""
        return self.cwnd, self.ssthresh

    def undo(self) -> None:
        """Take the last lost() back: nothing was lost."""
        if self._before:
            cwnd, ssthresh = self._before[:2]
            self.cwnd = max(self.cwnd, int(cwnd))
            self.ssthresh = max(self.ssthresh, int(ssthresh))
            self._before = ()
