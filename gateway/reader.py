"""The reader: device → free frame → shard → rx ring of its worker.

    read_frames ─► bucket_of ─► push ─► submit ··· worker ··· take_home
                      └─ fragment ─► Reassembly ─► bucket_of the whole packet

It cannot know the shard before it has read the frame, so it reads into a free frame of the common pool, and remembers
who has it: the frames of a dead worker come home. It looks at addresses and ports, at nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from mmap import mmap
from select import EPOLLIN, epoll
from time import monotonic
from typing import TYPE_CHECKING, Final

from ipc.channel import Channel
from ipc.layout import ADDRESS_MASK, FRAME_SIZE, LENGTH_SHIFT, RX_FRAMES
from ipc.memory import SharedMemory
from ipc.pool import FramePool
from ipc.ring import Consumer, Producer
from ipc.wait import spin
from workers.settings import ADDRESS_PORT, Settings
from workers.wire import fragments
from workers.wire.flowkey import BUCKETS, bucket_by_destination, bucket_of

if TYPE_CHECKING:
    from gateway.device import Device

COUNTERS: Final = (
    "frames",
    "bytes",
    "wakeups",
    "no_frame",  # times that every frame was in use, and the device had to wait
    "no_worker",  # frames dropped because their worker was being replaced
    "short",  # reads too short for an IP header
    *fragments.COUNTERS,
)
FRAMES, BYTES, WAKEUPS, NO_FRAME, NO_WORKER, SHORT, FRAGMENTS = range(7)

BATCH: Final = 64  #: frames between two submits of small ones
PROMPT: Final = 8 * 1024  #: octets; a frame as large as this is submitted at once
LOW_WATER: Final = RX_FRAMES - 32  #: fill rings are read when fewer frames are free: reuse keeps few in cache
MIN_LENGTH: Final = 30  #: octets; virtio_net_hdr and an IPv4 header


class Reader:
    """The state of the reader process."""

    def __init__(
        self,
        shared: SharedMemory,
        device: Device,
        count: memoryview,
        channel: Channel,
        bucket_of: Callable[[mmap, int], int] = bucket_of,
    ) -> None:
        """`bucket_of` is one of workers.wire.flowkey."""
        self.shared = shared
        self._bucket_of = bucket_of
        self.device = device
        self.count = count
        self.channel = channel
        self.pool = FramePool(0, FRAME_SIZE, RX_FRAMES)
        self.owner = [-1] * RX_FRAMES  #: the shard that has each frame, -1: we
        self.rx = [Producer(rings["rx"]) for rings in shared.rings]
        self.fill = [Consumer(rings["fill"]) for rings in shared.rings]
        #: shards whose worker takes frames; behind them one that never does, which has the fragments
        self.there = [True] * shared.shards + [False]
        #: bucket → shard: a worker is replaced, added or drained by this table, the flows of the others stay; the last
        #: entry is that of FRAGMENT, so that fragments cost the others no look
        self.indirection = [bucket % shared.shards for bucket in range(BUCKETS)] + [shared.shards]
        self.reassembly = fragments.Reassembly(count, FRAGMENTS)
        view = memoryview(shared.rx_frames)
        self._buffers = [[view[at : at + FRAME_SIZE]] for at in range(0, RX_FRAMES * FRAME_SIZE, FRAME_SIZE)]
        self._epoll = epoll()
        self._epoll.register(channel, EPOLLIN)
        self._epoll.register(device.fileno(), EPOLLIN)
        self._waits_for_frames = False

    def run(self, busy_poll: float) -> None:
        """Read until told to stop."""
        device_fd = self.device.fileno()
        channel_fd = self.channel.fileno()
        poller = self._epoll
        self.channel.send({"event": "ready"})
        while True:
            events = (busy_poll and spin(poller, busy_poll)) or poller.poll()
            self.count[WAKEUPS] += 1
            for fd, _ in events:
                if fd == channel_fd:
                    if not self._told():
                        return
                elif fd != device_fd:
                    self.take_home()
            if not self._waits_for_frames:
                self.read_frames()
                # Who was just busy looks once more before it sleeps: a wakeup costs more than a system call.
                while self.read_frames():
                    pass

    def read_frames(self) -> int:
        """Read what the device has; return how many frames that were. OSError: the device is gone."""
        pool = self.pool
        free = pool.free
        give = pool.give
        readv = self.device.readv
        buffers = self._buffers
        memory = self.shared.rx_frames
        owner = self.owner
        rx = self.rx
        indirection = self.indirection
        there = self.there
        bucket_of = self._bucket_of
        total = octets = waiting = 0
        while True:
            if len(free) < LOW_WATER and not waiting:
                self.take_home()
            if not free:
                self._submit()
                waiting = 0
                self.take_home()
                if not free:
                    self.count[NO_FRAME] += 1
                    self._wait_for_frames(True)
                    break
            at = free.pop()
            number = at // FRAME_SIZE
            try:
                length = readv(buffers[number])
            except BlockingIOError:
                give(at)
                break
            if length < MIN_LENGTH:
                give(at)
                self.count[SHORT] += 1
                continue
            shard = indirection[bucket_of(memory, at)]
            if not there[shard]:
                if shard < len(rx):
                    give(at)
                    self.count[NO_WORKER] += 1
                    continue
                length = self.reassembly.take(memory, at, length, monotonic())
                if not length:
                    give(at)
                    continue
                shard = indirection[bucket_of(memory, at)]
                if not there[shard]:
                    give(at)
                    self.count[NO_WORKER] += 1
                    continue
            owner[number] = shard
            rx[shard].push(at | length << LENGTH_SHIFT)
            total += 1
            octets += length
            if length >= PROMPT:
                rx[shard].submit()
            else:
                waiting += 1
                if waiting >= BATCH:
                    self._submit()
                    waiting = 0
        if waiting:
            self._submit()
        if total:
            self.count[FRAMES] += total
            self.count[BYTES] += octets
        return total

    def _submit(self) -> None:
        for ring in self.rx:
            ring.submit()

    def take_home(self) -> None:
        """Take back the frames that the workers are done with."""
        give = self.pool.give
        owner = self.owner
        for fill in self.fill:
            for descriptor in fill.take():
                at = descriptor & ADDRESS_MASK
                owner[at // FRAME_SIZE] = -1
                give(at)
        if self._waits_for_frames and self.pool.free:
            self._wait_for_frames(False)

    def _wait_for_frames(self, wait: bool) -> None:
        """Without a free frame the fill rings stand in epoll in the place of the device, which would spin."""
        if wait == self._waits_for_frames:
            return
        self._waits_for_frames = wait
        if wait:
            self._epoll.unregister(self.device.fileno())
            for fill in self.fill:
                self._epoll.register(fill.fileno(), EPOLLIN)
        else:
            for fill in self.fill:
                self._epoll.unregister(fill.fileno())
            self._epoll.register(self.device.fileno(), EPOLLIN)

    def _told(self) -> bool:
        """Do what the supervisor says; False: stop."""
        message = self.channel.order()
        if message is None:
            return True
        if message["do"] == "stop":
            return False
        shard = message["shard"]
        if message["do"] == "drop-shard":
            self.there[shard] = False
            self.rx[shard].reset()
            self.fill[shard].reset()
            for number, who in enumerate(self.owner):
                if who == shard:
                    self.owner[number] = -1
                    self.pool.give(number * FRAME_SIZE)
            if self._waits_for_frames and self.pool.free:
                self._wait_for_frames(False)
            self.channel.send({"done": "drop-shard", "shard": shard})
        elif message["do"] == "add-shard":
            self.there[shard] = True
        return True


def reader_main(shared: SharedMemory, device: Device, channel: Channel, settings: Settings) -> None:
    """Run the reader until the supervisor says stop, or is gone."""
    by_destination = settings.udp_mapping == ADDRESS_PORT
    hashed = bucket_by_destination if by_destination else bucket_of
    Reader(shared, device, shared.counters.block("reader"), channel, hashed).run(settings.busy_poll)
