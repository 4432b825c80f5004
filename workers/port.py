"""Port: a worker's side of the device: frames come in, packets go out.

RingPort is the one of the `pipeline` placement: reader and writer are other processes, behind rings. In the `single`
placement gateway/single.py puts the device itself behind the same methods.

A TX frame is free when every descriptor on it is completed *and* nobody holds it:

    take() ── payload ── transmit(): in flight + 1 ── completion: in flight - 1 ─┐
                    └─── hold(): held ── unhold() when acknowledged ─────────────┴─► free
"""

from mmap import mmap
from typing import Protocol

from ipc.layout import (
    ADDRESS_MASK,
    FRAME_SIZE,
    LENGTH_MASK,
    LENGTH_SHIFT,
    MORE,
    RX_FRAMES,
    SMALL_SIZE,
    TX_LARGE,
    TX_SMALL,
    TX_SMALL_BASE,
)
from ipc.memory import SharedMemory
from ipc.pool import FramePool
from ipc.ring import Consumer, Producer

LARGE_LOW_WATER = TX_LARGE - 8  #: completions are read when fewer frames are free: reuse keeps few frames in cache
SMALL_LOW_WATER = TX_SMALL - 128
#: octets on their way to the writer beyond which no more are read from proxies: a longer queue only makes frames cold
#: and few (Linux: byte queue limits); 32 full frames keep the writer busy while completions travel
BACKLOG = 2 << 20
#: octets that do not wait for the end of the breath; waking a writer that sleeps costs 8 µs, a fifth of a full frame
PROMPT = 128 * 1024


class Port(Protocol):
    """What a worker needs of its neighbours."""

    rx: mmap  #: the RX frames
    rx_view: memoryview
    tx: mmap  #: this worker's TX frames
    tx_view: memoryview
    large: FramePool  #: free TX frames of FRAME_SIZE octets
    small: FramePool  #: free TX frames of SMALL_SIZE octets
    packets: int  #: transmitted since the worker last looked
    octets: int  #: of them, virtio_net_hdr included
    backlog: int  #: octets on their way to the device; with BACKLOG of them nothing more should be read for it
    completion_fd: int  #: readable when the backlog may have shrunk; -1: there never is one

    def fileno(self) -> int:
        """Return the descriptor that is readable while frames wait."""

    def frames(self) -> list[int]:
        """Return descriptors of frames from the device, oldest first; each is given back by release()."""

    def release(self, descriptors: list[int]) -> None:
        """Give RX frames back to the reader."""

    def reassemble(self, at: int, length: int, now: float) -> int:
        """Take the fragment in an RX frame; return the length of the whole packet that is there now, or 0."""

    def transmit(self, at: int, length: int, more: bool = False) -> None:
        """Send the packet (or with `more` the first piece of one) that stands at tx[at : at + length]."""

    def hold(self, frame: int) -> None:
        """Keep a large frame from being free when it is completed."""

    def unhold(self, frame: int) -> None:
        """End a hold."""

    def flush(self) -> None:
        """Make everything transmitted since the last call visible to the writer."""

    def complete(self) -> None:
        """Take home the frames that the writer is done with."""


