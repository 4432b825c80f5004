"""Policy: what all connections of one worker share: what is configured, budgets that they draw on, and counters."""

from collections.abc import Callable

from workers import counts
from workers.tcp.congestion import NewReno
from workers.tcp.cubic import Cubic
from workers.tcp.limits import CHALLENGES, FIRST_BUFFER, FIRST_FLIGHT, GROWN_FLOWS, RECEIVE_BUFFER, SEND_BUFFER


class Policy:
    """One for each worker; the numbers that change are changed by its connections."""

    __slots__ = (
        "_challenges",
        "_second",
        "congestion",
        "count",
        "flights",
        "growth",
        "keepalive",
        "keepalive_count",
        "keepalive_interval",
        "quota",
        "receive_buffer",
        "scale",
    )

    def __init__(
        self,
        receive_buffer: int = RECEIVE_BUFFER,
        count: memoryview | list[int] | None = None,
        quota: Callable[[], int] = lambda: CHALLENGES,
        congestion: type[NewReno] = Cubic,
    ) -> None:
        """`receive_buffer`: octets of one flow that may wait for the proxy; `count`: the worker's counters.

        `quota` says how many challenge ACKs one second may have: somewhat random, or those who share the limit could
        find out from it what others got (CVE-2016-5696).
        """
        self.congestion = congestion
        self.keepalive = 0.0  #: seconds without a segment before the peer is probed (RFC 9293, 3.8.4); 0 = never
        self.keepalive_interval = 60.0  #: seconds between two probes
        self.keepalive_count = 3  #: probes without an answer after which the peer is gone
        self.count = [0] * len(counts.NAMES) if count is None else count
        self.receive_buffer = receive_buffer
        #: Rcv.Wind.Shift that we announce (RFC 7323): the whole buffer can be said in 16 bits
        self.scale = max(7, (receive_buffer - 1).bit_length() - 16)
        #: octets by which receive buffers may still grow: their sum is bounded, however many flows there are
        self.growth = GROWN_FLOWS * max(receive_buffer - FIRST_BUFFER, 0)
        #: octets by which flows may have more in flight than FIRST_FLIGHT, together
        self.flights = GROWN_FLOWS * (SEND_BUFFER - FIRST_FLIGHT)
        self.quota = quota
        self._challenges = 0  # left in this second
        self._second = -1

    def may_challenge(self, now: float) -> bool:
        """Say whether this worker may send one more challenge ACK in this second (RFC 5961, 7)."""
        if int(now) != self._second:
            self._second = int(now)
            self._challenges = self.quota()
        self._challenges -= 1
        return self._challenges >= 0
