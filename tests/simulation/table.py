"""What the simulated TCP carries over loss × round trip: a table that stands in git, so that a change is a diff.

The gateway sends to clients of some kinds, over a link of 100 Mbit/s that loses packets each way. Behind each figure
stands what a sender should reach by formula: slow start from ten segments up to the rate of the link or, with loss, the
window of Reno (1.22 / √p segments, RFC 5681's) or of CUBIC (RFC 9438, 5.1), whichever is larger. For a client without
SACK Reno's is that of Padhye et al. (1998), with the timeouts that it takes.
"""

from __future__ import annotations

from math import inf, sqrt
from pathlib import Path
from statistics import median

from tests.simulation.gateway import Gateway, GatewayTraits
from tests.simulation.pair import Pair
from tests.simulation.peer import Peer, PeerTraits
from tests.simulation.world import Link, LinkTraits, World

FILE = Path(__file__).parent.parent / "throughput.txt"
COMMAND = "python -m tests.simulation --table"

RATE = 12_500_000.0  #: octets a second
QUEUE = 256 * 1024  #: octets in front of the link
LOSSES = (0.0, 0.001, 0.01, 0.05, 0.2)
ROUND_TRIPS = (0.0001, 0.005, 0.05, 0.2)
BULK = 1_000_000  #: octets of a long transfer
BULK_RUNS = 9
SHORT = 100_000  #: octets of a short one
SHORT_RUNS = 20
SMSS = 1448  #: octets

CLIENTS: dict[str, PeerTraits | None] = {
    "SACK, timestamps, an ACK for two segments": PeerTraits(),
    "SACK, timestamps, an ACK for sixteen segments (GRO)": PeerTraits(acks_every=16, ack_timeout=0.001),
    "neither SACK nor timestamps": PeerTraits(sack=False, timestamps=False),
    "the same TCP at the other end": None,
}


def transfer(seed: int, loss: float, round_trip: float, client: PeerTraits | None, octets: int) -> float:
    """Return how many seconds a download takes, from the end of the handshake to the last octet."""
    world = World(seed)
    link = LinkTraits(round_trip / 2, loss=loss, rate=RATE, queue=QUEUE)
    down, up = Link(world, link, "down"), Link(world, LinkTraits(round_trip / 2, loss=loss), "up")
    receiver: Peer | Gateway
    if client is None:
        # Who receives closes when all has come.
        pair = Pair(world, [up, down], [GatewayTraits(lingers=1e6), GatewayTraits()], [0, octets])
        receiver, sender = pair.ends
        receiver.connect()
    else:
        sender = Gateway(world, down, GatewayTraits(), octets)
        receiver = Peer(world, up, client, 0, octets)
        up.receiver, down.receiver = sender.arrives, receiver.arrives
        receiver.begin()
    world.run(lambda: sender.established, until_idle=False)
    begin = world.now
    world.run(lambda: receiver.received == octets or sender.gave_up, until_idle=False)
    return world.now - begin if receiver.received == octets else inf


def reference(loss: float, round_trip: float, octets: int, sack: bool) -> float:
    """Return how many seconds a good sender takes for a download, by formula."""
    bdp = RATE * round_trip / SMSS
    window = bdp + QUEUE / SMSS
    if loss:
        seconds_each = sqrt(2 * loss / 3) * round_trip  # a segment
        if not sack:
            timeout = max(0.2, 2 * round_trip)
            seconds_each += timeout * min(1, 3 * sqrt(3 * loss / 8)) * loss * (1 + 32 * loss**2)
        window = min(window, max(round_trip / seconds_each, 1.054 * (round_trip / loss) ** 0.75))
    seconds = round_trip / 2
    sent, flight = 0.0, min(10.0, window)
    segments = octets / SMSS
    while flight < min(window, bdp) and sent + flight < segments:
        seconds += round_trip
        sent += flight
        flight = min(2 * flight, window)
    return seconds + max(segments - sent, 0) / min(flight / round_trip, RATE / (SMSS + 52))


def row(name: str, round_trip: float) -> str:
    """Return one row of the long transfers: Mbit/s, and in brackets the reference."""
    client = CLIENTS[name]
    cells = []
    for loss in LOSSES:
        runs = BULK_RUNS if loss else 1
        seconds = median(transfer(seed, loss, round_trip, client, BULK) for seed in range(runs))
        expected = reference(loss, round_trip, BULK, client is None or client.sack)
        cells.append(f"{figure(BULK * 8e-6 / seconds)} ({figure(BULK * 8e-6 / expected)})")
    return f"{round_trip * 1000:>6g} ms" + "".join(f"{cell:>19}" for cell in cells)


def short_row(name: str, round_trip: float) -> str:
    """Return one row of the short transfers: seconds, median and slowest."""
    cells = []
    for loss in LOSSES:
        runs = range(SHORT_RUNS if loss else 1)
        seconds = sorted(transfer(1000 + seed, loss, round_trip, CLIENTS[name], SHORT) for seed in runs)
        cells.append(f"{figure(median(seconds))} … {figure(seconds[-1])}")
    return f"{round_trip * 1000:>6g} ms" + "".join(f"{cell:>19}" for cell in cells)


def figure(value: float) -> str:
    """Return a number with about three digits that matter."""
    return "never" if value in (0.0, inf) else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


KINDS = {
    "Mbit/s of 1 MB, median (reference)": row,
    "seconds for 100 KB, median … slowest of 20": short_row,
}
HEADING = "   RTT   " + "".join(f"{f'loss {loss:.1%}':>19}" for loss in LOSSES)


def line(kind: str, name: str, round_trip: float) -> str:
    """Return one line of the table."""
    return KINDS[kind](name, round_trip)


def table() -> str:
    """Measure everything, and return the text for FILE."""
    text = [f"What the simulated TCP sends to a client; see tests/simulation/table.py. Written by {COMMAND}"]
    for kind in KINDS:
        for name in CLIENTS:
            text += ["", f"{kind}: {name}", HEADING]
            text += [line(kind, name, round_trip) for round_trip in ROUND_TRIPS]
    return "\n".join(text) + "\n"
