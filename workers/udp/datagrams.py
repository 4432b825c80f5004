"""Udp: datagrams from the device, which leave through the association of their client socket.

Nothing is copied: a SOCKS header is written over the UDP header (and the end of the IP header) in the RX frame, and
the frame's tail goes into `send`. Datagrams of one batch and flow wait for its end, and leave in one `sendmsg` with
UDP_SEGMENT if their lengths are equal (a shorter one may be last).
"""

from __future__ import annotations

import errno
from struct import Struct
from typing import TYPE_CHECKING, Final

from workers import counts
from workers.dns.over_tcp import DnsOverTcp
from workers.icmp import ADMIN, HOST, NET, PORT
from workers.proxyconnection import proxy_unreachable
from workers.public import is_public
from workers.settings import ADDRESS_PORT
from workers.udp.answers import Answers
from workers.udp.association import CLOSED, READY, Association
from workers.udp.associations import Associations
from workers.udp.availability import DOWN, Availability
from workers.udp.dns import DnsOverUdp
from workers.udp.flow import Flow
from workers.udp.tunnel import STALLED
from workers.wire.checksum import ones_sum, pseudo_sum
from workers.wire.udp import UDP, packet_of, split_key
from workers.wire.vnet import GSO_UDP_L4, TRUSTED

if TYPE_CHECKING:
    from workers.worker import Worker

SOL_UDP: Final = 17  # linux/udp.h; Python has no names for these
UDP_SEGMENT: Final = 103
MAX_SEGMENTS: Final = 64  #: of one sendmsg; UDP_MAX_SEGMENTS was 64 until Linux 6.9
MAX_SEGMENTED: Final = 65487  #: octets of one sendmsg: 65,535 less the IPv6 and UDP headers
DNS_PORT: Final = 53
QUIC_PORT: Final = 443

FLOWS_PER_ASSOCIATION: Final = 1024  #: destinations that one client socket has prepared headers for
FLOWS_FACTOR: Final = 16  #: the same for the worker, times max_associations
QUOTED: Final = 512  #: octets of payload that an ICMP error may quote

#: errno of direct:// → what the client is told
_NO_WAY: Final = {errno.ENETUNREACH: NET, errno.EHOSTUNREACH: HOST, errno.EACCES: ADMIN, errno.EPERM: ADMIN}
_U16: Final = Struct("=H")
#: flags and gso_type of the virtio_net_hdr, flow key, length of the datagram: one unpack for the usual packet
_USUAL4: Final = Struct(">BB20x12sH")
_USUAL6: Final = Struct(">BB16x36sH")


