"""DirectPort: reader, worker and writer in one process, for routers with one or two cores (`placement = "single"`).

The worker is the same code; only its port differs: frames are read from the device when the worker asks for them, and
a packet is written when it is transmitted, so no ring, no eventfd and no other process stands in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gateway.reader import FRAGMENTS
from gateway.writer import BYTES, FRAMES, WRITE_ERRORS
from ipc.layout import ADDRESS_MASK, FRAME_SIZE, LENGTH_SHIFT, RX_FRAMES, SMALL_SIZE, TX_SMALL_BASE
from ipc.memory import SharedMemory
from ipc.pool import FramePool
from workers.port import TxFrames
from workers.wire.fragments import Reassembly

if TYPE_CHECKING:
    from gateway.device import Device

BATCH: Final = 64  #: frames that one breath reads at the most
PROMPT: Final = 256 * 1024  #: octets that one breath reads at the most, about
MIN_LENGTH: Final = 30  #: octets; virtio_net_hdr and an IPv4 header


class DirectPort(TxFrames):
    """The port of a worker that has the device itself."""

    def __init__(self, shared: SharedMemory, device: Device) -> None:
        super().__init__(shared.tx_frames[0])
        self.rx = shared.rx_frames
        self.rx_view = memoryview(self.rx)
        self._pool = FramePool(0, FRAME_SIZE, RX_FRAMES)
        self._buffers = [[self.rx_view[at : at + FRAME_SIZE]] for at in range(0, RX_FRAMES * FRAME_SIZE, FRAME_SIZE)]
        self._device = device
        self._pieces: list[memoryview] = []
        self._gathered: list[int] = []
        self._written = shared.counters.block("writer")
        self._reassembly = Reassembly(shared.counters.block("reader"), FRAGMENTS)
        self.fileno = device.fileno

    def frames(self) -> list[int]:
        """Read frames until there is none, or the breath is full. OSError: the device is gone."""
        readv = self._device.readv
        take = self._pool.take
        descriptors: list[int] = []
        octets = 0
        while len(descriptors) < BATCH and octets < PROMPT:
            at = take()
            try:
                length = readv(self._buffers[at // FRAME_SIZE])
            except BlockingIOError:
                self._pool.give(at)
                break
            if length < MIN_LENGTH:
                self._pool.give(at)
                continue
            octets += length
            descriptors.append(at | length << LENGTH_SHIFT)
        return descriptors

    def reassemble(self, at: int, length: int, now: float) -> int:
        """Put a fragment to those that have come; return the length of the whole packet in its place, or 0."""
        return self._reassembly.take(self.rx, at, length, now)

    def release(self, descriptors: list[int]) -> None:
        """Give the frames back to the pool, the first one last: it is read into next."""
        give = self._pool.give
        for descriptor in reversed(descriptors):
            give(descriptor & ADDRESS_MASK)

    def transmit(self, at: int, length: int, more: bool = False) -> None:
        """Write the packet; a device that does not take it has lost it."""
        written = self._written
        piece = self.tx_view[at : at + length]
        self.octets += length
        if more:
            self._pieces.append(piece)
            self._gathered.append(at)
            return
        self.packets += 1
        try:
            if self._pieces:
                written[BYTES] += self._device.writev([*self._pieces, piece])
            else:
                written[BYTES] += self._device.write(piece)
        except OSError:
            written[WRITE_ERRORS] += 1
        written[FRAMES] += 1
        if self._pieces:
            for gathered in self._gathered:
                self._free(gathered)
            self._pieces.clear()
            self._gathered.clear()
        self._free(at)

    def _free(self, at: int) -> None:
        if at >= TX_SMALL_BASE:
            self.small.give(at - (at - TX_SMALL_BASE) % SMALL_SIZE)
        elif not self._uses[at // FRAME_SIZE]:
            self.large.give(at - at % FRAME_SIZE)

    def flush(self) -> None:
        """Nothing waits here."""

    def complete(self) -> None:
        """Nor here."""
