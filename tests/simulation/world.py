"""Virtual time, a queue of what happens, and the two links between the ends."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, inf

from workers.tcp.segment import ACK, FIN, PSH, RST, SYN

MASK = 0xFFFFFFFF
MAX_SECONDS = 100_000.0  #: virtual; a run that lasts longer hangs (a back-off of 60 s for each loss may be right)
MAX_STEPS = 300_000
BURST_SECONDS = 0.05
HEADERS = 52  #: octets of a packet beside its text, on a link that has a rate

#: What both sides send: octet i of a stream is octet i of this, so a position says what must stand there.
STREAM = random.Random(793).randbytes(1 << 20)
FORGED = bytes(1 << 16)  #: what a stranger sends


class Packet:
    """One packet on the link; not changed once it is sent, so a duplicate is the same object."""

    __slots__ = ("ack", "flags", "len", "mss", "sack", "sack_permitted", "scale", "seq", "start", "ts", "wnd")

    def __init__(
        self,
        flags: int,
        seq: int,
        ack: int,
        wnd: int,
        start: int = 0,
        length: int = 0,
        ts: tuple[int, int] | None = None,
        sack: tuple[tuple[int, int], ...] = (),
        mss: int = 0,
        scale: int = -1,
        sack_permitted: bool = False,
    ) -> None:
        self.flags = flags
        self.seq = seq
        self.ack = ack
        self.wnd = wnd
        self.start = start  #: position of the text in its sender's stream
        self.len = length  #: octets of text
        self.ts = ts
        self.sack = sack
        self.mss = mss
        self.scale = scale
        self.sack_permitted = sack_permitted

    def told(self, seq_base: int, ack_base: int) -> str:
        """Return a line for a trace, with sequence numbers relative to their beginnings."""
        names = ((SYN, "S"), (FIN, "F"), (RST, "R"), (PSH, "P"), (ACK, "."))
        flags = "".join(letter for bit, letter in names if self.flags & bit)
        seq = (self.seq - seq_base) & MASK
        line = f"{flags:3} {seq}:{seq + self.len}({self.len}) ack {(self.ack - ack_base) & MASK} win {self.wnd}"
        if self.sack:
            blocks = " ".join(f"{(a - ack_base) & MASK}:{(b - ack_base) & MASK}" for a, b in self.sack)
            line += f" sack {blocks}"
        if self.flags & SYN:
            line += f" mss {self.mss} scale {self.scale}{' sackOK' if self.sack_permitted else ''}"
        return line + (f" ts {self.ts[0]} {self.ts[1]}" if self.ts else "")


class Stillness(AssertionError):
    """Both ends wait, and nothing is on the way."""


class World:
    """Virtual time (seconds), and what will happen in it."""

    def __init__(self, seed: int, start: float = 10.0) -> None:
        self.dice = random.Random(seed)
        self.now = self.start = start
        self.on_the_way = 0  #: packets
        self.carried = 0  #: packets, in all
        self.tell: Callable[[str], None] | None = None  #: takes the lines of a trace
        self._queue: list[tuple[float, int, Callable, object]] = []
        self._number = 0

    def at(self, when: float, call: Callable, argument: object = None) -> None:
        """Call call(argument) at a moment."""
        self._number += 1
        heapq.heappush(self._queue, (when, self._number, call, argument))

    def run(self, done: Callable[[], bool], until_idle: bool = True) -> None:
        """Let happen what happens until done() is true and, unless it should not wait for that, nothing on the way."""
        queue = self._queue
        pop = heapq.heappop
        end = self.start + MAX_SECONDS
        for _ in range(MAX_STEPS):
            if not (until_idle and self.on_the_way) and done():
                return
            if not queue:
                raise Stillness("nothing will ever happen again, and the run is not done")
            when, _, call, argument = pop(queue)
            if when > self.now:
                self.now = when
            assert when < end, "the run hangs"
            call(argument)
        raise AssertionError("the run does not come to an end")


@dataclass(frozen=True, slots=True)
class LinkTraits:
    """What a link does to packets: seconds, octets, and probabilities."""

    delay: float
    jitter: float = 0.0  #: each packet is late by up to so much more, and so overtaken
    loss: float = 0.0
    burst: float = 0.0  #: probability that what follows a lost packet within BURST_SECONDS is lost too
    duplicates: float = 0.0
    rate: float = inf  #: octets a second
    queue: int = 0  #: octets that wait for a slow link; the rest is dropped
    tick: float = 0.0  #: packets arrive together, each so many seconds
    stall: tuple[float, float] = (inf, inf)  #: from when to when nothing arrives (seconds after the start)
    mtu: int = 1 << 16  #: of a router in the middle
    mtu_from: float = 0.0  #: seconds after the start
    silence: float = 0.0  #: probability that the router does not say what was too big


class Link:
    """One way of the link."""

    def __init__(self, world: World, traits: LinkTraits, name: str) -> None:
        self.world = world
        self.name = name
        self.traits = traits
        self.receiver: Callable[[Packet], None]
        self.describe: Callable[[Packet], str] = repr
        self.too_big: Callable[[Packet, int], None]
        self.headers = 40  #: octets of IP and TCP without options
        self.loss = traits.loss
        self.dropped = 0  #: packets
        self._burst_end = 0.0
        self._free_at = 0.0
        self._random = world.dice.random
        self._simple = not (traits.duplicates or traits.rate < inf or traits.tick or traits.stall[0] < inf)

    def send(self, packet: Packet) -> None:
        """Carry a packet, or not."""
        world = self.world
        traits = self.traits
        world.carried += 1
        if self.loss and self._random() < (traits.burst if world.now < self._burst_end else self.loss):
            self.dropped += 1
            if traits.burst:
                self._burst_end = world.now + BURST_SECONDS
            if world.tell is not None:
                self._told(packet, "LOST")
            return
        at = world.now + traits.delay
        if traits.jitter:
            at += self._random() * traits.jitter
        if not self._simple:
            if packet.len and self._exceeds(packet):
                return
            if traits.rate < inf:
                begins = max(world.now, self._free_at)
                if (begins - world.now) * traits.rate > traits.queue:
                    self.dropped += 1
                    if world.tell is not None:
                        self._told(packet, "QUEUE FULL")
                    return
                self._free_at = begins + (packet.len + HEADERS) / traits.rate
                at += self._free_at - world.now
            at = self._later(at)
            if traits.duplicates and self._random() < traits.duplicates:
                again = self._later(at + self._random() * (traits.jitter + traits.delay))
                world.on_the_way += 1
                world.at(again, self._arrives, packet)
        if world.tell is not None:
            self._told(packet, "")
        world.on_the_way += 1
        world.at(at, self._arrives, packet)

    def _exceeds(self, packet: Packet) -> bool:
        """Drop what is too big for the router in the middle, who mostly says so."""
        traits = self.traits
        world = self.world
        if self.headers + 12 * (packet.ts is not None) + packet.len <= traits.mtu:
            return False
        if world.now - world.start < traits.mtu_from:
            return False
        told = self._random() >= traits.silence
        if world.tell is not None:
            self._told(packet, f"MORE THAN {traits.mtu}{', and says so' if told else ''}")
        if told:
            world.on_the_way += 1
            world.at(world.now + traits.delay, self._too_big, packet)
        return True

    def _too_big(self, packet: Packet) -> None:
        self.world.on_the_way -= 1
        self.too_big(packet, self.traits.mtu)

    def _later(self, at: float) -> float:
        stall, end = self.traits.stall
        if stall <= at - self.world.start < end:
            at = self.world.start + end
        if self.traits.tick:
            at = ceil(at / self.traits.tick) * self.traits.tick
        return at

    def _arrives(self, packet: Packet) -> None:
        self.world.on_the_way -= 1
        self.receiver(packet)

    def _told(self, packet: Packet, fate: str) -> None:
        assert self.world.tell is not None
        self.world.tell(f"{self.world.now - self.world.start:12.6f} {self.name} {self.describe(packet)} {fate}")
