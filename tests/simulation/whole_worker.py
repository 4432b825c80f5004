"""A whole Worker in virtual time: frames in and out, and targets that are objects instead of sockets.

    Peer ── Link ── Flow ── frames ──► Worker (TcpFlows, Dial, Relay, Unacked …) ──► Target
             ▲                            │
             └────── cut, as TSO does ◄───┘

Frames are built and read here octet by octet, IPv4 and IPv6, with options and extension headers, offloaded or with
checksums of their own. A transmitted frame stays in flight for a while, and must not change before it is completed.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
from collections.abc import Callable
from math import inf

from ipc.channel import Channel
from ipc.layout import TX_LARGE, TX_SMALL
from tests.one_worker import TRUSTED, Answer, RecordingPort
from tests.simulation.target import Target, TargetTraits
from tests.simulation.world import MASK, STREAM, Link, Packet, World
from workers import counts
from workers.flows import TimeWait
from workers.settings import Settings
from workers.tcp.segment import FIN, SYN
from workers.wire.checksum import checksum, pseudo_sum
from workers.worker import Worker

FIRST_FD = 100_000  #: of targets; no real descriptor is so high
WIRE = bytes(10)  #: a virtio_net_hdr that promises nothing


class SlowPort(RecordingPort):
    """A port whose frames stay in flight until the writer is done with them; they must not change before."""

    def __init__(self) -> None:
        super().__init__()
        self._flying: list[tuple[int, int, bytes]] = []

    def transmit(self, at: int, length: int, more: bool = False) -> None:
        super().transmit(at, length, more)
        self._flying.append((at, length, self.tx[at : at + length]))

    def complete(self) -> None:
        for at, length, octets in self._flying:
            assert self.tx[at : at + length] == octets, "a frame was changed while the writer had it"
        self._flying.clear()
        super().complete()


class VirtualWorker(Worker):
    """A worker whose targets are no descriptors of the kernel."""

    def watch(self, fd: int, mask: int, handler: Callable[[int, float], None]) -> None:
        if fd < FIRST_FD:
            super().watch(fd, mask, handler)
        else:
            self.handlers[fd] = handler


class Flow:
    """One client's way into the worker: packets become frames, frames become packets."""

    def __init__(
        self, shard: WholeWorker, link: Link, version: int, server_port: int, traits: TargetTraits, total: int
    ) -> None:
        self.shard = shard
        self.link = link
        self.version = version
        self.traits = traits
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        self.client = socket.inet_pton(family, "198.18.0.1" if version == 4 else "fd72:6e67:7761:7900::1")
        self.server = socket.inet_pton(family, "192.0.2.7" if version == 4 else "2001:db8::7")
        self.router = socket.inet_pton(family, "198.18.0.9" if version == 4 else "fd72:6e67:7761:7900::9")
        self.server_port = server_port
        self.ports = struct.pack(">HH", 40_000, server_port)
        self.key = self.client + self.server + self.ports
        self.iss = self.next_iss = MASK - shard.world.dice.randrange(3000)
        self.total = total
        self.targets: list[Target] = []
        shard.flows[self.key] = self
        self.first: list[tuple[Packet, bytes]] = []  #: of the client's packets, with their texts
        self.last: tuple[Packet, bytes] | None = None
        self._wire = shard.world.dice.random() < 0.3  #: no offloads: checksums are ours
        self._odd = shard.world.dice.random() < 0.3  #: with options and extension headers

    def arrives(self, packet: Packet) -> None:
        """Let a packet of the client arrive."""
        text = STREAM[packet.start : packet.start + packet.len]
        self.last = packet, text
        if len(self.first) < 20:
            self.first.append(self.last)
        self.shard.receive(*self.frame(packet, text))

    def frame(self, packet: Packet, text: bytes, wire: bool = False, extra: bytes = b"") -> tuple[bytes, bytes]:
        """Return an IP packet and its virtio_net_hdr; `extra` are more TCP options, `wire`: checksums must be right."""
        dice = self.shard.world.dice
        options = tcp_options(packet)
        options += extra[: 40 - len(options)]
        if self._odd and len(options) <= 36:
            options += b"\x01" * 4  # NOPs: the header is not the usual one
        tcp = self.ports + struct.pack(
            ">IIHHHH",
            *(packet.seq, packet.ack, (5 + len(options) // 4) << 12 | packet.flags, packet.wnd, 0, 0),
        )
        tcp += options + text
        wire = wire or (self._wire and len(text) < 9000)
        if wire:
            tcp = tcp[:16] + checksum(tcp, pseudo_sum(self.client, self.server, 6, len(tcp))).to_bytes(2) + tcp[18:]
        if self.version == 4:
            more = dice.choice((b"", b"\x01" * 4, b"\x94\x04\x00\x00")) if self._odd else b""
            header = struct.pack(">BBHHHBBH", 0x45 + len(more) // 4, 0, 20 + len(more) + len(tcp), 0, 0x4000, 64, 6, 0)
            header += self.client + self.server + more
            header = header[:10] + checksum(header).to_bytes(2) + header[12:]
        else:
            more = dice.choice((b"", b"\x06\x00\x01\x04\x00\x00\x00\x00")) if self._odd else b""
            header = struct.pack(">IHBB", 6 << 28, len(more) + len(tcp), 60 if more else 6, 64)
            header += self.client + self.server + more
        frame = header + tcp
        if self._wire and wire and text and dice.random() < 0.02:
            # Spoiled on the wire: its checksum says so, and it is as good as lost.
            at = len(header) + dice.randrange(len(tcp))
            frame = frame[:at] + bytes([frame[at] ^ 1 << dice.randrange(8)]) + frame[at + 1 :]
        return frame, WIRE if wire else TRUSTED

    def too_big(self, packet: Packet, mtu: int) -> None:
        """Let a router tell that it could not forward a packet to this client."""
        self.shard.receive(self.icmp_error(packet.seq, packet.len + 52, mtu), WIRE)

    def icmp_error(self, seq: int, length: int, mtu: int, kind: tuple[int, int] | None = None, quote: int = 8) -> bytes:
        """Return an ICMP error about a packet with this sequence number; without a kind: too big."""
        quoted = (self.ports[2:] + self.ports[:2] + seq.to_bytes(4) + bytes(12))[:quote]
        if self.version == 4:
            quoted = struct.pack(">BBHHHBBH", 0x45, 0, length, 0, 0x4000, 60, 6, 0) + self.server + self.client + quoted
            body = struct.pack(">BBHI", *(kind or (3, 4)), 0, mtu) + quoted
            body = body[:2] + checksum(body).to_bytes(2) + body[4:]
            return self.packet(1, body)
        quoted = struct.pack(">IHBB", 6 << 28, length - 40, 6, 60) + self.server + self.client + quoted
        body = struct.pack(">BBHI", *(kind or (2, 0)), 0, mtu) + quoted
        pseudo = pseudo_sum(self.router, self.server, 58, len(body))
        return self.packet(58, body[:2] + checksum(body, pseudo).to_bytes(2) + body[4:])

    def packet(self, protocol: int, body: bytes) -> bytes:
        """Return an IP packet of any protocol from a router on the client's side to the server."""
        if self.version == 4:
            header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0x4000, 64, protocol, 0)
            header += self.router + self.server
            return header[:10] + checksum(header).to_bytes(2) + header[12:] + body
        return struct.pack(">IHBB", 6 << 28, len(body), protocol, 64) + self.router + self.server + body

    def sent(self, frame: bytes) -> None:
        """Take a frame for this client, and put it on the link, cut."""
        answer = Answer(frame)
        if answer.flags & SYN:
            self.iss = answer.seq
        text = answer.text
        start = (answer.seq - self.iss - 1) & MASK
        assert text == STREAM[start : start + len(text)] or not text, f"wrong octets at {start}"
        size = answer.gso_size if answer.gso_type else len(text)
        options = answer.options
        ts = (options.ts_val, options.ts_ecr) if options.ts_present else None
        flags = answer.flags
        for at in range(0, len(text) or 1, size or 1):
            piece = min(size, len(text) - at)
            last = at + piece == len(text)
            self.link.send(
                Packet(
                    *(flags if last else flags & ~(FIN | 8), (answer.seq + at) & MASK, answer.ack, answer.wnd),
                    *(start + at, piece, ts, options.sack),
                    mss=options.mss,
                    scale=options.window_scale,
                    sack_permitted=options.sack_permitted,
                )
            )

    @property
    def target(self) -> Target | None:
        """The server's end, once there is one."""
        return self.targets[-1] if self.targets else None

    @property
    def ended(self) -> bool:
        """Whether the worker has done with this client, but for TIME-WAIT."""
        flow = self.shard.worker.tcp.table.get(self.key)
        return (flow is None or isinstance(flow, TimeWait)) and all(target.closed for target in self.targets)


def tcp_options(packet: Packet) -> bytes:
    """Return the options of a packet as Linux orders them."""
    options = b""
    if packet.flags & SYN:
        if packet.mss:
            options += struct.pack(">BBH", 2, 4, packet.mss)
        if packet.sack_permitted:
            options += b"\x01\x01\x04\x02"
        if packet.scale >= 0:
            options += struct.pack(">BBBB", 1, 3, 3, packet.scale)
    if packet.ts is not None:
        options += b"\x01\x01\x08\x0a" + struct.pack(">II", *packet.ts)
    if packet.sack:
        options += b"\x01\x01\x05" + bytes([2 + 8 * len(packet.sack)])
        options += b"".join(struct.pack(">II", *block) for block in packet.sack)
    return options


class WholeWorker:
    """One worker for many runs, one after the other: what one leaves behind, the next would find."""

    def __init__(self, **settings: object) -> None:
        self.port = SlowPort()
        self.count = memoryview(bytearray(8 * len(counts.NAMES))).cast("Q")
        self._channels = Channel.pair()
        defaults: dict[str, object] = {
            "scheme": "direct",
            "own_address4": socket.inet_aton("198.18.0.2"),
            "own_address6": socket.inet_pton(socket.AF_INET6, "fd72:6e67:7761:7900::2"),
            "connect_timeout": 5.0,
        }
        self.worker = VirtualWorker(self.port, Settings(**{**defaults, **settings}), self.count, self._channels[0])
        self.worker.upstream.open = self._open  # type: ignore[method-assign,assignment]
        self.worker.tcp.initial_sequence_number = self._initial  # type: ignore[method-assign]
        policy = self.worker.tcp.policy
        self._budgets = policy.growth, policy.flights
        self.world: World
        self.flows: dict[bytes, Flow] = {}
        self.strays: list[bytes] = []  #: frames for nobody
        self.completes = 0.0  #: seconds that the writer has a frame
        self._fd = FIRST_FD
        self._events: dict[int, Target] = {}
        self._breath = False
        self._completing = False
        self._wake_at = inf
        self._kept_back: list[int] = []

    def begin(self, world: World, frames: int = TX_LARGE) -> None:
        """Take another world; only so many large frames are there in it."""
        self.world = world
        self.flows.clear()
        self.strays.clear()
        self.worker.tcp.icmp_errors._known.clear()
        self._wake_at = inf
        self._breath = self._completing = False
        free = self.port.large.free
        assert len(free) == TX_LARGE
        self._kept_back = free[: TX_LARGE - frames]
        free[:] = free[TX_LARGE - frames :]

    def _initial(self, key: bytes, now: float) -> int:
        """Return the ISS of a flow; that of the next connection is behind all that this one sends (RFC 6528)."""
        flow = self.flows[key]
        iss = flow.next_iss
        flow.next_iss = (iss + flow.total + self.world.dice.randrange(1000, 100_000)) & MASK
        return iss

    def _open(self, family: int, kind: int) -> Target:
        if kind == socket.SOCK_DGRAM:
            raise OSError(errno.EMFILE, "no datagrams here")
        self._fd += 1
        return Target(self, self._fd)

    def receive(self, packet: bytes, vnet: bytes) -> None:
        """Put a frame where the worker finds it in its next breath, now."""
        self.port.put(packet, vnet)
        if len(self.port.waiting) == 60:
            self.breathe(None)
        self._soon()

    @property
    def is_busy(self) -> bool:
        """Whether a breath is due."""
        return self._breath

    def event(self, target: Target) -> None:
        """Note an event of a target: an edge; what the worker is told is how it stands in the next breath."""
        self._events[target.fd] = target
        self._soon()

    def _soon(self) -> None:
        if not self._breath:
            self._breath = True
            self.world.at(self.world.now, self.breathe)

    def breathe(self, _: object) -> None:
        """Do what Worker.run does in one breath."""
        worker = self.worker
        port = self.port
        now = self.world.now
        self._breath = False
        events = [(fd, target.mask()) for fd, target in self._events.items() if not target.closed]
        self._events.clear()
        if port.waiting:
            events.append((port.fileno(), select.EPOLLIN))
        worker.breathe(events, now)
        assert not self.count[counts.INTERNAL_ERRORS], "an exception was counted"
        sent = port.sent
        if sent:
            frames = sent[:]
            sent.clear()
            for frame in frames:
                self._sent(frame)
            if not self._completing:
                self._completing = True
                self.world.at(now + self.completes, self._complete)
        next_at = min(worker.timers.next_at, worker.tcp.next_at)
        if next_at < self._wake_at:
            self._wake_at = max(next_at, now)
            self.world.at(self._wake_at, self._wake)

    def _sent(self, frame: bytes) -> None:
        packet = frame[10:]
        if packet[0] >> 4 == 4:
            at, protocol = 20, packet[9]
            key = packet[16:20] + packet[12:16]
        else:
            at, protocol = 40, packet[6]
            key = packet[24:40] + packet[8:24]
        if protocol == 6:
            flow = self.flows.get(key + packet[at + 2 : at + 4] + packet[at : at + 2])
            if flow is not None:
                flow.sent(frame)
                return
        self.strays.append(frame)

    def _complete(self, _: object) -> None:
        self._completing = False
        self.port.complete()
        if self.worker.tcp.starved:
            self._soon()

    def _wake(self, _: object) -> None:
        if self.world.now >= self._wake_at:
            self._wake_at = inf
            self.breathe(None)

    def check_end(self) -> None:
        """Let an hour pass without an event, and demand that no frame, flow, timer or target is left."""
        world = self.world
        self.breathe(None)
        self.port.complete()
        for _ in range(10_000):
            worker = self.worker
            next_at = min(worker.timers.next_at, worker.tcp.next_at)
            if next_at == inf:
                break
            world.now = max(next_at, world.now)
            self.breathe(None)
            self.port.complete()
        else:
            raise AssertionError("the timers never end")
        tcp = self.worker.tcp
        assert not tcp.table and not tcp.pending, "a flow is left"
        assert not self._events
        assert (tcp.policy.growth, tcp.policy.flights) == self._budgets, "a part of a budget was not given back"
        assert not tcp.acks and not tcp.delayed and not tcp.ready and not tcp.starved
        assert all(fd < FIRST_FD for fd in self.worker.handlers), "a descriptor is watched"
        assert all(target.closed for flow in self.flows.values() for target in flow.targets), "a target is left"
        port = self.port
        port.large.free[:0] = self._kept_back
        self._kept_back = []
        assert len(port.large.free) == len(set(port.large.free)) == TX_LARGE, "a large frame is left"
        assert len(port.small.free) == len(set(port.small.free)) == TX_SMALL, "a small frame is left"
        assert not port._held
        assert not any(port._uses)

    def close(self) -> None:
        """End the worker."""
        self.worker._epoll.close()
        for end in self._channels:
            end.close()
        self.port.close()
