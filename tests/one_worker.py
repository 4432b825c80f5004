"""One worker without processes: the real Worker on a port that records, real sockets on loopback, time that can jump.

    RawClient ── frames ─► OneWorker(Worker) ◄── loopback sockets ──► proxy or target of the test
              ◄─ sent ───

A RawClient is a client's TCP by hand: it sends the segments that a test says, and reads the answers field by field.
"""

import contextlib
import select
import socket
import struct
import time
from mmap import mmap

from ipc.channel import Channel
from ipc.layout import FRAME_SIZE, LENGTH_SHIFT, SMALL_SIZE, TX_LARGE, TX_SMALL, TX_SMALL_BASE
from tests.segment_script import options_bytes
from workers import counts
from workers.port import TxFrames
from workers.settings import Settings
from workers.tcp.segment import ACK, FIN, PSH, RST, SYN, Segment
from workers.wire.checksum import pseudo_sum, verify
from workers.worker import Worker

VNET = 10
TRUSTED = bytes([1]) + bytes(9)  #: a virtio_net_hdr with NEEDS_CSUM: nobody has to verify
MASK = 0xFFFFFFFF
BATCH = 128  #: RX frames


class RecordingPort(TxFrames):
    """RX frames put there by a test; what is transmitted is copied, and its frames stay in flight until complete()."""

    def __init__(self) -> None:
        super().__init__(mmap(-1, TX_SMALL_BASE + TX_SMALL * SMALL_SIZE))
        self.rx = mmap(-1, BATCH * FRAME_SIZE)
        self.rx_view = memoryview(self.rx)
        self.waiting: list[int] = []
        self.sent: list[bytes] = []
        self._wakeup = socket.socketpair()
        self._pieces = b""
        self._in_flight: list[int] = []

    def fileno(self) -> int:
        return self._wakeup[0].fileno()

    def put(self, packet: bytes, vnet: bytes) -> None:
        """Let one packet wait in an RX frame."""
        at = len(self.waiting) * FRAME_SIZE
        self.rx[at : at + VNET + len(packet) + 128] = bytes(VNET + len(packet) + 128)
        self.rx[at : at + VNET + len(packet)] = vnet + packet
        self.waiting.append(at | (VNET + len(packet)) << LENGTH_SHIFT)

    def frames(self) -> list[int]:
        waiting, self.waiting = self.waiting, []
        return waiting

    def release(self, descriptors: list[int]) -> None:
        """Spoil what was there: nobody may look at it any more."""
        for descriptor in descriptors:
            at = descriptor & MASK
            self.rx[at : at + 2048] = b"\xee" * 2048

    def transmit(self, at: int, length: int, more: bool = False) -> None:
        self._pieces += self.tx[at : at + length]
        if at < TX_SMALL_BASE:
            self._uses[at // FRAME_SIZE] += 1
        else:
            assert self.small.frame_of(at) not in self.small.free
        self.octets += length
        self._in_flight.append(at)
        if not more:
            self.sent.append(self._pieces)
            self._pieces = b""
            self.packets += 1

    def flush(self) -> None:
        assert not self._pieces, "a packet has no last piece"

    def complete(self) -> None:
        """Give all frames in flight back, as the writer does when it is done."""
        in_flight, self._in_flight = self._in_flight, []
        for at in in_flight:
            if at >= TX_SMALL_BASE:
                self.small.give(self.small.frame_of(at))
            else:
                number = at // FRAME_SIZE
                self._uses[number] -= 1
                if not self._uses[number]:
                    self.large.give(number * FRAME_SIZE)

    def close(self) -> None:
        for end in self._wakeup:
            end.close()


class OneWorker:
    """A worker that breathes when it is told to; `skip` makes its clock jump."""

    def __init__(self, **settings) -> None:
        defaults = {
            "scheme": "direct",
            "own_address4": socket.inet_aton("198.18.0.2"),
            "own_address6": socket.inet_pton(socket.AF_INET6, "fd72:6e67:7761:7900::2"),
            "connect_timeout": 5.0,
        }
        self.port = RecordingPort()
        self.count = memoryview(bytearray(8 * len(counts.NAMES))).cast("Q")
        self._channel, self._supervisor = Channel.pair()
        self.worker = Worker(self.port, Settings(**{**defaults, **settings}), self.count, self._channel)
        self._skipped = 0.0
        self._stopped_at = 0.0  # where the clock stands, 0 = it runs

    @property
    def now(self) -> float:
        return (self._stopped_at or time.monotonic()) + self._skipped

    @contextlib.contextmanager
    def standstill(self):
        """Let no time pass meanwhile: nothing is due because the machine is slow."""
        self._stopped_at = time.monotonic()
        try:
            yield
        finally:
            self._stopped_at = 0.0

    @property
    def table(self):
        return self.worker.tcp.table

    def counted(self, index: int) -> int:
        return self.count[index]

    def skip(self, seconds: float) -> None:
        """Let time pass: timers that are due run, in small steps as in life."""
        end = self._skipped + seconds
        while self._skipped < end:
            next_at = min(self.worker.timers.next_at, self.worker.tcp.next_at) - time.monotonic()
            self._skipped = min(max(next_at + 0.0001, self._skipped + 0.001), end)
            self.breathe()

    def breathe(self, timeout: float = 0.0) -> bool:
        """One breath of Worker.run; True: something was ready."""
        worker = self.worker
        events = worker._epoll.poll(timeout)
        now = self.now
        if self.port.waiting:
            events.append((self.port.fileno(), select.EPOLLIN))
        worker.breathe(events, now)
        worker.publish()
        self.port.complete()
        assert self.counted(counts.INTERNAL_ERRORS) == 0
        return bool(events)

    def run_until(self, condition, timeout: float = 5.0):
        """Breathe until condition() is true, and return what it returned; fail after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            result = condition()
            if result:
                return result
            assert time.monotonic() < deadline, "nothing more happens"
            self.breathe(0.005)

    def settle(self) -> None:
        """Breathe until nothing is ready any more."""
        while self.breathe(0.005) or self.worker.tcp.ready:
            pass

    def receive(self, *packets: bytes, vnet: bytes = TRUSTED) -> None:
        """Let one batch arrive, and breathe once."""
        for packet in packets:
            self.port.put(packet, vnet)
        self.breathe()

    def take_sent(self) -> list[bytes]:
        """Return what was transmitted since the last call."""
        sent = list(self.port.sent)
        self.port.sent.clear()  # the port's own list: connections may hold a reference to its append
        return sent

    def close(self) -> None:
        """End everything, and demand that no frame, flow or descriptor is left."""
        self.worker.tcp.stop(self.now)
        self.worker.udp.stop(self.now)
        self.breathe()
        assert not self.table
        assert sorted(self.worker.handlers) == sorted((self.port.fileno(), self._channel.fileno()))
        assert len(self.port.large.free) == len(set(self.port.large.free)) == TX_LARGE
        assert len(self.port.small.free) == len(set(self.port.small.free)) == TX_SMALL
        assert not self.port._held
        self.worker._epoll.close()
        self._channel.close()
        self._supervisor.close()
        self.port.close()


class Answer:
    """One TCP packet that came out of the worker, its checksums verified as a device would complete them."""

    def __init__(self, frame: bytes) -> None:
        flags, self.gso_type, _, self.gso_size, csum_start, csum_offset = struct.unpack("<BBHHHH", frame[:VNET])
        packet = frame[VNET:]
        if packet[0] >> 4 == 4:
            assert verify(packet[:20])
            assert int.from_bytes(packet[2:4]) == len(packet)
            header, self.protocol = 20, packet[9]
            self.source, self.destination = packet[12:16], packet[16:20]
        else:
            assert int.from_bytes(packet[4:6]) == len(packet) - 40
            header, self.protocol = 40, packet[6]
            self.source, self.destination = packet[8:24], packet[24:40]
        self.packet = packet
        if self.protocol != socket.IPPROTO_TCP:
            return
        tcp = packet[header:]
        assert (flags, csum_start, csum_offset) == (1, header, 16)
        assert int.from_bytes(tcp[16:18]) % 65535 == pseudo_sum(self.source, self.destination, 6, len(tcp))
        self.source_port, self.destination_port, self.seq, self.ack, bits, self.wnd = struct.unpack(">HHIIHH", tcp[:16])
        self.flags = bits & 0x3F
        offset = (bits >> 12) * 4
        self.options = Segment()
        self.options.parse_options(tcp[20:offset])
        self.text = tcp[offset:]


class RawClient:
    """A client's end of one flow: numbers by hand, text of our own, answers as they come."""

    def __init__(self, one: OneWorker, target: tuple[str, int], port: int = 40000, irs: int = MASK - 1000) -> None:
        self.one = one
        self.version = 6 if ":" in target[0] else 4
        family = socket.AF_INET6 if self.version == 6 else socket.AF_INET
        self.address = socket.inet_pton(family, "fd72:6e67:7761:7900::1" if self.version == 6 else "198.18.0.1")
        self.target = socket.inet_pton(family, target[0])
        self.ports = struct.pack(">HH", port, target[1])
        self.iss = irs
        self.nxt = irs  #: SND.NXT
        self.rcv_nxt = 0
        self.wnd = 65535
        self.scale = 0  #: of our window
        self.timestamps = False
        self.ts_recent = 0
        self.acked = 0  #: the last RCV.NXT that we sent
        self.received = b""
        self.answers: list[Answer] = []  #: that the test has not looked at

    def packet(
        self, flags: int, text: bytes = b"", seq: int | None = None, ack: int | None = None, options=""
    ) -> bytes:
        """Make an IP packet; numbers that are not given are those that come next."""
        if self.timestamps and not options:
            options = f"nop,nop,TS val {int(self.one.now * 1000) & MASK} ecr {self.ts_recent}"
        packed = options_bytes(options)
        seq = self.nxt if seq is None else seq
        ack = (self.rcv_nxt if ack is None else ack) if flags & ACK else 0
        tcp = self.ports + struct.pack(
            ">IIHHHH", seq & MASK, ack & MASK, (5 + len(packed) // 4) << 12 | flags, self.wnd, 0, 0
        )
        tcp += packed + text
        if self.version == 4:
            header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0x4000, 64, 6, 0)
            return header + self.address + self.target + tcp
        return struct.pack(">IHBB", 6 << 28, len(tcp), 6, 64) + self.address + self.target + tcp

    def send(self, flags: int, text: bytes = b"", **fields) -> None:
        """Send one segment and advance SND.NXT."""
        packet = self.packet(flags, text, **fields)
        if "seq" not in fields:
            self.nxt = (self.nxt + len(text) + bool(flags & SYN) + bool(flags & FIN)) & MASK
        if flags & ACK and "ack" not in fields:
            self.acked = self.rcv_nxt
        self.one.receive(packet)
        self._take()

    def unread(self) -> list[Answer]:
        """Return the answers that the test has not looked at."""
        self._take()
        unread, self.answers = self.answers, []
        return unread

    def _take(self) -> None:
        """Take the text of what came."""
        for answer in map(Answer, self.one.take_sent()):
            self.answers.append(answer)
            if answer.protocol != socket.IPPROTO_TCP:
                continue
            assert (answer.source, answer.destination) == (self.target, self.address)
            if answer.flags & SYN:
                self.rcv_nxt = (answer.seq + 1) & MASK
            elif not answer.flags & RST and (answer.text or answer.flags & FIN):
                skip = (self.rcv_nxt - answer.seq) & MASK
                if skip <= len(answer.text):
                    fresh = answer.text[skip:]
                    self.received += fresh
                    self.rcv_nxt = (self.rcv_nxt + len(fresh) + bool(answer.flags & FIN)) & MASK
            if answer.options.ts_present:
                self.ts_recent = answer.options.ts_val

    def answer(self, condition=lambda answer: True) -> Answer:
        """Return the next answer that meets the condition (and drop those before it), waiting for it."""

        def find() -> Answer | None:
            self._take()
            while self.answers:
                answer = self.answers.pop(0)
                if condition(answer):
                    return answer
            return None

        return self.one.run_until(find)

    def syn(self, options: str = "mss 1460") -> None:
        """Send the SYN."""
        self.send(SYN, options=options)

    def open(self, options: str = "mss 1460") -> None:
        """Go through the handshake."""
        self.syn(options)
        answer = self.answer()
        assert answer.flags == SYN | ACK
        assert answer.ack == self.nxt
        self.timestamps = "TS" in options
        self.send(ACK)

    def acknowledge(self) -> None:
        """Send a pure ACK of all that came."""
        self._take()
        self.send(ACK)

    def read(self, octets: int) -> bytes:
        """Acknowledge text until so many octets came, and return all that came."""

        def enough() -> bool:
            self._take()
            while self.acked != self.rcv_nxt:
                self.acknowledge()
            return len(self.received) >= octets

        self.one.run_until(enough)
        return self.received

    def push(self, text: bytes) -> None:
        """Send text."""
        self.send(ACK | PSH, text)

    def fin(self) -> None:
        """Send FIN."""
        self.send(FIN | ACK)
