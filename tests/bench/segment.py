"""What one segment costs in Python alone: `python -m tests.bench.segment [--rounds N]`.

The real `Connection`, and the real `Worker.run` on a real `RingPort`, with everything that would be a system call
replaced: epoll is a script, eventfds are numbers, the proxy's sockets swallow and answer at once. What is printed is
the least of many rounds, so that what else the machine does is left out; compare it with the same on the commit before.
"""

import argparse
import errno
import operator
import os
import struct
import time
from collections.abc import Iterator
from select import EPOLLIN, EPOLLOUT, EPOLLRDHUP
from unittest.mock import patch

from ipc import ring
from ipc.channel import Channel
from ipc.layout import FRAME_SIZE, LENGTH_MASK, LENGTH_SHIFT
from ipc.memory import SharedMemory
from workers import counts
from workers.port import RingPort
from workers.settings import Settings
from workers.tcp import arrival
from workers.tcp.connection import Connection
from workers.tcp.segment import ACK, FIN, PSH, SYN, Segment
from workers.worker import Worker

MASK = 0xFFFFFFFF
VNET = 10
TRUSTED = bytes([1]) + bytes(9)  #: a virtio_net_hdr with NEEDS_CSUM
CLIENT, TARGET = bytes((198, 18, 0, 1)), bytes((203, 0, 113, 10))
REQUEST, ANSWER = 100, 1000  #: octets
METHOD, REPLY = b"\x05\x00", b"\x05\x00\x00\x01" + bytes(6)
BATCHES = (1, 20)
SEGMENTS = 20  #: of one round of the bare connection


# ── the bare connection ─────────────────────────────────────────────────────────────────────────────────────────────


def established() -> Connection:
    """Return a connection with timestamps and window scaling whose windows are open."""
    syn = Segment()
    syn.seq, syn.flags, syn.wnd, syn.mss, syn.window_scale = 5000, SYN, 65535, 1460, 7
    syn.ts_present, syn.ts_val = True, 1
    conn = Connection(syn, 1000, 1460)
    conn.segment_to_send(Segment(), 1.0)
    conn.segment_arrives(arriving(conn, 0, conn.snd.nxt), b"", 1.0)
    conn.take_events()
    return conn


def arriving(conn: Connection, length: int, ack: int, ahead: int = 0) -> Segment:
    """Return the next segment of the peer, `ahead` octets further on."""
    seg = Segment()
    seg.seq, seg.ack, seg.flags, seg.len, seg.wnd = (conn.rcv.nxt + ahead) & MASK, ack, ACK, length, 60_000
    seg.ts_present, seg.ts_val, seg.ts_ecr = True, 2, 0
    return seg


def text(arrives, rounds: int) -> float:
    """Return µs for each segment of text in order, one ACK for all of a round (not timed)."""
    best, out = 1 << 60, Segment()
    conn = established()
    for _ in range(rounds):
        segments = [arriving(conn, 1000, conn.snd.una, 1000 * i) for i in range(SEGMENTS)]
        began = time.perf_counter_ns()
        for seg in segments:
            arrives(conn, seg, b"", 1.0)
        best = min(best, time.perf_counter_ns() - began)
        assert segments[-1].len == 1000, "text was not taken"
        conn.take_events()
        assert conn.ack_to_send(out, 1.0), "no ACK is due"
    return best / 1000 / SEGMENTS


def acknowledgements(arrives, rounds: int) -> float:
    """Return µs for each ACK of text of ours."""
    best, out = 1 << 60, Segment()
    conn = established()
    for _ in range(rounds):
        segments = []
        for _ in range(SEGMENTS):
            assert conn.text_at_once(out, 100, 1.0), "text does not go at once"
            segments.append(arriving(conn, 0, conn.snd.nxt))
        began = time.perf_counter_ns()
        for seg in segments:
            arrives(conn, seg, b"", 1.0)
        best = min(best, time.perf_counter_ns() - began)
        assert conn.snd.una == conn.snd.nxt, "an ACK was not taken"
        conn.take_events()
    return best / 1000 / SEGMENTS


# ── a worker ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Upstream:
    """A socket that connects, takes everything, and answers as often as it is told that it is readable."""

    send = staticmethod(len)

    def __init__(self, number: int) -> None:
        self.number = number
        self.at_end = False
        self.handshake = [REPLY, METHOD]

    def fileno(self) -> int:
        return self.number

    def connect_ex(self, address) -> int:
        return errno.EINPROGRESS

    def recv_into(self, view) -> int:
        return 0 if self.at_end else ANSWER

    def recv(self, octets, flags=0) -> bytes:
        return self.handshake.pop()

    def setsockopt(self, *option) -> None:
        pass

    def shutdown(self, how) -> None:
        pass

    def close(self) -> None:
        pass


