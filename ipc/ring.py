"""Producer and Consumer: the two ends of a ring of descriptors between two processes.

            producer                    shared                    consumer
    push(d) ─ slots[head & mask] = d ──► slots
    submit() ─ eventfd_write(n) ───────► eventfd ──► peek(): eventfd_read() → n more
                                         index  ◄─── release(): index = tail

The eventfd is the producer's index: the descriptors are stored before `eventfd_write`, and read after `eventfd_read`,
and the pair of system calls orders memory on every architecture. The counter in the kernel cannot lose a wakeup.

| word           | written by   | when                                     |
| -------------- | ------------ | ---------------------------------------- |
| slots          | producer     | push, through a memoryview cast to "Q"   |
| eventfd        | producer     | submit, once a batch                     |
| consumer index | consumer     | release, after it is done with the slots |

Forbidden: `struct.pack_into` on anything of this (it clears the octets first, and the other side reads zeros); a
second producer or consumer; repairing a ring whose end died: the supervisor empties it (`RingMemory.reset`), and both
ends begin anew (`Producer.reset`, `Consumer.reset`).
"""

import os
from contextlib import suppress
from mmap import mmap

from ipc.layout import CACHE_LINE, RING_SLOTS


def drain(eventfd: int) -> None:
    """Set an eventfd back to 0."""
    with suppress(BlockingIOError):
        os.eventfd_read(eventfd)


class RingMemory:
    """The shared part of one ring: its slots, its consumer's index and its eventfd. Made before the fork."""

    __slots__ = ("eventfd", "index", "mask", "name", "slots")

    def __init__(self, name: str, memory: mmap, offset: int) -> None:
        count = RING_SLOTS[name]
        if count & (count - 1):
            raise ValueError(f"a ring of {count} slots is not a power of two")
        words = memoryview(memory).cast("Q")
        first = offset // 8
        self.name = name
        self.mask = count - 1
        self.index = words[first : first + 1]
        self.slots = words[first + CACHE_LINE // 8 : first + CACHE_LINE // 8 + count]
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def reset(self) -> None:
        """Empty the ring; only while neither end runs or both have been told (supervisor only)."""
        drain(self.eventfd)
        self.index[0] = 0


class Producer:
    """The end that stores descriptors. One process, one object."""

    __slots__ = ("_eventfd", "_index", "_mask", "_slots", "_submitted", "head")

    def __init__(self, memory: RingMemory) -> None:
        self._slots = memory.slots
        self._index = memory.index
        self._mask = memory.mask
        self._eventfd = memory.eventfd
        self.head = 0  #: descriptors pushed since the ring was made
        self._submitted = 0

    def push(self, descriptor: int) -> None:
        """Store one descriptor; the consumer sees it after the next submit. Never waits: see `ipc.layout`."""
        self._slots[self.head & self._mask] = descriptor
        self.head += 1

    def submit(self) -> None:
        """Publish what was pushed since the last call, with one system call, or none if there is nothing."""
        n = self.head - self._submitted
        if n:
            os.eventfd_write(self._eventfd, n)
            self._submitted = self.head

    @property
    def unsubmitted(self) -> int:
        """Descriptors that the consumer does not know of yet."""
        return self.head - self._submitted

    @property
    def in_flight(self) -> int:
        """Descriptors that the consumer has not released."""
        return self.head - self._index[0]

    def reset(self) -> None:
        """Begin anew, after the supervisor emptied the ring."""
        self.head = self._submitted = 0


class Consumer:
    """The end that reads descriptors. `fileno` stands in epoll; readable means that something was submitted."""

    __slots__ = ("_eventfd", "_index", "_mask", "_slots", "tail")

    def __init__(self, memory: RingMemory) -> None:
        self._slots = memory.slots
        self._index = memory.index
        self._mask = memory.mask
        self._eventfd = memory.eventfd
        self.tail = 0  #: descriptors read since the ring was made

    def fileno(self) -> int:
        """Return the eventfd."""
        return self._eventfd

    def take(self) -> list[int]:
        """Return all descriptors submitted since the last call, oldest first, and release their slots.

        The descriptors are copied out, so the slots are free at once; the frames that they name are the caller's.
        """
        try:
            n = os.eventfd_read(self._eventfd)
        except BlockingIOError:
            return []
        tail = self.tail
        start = tail & self._mask
        end = start + n
        size = self._mask + 1
        if end <= size:
            taken = self._slots[start:end].tolist()
        else:
            taken = self._slots[start:].tolist() + self._slots[: end - size].tolist()
        self.tail = tail = tail + n
        self._index[0] = tail
        return taken

    def reset(self) -> None:
        """Begin anew; what the other end submitted before it died is not taken any more."""
        drain(self._eventfd)
        self.tail = 0
