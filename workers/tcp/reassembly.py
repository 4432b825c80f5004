"""Reassembly: text of one connection that came out of order, and what a SACK option says of it (RFC 2018).

    taken            run              run
 ─────┴ ─ ─ ─ ─ ─ ┼───────┼ ─ ─ ─ ─ ┼──────┼ ─ ─ ─►  positions

A run is text without a gap; runs neither touch nor overlap. Positions count octets of the stream from its beginning,
so they never wrap. What is kept is bounded in octets by the receive window, and in chunks here: a run grows by filling
its last chunk, so that small segments behind one gap do not use them up.
"""

from bisect import bisect_right
from typing import Final

MAX_CHUNKS: Final = 1024  #: buffers kept for one connection; text beyond is dropped and comes again
CHUNK: Final = 65536  #: octets; a chunk is not grown beyond

Range = tuple[int, int]  #: where it begins, where it ends


class Run:
    """Text from `start` to `end` without a gap."""

    __slots__ = ("chunks", "end", "start")

    def __init__(self, start: int, end: int, chunks: list[bytearray]) -> None:
        self.start = start
        self.end = end
        self.chunks = chunks


class Reassembly:
    """The runs of one connection; made when the first text is out of order, gone when there is none left."""

    __slots__ = ("_chunks", "_runs", "_starts", "dropped")

    def __init__(self) -> None:
        self._starts: list[int] = []  #: where the runs begin, sorted
        self._runs: dict[int, Run] = {}  #: by start; the one that was touched last stands last
        self._chunks = 0  #: chunks of all runs
        self.dropped = 0  #: insertions that were dropped, wholly or in part

    def __len__(self) -> int:
        return len(self._starts)

    def insert(self, start: int, text: bytes) -> Range | None:
        """Keep text; octets already kept win. Return the first part of it that was there already, None: no octet was.

        Once there are MAX_CHUNKS chunks the rest of the text is dropped.
        """
        starts, runs = self._starts, self._runs
        end = start + len(text)
        again: Range | None = None
        i = bisect_right(starts, start)
        run: Run | None = None
        if i:
            before = runs[starts[i - 1]]
            if before.end >= start:
                run = before
                self._touch(run)
                if run.end > start:
                    again = start, min(end, run.end)
        at = run.end if run is not None else start
        while at < end:
            following = runs[starts[i]] if i < len(starts) and starts[i] <= end else None
            part = text[at - start : following.start - start if following is not None else end - start]
            if run is None:
                run = self._begin(i, at, part)
                if run is None:
                    self.dropped += 1
                    break
                i += 1
            elif not self._grow(run, part):
                self.dropped += 1
                break
            if following is None:
                break
            if again is None and following.start < end:
                again = following.start, min(end, following.end)
            run.end = at = following.end
            run.chunks += following.chunks
            del runs[following.start]
            del starts[i]
        return again

    def _touch(self, run: Run) -> None:
        """Make it the newest."""
        del self._runs[run.start]
        self._runs[run.start] = run

    def _begin(self, i: int, start: int, text: bytes) -> Run | None:
        if self._chunks >= MAX_CHUNKS:
            return None
        self._chunks += 1
        run = Run(start, start + len(text), [bytearray(text)])
        self._starts.insert(i, start)
        self._runs[start] = run
        return run

    def _grow(self, run: Run, text: bytes) -> bool:
        last = run.chunks[-1]
        if len(last) + len(text) <= CHUNK:
            last += text
        elif self._chunks < MAX_CHUNKS:
            self._chunks += 1
            run.chunks.append(bytearray(text))
        else:
            return False
        run.end += len(text)
        return True

    def first_kept(self, end: int) -> Range | None:
        """Return the first range before a position that is kept, None: there is none."""
        if not self._starts or self._starts[0] >= end:
            return None
        run = self._runs[self._starts[0]]
        return run.start, min(run.end, end)

    def take(self, taken: int) -> bytes:
        """Remove and return the text from a position on that has become in order, and forget what stands before it."""
        ready: list[bytearray | memoryview] = []
        starts = self._starts
        while starts and starts[0] <= taken:
            run = self._runs.pop(starts.pop(0))
            self._chunks -= len(run.chunks)
            skip = taken - run.start
            for chunk in run.chunks:
                if skip < len(chunk):
                    ready.append(memoryview(chunk)[skip:] if skip else chunk)
                    skip = 0
                else:
                    skip -= len(chunk)
            taken = max(taken, run.end)
        return b"".join(ready)

    def newest(self, limit: int) -> list[Range]:
        """Return the runs that were touched last, newest first, at most `limit` of them: RFC 2018, section 4."""
        return [(run.start, run.end) for run, _ in zip(reversed(self._runs.values()), range(limit), strict=False)]