class Client:
    """The numbers of one client, and its packet, written again and again."""

    def __init__(self, port: int) -> None:
        self.ports = struct.pack(">HH", port, 80)
        self.seq = port * 7919
        self.ack = 0

    def packet(self, flags: int, length: int = 0) -> bytes:
        """Return the next packet, and advance over it."""
        clock = int(time.monotonic() * 1000) & MASK
        options = struct.pack(">HHII", 0x0101, 0x080A, clock, clock if self.ack else 0)
        if flags & SYN:
            options = b"\x02\x04\x05\xb4" + options + b"\x01\x03\x03\x07"
        tcp = self.ports + struct.pack(
            ">IIHHHH", self.seq, self.ack, (20 + len(options)) // 4 << 12 | flags, 60_000, 0, 0
        )
        total = 20 + len(tcp) + len(options) + length
        self.seq = (self.seq + length + bool(flags & SYN)) & MASK
        header = struct.pack(">BBHHHBBH", 0x45, 0, total, 0, 0x4000, 64, 6, 0)
        return TRUSTED + header + CLIENT + TARGET + tcp + options + b"q" * length


class Bench:
    """A worker and its neighbours: reader, writer, epoll and the proxy, all played by us between two breaths."""

    def __init__(self, scheme: str = "direct") -> None:
        self.memory = SharedMemory(1, {})
        self.waiting: dict[int, int] = {}  # eventfd → what a read of it returns
        self.eventfds = patch.multiple("os", eventfd_write=operator.add, eventfd_read=self.eventfd_read)
        self.eventfds.start()
        self.port = RingPort(self.memory, 0)
        rings = self.memory.rings[0]
        self.rx = ring.Producer(rings["rx"])
        self.completion = ring.Producer(rings["completion"])
        self.tx_slots, self.tx_mask, self.written = rings["tx"].slots, rings["tx"].mask, 0
        self.count = memoryview(bytearray(8 * len(counts.NAMES))).cast("Q")
        self.channels = Channel.pair()
        self.worker = Worker(
            self.port, Settings(scheme, "", [("127.0.0.1", 1)], max_pending=1000), self.count, self.channels[0]
        )
        self.worker._epoll.close()
        self.worker._epoll = self  # type: ignore[assignment]
        self.worker.upstream.open = self.open  # type: ignore[assignment,method-assign]
        self.sockets: list[Upstream] = []
        self.spent = self.began = 0
        self.script: Iterator[list[tuple[int, int]]] = iter(())

    # What the worker calls in the place of eventfds, epoll and sockets.

    def eventfd_read(self, fd: int) -> int:
        return self.waiting.pop(fd, 0)

    def register(self, fd: int, mask: int) -> None:
        pass

    unregister = register

    def poll(self, timeout=None, max_events=-1) -> list[tuple[int, int]]:
        """End the time of one breath, and begin that of the next."""
        self.spent = time.perf_counter_ns() - self.began
        events = next(self.script, [])
        self.began = time.perf_counter_ns()
        return events

    def open(self, family, kind) -> Upstream:
        self.sockets.append(Upstream(10_000 + len(self.sockets)))
        return self.sockets[-1]

    # The neighbours.

    def frames(self, packets: list[bytes]) -> list[tuple[int, int]]:
        """Let frames wait, and return the event that says so."""
        rx = self.memory.rx_frames
        for number, packet in enumerate(packets):
            at = number * FRAME_SIZE
            rx[at : at + len(packet)] = packet
            self.rx.push(at | len(packet) << LENGTH_SHIFT)
        self.waiting[self.port.fileno()] = len(packets)
        return [(self.port.fileno(), EPOLLIN)]

    def write(self) -> list[bytes]:
        """Return what was transmitted, and its frames to the worker."""
        written = []
        while self.written < self.port._tx.head:
            descriptor = self.tx_slots[self.written & self.tx_mask]
            self.written += 1
            at = descriptor & MASK
            written.append(self.port.tx[at : at + (descriptor >> LENGTH_SHIFT & LENGTH_MASK)])
            self.completion.push(descriptor)
        self.waiting[self.port.completion_fd] = len(written)
        self.port.complete()
        return written

    # The measurement.

    def request_and_answer(self, batch: int, rounds: int) -> float:
        """Return µs for each request and its answer; every breath of Worker.run is timed whole."""
        self.best = 1 << 60
        self.script = self._breaths([Client(20000 + number) for number in range(batch)], rounds)
        self.worker.run()
        assert not self.count[counts.INTERNAL_ERRORS], "the worker is broken"
        return self.best / 1000 / batch

    def _breaths(self, clients: list[Client], rounds: int) -> Iterator[list[tuple[int, int]]]:
        self.sockets.clear()
        yield self.frames([client.packet(SYN) for client in clients])
        yield [(upstream.number, EPOLLOUT) for upstream in self.sockets]
        for client, frame in zip(clients, self.write(), strict=True):
            client.ack = int.from_bytes(frame[VNET + 24 : VNET + 28]) + 1
        yield self.frames([client.packet(ACK) for client in clients])
        readable = [(upstream.number, EPOLLIN) for upstream in self.sockets]
        for _ in range(rounds):
            yield self.frames([client.packet(ACK | PSH, REQUEST) for client in clients])
            spent = self.spent
            self.write()  # at first there are ACKs
            yield readable
            spent += self.spent
            answers = self.write()
            assert [len(answer) for answer in answers] == [VNET + 52 + ANSWER] * len(clients), "no answer"
            for client in clients:
                client.ack = (client.ack + ANSWER) & MASK
            self.best = min(self.best, spent)
        self.worker._stopping = True
        while True:
            yield []

    def connection(self, batch: int, rounds: int) -> float:
        """Return µs for each connection through SOCKS5, from its SYN over one request to the last ACK of both FINs."""
        self.best = 1 << 60
        self.script = self._connections(batch, rounds)
        self.worker.run()
        assert not self.count[counts.INTERNAL_ERRORS], "the worker is broken"
        return self.best / 1000 / batch

    def _connections(self, batch: int, rounds: int) -> Iterator[list[tuple[int, int]]]:
        for turn in range(rounds):
            self.sockets.clear()
            clients = [Client(1024 + (turn * batch + number) % 60_000) for number in range(batch)]
            yield self.frames([client.packet(SYN) for client in clients])
            spent = self.spent
            for mask in (EPOLLOUT, EPOLLIN, EPOLLIN):
                yield [(upstream.number, mask) for upstream in self.sockets]
                spent += self.spent
            for client, frame in zip(clients, self.write(), strict=True):
                client.ack = int.from_bytes(frame[VNET + 24 : VNET + 28]) + 1
            yield self.frames([client.packet(ACK | PSH, REQUEST) for client in clients])
            spent += self.spent
            yield [(upstream.number, EPOLLIN) for upstream in self.sockets]
            spent += self.spent
            self.write()
            for client, upstream in zip(clients, self.sockets, strict=True):
                client.ack = (client.ack + ANSWER) & MASK
                upstream.at_end = True
            yield self.frames([client.packet(ACK | FIN) for client in clients])
            spent += self.spent
            yield [(upstream.number, EPOLLIN | EPOLLRDHUP) for upstream in self.sockets]
            spent += self.spent
            for client in clients:
                client.seq = (client.seq + 1) & MASK
                client.ack = (client.ack + 1) & MASK
            yield self.frames([client.packet(ACK) for client in clients])
            spent += self.spent
            self.write()
            self.best = min(self.best, spent)
            assert not self.worker.tcp.table, "a connection has not ended"
        self.worker._stopping = True
        yield []

    def close(self) -> None:
        """Give everything back."""
        self.eventfds.stop()
        for memory in self.memory.rings[0].values():
            os.close(memory.eventfd)
        for channel in self.channels:
            channel.close()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.segment", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20_000, help="of each measure; the least is printed")
    rounds = parser.parse_args().rounds
    print("µs in Python alone, least of many rounds")
    print(f"  {text(Connection.segment_arrives, rounds):6.2f}  a segment of text in order: Connection.segment_arrives")
    print(f"  {text(arrival.steps, rounds):6.2f}  the same by the steps of RFC 9293: arrival.steps")
    print(f"  {acknowledgements(Connection.segment_arrives, rounds):6.2f}  an ACK of text of ours")
    for batch in BATCHES:
        bench = Bench()
        micros = bench.request_and_answer(batch, max(3, rounds // batch * 4))
        bench.close()
        print(f"  {micros:6.2f}  request up and answer down through Worker.run, {batch} of each in a breath")
        bench = Bench("socks5")
        micros = bench.connection(batch, max(3, rounds // batch))
        bench.close()
        print(f"  {micros:6.2f}  a connection through SOCKS5 with one request, {batch} at a time")


if __name__ == "__main__":
    main()
