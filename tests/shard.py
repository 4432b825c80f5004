"""One shard without processes: a stand-in for the worker, its port and its loop, for tests of what it calls.

Frames are put into RX memory with `receive`, what is transmitted is collected in `sent`; sockets are real, on loopback.
"""

import select
import socket
import struct
from mmap import mmap
from time import monotonic

import dpkt

from ipc.layout import FRAME_SIZE, TX_LARGE, TX_SMALL, TX_SMALL_BASE
from ipc.pool import FramePool
from workers import counts
from workers.icmp import Icmp
from workers.settings import Settings
from workers.timers import Timers
from workers.upstream import Upstream
from workers.wire.checksum import checksum, pseudo_sum, verify
from workers.wire.vnet import GSO_NONE, GSO_UDP_L4, HEADER, NEEDS_CSUM

OWN4 = socket.inet_pton(socket.AF_INET, "198.18.0.2")
OWN6 = socket.inet_pton(socket.AF_INET6, "fd72:6e67:7761:7900::2")
VNET = 10
BATCH = 64  #: frames of one batch


class FakePort:
    """Frames in memory; what is transmitted is copied, and the frame is free at once."""

    def __init__(self):
        self.rx = mmap(-1, BATCH * FRAME_SIZE)
        self.rx_view = memoryview(self.rx)
        self.tx = mmap(-1, TX_SMALL_BASE + TX_SMALL * 2048)
        self.tx_view = memoryview(self.tx)
        self.large = FramePool(0, FRAME_SIZE, TX_LARGE)
        self.small = FramePool(TX_SMALL_BASE, 2048, TX_SMALL)
        self.sent: list[bytes] = []

        self._pieces = b""
        self._gathered: list[int] = []
        self._held: set[int] = set()

    def transmit(self, at, length, more=False):
        pool = self.small if at >= TX_SMALL_BASE else self.large
        frame = pool.frame_of(at)
        assert at + length <= frame + pool.size
        assert frame not in pool.free
        self._pieces += self.tx[at : at + length]
        if frame not in self._held:
            self._gathered.append(frame)
        if more:
            return
        self.sent.append(self._pieces)
        self._pieces = b""
        for each in self._gathered:
            (self.small if each >= TX_SMALL_BASE else self.large).give(each)
        self._gathered = []

    def hold(self, frame):
        self._held.add(frame)

    def unhold(self, frame):
        self._held.remove(frame)
        self.large.give(frame)


class Shard:
    """What a worker offers to its parts."""

    def __init__(self, **settings):
        defaults = {"scheme": "direct", "own_address4": OWN4, "own_address6": OWN6, "connect_timeout": 2.0}
        self.settings = Settings(**{**defaults, **settings})
        self.port = FakePort()
        self.count = memoryview(bytearray(8 * len(counts.NAMES))).cast("Q")
        self.timers = Timers()
        self.events: list[dict[str, str]] = []
        self.upstream = Upstream(self.settings, self.events.append)
        self._epoll = select.epoll()
        self._handlers = {}
        self.icmp = Icmp(self)
        self.udp = None
        self.dns_cache = None

    @property
    def sent(self) -> list[bytes]:
        return self.port.sent

    def watch(self, fd, mask, handler):
        self._epoll.register(fd, mask)
        self._handlers[fd] = handler

    def unwatch(self, fd):
        self._epoll.unregister(fd)
        del self._handlers[fd]

    def forget(self, fd):
        del self._handlers[fd]

    def poll(self, timeout=0.0):
        """Handle what is ready; True if something was."""
        events = self._epoll.poll(timeout)
        now = monotonic()
        for fd, mask in events:
            if fd in self._handlers:
                self._handlers[fd](mask, now)
        self.timers.run(monotonic())
        return bool(events)

    def run_until(self, condition, timeout=5.0):
        """Run the loop until condition() holds; fail after `timeout` seconds."""
        deadline = monotonic() + timeout
        while not condition():
            assert monotonic() < deadline, "nothing more happens"
            self.poll(0.01)

    def receive(self, *packets, vnet=bytes(VNET), handler=None, transport=None):
        """Let one batch of IP packets arrive, each with this virtio_net_hdr."""
        arrives = handler or self.udp.frame_arrives
        now = monotonic()
        for number, packet in enumerate(packets):
            at = number * FRAME_SIZE
            self.port.rx[at : at + VNET + len(packet)] = vnet + packet
            version = packet[0] >> 4
            header = transport or (40 if version == 6 else (packet[0] & 15) * 4)
            arrives(at, at + VNET + header, at + VNET + len(packet), version, now)
        if handler is None:
            self.udp.end_of_batch(now)
            # The frames are somebody else's now: who still looks at them reads this.
            for number in range(len(packets)):
                at = number * FRAME_SIZE
                self.port.rx[at : at + 4096] = b"\xee" * 4096

    def counted(self, index):
        return self.count[index]

    def close(self):
        if self.udp is not None:
            self.udp.stop(monotonic())
        assert not self._handlers
        self._epoll.close()
        assert len(self.port.large.free) == TX_LARGE
        assert len(self.port.small.free) == TX_SMALL