class TxFrames:
    """Which TX frames are free, in flight, held: shared by both placements."""

    def __init__(self, memory: mmap) -> None:
        self.tx = memory
        self.tx_view = memoryview(memory)
        self.large = FramePool(0, FRAME_SIZE, TX_LARGE)
        self.small = FramePool(TX_SMALL_BASE, SMALL_SIZE, TX_SMALL)
        self._uses = [0] * TX_LARGE  # descriptors in flight, plus one if held, of each large frame
        self._held: set[int] = set()  # large frames
        self.packets = 0
        self.octets = 0
        self.backlog = 0  # for ever, where a packet is written as soon as it is transmitted
        self.completion_fd = -1

    def reassemble(self, at: int, length: int, now: float) -> int:
        """Drop the fragment: where there is a reader, it has put packets together before."""
        return 0

    def hold(self, frame: int) -> None:
        """Keep a large frame from being free when it is completed."""
        self._uses[frame // FRAME_SIZE] += 1
        self._held.add(frame)

    def unhold(self, frame: int) -> None:
        """End a hold; the frame is free if it is not in flight either."""
        self._held.discard(frame)
        number = frame // FRAME_SIZE
        self._uses[number] = uses = self._uses[number] - 1
        if not uses:
            self.large.give(frame)


class RingPort(TxFrames):
    """The port of a worker whose reader and writer are other processes."""

    def __init__(self, shared: SharedMemory, shard: int) -> None:
        super().__init__(shared.tx_frames[shard])
        self.rx = shared.rx_frames
        self.rx_view = memoryview(self.rx)
        rings = shared.rings[shard]
        self._rx = Consumer(rings["rx"])
        self._fill = Producer(rings["fill"])
        self._tx = Producer(rings["tx"])
        self._completion = Consumer(rings["completion"])
        #: small enough that a reader without a frame gets one, whatever the workers still keep for a fuller batch
        self._fill_batch = max(1, min(16, RX_FRAMES // (2 * shared.shards)))
        self._writer_is_there = True
        self.frames = self._rx.take
        self.fileno = self._rx.fileno
        self.completion_fd = self._completion.fileno()
        self._waiting = 0  # octets of the backlog that the writer does not know of

    def release(self, descriptors: list[int]) -> None:
        """Give RX frames back to the reader, several with one system call."""
        fill = self._fill
        push = fill.push
        for descriptor in descriptors:
            push(descriptor)
        if fill.unsubmitted >= self._fill_batch:
            fill.submit()

    def transmit(self, at: int, length: int, more: bool = False) -> None:
        """Push one descriptor; without a writer the packet is lost, as on a link."""
        if at < TX_SMALL_BASE:
            self._uses[at // FRAME_SIZE] += 1
        self.octets += length
        self.backlog += length
        if not more:
            self.packets += 1
        descriptor = at | length << LENGTH_SHIFT
        if not self._writer_is_there:
            self._complete([descriptor])
            return
        self._tx.push(descriptor | MORE if more else descriptor)
        self._waiting += length
        if self._waiting >= PROMPT and not more:
            self.flush()

    def flush(self) -> None:
        """Wake the writer, and take completed frames home when few are free."""
        self._waiting = 0
        self._tx.submit()
        if len(self.large.free) < LARGE_LOW_WATER or len(self.small.free) < SMALL_LOW_WATER:
            self._complete(self._completion.take())

    def complete(self) -> None:
        """Take home the frames that the writer is done with."""
        self._complete(self._completion.take())

    def _complete(self, descriptors: list[int]) -> None:
        small = self.small
        uses = self._uses
        for descriptor in descriptors:
            at = descriptor & ADDRESS_MASK
            self.backlog -= descriptor >> LENGTH_SHIFT & LENGTH_MASK
            if at >= TX_SMALL_BASE:
                small.give(at - (at - TX_SMALL_BASE) % SMALL_SIZE)
            else:
                number = at // FRAME_SIZE
                uses[number] = left = uses[number] - 1
                if not left:
                    self.large.give(number * FRAME_SIZE)

    def drop_writer(self) -> None:
        """Take home all frames in flight: the writer that had them is dead. Until add_writer() packets are lost."""
        self._writer_is_there = False
        self.small.reset()
        self.large.free[:] = []
        for number in range(TX_LARGE):
            held = number * FRAME_SIZE in self._held
            self._uses[number] = int(held)
            if not held:
                self.large.give(number * FRAME_SIZE)
        self.backlog = 0
        self._tx.reset()
        self._completion.reset()

    def add_writer(self) -> None:
        """Begin with the empty rings of a new writer."""
        self._writer_is_there = True

    def drop_reader(self) -> None:
        """Forget the rings of a dead reader; no RX frame is held between two breaths."""
        self._rx.reset()
        self._fill.reset()
