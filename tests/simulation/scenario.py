"""One run: the dice of a seed decide what the link, the peer and the gateway's surroundings are like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from random import Random

from tests.simulation.forgery import forge
from tests.simulation.gateway import Gateway, GatewayTraits
from tests.simulation.peer import Peer, PeerTraits
from tests.simulation.world import Link, LinkTraits, Packet, Stillness, World
from workers.icmperrors import MIN_MTU4
from workers.tcp.limits import RECEIVE_BUFFER

MAX_PACKETS = 600  #: of one way, about: many small runs find more than few long ones


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    seed: int
    seconds: float
    packets: int  #: carried, both ways
    up: int  #: octets
    down: int
    reset: bool
    stranger: bool


def link_traits(dice: Random, delay: float, least_mtu: int = 1 << 16) -> LinkTraits:
    """Draw one way of a link; half of them only lose, or nothing at all."""
    mtu = dice.choice((1 << 16, 1 << 16, 552, 576, 1000, 1280, 1400))
    loss = dice.choice((0.0, 0.0, 0.01, 0.05, 0.2))
    jitter = dice.choice((0.0, 0.0, delay / 10, delay, 4 * delay))
    if dice.random() < 0.5:
        return LinkTraits(delay, jitter, loss)
    rate = dice.choice((inf, inf, 1e5, 1e7))
    stall = dice.choice((inf, inf, dice.random(), 5 * dice.random()))
    return LinkTraits(
        delay,
        jitter,
        loss,
        burst=dice.choice((0.0, 0.0, 0.5)),
        duplicates=dice.choice((0.0, 0.05, 0.3)),
        rate=rate,
        queue=dice.choice((5_000, 50_000, 1_000_000)) if rate < inf else 0,
        tick=dice.choice((0.0, 0.001, 0.02)),
        stall=(stall, stall + dice.choice((0.3, 1.0, 4.0))),
        mtu=max(mtu, least_mtu),
        mtu_from=dice.choice((0.0, 0.1, 1.0)),
        silence=dice.choice((0.0, 0.3)),
    )


def peer_traits(dice: Random, rtt: float, abort_after: float, vanishes_after: float) -> PeerTraits:
    """Draw a client."""
    odd = dice.random() < 0.3
    return PeerTraits(
        mss=dice.choice((0, 100, 536, 1460, 1460)),
        scale=dice.choice((-1, 0, 2, 7)),
        timestamps=dice.random() < 0.6,
        sack=dice.random() < 0.7,
        buffer=dice.choice((1, 10, 1000, 5000, 60_000, 60_000, 1_000_000)),
        reader_period=dice.choice((0.0, 0.0, 0.01, 1.0)),
        keeps=dice.random() < 0.8,
        reneges=0.2 if odd and dice.random() < 0.3 else 0.0,
        shrinks=0.2 if odd and dice.random() < 0.3 else 0.0,
        tells_gaps=dice.random() < 0.8,
        acks_every=dice.choice((1, 2, 2, 2, 16)),
        ack_timeout=dice.choice((0.0, 0.04, 0.04, 0.2)),
        window=dice.choice((2, 20, 20, 64)),
        merges=dice.choice((1, 1, 4, 40)),
        rto=dice.choice((0.3, max(0.3, 2 * rtt), max(1.0, 4 * rtt))),
        trusting=dice.random() < 0.5,
        bsd_probes=dice.random() < 0.5,
        lone_fin=dice.random() < 0.3,
        lingers=dice.choice((0.0, 0.0, 0.0, 0.1, 100.0)),
        abort_after=abort_after,
        vanishes_after=vanishes_after,
    )


class Scenario:
    """The world of a seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.world = world = World(seed)
        dice = world.dice
        if dice.random() < 0.5:
            world.now = world.start = 4294960.0  # the gateway's millisecond clock wraps soon
        delay = dice.choice((0.0001, 0.001, 0.01, 0.1))
        cuts = dice.random() < 0.8
        self.down_link = Link(world, link_traits(dice, delay, MIN_MTU4 if cuts else 1 << 16), "down")
        self.up_link = Link(world, link_traits(dice, delay), "  up")
        moments = (0.0, 0.01, 0.2, 3.0)
        ends = [dice.choice(moments) * dice.random() if dice.random() < 0.06 else inf for _ in range(3)]
        self.aborted = min(ends) < inf
        traits = peer_traits(dice, 2 * delay + 0.01, ends[0], ends[1])
        gateway = GatewayTraits(
            mss=dice.choice((1460, 1460, 536, 8960)),
            slow_proxy=dice.random() < 0.3,
            cuts=cuts,
            reads=dice.choice(((65_000,), (1, 700, 20_000, 65_000), (100,))),
            pause=dice.choice((0.0, 0.0, 0.0, 0.001, 0.05, 1.0)),
            lingers=dice.choice((0.0, 0.0, 0.0, 0.1, 100.0)),
            abort_after=ends[2],
            receive_buffer=dice.choice((16_384, 262_144, RECEIVE_BUFFER, 64 << 20)),
            surplus=dice.choice((0, 0, 0, 300, 30_000)),
        )
        sizes = (0, 1, 1000, 10_000, 30_000, 100_000, 400_000)
        # Octet by octet, or once a second, or after each timeout: not too many of them.
        mss = min(traits.mss or 536, gateway.mss) - 12
        down = min(dice.choice(sizes), MAX_PACKETS * min(mss, traits.buffer, min(gateway.reads) * 2))
        up = min(dice.choice(sizes), MAX_PACKETS * mss)
        if traits.reader_period == 1.0:
            down = min(down, 100 * traits.buffer)
        if gateway.pause:
            down = min(down, 30 * max(gateway.reads))
        self.gateway = Gateway(world, self.down_link, gateway, down)
        self.peer = Peer(world, self.up_link, traits, up, down)
        self.up_link.receiver = self.gateway.arrives
        self.down_link.receiver = self.peer.arrives
        self.down_link.too_big = self.gateway.too_big
        self.up_link.describe = self._told_up
        self.down_link.describe = self._told_down
        self.stranger = dice.random() < 0.15

    def _told_up(self, packet: Packet) -> str:
        return packet.told(self.peer.iss, self.gateway.iss)

    def _told_down(self, packet: Packet) -> str:
        return packet.told(self.gateway.iss, self.peer.iss)

    def _over(self) -> bool:
        gateway, peer = self.gateway, self.peer
        if gateway.conn is None:
            return peer.done
        return peer.done and gateway.ended and not gateway.backlog

    def run(self) -> Result:
        """Run to the end; AssertionError when anything is wrong."""
        world, gateway, peer = self.world, self.gateway, self.peer
        peer.begin()
        if self.stranger:
            world.at(world.now + world.dice.random(), forge, gateway)
        still = False
        try:
            world.run(self._over)
        except Stillness:
            # A RST was lost, or the peer is gone, and whoever is left has nothing to say: in life it is idle until it
            # is given up.
            if not self.aborted and not gateway.gave_up:
                raise
            still = True
        if not still:
            gateway.check_end()
        # At 20 % (40 % of the round trips) ten retransmissions in a row are lost once in a long while.
        unlucky = max(self.up_link.loss, self.down_link.loss) == 0.2 and gateway.gave_up
        if not self.aborted and not unlucky:
            ends = (gateway.reset, gateway.gave_up, peer.reset)
            assert not any(ends), f"reset, gave up, reset by the gateway: {ends}"
            assert gateway.received == peer.total, f"{gateway.received} of {peer.total} octets came up"
            assert peer.received == gateway.total, f"{peer.received} of {gateway.total} octets came down"
            assert gateway.remote_closed
            assert peer.remote_closed
        reset = gateway.reset or peer.reset
        seconds = world.now - world.start
        return Result(self.seed, seconds, world.carried, gateway.received, peer.received, reset, self.stranger)


def run(seed: int, tell: Callable[[str], None] | None = None) -> Result:
    """Run one seed; `tell` takes the lines of a trace."""
    scenario = Scenario(seed)
    scenario.world.tell = tell
    if tell is not None:
        tell(f"down: {scenario.down_link.traits}\n  up: {scenario.up_link.traits}")
        tell(f"{scenario.peer.traits}, sends {scenario.peer.total}")
        tell(f"{scenario.gateway.traits}, sends {scenario.gateway.total}")
    return scenario.run()
