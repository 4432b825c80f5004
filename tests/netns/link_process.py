"""The process in the middle of a bad link (tests/netns/link.py starts it, by path; standard library only).

    link_process.py FD_A FD_B SEED A_TO_B B_TO_A      the last two are JSON of what `Direction` takes

Both descriptors are TUN devices with a virtio_net_hdr. A frame may be a super-segment of up to 64 KiB: it is passed on
as one, for the kernel's sake and ours, but loss meets each of its MSS-sized segments on its own, as on a wire: a frame
that loses some is cut at the gaps, and what is left of it goes on in pieces. Everything else that may befall a packet
(delay, doubling, reordering, corruption) befalls whole frames; a link that is to reorder or corrupt is made without
offloads, so that its frames are single packets whose checksums are complete.

At SIGUSR1 it prints what it has counted, as JSON. SIGUSR2 breaks the link, and mends it.
"""

import heapq
import json
import math
import os
import random
import select
import signal
import struct
import sys
import time

VNET = struct.Struct("=BBHHHH")  # struct virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
VNET_SIZE = 10
GSO_TCPV4, GSO_TCPV6, GSO_ECN = 1, 4, 0x80
FIN, PSH, CWR = 0x01, 0x08, 0x80
FRAME = 65536 + VNET_SIZE
BATCH = 64  # frames of one direction between two looks at the other one and the clock
NEVER = 1 << 62


class Direction:
    """One way across: its bad luck, seeded, and what was counted."""

    def __init__(
        self,
        seed: str,
        *,
        loss: float = 0.0,  # share of segments
        delay: float = 0.0,  # seconds
        reorder: float = 0.0,  # share of frames that take `late` seconds more
        late: float = 0.002,
        double: float = 0.0,  # share of frames that come twice
        corrupt: float = 0.0,  # share of frames with one bit turned over
    ) -> None:
        self.delay = delay
        self._loss, self._reorder, self._late, self._double, self._corrupt = loss, reorder, late, double, corrupt
        self._dice = random.Random(seed)
        self._until_loss = self._gap()
        self._kind = bool(reorder or double or corrupt)
        self.frames = self.segments = self.lost = self.reordered = self.doubled = self.corrupted = self.refused = 0

    def _gap(self) -> int:
        """Return how many segments pass before the next one is lost: one draw for each loss, not for each segment."""
        if self._loss <= 0:
            return NEVER
        if self._loss >= 1:
            return 0
        return int(math.log(1 - self._dice.random()) / math.log(1 - self._loss))

    def cross(self, frame: bytes) -> "list[tuple[float, bytes]]":
        """Return what arrives of a frame: (seconds of delay, frame)."""
        self.frames += 1
        segments = segments_of(frame)
        self.segments += segments
        if self._until_loss >= segments:
            self._until_loss -= segments
            pieces = [frame]
        else:
            pieces = self._cut(frame, segments)
        if not self._kind:
            return [(self.delay, piece) for piece in pieces]
        arriving = []
        for piece in pieces:
            delay = self.delay
            if self._dice.random() < self._reorder:
                delay += self._late
                self.reordered += 1
            if self._dice.random() < self._corrupt:
                at = self._dice.randrange(VNET_SIZE, len(piece))
                piece = piece[:at] + bytes((piece[at] ^ 1 << self._dice.randrange(8),)) + piece[at + 1 :]
                self.corrupted += 1
            arriving.append((delay, piece))
            if self._dice.random() < self._double:
                arriving.append((delay, piece))
                self.doubled += 1
        return arriving

    def _cut(self, frame: bytes, segments: int) -> "list[bytes]":
        pieces = []
        begin = 0
        at = self._until_loss
        while at < segments:
            self.lost += 1
            if at > begin:
                pieces.append(piece_of(frame, begin, at, segments))
            begin = at + 1
            at = begin + self._gap()
        if begin < segments:
            pieces.append(piece_of(frame, begin, segments, segments))
        self._until_loss = at - segments
        return pieces

    def report(self) -> "dict[str, int]":
        return {name: value for name, value in vars(self).items() if not name.startswith("_") and name != "delay"}


def layout_of(frame: bytes) -> "tuple[int, int, int]":
    """Return where the TCP header of a super-segment begins, where its text does, and its MSS."""
    _, _, _, mss, _, _ = VNET.unpack_from(frame)
    tcp = VNET_SIZE + (40 if frame[VNET_SIZE] >> 4 == 6 else (frame[VNET_SIZE] & 15) * 4)
    return tcp, tcp + (frame[tcp + 12] >> 4) * 4, mss


