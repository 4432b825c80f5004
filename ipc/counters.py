"""Counters: u64 words in shared memory, one writer, any reader.

A block belongs to one process of the tree (reader, writer, each worker) and outlives it: a successor counts on where
its predecessor stopped. Words are stored whole, through a memoryview cast to "Q", so that a reader never sees half of
one (`struct.pack_into` clears the octets first).
"""

from mmap import mmap

from ipc.layout import COUNTER_SLOTS


class Counters:
    """All blocks of the process tree, by the name of their owner (`reader`, `writer`, `worker/0` …)."""

    def __init__(self, names: dict[str, tuple[str, ...]]) -> None:
        """Map one block for each owner; `names` gives the names of its words, in order."""
        for owner, words in names.items():
            if len(words) > COUNTER_SLOTS:
                raise ValueError(f"{owner} has {len(words)} counters, a block has {COUNTER_SLOTS}")
        self._names = names
        self._memory = mmap(-1, max(len(names), 1) * COUNTER_SLOTS * 8)
        words_view = memoryview(self._memory).cast("Q")
        self._blocks = {owner: words_view[i * COUNTER_SLOTS : (i + 1) * COUNTER_SLOTS] for i, owner in enumerate(names)}

    def block(self, owner: str) -> memoryview:
        """Return the words of one owner, to count with: `block[DROPPED] += 1`. One process writes, any may read."""
        return self._blocks[owner]

    def snapshot(self) -> dict[str, dict[str, int]]:
        """Return every counter by owner and name; words are read one by one, at nearly one moment."""
        return {
            owner: dict(zip(names, self._blocks[owner].tolist(), strict=False)) for owner, names in self._names.items()
        }
