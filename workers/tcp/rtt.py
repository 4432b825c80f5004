"""The round-trip time, and the timeouts that follow from it (RFC 6298, RFC 8985)."""

from math import inf
from typing import Final

INITIAL_RTO: Final = 1.0  # seconds; RFC 6298, (2.1)
MIN_RTO: Final = 0.2  # seconds; Linux TCP_RTO_MIN, RFC 6298 (2.4) says 1
MAX_RTO: Final = 60.0  # seconds; RFC 6298, (2.5)
GRANULARITY: Final = 0.001  # seconds; of timestamps, and about that of timers
EPSILON: Final = 1e-6  #: seconds; the least that is told apart: sums of floats that should be equal are not
MIN_PROBE: Final = 0.002  # seconds beyond two round trips before a tail loss probe; Linux TCP_TIMEOUT_MIN


class RttEstimator:
    """Smoothed round-trip time and the timeouts, all in seconds."""

    __slots__ = ("least", "probes", "pto", "rto", "rttvar", "srtt")

    def __init__(self) -> None:
        self.srtt = 0.0  #: SRTT; 0 = nothing was measured yet
        self.rttvar = 0.0  #: RTTVAR
        self.least = inf  #: min_RTT (RFC 8985, 5.2), of the whole connection
        self.rto = INITIAL_RTO  #: RTO, with the back-off of (5.5)
        self.probes = False  #: with SACK: a tail loss probe goes out before the RTO
        self.pto = INITIAL_RTO  #: PTO (RFC 8985, 7.2), or the RTO if there are no probes

    def sample(self, rtt: float) -> None:
        """Take one measurement; it also ends a back-off."""
        srtt = self.srtt
        if srtt:
            # RTTVAR first, with the old SRTT.
            self.rttvar = var = self.rttvar + ((rtt - srtt if rtt > srtt else srtt - rtt) - self.rttvar) / 4
            self.srtt = srtt = srtt + (rtt - srtt) / 8
        else:
            self.srtt = srtt = rtt
            self.rttvar = var = rtt / 2
        if rtt < self.least:
            self.least = rtt
        if srtt < 0.04 and var < 0.04:  # RTO at its minimum: the usual one
            self.rto = MIN_RTO
            self.pto = 2 * srtt + MIN_PROBE if self.probes else MIN_RTO
        else:
            self.end_back_off()

    def end_back_off(self) -> None:
        """Set the timeouts to what the measurements give (2.2, 2.3)."""
        if self.srtt:
            rto = self.srtt + max(GRANULARITY, 4 * self.rttvar)
            self.rto = rto = MIN_RTO if rto < MIN_RTO else min(rto, MAX_RTO)
            self.pto = min(2 * self.srtt + MIN_PROBE, rto) if self.probes else rto
        else:
            self.rto = self.pto = INITIAL_RTO

    def back_off(self) -> None:
        """Double the timeout (5.5)."""
        self.rto = self.pto = min(self.rto * 2, MAX_RTO)