def segments_of(frame: bytes) -> int:
    """Return how many segments of MSS size a frame stands for."""
    if frame[1] & ~GSO_ECN not in (GSO_TCPV4, GSO_TCPV6):
        return 1
    _, text, mss = layout_of(frame)
    return max(1, -(-(len(frame) - text) // mss))


def piece_of(frame: bytes, begin: int, end: int, segments: int) -> bytes:
    """Return segments begin to end of a super-segment as a frame of its own, as the sender would have made it."""
    if (begin, end) == (0, segments):
        return frame
    tcp, text, mss = layout_of(frame)
    payload = frame[text + begin * mss : text + end * mss]
    headers = bytearray(frame[:text])
    if len(payload) <= mss:
        VNET.pack_into(headers, 0, headers[0], 0, 0, 0, *VNET.unpack_from(frame)[4:])
    seq = struct.unpack_from(">I", frame, tcp + 4)[0]
    struct.pack_into(">I", headers, tcp + 4, seq + begin * mss & 0xFFFFFFFF)
    if end < segments:
        headers[tcp + 13] &= ~(FIN | PSH)
    if begin:
        headers[tcp + 13] &= ~CWR
    length = text - tcp + len(payload)
    ip = VNET_SIZE
    if headers[ip] >> 4 == 4:
        struct.pack_into(">H", headers, ip + 2, tcp - ip + length)
        identification = struct.unpack_from(">H", frame, ip + 4)[0]
        struct.pack_into(">HH", headers, ip + 4, identification + begin & 0xFFFF, 0x4000)
        headers[ip + 10 : ip + 12] = b"\0\0"
        struct.pack_into(">H", headers, ip + 10, 0xFFFF ^ ones_sum(headers[ip:tcp]))
        addresses = headers[ip + 12 : ip + 20]
    else:
        struct.pack_into(">H", headers, ip + 4, length)
        addresses = headers[ip + 8 : ip + 40]
    # Without its checksum: the field holds the sum of the pseudo-header, for whoever completes it.
    struct.pack_into(">H", headers, tcp + 16, ones_sum(addresses + struct.pack(">HH", 6, length)))
    return bytes(headers) + payload


def ones_sum(data: "bytes | bytearray") -> int:
    total = int.from_bytes(data, "big")
    return total % 0xFFFF or (0xFFFF if total else 0)


def run(ends: "tuple[int, int]", ways: "tuple[Direction, Direction]") -> None:
    """Carry frames until killed."""
    broken = False

    def break_or_mend(*_: object) -> None:
        nonlocal broken
        broken = not broken

    signal.signal(signal.SIGUSR1, lambda *_: print(json.dumps([way.report() for way in ways]), flush=True))
    signal.signal(signal.SIGUSR2, break_or_mend)
    print("ready", flush=True)
    across = {ends[0]: (ends[1], ways[0]), ends[1]: (ends[0], ways[1])}
    buffer = bytearray(FRAME)
    view = memoryview(buffer)
    waiting: list[tuple[float, int, int, bytes, Direction]] = []  # due at, order, to, frame
    order = 0
    clock = time.monotonic
    while True:
        now = clock()
        while waiting and waiting[0][0] <= now:
            _, _, to, frame, way = heapq.heappop(waiting)
            if not broken:
                write(to, frame, way)
        timeout = max(0.0, waiting[0][0] - now) if waiting else 60.0
        # Not epoll, whose timeout is in whole milliseconds.
        for end in select.select(ends, (), (), timeout)[0]:
            to, way = across[end]
            for _ in range(BATCH):
                try:
                    length = os.readv(end, [buffer])
                except BlockingIOError:
                    break
                if broken:
                    continue
                now = clock()
                for delay, frame in way.cross(bytes(view[:length])):
                    if delay:
                        order += 1
                        heapq.heappush(waiting, (now + delay, order, to, frame, way))
                    else:
                        write(to, frame, way)


def write(to: int, frame: bytes, way: Direction) -> None:
    try:
        os.write(to, frame)
    except OSError:  # corrupted into no packet at all, or the device is down
        way.refused += 1


def main(arguments: "list[str]") -> None:
    a, b, seed = (int(argument) for argument in arguments[:3])
    ways = tuple(Direction(f"{seed}{which}", **json.loads(arguments[3 + which])) for which in (0, 1))
    run((a, b), ways)


if __name__ == "__main__":
    main(sys.argv[1:])
