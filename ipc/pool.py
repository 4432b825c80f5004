"""FramePool: which frames of a mapping are free.

The free list is last in, first out: a frame used a moment ago is still in the cache (first touch of a 64 KiB frame:
68 µs; reuse: 3.3 µs). A pool belongs to one process; other processes only see addresses, in descriptors.
"""

from collections.abc import Callable


class FramePool:
    """The free frames of one size class, `count` of them from address `base` on, `size` octets apart."""

    __slots__ = ("base", "count", "free", "give", "size", "take")

    def __init__(self, base: int, size: int, count: int) -> None:
        self.base = base
        self.size = size
        self.count = count
        #: addresses of the free frames; the last is taken next
        self.free: list[int] = []
        #: take() → address of a frame that the caller now owns; IndexError when none is free
        self.take: Callable[[], int] = self.free.pop
        #: give(address): the frame is free again; the address must be the one that take() returned
        self.give: Callable[[int], None] = self.free.append
        self.reset()

    def reset(self) -> None:
        """Make every frame free; the lowest address is taken first."""
        self.free[:] = range(self.base + (self.count - 1) * self.size, self.base - 1, -self.size)

    def frame_of(self, address: int) -> int:
        """Return where the frame begins that holds this address."""
        return address - (address - self.base) % self.size

    def index_of(self, address: int) -> int:
        """Return the number (0 … count - 1) of the frame that holds this address."""
        return (address - self.base) // self.size

    @property
    def taken(self) -> int:
        """How many frames are in use."""
        return self.count - len(self.free)