class Udp:
    """The UDP of one worker."""

    def __init__(self, worker: Worker) -> None:
        settings = worker.settings
        self.worker = worker
        self.answers = Answers(worker)
        self.dns = DnsOverTcp(worker, self.answers.deliver, worker.dns_cache)
        self._rx = worker.port.rx
        self._rx_view = worker.port.rx_view
        self._count = worker.count
        self._direct = worker.upstream.direct
        self._public_only = settings.public_only
        self._block_quic = settings.block_quic
        self.filtering = settings.udp_filtering
        self._by_destination = settings.udp_mapping == ADDRESS_PORT
        self._own = (settings.own_address4, settings.own_address6)
        self._max_flows = FLOWS_FACTOR * settings.max_associations
        self._flows: dict[bytes, Flow] = {}
        self._waiting: list[Flow] = []  # flows with pieces of this batch
        self._ancillary: dict[int, list[tuple[int, int, bytes]]] = {}  # UDP_SEGMENT by size
        upstream = worker.upstream
        self.availability = Availability(
            settings.connect_timeout,
            settings.udp_mode,
            settings.udp_found,
            upstream.direct or upstream.associates,
            upstream.udp_learned,
        )
        self.associations = Associations(self)
        self._associations = self.associations.table
        over_udp = DnsOverUdp(self, worker.dns_cache)
        #: by octets of a key: direct:// has a socket for each IP version
        self.dns_over_udp = {12: over_udp, 36: DnsOverUdp(self, worker.dns_cache) if self._direct else over_udp}

    # ── from the device ─────────────────────────────────────────────────────────────────────────────────────────

    def frame_arrives(self, at: int, transport: int, end: int, version: int, now: float) -> None:
        """Take one datagram, or a super-frame of them.

        `at` is where the frame begins (virtio_net_hdr), `transport` the UDP header, `end` the end of the IP packet, in
        the RX memory. The IP header has been checked. The frame must stay until end_of_batch(), which sends.
        """
        rx = self._rx
        # Without options or extension headers, addresses and ports are one slice.
        if version == 4 and transport == at + 30:
            flags, gso_type, key, length = _USUAL4.unpack_from(rx, at)
        elif version == 6 and transport == at + 50:
            flags, gso_type, key, length = _USUAL6.unpack_from(rx, at)
        else:
            flags, gso_type = rx[at], rx[at + 1]
            key = rx[at + 22 : at + 30] if version == 4 else rx[at + 18 : at + 50]
            key += rx[transport : transport + 4]
            length = rx[transport + 4] << 8 | rx[transport + 5]
        if length != end - transport or not flags & TRUSTED:
            end = self._examine(at, transport, end, version)
        size = end - transport - 8
        if size <= 0 and (size < 0 or not self._direct):
            # Some servers end the association at an empty datagram, some drop it.
            self._count[counts.UDP_DROPPED_EMPTY if size == 0 else counts.MALFORMED] += end > 0
            return
        flow = self._flows.get(key)
        if flow is None:
            flow = self._new_flow(key, transport + 8, end, now)
            if flow is None:
                return
        if gso_type:
            self._super_frame(flow, at, transport + 8, end, now)
            return
        header = flow.header
        if header:
            begin = transport + 8 - len(header)
            rx[begin : transport + 8] = header
            size = end - begin
        else:
            begin = transport + 8
        pieces = flow.pieces
        if not pieces:
            flow.size = size
            self._waiting.append(flow)
        elif size != flow.size:
            if size > flow.size or len(pieces) == MAX_SEGMENTS or not size:
                self._leave(flow, now)
                flow.size = size
                flow.pieces.append(self._rx_view[begin:end])
            else:  # the shorter last one
                pieces.append(self._rx_view[begin:end])
                self._leave(flow, now)
            return
        elif len(pieces) == MAX_SEGMENTS or (len(pieces) + 1) * size > MAX_SEGMENTED:
            self._leave(flow, now)
            pieces = flow.pieces
        pieces.append(self._rx_view[begin:end])

    def end_of_batch(self, now: float) -> None:
        """Send what waits, before the RX frames go home."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            try:
                for flow in waiting:
                    self._leave(flow, now)
            except BaseException:
                for flow in waiting:  # no piece may outlive its frame
                    flow.pieces.clear()
                raise

    def _leave(self, flow: Flow, now: float) -> None:
        """Send the pieces of a flow."""
        pieces = flow.pieces
        if not pieces:
            return
        flow.pieces = []
        association = flow.association
        number = len(pieces)
        association.active_at = now
        if association.state != READY:
            self._hold(flow, pieces)
            return
        try:
            if number == 1:
                if flow.address is None:
                    association.send(pieces[0])
                else:
                    association.sendto(pieces[0], flow.address)
            elif 0 < flow.size <= association.segment_limit:
                association.sendmsg(
                    pieces, self._ancillary.get(flow.size) or self._segments(flow.size), 0, flow.address
                )
            else:
                self._send_singly(flow, pieces, now)
                return
        except OSError as error:
            self._send_failed(flow, pieces, error, now)
            return
        self._count[counts.UDP_DATAGRAMS_UP] += number

    def _examine(self, at: int, transport: int, end: int, version: int) -> int:
        """Check what the hot path does not: return the end of the datagram, or 0 if it was dropped and counted."""
        rx = self._rx
        length = rx[transport + 4] << 8 | rx[transport + 5]
        if not 8 <= length <= end - transport:
            self._count[counts.MALFORMED] += 1
            return 0
        end = transport + length  # what is behind is padding
        if rx[at] & TRUSTED:
            return end
        if rx[transport + 6 : transport + 8] == b"\0\0":
            if version == 4:
                return end  # the sender made none: RFC 768
            self._count[counts.BAD_CHECKSUM] += 1
            return 0
        addresses = rx[at + 22 : at + 30] if version == 4 else rx[at + 18 : at + 50]
        if ones_sum(rx[transport:end]) + pseudo_sum(addresses, b"", UDP, length) not in (65535, 0, 131070):
            self._count[counts.BAD_CHECKSUM] += 1
            return 0
        return end

    def _super_frame(self, flow: Flow, at: int, payload: int, end: int, now: float) -> None:
        """Send a frame that the kernel left to us to cut (USO): the same cuts, made by the kernel on the other side."""
        rx = self._rx
        size = rx[at + 4] | rx[at + 5] << 8
        if rx[at + 1] & 0x7F != GSO_UDP_L4 or not size:
            self._count[counts.MALFORMED] += 1
            return
        self._leave(flow, now)
        view = self._rx_view
        association = flow.association
        header = flow.header
        cuts = [view[cut : min(cut + size, end)] for cut in range(payload, end, size)]
        association.active_at = now
        if association.state != READY:
            for cut in cuts:
                association.wait(flow, bytes(cut))
            return
        each = size + len(header)
        at_once = min(MAX_SEGMENTS, MAX_SEGMENTED // each) if each <= association.segment_limit else 1
        for first in range(0, len(cuts), at_once):
            some = cuts[first : first + at_once]
            pieces = [piece for cut in some for piece in (header, cut)] if header else some
            try:
                association.sendmsg(pieces, self._segments(each) if len(some) > 1 else [], 0, flow.address)
            except OSError as error:
                if len(some) > 1:
                    self._no_segments(association, error)
                for cut in some:
                    self.send_copy(flow, bytes(cut), now)
                if not association.segment_limit:
                    at_once = 1
            else:
                self._count[counts.UDP_DATAGRAMS_UP] += len(some)

    def _segments(self, size: int) -> list[tuple[int, int, bytes]]:
        ancillary = self._ancillary[size] = [(SOL_UDP, UDP_SEGMENT, _U16.pack(size))]
        return ancillary

    def send_copy(self, flow: Flow, payload: bytes, now: float) -> None:
        """Send one datagram of a flow from memory of its own."""
        self._send_singly(flow, [memoryview(flow.header + payload)], now)

    def _send_singly(self, flow: Flow, pieces: list[memoryview], now: float) -> None:
        association = flow.association
        for piece in pieces:
            # Twice: a connected socket may report what became of an earlier datagram, and then has not sent this one.
            for attempt in (1, 2):
                try:
                    if flow.address is None:
                        association.send(piece)
                    else:
                        association.sendto(piece, flow.address)
                except OSError as error:
                    if error.errno == errno.ECONNREFUSED and attempt == 1:
                        continue
                    self._lost(flow, piece, error)
                else:
                    self._count[counts.UDP_DATAGRAMS_UP] += 1
                break

    def _send_failed(self, flow: Flow, pieces: list[memoryview], error: OSError, now: float) -> None:
        if error.errno in (errno.EAGAIN, errno.ENOBUFS):
            self._count[counts.UDP_DROPPED_SOCKET] += len(pieces)
            return
        if len(pieces) > 1:
            self._no_segments(flow.association, error)
        if len(pieces) > 1 or error.errno == errno.ECONNREFUSED:
            self._send_singly(flow, pieces, now)
        else:
            self._lost(flow, pieces[0], error)

    def _no_segments(self, association: Association, error: OSError) -> None:
        """Switch UDP_SEGMENT off for a socket whose path does not take it."""
        if error.errno in (errno.EINVAL, errno.EIO, errno.EMSGSIZE) and association.segment_limit:
            association.segment_limit = 0
            self._count[counts.UDP_GSO_REFUSED] += 1

    def _lost(self, flow: Flow, piece: memoryview, error: OSError) -> None:
        """Count a datagram that the socket did not take; for direct://, say by ICMP that there is no way."""
        if error.errno == errno.EMSGSIZE:
            self._count[counts.UDP_DROPPED_TOO_BIG] += 1
            return
        if error.errno == STALLED:
            self._count[counts.UDP_DROPPED_TUNNEL] += 1
            return
        self._count[counts.UDP_DROPPED_SOCKET] += 1
        if self._direct and error.errno in _NO_WAY:
            self.worker.icmp.unreachable(packet_of(flow.key, bytes(piece[:QUOTED])), _NO_WAY[error.errno])

    def _hold(self, flow: Flow, pieces: list[memoryview]) -> None:
        """Keep copies of pieces until the association is ready."""
        association = flow.association
        if association.state == CLOSED:
            self._count[counts.UDP_DROPPED_SOCKET] += len(pieces)
            return
        behind = len(flow.header)
        for piece in pieces:
            association.wait(flow, bytes(piece[behind:]))

    def flow_undelivered(self, flow: Flow, payload: bytes, code: int, now: float) -> None:
        """Answer a datagram that waited in vain for its association."""
        self.undelivered(flow.key, payload, code, now)

    def undelivered(self, key: bytes, payload: bytes, code: int, now: float) -> None:
        """Answer a datagram that found no association: over TCP if it is a question, else by ICMP, with this code."""
        if code == DOWN:
            self._count[counts.UDP_DROPPED_PROXY_DOWN] += 1
            code = NET
        elif key[-2] << 8 | key[-1] == DNS_PORT and not self.worker.upstream.rejects:
            self.dns.ask(key, payload, now)
            return
        else:
            self._count[counts.UDP_DROPPED_REFUSED] += 1
        self.worker.icmp.unreachable(packet_of(key, payload[:QUOTED]), code)

    # ── flows and associations ──────────────────────────────────────────────────────────────────────────────────

    def _new_flow(self, key: bytes, payload: int, end: int, now: float) -> Flow | None:
        """Return a flow for this key, or None if its datagram was refused and counted."""
        source, source_port, destination, port = split_key(key)
        datagram = self._rx[payload:end]
        if destination[0] == 0xFF or (len(destination) == 4 and destination[0] >= 224):
            self._count[counts.UDP_DROPPED_MULTICAST] += 1
            return None
        if destination in self._own:  # nothing of ours listens
            self.worker.icmp.unreachable(packet_of(key, datagram[:QUOTED]), PORT)
            self._count[counts.UDP_DROPPED_REFUSED] += 1
            return None
        if self._public_only and not is_public(destination):
            self._count[counts.NOT_PUBLIC] += 1
            self.worker.icmp.unreachable(packet_of(key, datagram[:QUOTED]), ADMIN)
            return None
        if self._block_quic and port == QUIC_PORT:
            self._count[counts.UDP_DROPPED_QUIC] += 1
            self.worker.icmp.unreachable(packet_of(key, datagram[:QUOTED]), PORT)
            return None
        if port == DNS_PORT and self.dns_over_udp[len(key)].ask(key, datagram, now):
            return None
        client = source + source_port.to_bytes(2, "big")
        association = self._associations.get(key if self._by_destination else client)
        if association is None:
            code = self.availability.refused(now)
            if code is not None:
                self.undelivered(key, datagram, code, now)
                return None
            association = self._new_association(client, key, datagram, now)
            if association is None:
                return None
        if port != DNS_PORT:
            association.only_dns = False
        association.permit(destination, port)
        if len(association.flow_keys) >= FLOWS_PER_ASSOCIATION:
            self._forget_flows(association)
        elif len(self._flows) >= self._max_flows:
            for each in self._associations.values():
                each.flow_keys.clear()
            self._flows.clear()
        flow = Flow(association, key, self._direct)
        self._flows[key] = flow
        association.flow_keys.append(key)
        return flow

    def _new_association(self, client: bytes, key: bytes, payload: bytes, now: float) -> Association | None:
        try:
            return self.associations.open(key if self._by_destination else client, client, now)
        except OSError as error:
            if self._direct and error.errno in _NO_WAY:
                self._count[counts.UDP_DROPPED_SOCKET] += 1
                self.worker.icmp.unreachable(packet_of(key, payload[:QUOTED]), _NO_WAY[error.errno])
            elif self._direct or error.errno in (errno.EMFILE, errno.ENFILE):
                self._count[counts.UDP_DROPPED_DESCRIPTORS] += 1
            else:
                proxy_unreachable(self.worker, error.strerror or str(error))
                self.undelivered(key, payload, self.availability.is_down(now), now)
            return None

    def _forget_flows(self, association: Association) -> None:
        for key in association.flow_keys:
            self._flows.pop(key, None)
        association.flow_keys.clear()

    def remove(self, association: Association, now: float) -> None:
        """Forget an association that ends, and its flows."""
        self._forget_flows(association)
        self.associations.remove(association, now)

    def stop(self, now: float) -> None:
        """Close all sockets; clients notice nothing, as with any router."""
        self._waiting.clear()
        self._flows.clear()
        self.associations.stop()
        self.dns.stop()
