"""The writer: tx rings of all workers, in turn and fairly → device.

take ─► write (one piece) or writev (headers, then slices of payload frames) ─► completion
"""

from __future__ import annotations

from contextlib import suppress
from select import EPOLLIN, epoll
from typing import TYPE_CHECKING, Final

from ipc.channel import Channel
from ipc.layout import ADDRESS_MASK, LENGTH_MASK, LENGTH_SHIFT, MORE
from ipc.memory import SharedMemory
from ipc.ring import Consumer, Producer
from ipc.wait import spin

if TYPE_CHECKING:
    from gateway.device import Device

COUNTERS: Final = ("frames", "bytes", "wakeups", "write_errors")
FRAMES, BYTES, WAKEUPS, WRITE_ERRORS = range(len(COUNTERS))

TURN: Final = 32  #: packets of one worker before the next one has its turn
TURN_OCTETS: Final = 512 * 1024  #: the same in octets; then what was written is completed, too


class Outlet:
    """One worker's packets on their way to the device."""

    __slots__ = ("completion", "consumer", "view", "waiting")

    def __init__(self, shared: SharedMemory, shard: int) -> None:
        rings = shared.rings[shard]
        self.consumer = Consumer(rings["tx"])
        self.completion = Producer(rings["completion"])
        self.view = memoryview(shared.tx_frames[shard])
        self.waiting: list[int] = []  #: descriptors taken from the ring and not written yet


class Writer:
    """The state of the writer process."""

    def __init__(self, shared: SharedMemory, device: Device, count: memoryview, channel: Channel) -> None:
        self.count = count
        self.device = device
        self.channel = channel
        self.outlets = [Outlet(shared, shard) for shard in range(shared.shards)]
        self._by_fd = {outlet.consumer.fileno(): outlet for outlet in self.outlets}
        self._epoll = epoll()
        self._epoll.register(channel, EPOLLIN)
        for fd in self._by_fd:
            self._epoll.register(fd, EPOLLIN)

    def run(self, busy_poll: float) -> None:
        """Write until told to stop, and then what is still there."""
        poller = self._epoll
        channel_fd = self.channel.fileno()
        by_fd = self._by_fd
        self.channel.send({"event": "ready"})
        looked_again = True
        while True:
            events = poller.poll() if looked_again else spin(poller, busy_poll)
            looked_again = not events
            self.count[WAKEUPS] += 1
            more = []
            for fd, _ in events:
                if fd == channel_fd:
                    if not self._told():
                        self._drain()
                        return
                    continue
                outlet = by_fd[fd]
                outlet.waiting += outlet.consumer.take()
                self.write_turn(outlet)
                if outlet.waiting:
                    more.append(outlet)
            while more:  # the others have had their turn
                for outlet in self.outlets:
                    outlet.waiting += outlet.consumer.take()
                    self.write_turn(outlet)
                more = [outlet for outlet in self.outlets if outlet.waiting]

    def write_turn(self, outlet: Outlet) -> None:
        """Write one turn of a worker's packets, and complete their descriptors."""
        waiting = outlet.waiting
        view = outlet.view
        write = self.device.write
        push = outlet.completion.push
        packets = octets = errors = used = 0
        pieces: list[memoryview] = []
        for descriptor in waiting:
            used += 1
            at = descriptor & ADDRESS_MASK
            piece = view[at : at + (descriptor >> LENGTH_SHIFT & LENGTH_MASK)]
            if descriptor & MORE:
                pieces.append(piece)
                continue
            try:
                if pieces:
                    pieces.append(piece)
                    octets += self.device.writev(pieces)
                    pieces = []
                else:
                    octets += write(piece)
            except OSError:  # the device is down, or does not take this packet: lost, as on a link
                errors += 1
                pieces = []
            packets += 1
            if packets >= TURN or octets >= TURN_OCTETS:
                break
        for descriptor in waiting[:used]:
            push(descriptor)
        outlet.completion.submit()
        del waiting[:used]
        count = self.count
        count[FRAMES] += packets
        count[BYTES] += octets
        if errors:
            count[WRITE_ERRORS] += errors

    def _drain(self) -> None:
        for outlet in self.outlets:
            outlet.waiting += outlet.consumer.take()
            while outlet.waiting:
                self.write_turn(outlet)

    def _told(self) -> bool:
        """Do what the supervisor says; False: stop."""
        message = self.channel.order()
        if message is None:
            return True
        if message["do"] == "stop":
            return False
        if message["do"] == "drop-shard":
            outlet = self.outlets[message["shard"]]
            outlet.waiting.clear()
            outlet.consumer.reset()
            outlet.completion.reset()
            with suppress(FileNotFoundError):  # told twice: its successor died as well
                self._epoll.unregister(outlet.consumer.fileno())
            self.channel.send({"done": "drop-shard", "shard": message["shard"]})
        elif message["do"] == "add-shard":
            self._epoll.register(self.outlets[message["shard"]].consumer.fileno(), EPOLLIN)
        return True


def writer_main(shared: SharedMemory, device: Device, channel: Channel, busy_poll: float) -> None:
    """Run the writer until the supervisor says stop, or is gone."""
    Writer(shared, device, shared.counters.block("writer"), channel).run(busy_poll)