CLIENT4 = socket.inet_pton(socket.AF_INET, "198.18.0.1")
CLIENT6 = socket.inet_pton(socket.AF_INET6, "fd72:6e67:7761:7900::1")
FROM_KERNEL = b"\x01" + bytes(
    9
)  #: a virtio_net_hdr with NEEDS_CSUM: the checksum was left out, and need not be verified


def udp_packet(payload, source=CLIENT4, sport=1000, destination=b"\x08\x08\x08\x08", dport=99, **ip):
    """Return an IP packet with a datagram, written by dpkt, with all checksums."""
    udp = dpkt.udp.UDP(sport=sport, dport=dport, data=payload, ulen=8 + len(payload))
    if len(source) == 4:
        return bytes(dpkt.ip.IP(**{"src": source, "dst": destination, "p": 17, "ttl": 64, "data": udp} | ip))
    return bytes(
        dpkt.ip6.IP6(**{"src": source, "dst": destination, "nxt": 17, "plen": len(udp), "hlim": 64, "data": udp} | ip)
    )


def datagrams(frame):
    """Return (source, sport, destination, dport, payload) of each datagram in a frame, all of its fields verified."""
    flags, gso_type, _, gso_size, csum_start, csum_offset = HEADER.unpack_from(frame)
    packet = frame[VNET:]
    if packet[0] >> 4 == 4:
        ip = dpkt.ip.IP(packet)
        assert verify(packet[:20])
        assert ip.len == len(packet)
        assert ip.df and not ip.mf and not ip.offset
        size = 20
    else:
        ip = dpkt.ip6.IP6(packet)
        assert ip.plen == len(packet) - 40
        size = 40
    udp = packet[size:]
    sport, dport, length, field = struct.unpack_from(">HHHH", udp)
    assert length == len(udp)
    if not flags:  # a packet that was cut: its checksum is complete
        assert verify(udp, pseudo_sum(ip.src, ip.dst, 17, length))
        return [(ip.src, sport, ip.dst, dport, udp[8:])]
    assert (flags, csum_start, csum_offset) == (NEEDS_CSUM, size, 6)
    # The field holds the sum of the pseudo-header; dpkt's own checksum says what the device must make of it.
    ip.data.sum = 0
    if size == 20:
        ip.sum = 0
    right = int.from_bytes(bytes(ip)[size + 6 : size + 8])
    completed = checksum(udp[:6] + bytes(2) + udp[8:], field)
    assert (right or 65535) == (completed or 65535)
    payload = udp[8:]
    if gso_type == GSO_NONE:
        assert gso_size == 0
        cut = [payload]
    else:
        assert gso_type == GSO_UDP_L4
        assert len(packet) <= 65535
        cut = [payload[at : at + gso_size] for at in range(0, len(payload), gso_size)]
        assert 1 < len(cut) <= 64
    return [(ip.src, sport, ip.dst, dport, each) for each in cut]


def whole_packets(frames, mtu=1500):
    """Return the frames, those of one packet in fragments put together by plain means, in their order of ending."""
    whole = []
    parts = {}
    for frame in frames:
        packet = frame[VNET:]
        if packet[0] >> 4 == 4:
            ip = dpkt.ip.IP(packet)
            if not ip.mf and not ip.offset:
                whole.append(frame)
                continue
            assert verify(packet[:20])
            assert not ip.df
            assert ip.len == len(packet)
            key, header, payload = (ip.src, ip.dst, ip.id), packet[:20], packet[20:]
            offset, more = (int.from_bytes(packet[6:8]) & 0x1FFF) * 8, ip.mf
        else:
            if packet[6] != 44:
                whole.append(frame)
                continue
            assert int.from_bytes(packet[4:6]) == len(packet) - 40
            field = int.from_bytes(packet[42:44])
            key, header, offset, more = packet[8:40] + packet[44:48], packet[:40], field & 0xFFF8, field & 1
            header = header[:6] + packet[40:41] + header[7:]
            payload = packet[48:]
        assert frame[:VNET] == bytes(VNET)
        assert len(packet) <= mtu
        assert not more or len(payload) % 8 == 0
        assert offset == len(parts.setdefault(key, b"")), "our own fragments go out in order"
        parts[key] += payload
        if not more:
            payload = parts.pop(key)
            if len(header) == 20:
                header = (
                    header[:2] + (20 + len(payload)).to_bytes(2) + b"\0\0\x40\0" + header[8:10] + b"\0\0" + header[12:]
                )
                header = header[:10] + checksum(header).to_bytes(2) + header[12:]
            else:
                header = header[:4] + len(payload).to_bytes(2) + header[6:]
            whole.append(bytes(VNET) + header + payload)
    return whole


def all_datagrams(frames):
    """Return what datagrams() does for many frames, of which some are fragments."""
    return [each for frame in whole_packets(frames) for each in datagrams(frame)]


def unreachable(frame):
    """Return type, code and the quoted packet of an ICMP error."""
    packet = frame[VNET:]
    at = 20 if packet[0] >> 4 == 4 else 40
    return packet[at], packet[at + 1], packet[at + 8 :]
