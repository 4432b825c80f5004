"""Both ends real: the active side against the passive one, or two active sides at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf

from tests.simulation.forgery import forge
from tests.simulation.gateway import Gateway, GatewayTraits
from tests.simulation.scenario import Result, link_traits
from tests.simulation.world import Link, Packet, Stillness, World
from workers.icmperrors import MIN_MTU4
from workers.tcp.limits import RECEIVE_BUFFER


class Pair:
    """Two gateways on a link: the first opens."""

    def __init__(self, world: World, links: list[Link], traits: list[GatewayTraits], totals: list[int]) -> None:
        self.world = world
        self.links = links
        self.ends = [Gateway(world, links[i], traits[i], totals[i]) for i in range(2)]
        for i, end in enumerate(self.ends):
            link, other = links[i], self.ends[1 - i]
            link.receiver = other.arrives
            link.too_big = end.too_big
            link.describe = partial(self._told, i)

    def _told(self, i: int, packet: Packet) -> str:
        return packet.told(self.ends[i].iss, self.ends[1 - i].iss)

    def over(self) -> bool:
        """Whether both have done."""
        return all(end.conn is not None and end.ended and not end.backlog for end in self.ends)


def gateway_traits(world: World, cuts: bool, abort_after: float) -> GatewayTraits:
    """Draw what is around one end."""
    dice = world.dice
    return GatewayTraits(
        mss=dice.choice((100, 536, 1460, 1460, 8960)),
        slow_proxy=dice.random() < 0.3,
        cuts=cuts,
        reads=dice.choice(((65_000,), (1, 700, 20_000, 65_000), (100,))),
        pause=dice.choice((0.0, 0.0, 0.0, 0.001, 0.05)),
        lingers=dice.choice((0.0, 0.0, 0.0, 0.1, 100.0)),
        abort_after=abort_after,
        receive_buffer=dice.choice((16_384, 262_144, RECEIVE_BUFFER)),
        surplus=dice.choice((0, 0, 0, 300, 30_000)),
    )


def run(seed: int, tell: Callable[[str], None] | None = None) -> Result:
    """Run one seed."""
    world = World(seed)
    world.tell = tell
    dice = world.dice
    delay = dice.choice((0.0001, 0.001, 0.01, 0.1))
    cuts = dice.random() < 0.8
    links = [Link(world, link_traits(dice, delay, MIN_MTU4 if cuts else 1 << 16), name) for name in ("a > b", "b > a")]
    ends = [dice.choice((0.0, 0.01, 0.2, 3.0)) * dice.random() if dice.random() < 0.05 else inf for _ in range(2)]
    traits = [gateway_traits(world, cuts, after) for after in ends]
    sizes = (0, 1, 1000, 10_000, 30_000, 100_000)
    totals = [min(dice.choice(sizes), 200 * min(traits[0].mss, traits[1].mss, *each.reads)) for each in traits]
    pair = Pair(world, links, traits, totals)
    if tell is not None:
        for i in range(2):
            tell(f"{links[i].traits}\n{traits[i]}, sends {totals[i]}")
    pair.ends[0].connect()
    if dice.random() < 0.3:
        world.at(world.now + dice.random() * 3 * delay, pair.ends[1].connect)
    for end in pair.ends:
        if dice.random() < 0.1:
            world.at(world.now + dice.random(), forge, end)
    try:
        world.run(pair.over)
    except Stillness:
        if min(ends) == inf and not any(end.gave_up for end in pair.ends):
            raise
    else:
        for end in pair.ends:
            end.check_end()
    gave_up = any(end.gave_up for end in pair.ends)
    unlucky = gave_up and max(link.loss for link in links) == 0.2
    if min(ends) == inf and not unlucky:
        for i, end in enumerate(pair.ends):
            assert not end.reset and not end.gave_up, (end.reset, end.gave_up)
            assert end.received == totals[1 - i], f"{end.received} of {totals[1 - i]} octets came"
            assert end.remote_closed
    reset = any(end.reset for end in pair.ends)
    first, second = pair.ends
    return Result(seed, world.now - world.start, world.carried, second.received, first.received, reset, False)
