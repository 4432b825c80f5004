"""Waiting for something to do: at once, for a while, or asleep."""

import time
from select import epoll

Events = list[tuple[int, int]]


def spin(poller: epoll, seconds: float, max_events: int = -1) -> Events:
    """Look again and again for `seconds`, at least once; return the events, or none.

    A wakeup costs 10–40 µs on an idle machine, a look 0.3 µs: who was busy a moment ago looks once more before it
    sleeps (seconds = 0), and with the key busy-poll for longer.
    """
    events = poller.poll(0, max_events)
    if events or not seconds:
        return events
    until = time.monotonic() + seconds
    while not events and time.monotonic() < until:
        events = poller.poll(0, max_events)
    return events
