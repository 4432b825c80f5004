"""Unacked: the payload of one flow that the client has not acknowledged, and how it is sent again.

A chunk is what one read of the proxy's socket brought. Its octets stay in the TX frame that they were read into, which
is held, or in a copy: small chunks at once (a copy is cheaper than a held frame), all when frames are few, when the
flow holds its share of them, or when the client has gone silent. Small copies in a row become one chunk.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from typing import Final

from ipc.layout import HEADROOM, SMALL_PAYLOAD, TX_LARGE
from workers.port import Port
from workers.tcp.segment import Segment
from workers.tcp.sequence import HALF, MASK
from workers.wire.tcp import Headers

COPY_LIMIT: Final = 4096  #: octets; so small a payload is copied and its frame goes home
FEW_FRAMES: Final = TX_LARGE // 16  #: with fewer free frames every payload is copied: no flow starves the others
MAX_HELD: Final = TX_LARGE // 2  #: frames that one flow holds; with full ones that is SEND_BUFFER


class Unacked:
    """The chunks of one flow, oldest first, without gaps."""

    __slots__ = ("_chunks", "_held", "_port")

    def __init__(self, port: Port) -> None:
        self._port = port
        self._held = 0  #: frames
        #: (sequence number, octets, held frame or -1, copy if there is no frame)
        self._chunks: deque[tuple[int, int, int, bytes]] = deque()

    def keep(self, seq: int, frame: int, length: int) -> None:
        """Keep the payload of a TX frame about to be transmitted: the frame is held, or copied and left alone."""
        port = self._port
        if length <= COPY_LIMIT or self._held >= MAX_HELD or len(port.large.free) < FEW_FRAMES:
            payload = frame + HEADROOM
            copy = port.tx[payload : payload + length]
            if self._chunks:
                self.keep_copy(seq, copy)
            else:
                self._chunks.append((seq, length, -1, copy))
        else:
            self._chunks.append((seq, length, frame, b""))
            self._held += 1
            port.hold(frame)

    def keep_copy(self, seq: int, data: bytes) -> None:
        """Keep payload that stands in no frame."""
        chunks = self._chunks
        length = len(data)
        if chunks:
            before, octets, frame, copy = chunks[-1]
            if frame < 0 and octets + length <= COPY_LIMIT:
                chunks[-1] = (before, octets + length, -1, copy + data)
                return
        chunks.append((seq, length, -1, data))

    def release(self, una: int) -> None:
        """Let go of what stands before SND.UNA."""
        chunks = self._chunks
        while chunks:
            seq, length, frame, _ = chunks[0]
            if not length <= (una - seq) & MASK < HALF:
                return
            if frame >= 0:
                self._held -= 1
                self._port.unhold(frame)
            chunks.popleft()

    def release_all(self) -> None:
        """Let go of everything: the flow ends."""
        for _, _, frame, _ in self._chunks:
            if frame >= 0:
                self._port.unhold(frame)
        self._held = 0
        self._chunks.clear()

    def copy_held(self) -> None:
        """Copy everything out of its frames: a client that went silent must not keep them."""
        tx = self._port.tx
        for i, (seq, length, frame, _) in enumerate(self._chunks):
            if frame >= 0:
                at = frame + HEADROOM
                self._chunks[i] = (seq, length, -1, tx[at : at + length])
                self._port.unhold(frame)
        self._held = 0

    def transmit(self, headers: Headers, out: Segment) -> bool:
        """Send text of the chunks behind headers in a frame of their own; False: there is no frame for it.

        The headers of the first transmission stand in front of the chunk, and the writer may still read them. One
        slice of a held frame is gathered by the writer; anything else is copied behind the headers.
        """
        port = self._port
        pieces: list[tuple[int, int, bytes]] = []  # (address or -1, octets, copy)
        at, left = out.seq, out.len
        chunks = self._chunks
        first = chunks[0][0]
        i = bisect_right(chunks, (at - first) & MASK, key=lambda chunk: (chunk[0] - first) & MASK) - 1
        while left:
            seq, length, frame, data = chunks[i]
            offset = (at - seq) & MASK
            n = min(length - offset, left)
            pieces.append((frame + HEADROOM + offset if frame >= 0 else -1, n, data[offset : offset + n]))
            at = (at + n) & MASK
            left -= n
            i += 1
        gather = len(pieces) == 1 and pieces[0][0] >= 0 and out.len > SMALL_PAYLOAD
        pool = port.small if gather or out.len <= SMALL_PAYLOAD else port.large
        if not pool.free:
            return False
        end = pool.take() + HEADROOM
        written = headers.write(port.tx_view, end, out)
        if gather:
            port.transmit(end - written, written, more=True)
            port.transmit(pieces[0][0], out.len)
            return True
        payload = end
        for address, n, data in pieces:
            port.tx_view[payload : payload + n] = data if address < 0 else port.tx_view[address : address + n]
            payload += n
        port.transmit(end - written, written + out.len)
        return True
