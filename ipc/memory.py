"""SharedMemory: everything that the processes share, made once, before the first fork.

The mappings are anonymous and MAP_SHARED: /dev/shm is not needed, and pages that nobody touched cost nothing, so
there is room for `shards` workers from the start.
"""

from mmap import mmap

from ipc.cache import SharedCache
from ipc.counters import Counters
from ipc.layout import (
    FRAME_SIZE,
    RINGS,
    RX_FRAMES,
    SMALL_SIZE,
    TX_LARGE,
    TX_SMALL,
    ring_bytes,
)
from ipc.ring import RingMemory


class SharedMemory:
    """The RX frames; the TX frames and the four rings of each worker; the counters; the cache of names."""

    def __init__(self, shards: int, counter_names: dict[str, tuple[str, ...]], cache_octets: int = 0) -> None:
        """Map the memory and make the eventfds for `shards` workers; 0 octets: they have no cache."""
        self.shards = shards
        self.rx_frames = mmap(-1, RX_FRAMES * FRAME_SIZE)
        self.tx_frames = [mmap(-1, TX_LARGE * FRAME_SIZE + TX_SMALL * SMALL_SIZE) for _ in range(shards)]
        ring_memory = mmap(-1, shards * sum(ring_bytes(name) for name in RINGS))
        offset = 0
        #: rings[shard][name], with the names as the worker sees them: rx, fill, tx, completion
        self.rings: list[dict[str, RingMemory]] = []
        for _ in range(shards):
            rings = {}
            for name in RINGS:
                rings[name] = RingMemory(name, ring_memory, offset)
                offset += ring_bytes(name)
            self.rings.append(rings)
        self.counters = Counters(counter_names)
        self.dns_cache = SharedCache(cache_octets) if cache_octets else None

    def reset(self, shard: int, *names: str) -> None:
        """Empty the named rings of a worker; only after both ends have been told to let go."""
        for name in names:
            self.rings[shard][name].reset()
