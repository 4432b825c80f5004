"""One run of a whole worker: a few clients at once, each on a link of its own; see whole_worker.py."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from ipc.layout import TX_LARGE
from tests.simulation.peer import Peer
from tests.simulation.scenario import Result, link_traits, peer_traits
from tests.simulation.stranger import Stranger
from tests.simulation.target import target_traits
from tests.simulation.whole_worker import Flow, WholeWorker
from tests.simulation.world import MASK, Link, Packet, Stillness, World
from workers import counts
from workers.icmperrors import MIN_MTU4, MIN_MTU6

MAX_PACKETS = 300  #: of one way of one flow, about
LOOK = 0.01  #: seconds between two looks whether a connection has ended
RUNS = 50  #: of one worker, one after the other
#: what the workers of the runs are told, in turn
SETTINGS = (
    {},
    {"early_accept": True},
    {"tcp_keepalive": 20.0, "tcp_keepalive_interval": 5.0},  # flows that linger are asked whether they live
    {"congestion": "newreno", "tcp_receive_buffer": 65_536},
    {"mtu": 576},
    {"mtu": 65_535, "early_accept": True},
    {"mtu": 9000, "tcp_receive_buffer": 16_384},
)


def worker_of(seed: int) -> WholeWorker:
    """Return a worker as the run of a seed has it."""
    return WholeWorker(**SETTINGS[seed // RUNS % len(SETTINGS)])


class Client:
    """One client, its link, its way into the worker."""

    def __init__(self, shard: WholeWorker, number: int) -> None:
        self.world = world = shard.world
        dice = world.dice
        delay = dice.choice((0.0001, 0.001, 0.01, 0.1))
        mtu = shard.worker.settings.mtu
        version = dice.choice((4, 6)) if mtu >= 1280 else 4  # RFC 8200, 5
        least_mtu = MIN_MTU4 if version == 4 else MIN_MTU6
        self.down_link = Link(world, link_traits(dice, delay, least_mtu), f"{number} down")
        self.up_link = Link(world, link_traits(dice, delay), f"{number}   up")
        moments = (0.0, 0.01, 0.2, 3.0)
        ends = [dice.choice(moments) * dice.random() if dice.random() < 0.04 else inf for _ in range(2)]
        traits = peer_traits(dice, 2 * delay + 0.01, *ends)
        target = target_traits(dice)
        self.aborted = min(*ends, target.resets_after) < inf or target.refuses
        sizes = (0, 1, 1000, 10_000, 30_000, 100_000, 400_000)
        mss = min(traits.mss or 536, mtu - 40) - 12
        down = min(dice.choice(sizes), MAX_PACKETS * min(mss, traits.buffer, min(target.reads) * 2))
        up = min(dice.choice(sizes), MAX_PACKETS * mss)
        if traits.reader_period == 1.0:
            down = min(down, 100 * traits.buffer)
        if target.pause:
            down = min(down, 30 * max(target.reads))
        self.flow = Flow(shard, self.down_link, version, 1000 + number, target, down)
        self.lives = dice.choice((1, 1, 1, 2, 4)) if not self.aborted else 1  #: connections with these ports
        self.peer = Peer(world, self.up_link, traits, up, down)
        self.up_link.receiver = self.flow.arrives
        self.down_link.receiver = self.peer.arrives
        self.down_link.too_big = self.flow.too_big
        self.down_link.headers = 40 if version == 4 else 60
        self.up_link.describe = self._told_up
        self.down_link.describe = self._told_down

    def _told_up(self, packet: Packet) -> str:
        return packet.told(self.peer.iss, self.flow.iss)

    def _told_down(self, packet: Packet) -> str:
        return packet.told(self.flow.iss, self.peer.iss)

    def begin(self) -> None:
        """Open, and once more after the end."""
        self.peer.begin()
        if self.lives > 1:
            self.world.at(self.world.now + LOOK, self._look)

    def _look(self, _: object) -> None:
        """Open the next connection as soon as the one before has ended, whatever is still on the way."""
        world, old = self.world, self.peer
        if not (old.done and self.flow.ended):
            world.at(world.now + LOOK + (world.now - world.start) / 50, self._look)
        elif old.reset:
            self.lives = 1
        else:
            self.check(False)
            self.lives -= 1
            self.peer = Peer(world, self.up_link, old.traits, old.total, old.their_total)
            self.peer.iss = (old.iss + old.total + 2 + world.dice.randrange(100_000)) & MASK
            self.down_link.receiver = self.peer.arrives
            self.begin()

    def over(self) -> bool:
        """Whether both ends have done."""
        return self.lives == 1 and self.peer.done and self.flow.ended

    @property
    def is_bad(self) -> bool:
        """Whether its link may well lose ten retransmissions in a row."""
        return max(self.up_link.loss, self.down_link.loss) == 0.2

    def check(self, gave_up: bool) -> None:
        """Compare what was sent with what came."""
        peer, flow = self.peer, self.flow
        for target in flow.targets:
            # A clean end means that nothing is missing, whatever happened.
            assert not target.remote_closed or target.received == peer.total, "a broken transfer ended cleanly"
        if self.aborted or (gave_up and self.is_bad):
            return
        assert not peer.reset, "reset by the gateway"
        target = flow.targets[-1]
        assert target.received == peer.total, f"{target.received} of {peer.total} octets came up"
        assert peer.received == target.total, f"{peer.received} of {target.total} octets came down"
        assert target.remote_closed and peer.remote_closed and not target.reset


def run(shard: WholeWorker, seed: int, tell: Callable[[str], None] | None = None, strange: int = 0) -> Result:
    """Run one seed with a worker that has run others before, beside so many frames of a stranger."""
    world = World(seed)
    dice = world.dice
    shard.begin(world, frames=dice.choice((2, 8, TX_LARGE)))
    shard.completes = dice.choice((0.0, 0.0001, 0.05))
    clients = [Client(shard, number) for number in range(dice.choice((1, 1, 2, 4)))]
    world.tell = tell
    for client in clients:
        if tell is not None:
            tell(f"down: {client.down_link.traits}\n  up: {client.up_link.traits}")
            tell(f"{client.peer.traits}, sends {client.peer.total}")
            tell(f"{client.flow.traits}, sends {client.flow.total}")
        client.begin()
    if strange:
        Stranger(shard, [client.flow for client in clients], strange).begin()
    timeouts = shard.count[counts.TCP_RETRANSMIT_TIMEOUTS]
    aborted = any(client.aborted for client in clients)
    try:
        world.run(lambda: not shard.is_busy and all(client.over() for client in clients))
    except Stillness:
        # A client whose RST was lost, and who has nothing to say, waits for ever; the worker must not.
        gave_up = shard.count[counts.TCP_RETRANSMIT_TIMEOUTS] - timeouts
        if not (aborted or gave_up) or not all(client.flow.ended for client in clients):
            raise
    seconds = world.now - world.start
    shard.check_end()
    gave_up = shard.count[counts.TCP_RETRANSMIT_TIMEOUTS] - timeouts
    assert not gave_up or aborted or any(client.is_bad for client in clients), "gave up"
    for client in clients:
        client.check(gave_up > 0)
    up = sum(target.received for client in clients for target in client.flow.targets)
    down = sum(client.peer.received for client in clients)
    return Result(seed, seconds, world.carried, up, down, any(client.peer.reset for client in clients), strange > 0)
