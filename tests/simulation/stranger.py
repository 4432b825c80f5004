"""A stranger on the network: knows addresses and ports of the flows, but not where in their streams they are.

What it sends must neither end a flow nor change an octet, and nothing of it may raise: it is answered as the RFCs say,
or dropped and counted.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.one_worker import TRUSTED
from tests.simulation.whole_worker import WIRE, Flow, WholeWorker
from tests.simulation.world import FORGED, Packet
from workers.relay import Relay
from workers.tcp.segment import ACK, FIN, PSH, RST, SYN, URG
from workers.tcp.states import SYN_RECEIVED

STRANGE_FRAMES = 300  #: in one run
MOMENTS = (0.0, 0.0001, 0.001, 0.01, 0.1)  #: seconds between two frames, one of these for a run


class Stranger:
    """Sends `frames` frames into the flows of a shard, each of another kind."""

    def __init__(self, shard: WholeWorker, flows: list[Flow], frames: int) -> None:
        self.shard = shard
        self.flows = flows
        self._left = frames
        self._dice = shard.world.dice
        self._moment = self._dice.choice(MOMENTS)
        self._kinds: tuple[Callable[[Flow], tuple[bytes, bytes] | None], ...] = (
            *(self._blind,) * 4,
            *(self._spoiled,) * 2,
            self._replayed,
            self._cut_off,
            self._noise,
            self._other_protocol,
            self._icmp_error,
        )

    def begin(self) -> None:
        """Send the first one soon."""
        self._next()

    def _next(self) -> None:
        world = self.shard.world
        world.at(world.now + self._dice.expovariate(1) * self._moment, self._act)

    def _act(self, _: object) -> None:
        dice = self._dice
        self._left -= 1
        if self._left > 0:
            self._next()
        for _ in range(dice.choice((1, 1, 5))):  # a batch
            made = dice.choice(self._kinds)(dice.choice(self.flows))
            if made is not None:
                packet, vnet = made
                if self.shard.world.tell is not None:
                    self.shard.world.tell(f"{self.shard.world.now:12.6f} a stranger's {packet[:80].hex()}")
                self.shard.receive(packet, vnet)

    def _blind(self, flow: Flow) -> tuple[bytes, bytes] | None:
        """A segment whose numbers are guesses."""
        dice = self._dice
        relay = self.shard.worker.tcp.table.get(flow.key)
        flags = dice.choice((ACK, ACK, ACK | PSH, ACK | FIN, RST, RST | ACK, SYN, SYN | ACK, FIN, 0, 0x3F, URG | ACK))
        if flags & SYN and not (isinstance(relay, Relay) and relay.conn.state > SYN_RECEIVED):
            return None  # that would be a connection of its own
        ts = dice.choice((None, (dice.getrandbits(32), dice.getrandbits(32))))
        blocks = dice.choice(((), (), ((dice.getrandbits(32), dice.getrandbits(32)),)))
        text = FORGED[: dice.choice((0, 0, 1, 100, 1460, 20_000))]
        packet = Packet(
            *(flags, dice.getrandbits(32), dice.getrandbits(32), dice.getrandbits(16), 0, len(text), ts, blocks),
            mss=dice.choice((0, 1, 1460)) if flags & SYN else 0,
            scale=dice.choice((-1, 0, 255)) if flags & SYN else -1,
        )
        return flow.frame(packet, text, extra=dice.randbytes(dice.choice((0, 0, 4, 12))))

    def _spoiled(self, flow: Flow) -> tuple[bytes, bytes] | None:
        """A true packet with a bit turned, or up to fifteen in a row: no checksum misses that.

        Sixteen may: turned from zeros to ones they add 65,535, which is as good as nothing.
        """
        dice = self._dice
        if flow.last is None or flow.last[0].flags & SYN:
            return None
        packet, _ = flow.frame(*flow.last, wire=True)
        begin = 0 if flow.version == 4 else 40  # nothing protects the header of IPv6
        at = begin * 8 + dice.randrange((len(packet) - begin) * 8 - 16)
        spoiled = int.from_bytes(packet) ^ (dice.getrandbits(14) << 1 | 1) << (len(packet) * 8 - at - 16)
        return spoiled.to_bytes(len(packet)), WIRE

    def _replayed(self, flow: Flow) -> tuple[bytes, bytes] | None:
        """A true packet of long ago."""
        if not flow.first:
            return None
        packet, text = self._dice.choice(flow.first)
        return None if packet.flags & SYN else flow.frame(packet, text)

    def _cut_off(self, flow: Flow) -> tuple[bytes, bytes] | None:
        """A true packet that ends too soon."""
        dice = self._dice
        if flow.last is None:
            return None
        packet, vnet = flow.frame(*flow.last)
        return packet[: dice.randrange(len(packet))], vnet

    def _noise(self, flow: Flow) -> tuple[bytes, bytes]:
        """Octets."""
        dice = self._dice
        packet = dice.randbytes(dice.choice((0, 1, 19, 20, 28, 40, 60, 200)))
        if packet and dice.random() < 0.9:
            packet = bytes([dice.choice((0x45, 0x46, 0x4F, 0x60, 0x40))]) + packet[1:]
            if len(packet) >= 20 and packet[0] >> 4 == 4 and dice.random() < 0.8:
                packet = packet[:2] + len(packet).to_bytes(2) + packet[4:6] + b"\x40\x00" + packet[8:]
        return packet, dice.choice((WIRE, TRUSTED, dice.randbytes(10)))

    def _other_protocol(self, flow: Flow) -> tuple[bytes, bytes]:
        """A well-formed header in front of any protocol, or of a UDP datagram."""
        dice = self._dice
        body = dice.randbytes(dice.choice((0, 7, 8, 20, 100, 1000)))
        protocol = dice.choice((1, 17, 17, 58, 0, 43, 44, 60, 41, 50, 132, dice.randrange(256)))
        if protocol == 17 and len(body) >= 8:
            body = body[:2] + dice.choice((b"\x00\x35", b"\x01\xbb", body[2:4])) + len(body).to_bytes(2) + body[6:]
        if protocol == 6:
            protocol = 7
        return flow.packet(protocol, body), TRUSTED

    def _icmp_error(self, flow: Flow) -> tuple[bytes, bytes] | None:
        """An ICMP error about a packet that we did not send: its sequence number is a guess."""
        dice = self._dice
        mtu = dice.choice((0, 68, 296, 576, 1280, 1400, 65535))
        if flow.version == 4:
            kind = dice.choice(((3, 4), (3, 4), (3, 4), (3, 1), (3, 3), (4, 0), (11, 0), (12, 0)))
        else:
            kind = dice.choice(((2, 0), (2, 0), (2, 0), (1, 0), (1, 4), (3, 0), (4, 0)))
        quote = dice.choice((0, 4, 8, 20))
        return flow.icmp_error(dice.getrandbits(32), 1500, mtu, kind, quote), WIRE
