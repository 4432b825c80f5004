"""Timers: a heap of callbacks by time.

They cannot be cancelled: what no longer wants to be called looks at itself and returns. So an owner re-arms by writing
a float of its own, and puts one entry here only if the new time is earlier than the one that it has here already
(gVisor's lazy timers).
"""

from collections.abc import Callable
from heapq import heappop, heappush
from math import inf

Callback = Callable[[float], None]


class Timers:
    """Callbacks of one event loop; times are `time.monotonic()` seconds."""

    __slots__ = ("_heap", "_number")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callback]] = []
        self._number = 0  # equal times are called in the order of their arming, and callbacks never compared

    def call_at(self, when: float, callback: Callback) -> None:
        """Call callback(now) at `when` or a little later."""
        self._number += 1
        heappush(self._heap, (when, self._number, callback))

    @property
    def next_at(self) -> float:
        """When run() has something to do; inf: never."""
        return self._heap[0][0] if self._heap else inf

    def run(self, now: float) -> None:
        """Call everything that is due."""
        heap = self._heap
        while heap and heap[0][0] <= now:
            heappop(heap)[2](now)
