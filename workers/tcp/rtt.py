"""The retransmission timeout (RFC 6298)."""

from typing import Final

INITIAL_RTO: Final = 1.0  # seconds; RFC 6298, (2.1)
MIN_RTO: Final = 0.2  # seconds; Linux TCP_RTO_MIN, RFC 6298 (2.4) says 1
MAX_RTO: Final = 60.0  # seconds; RFC 6298, (2.5)
GRANULARITY: Final = 0.001  # seconds; of the timestamps


class RttEstimator:
    """Smoothed round-trip time and the timeout that follows from it, all in seconds."""

    __slots__ = ("rto", "rttvar", "srtt")

    def __init__(self) -> None:
        self.srtt = 0.0  #: SRTT; 0 = nothing was measured yet
        self.rttvar = 0.0  #: RTTVAR
        self.rto = INITIAL_RTO  #: RTO, with the back-off of (5.5)

    def sample(self, rtt: float) -> None:
        """Take one measurement; it also ends a back-off."""
        if self.srtt:
            self.rttvar += (abs(self.srtt - rtt) - self.rttvar) / 4
            self.srtt += (rtt - self.srtt) / 8
        else:
            self.srtt = rtt
            self.rttvar = rtt / 2
        rto = self.srtt + max(GRANULARITY, 4 * self.rttvar)
        self.rto = MIN_RTO if rto < MIN_RTO else min(rto, MAX_RTO)

    def end_back_off(self) -> None:
        """Go back to the timeout that the measurements give: it was window probes that doubled it."""
        rto = self.srtt + max(GRANULARITY, 4 * self.rttvar) if self.srtt else INITIAL_RTO
        self.rto = MIN_RTO if rto < MIN_RTO else min(rto, MAX_RTO)

    def back_off(self) -> None:
        """Double the timeout (5.5)."""
        self.rto = min(self.rto * 2, MAX_RTO)
