"""Worker: one shard: what becomes of its frames, its sockets and its timers.

One breath: wait for something; frames in; sockets; timers; what the batch owes (ACKs, new flows, gathered datagrams);
frames out, with one system call.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from math import inf
from select import EPOLLIN, epoll
from typing import Final

from ipc.cache import SharedCache
from ipc.channel import Channel, ChannelClosed, Message
from ipc.layout import ADDRESS_MASK, LENGTH_SHIFT
from ipc.wait import spin
from workers import counts
from workers.dial import Dial
from workers.dns.cache import DnsCache
from workers.flows import TcpFlows
from workers.icmp import Icmp
from workers.port import Port, RingPort
from workers.relay import Relay
from workers.settings import Settings
from workers.timers import Timers
from workers.udp import Udp
from workers.upstream import Upstream
from workers.wire import ip
from workers.wire.ip import HEADER4, IS_FRAGMENT, TCP, UDP
from workers.wire.vnet import SIZE as VNET
from workers.wire.vnet import TRUSTED

log = logging.getLogger("ringway")

Handler = Callable[[int, float], None]

MAX_EVENTS: Final = 256  #: of one breath
PUBLISH_SECONDS: Final = 0.1  #: between two times that a worker which never sleeps writes its gauges
MIN_FRAME: Final = VNET + 20  #: octets; with an IPv4 header; what a fragment has behind it may be one


class Worker:
    """Everything of one shard. One process, one thread."""

    def __init__(
        self, port: Port, settings: Settings, count: memoryview, channel: Channel, cache: SharedCache | None = None
    ) -> None:
        """`cache` keeps the answers of resolvers, for all workers."""
        self.port = port
        self.settings = settings
        self.count = count
        self.timers = Timers()
        self.handlers: dict[int, Handler] = {}
        self._epoll = epoll()
        self._channel = channel
        self._stopping = False
        self._logged_error = False
        self._watches_completions = False
        self.upstream = Upstream(settings, self.report)
        self.icmp = Icmp(self)
        self.dns_cache = DnsCache(cache, count) if cache is not None else None
        self.tcp = TcpFlows(self)
        self.udp = Udp(self)
        self.watch(port.fileno(), EPOLLIN, self._frames_wait)
        self.watch(channel.fileno(), EPOLLIN, self._told)

    # ── what the parts of a worker call ─────────────────────────────────────────────────────────────────────────

    def watch(self, fd: int, mask: int, handler: Handler) -> None:
        """Call handler(mask, now) at each event of a descriptor."""
        self._epoll.register(fd, mask)
        self.handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        """End watch()."""
        del self.handlers[fd]
        self._epoll.unregister(fd)

    def forget(self, fd: int) -> None:
        """End watch() for a descriptor that is closed right after: the kernel takes it out of the epoll set."""
        self.handlers.pop(fd, None)

    def report(self, message: Message) -> None:
        """Tell the supervisor; if it does not listen, the message is lost."""
        try:
            self._channel.send(message)
        except (ChannelClosed, BlockingIOError):
            pass

    # ── the loop ────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        """Breathe until told to stop."""
        monotonic = time.monotonic
        poller = self._epoll
        timers = self.timers
        tcp = self.tcp
        busy_poll = self.settings.busy_poll
        now = monotonic()
        publish_at = now
        self.report({"event": "ready"})
        while not self._stopping:
            # Who was just busy looks once more before it sleeps: a wakeup costs more than a system call.
            events = spin(poller, busy_poll, MAX_EVENTS) if busy_poll else poller.poll(0, MAX_EVENTS)
            if not events or now >= publish_at:
                self.publish()
                publish_at = now + PUBLISH_SECONDS
            if not events:
                next_at = min(tcp.next_at, timers.next_at)
                if next_at > now:
                    events = poller.poll(None if next_at == inf else max(next_at - now, 0.001), MAX_EVENTS)
            now = monotonic()
            self.breathe(events, now)
        tcp.stop(now)
        self.udp.stop(now)
        self.port.flush()
        self.publish()

    def breathe(self, events: list[tuple[int, int]], now: float) -> None:
        """Do what the events ask for, then what is due, and let the packets go."""
        tcp = self.tcp
        if events:
            self.handle(events, now)
        try:
            self.timers.run(now)
            tcp.run(now)
        except Exception:
            self._broken(None, now)
        self.port.flush()
        if bool(tcp.starved) != self._watches_completions:
            self._watch_completions()

    def publish(self) -> None:
        """Write the counters that are kept elsewhere meanwhile; always before the worker sleeps."""
        count = self.count
        port = self.port
        if port.packets:
            count[counts.FRAMES_TO_DEVICE] += port.packets
            count[counts.BYTES_TO_DEVICE] += port.octets - VNET * port.packets
            port.packets = port.octets = 0
        self.tcp.publish()

    def handle(self, events: list[tuple[int, int]], now: float) -> None:
        """Call the handlers of one breath's events.

        They are looked up before the first one runs: it may close a socket, and open one that gets the same number,
        to which an event of the old one would say that it is connected.
        """
        handlers = self.handlers
        port_fd = self.port.fileno()
        for fd, mask, handler in [(fd, mask, handlers.get(fd)) for fd, mask in events]:
            if handler is None or handlers.get(fd) is not handler:
                continue
            try:
                handler(mask, now)
            except Exception:
                if fd == port_fd:
                    raise  # the device is gone
                self._broken(handler, now)

    def _watch_completions(self) -> None:
        """Hear of completions only while somebody waits for them: they would wake us for each frame."""
        fd = self.port.completion_fd
        if fd < 0:
            return
        self._watches_completions = not self._watches_completions
        if self._watches_completions:
            self.watch(fd, EPOLLIN, self._completed)
        else:
            self.unwatch(fd)

    def _completed(self, mask: int, now: float) -> None:
        """Take completed frames home; TcpFlows.run() looks who waited for them."""
        self.port.complete()

    def _frames_wait(self, mask: int, now: float) -> None:
        """Take all frames that wait, then do what the batch owes."""
        descriptors = self.port.frames()
        rx = self.port.rx
        unpack = HEADER4.unpack_from
        tcp_arrives = self.tcp.packet_arrives
        udp_arrives = self.udp.frame_arrives
        octets = 0
        for descriptor in descriptors:
            at = descriptor & ADDRESS_MASK
            length = descriptor >> LENGTH_SHIFT
            octets += length
            flags, first, total, fragment, protocol = unpack(rx, at)
            try:
                if first == 0x45 and flags & TRUSTED and 28 <= total <= length - VNET and not fragment & IS_FRAGMENT:
                    end = at + VNET + total
                    if protocol == TCP:
                        tcp_arrives(at, at + 30, end, 4, now)
                        continue
                    if protocol == UDP:
                        udp_arrives(at, at + 30, end, 4, now)
                        continue
                self._other_arrives(at, length, now)
            except Exception:
                self._broken(None, now)
        count = self.count
        count[counts.FRAMES_FROM_DEVICE] += len(descriptors)
        count[counts.BYTES_FROM_DEVICE] += octets - VNET * len(descriptors)
        try:
            self.udp.end_of_batch(now)
            self.tcp.end_of_batch(now)
        except Exception:
            self._broken(None, now)
        self.port.release(descriptors)

    def _other_arrives(self, at: int, length: int, now: float) -> None:
        """Take a frame that is not the usual IPv4."""
        count = self.count
        if length < MIN_FRAME:
            count[counts.MALFORMED] += 1
            return
        protocol, transport, end, version = ip.locate(self.port.rx, at, length)
        if protocol == TCP:
            self.tcp.packet_arrives(at, transport, end, version, now)
        elif protocol == UDP:
            self.udp.frame_arrives(at, transport, end, version, now)
        elif protocol == (ip.ICMP if version == 4 else ip.ICMPV6):
            self.icmp.frame_arrives(at, transport, end, version, now)
        elif protocol == ip.FRAGMENT:
            whole = self.port.reassemble(at, length, now)
            if whole:
                self._other_arrives(at, whole, now)  # never a fragment again
        elif protocol == ip.BAD_CHECKSUM:
            count[counts.BAD_CHECKSUM] += 1
        elif protocol == ip.MALFORMED:
            count[counts.MALFORMED] += 1
        else:
            count[counts.UNKNOWN_PROTOCOL] += 1

    def _broken(self, handler: Handler | None, now: float) -> None:
        """An exception of our own: count it, log the first, and end the flow that raised it; the others go on."""
        self.count[counts.INTERNAL_ERRORS] += 1
        if not self._logged_error:
            self._logged_error = True
            log.exception("a flow was ended by an error in Ringway; please report it (further ones are only counted)")
        owner = getattr(handler, "__self__", None)
        if isinstance(owner, Relay | Dial):
            self.tcp.end_broken(owner, now)

    def _told(self, mask: int, now: float) -> None:
        """Do what the supervisor says."""
        message = self._channel.order()
        if message is None:
            return
        do = message["do"]
        port = self.port
        if do == "stop":
            self._stopping = True
        elif do == "proxy-addresses":
            self.upstream.use_addresses([(host, number) for host, number in message["addresses"]])
        elif do == "proxy-abilities":
            self.udp.availability.use(message["udp"])
            self.upstream.use_pipelining(message["pipelined"])
        elif isinstance(port, RingPort):
            if do == "drop-reader":
                port.drop_reader()
            elif do == "drop-writer":
                port.drop_writer()
            elif do == "add-writer":
                port.add_writer()
            if do.startswith("drop-"):
                self.report({"done": do})


def worker_main(
    port: Port, settings: Settings, count: memoryview, channel: Channel, cache: SharedCache | None = None
) -> None:
    """Run a worker until the supervisor says stop, or is gone."""
    Worker(port, settings, count, channel, cache).run()
