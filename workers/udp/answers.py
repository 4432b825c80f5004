"""Answers: datagrams from the upstream sockets, which become packets to the device.

A single answer is copied into a small frame behind its headers: few are large, and a large frame in flight costs more.
When many wait, they are received back to back into one large frame, as long as they have one source and one length (a
shorter one may be last), and leave as one super-frame (USO); what is above the device's MTU leaves as IP fragments:

    frame + START                 tail - 10                        (SOCKS header of 10 octets, IPv4)
    ├ SOCKS header ┬ payload 1 ───┬──────────┐
                                  ├ SOCKS hd ┴ payload 2 ───┬──────────┐
                                                            ├ SOCKS hd ┴ …

The SOCKS header of answer 2 is received over the end of payload 1, which has been saved and is put back.
"""

from __future__ import annotations

import socket
from mmap import mmap
from typing import TYPE_CHECKING, Final

from ipc.layout import FRAME_SIZE, SMALL_SIZE
from workers import counts
from workers.fragmenting import Fragmenting
from workers.socks.wire import ProtocolError, parse_datagram
from workers.wire.udp import MAX_PACKET, DatagramHeaders, split_key

if TYPE_CHECKING:
    from workers.udp.association import Association
    from workers.worker import Worker

START: Final = 64  #: octets in a frame before what is received: 58 of IPv6 headers, with no SOCKS header, fit
MAX_SEGMENTS: Final = 64  #: of one super-frame: UDP_MAX_SEGMENTS, linux/udp.h before 6.9
FAIR_SHARE: Final = 64  #: answers of one socket in one event; the others are not kept waiting by it
MAX_SOURCES: Final = 1024  #: sources that one association has prepared headers for
LONGEST_QUIET: Final = 8  #: a second look that finds nothing costs 0.7 µs, so at most every eighth event has one
MSG_TRUNC: Final = socket.MSG_TRUNC  # the real length is returned, also of what did not fit

_MAPPED: Final = bytes(10) + b"\xff\xff"


class Answers:
    """The way down of one worker's UDP."""

    def __init__(self, worker: Worker) -> None:
        port = worker.port
        self._port = port
        self._count = worker.count
        self._mtu = worker.settings.mtu
        self._tx = port.tx
        self._tx_view = port.tx_view
        self._transmit = port.transmit
        self._small = port.small
        self._fragmenting = Fragmenting(port, self._mtu, self._count)
        #: where a single answer is received: it may be of any size, and nearly all are small and copied
        self._scratch = mmap(-1, FRAME_SIZE)

    # ── through a proxy ─────────────────────────────────────────────────────────────────────────────────────────

    def from_relay(self, association: Association, mask: int, now: float) -> None:
        """Take answers that the proxy's relay sent, each behind a SOCKS header."""
        if association.busy:
            self._many_from_relay(association, now)
            return
        scratch = self._scratch
        try:
            received = association.receive(scratch, 0, MSG_TRUNC)
        except OSError as error:
            self._failed(association, error)
            return
        behind = association.socks_header
        headers = association.sources.get(scratch[:behind])
        if headers is None:
            found = self._new_source(association, scratch[: min(received, 300)])
            if found is None:
                return
            headers, behind = found
        size = received - behind
        association.active_at = now
        self._send_one(headers, behind, size)
        if association.quiet:
            association.quiet -= 1
        else:
            self._many_from_relay(association, now)

    def _many_from_relay(self, association: Association, now: float) -> None:
        """Take all answers that wait, as few packets as possible."""
        try:
            frame = self._port.large.take()
        except IndexError:
            association.busy = False  # small frames may be left
            return
        tx = self._tx
        view = self._tx_view
        behind = association.socks_header
        start = frame + START
        frame_end = frame + FRAME_SIZE
        # The run: answers of one source and size, whose payloads stand from `first` to `tail`.
        headers: DatagramHeaders | None = None
        key: object = None
        first = tail = size = segments = 0
        answers = 0
        at = start
        saved = b""
        while answers < FAIR_SHARE:
            try:
                received = association.receive(view[at:frame_end], 0, MSG_TRUNC)
            except BlockingIOError:
                break
            except OSError as error:
                self._failed(association, error)
                break
            answers += 1
            payload = received - behind
            socks = tx[at : at + behind]
            if socks == key and 0 < payload <= size and segments < MAX_SEGMENTS:
                total = tail - first + payload
                if total <= MAX_PACKET - 48 and at + received <= frame_end:
                    tx[at:tail] = saved
                    tail += payload
                    segments += 1
                    if payload == size and frame_end - tail > self._mtu:
                        at = tail - behind
                        saved = tx[at:tail]
                        continue
                    frame = self._send_run(headers, frame, first, tail, size, segments)
                    headers = key = None
                    if frame < 0:
                        break
                    at = start = frame + START
                    frame_end = frame + FRAME_SIZE
                    saved = b""
                    continue
            # It begins a run of its own: what has come is moved to the frame's beginning, after the old run has left.
            if headers is not None:
                came = tx[at : min(at + received, frame_end)]
                tx[at:tail] = saved
                frame = self._send_run(headers, frame, first, tail, size, segments)
                headers = key = None
                if frame < 0:
                    self._count[counts.NO_FRAMES] += 1
                    break
                at = start = frame + START
                frame_end = frame + FRAME_SIZE
                tx[at : at + len(came)] = came
            saved = b""
            begin = at + behind
            headers = association.sources.get(socks)
            if headers is None:
                found = self._new_source(association, tx[at : at + min(received, 300)])
                if found is None:
                    continue
                headers, length = found
                begin = at + length
                payload = received - length
            if not 0 <= payload <= headers.max_payload:
                fits = payload > 0 and self._fits(headers, payload, begin + payload <= frame_end)
                if payload < 0:
                    self._count[counts.UDP_DROPPED_BAD_HEADER] += 1
                elif fits:
                    frame = self._send_fragments(headers, frame, begin, begin + payload)
                    if frame < 0:
                        break
                    at = start = frame + START
                    frame_end = frame + FRAME_SIZE
                headers = None
                continue
            key = headers.key
            first, size, segments = begin, payload, 1
            tail = begin + payload
            at = tail - behind
            saved = tx[at:tail]
        else:
            answers += 1  # there are more: stay busy
        if frame >= 0:
            if headers is not None:
                if saved:
                    tx[at:tail] = saved
                frame = self._send_run(headers, frame, first, tail, size, segments)
            if frame >= 0:
                self._port.large.give(frame)
        self._note(association, answers, now)

    # ── direct:// ───────────────────────────────────────────────────────────────────────────────────────────────

    def from_anyone(self, association: Association, mask: int, now: float) -> None:
        """Take answers from wherever they come: the socket is not connected (full cone)."""
        if association.busy:
            self._many_from_anyone(association, now)
            return
        try:
            size, source = association.receive_from(self._scratch, 0, MSG_TRUNC)
        except OSError as error:
            self._failed(association, error)
            return
        headers = association.sources.get(source) or self._new_direct_source(association, source)
        if headers is None:
            return
        association.active_at = now
        self._send_one(headers, 0, size)
        if association.quiet:
            association.quiet -= 1
        else:
            self._many_from_anyone(association, now)

    def _many_from_anyone(self, association: Association, now: float) -> None:
        """Take all answers that wait, as few packets as possible; without SOCKS headers nothing is in the way."""
        try:
            frame = self._port.large.take()
        except IndexError:
            association.busy = False
            return
        tx = self._tx
        view = self._tx_view
        first = tail = at = frame + START
        frame_end = frame + FRAME_SIZE
        headers: DatagramHeaders | None = None
        key: object = None
        size = segments = answers = 0
        while answers < FAIR_SHARE:
            try:
                received, source = association.receive_from(view[at:frame_end], 0, MSG_TRUNC)
            except BlockingIOError:
                break
            except OSError as error:
                self._failed(association, error)
                break
            answers += 1
            if source == key and 0 < received <= size and segments < MAX_SEGMENTS:
                total = tail - first + received
                if total <= MAX_PACKET - 48 and at + received <= frame_end:
                    at = tail = at + received
                    segments += 1
                    if received == size and frame_end - tail > self._mtu:
                        continue
                    frame = self._send_run(headers, frame, first, tail, size, segments)
                    headers = key = None
                    if frame < 0:
                        break
                    first = tail = at = frame + START
                    frame_end = frame + FRAME_SIZE
                    continue
            if headers is not None:
                came = tx[at : min(at + received, frame_end)]
                frame = self._send_run(headers, frame, first, tail, size, segments)
                headers = key = None
                if frame < 0:
                    self._count[counts.NO_FRAMES] += 1
                    break
                at = frame + START
                frame_end = frame + FRAME_SIZE
                tx[at : at + len(came)] = came
            headers = association.sources.get(source) or self._new_direct_source(association, source)
            if headers is None:
                key = None
                continue
            if received > headers.max_payload:
                if self._fits(headers, received, at + received <= frame_end):
                    frame = self._send_fragments(headers, frame, at, at + received)
                    if frame < 0:
                        break
                    at = frame + START
                    frame_end = frame + FRAME_SIZE
                headers = key = None
                continue
            key = source
            first, size, segments = at, received, 1
            at = tail = first + received
        else:
            answers += 1
        if frame >= 0:
            if headers is not None:
                frame = self._send_run(headers, frame, first, tail, size, segments)
            if frame >= 0:
                self._port.large.give(frame)
        self._note(association, answers, now)

    # ── for both ────────────────────────────────────────────────────────────────────────────────────────────────

    def _send_one(self, headers: DatagramHeaders, begin: int, size: int) -> None:
        """Send the answer whose payload of `size` octets stands in the scratch memory, from `begin` on."""
        length = headers.length
        if size <= headers.max_payload and 0 <= size <= SMALL_SIZE - length:
            try:
                small = self._small.take()
            except IndexError:
                self._count[counts.NO_FRAMES] += 1
                return
            header = headers.header if size == headers.size else headers.of(size)
            self._tx[small : small + length + size] = header + self._scratch[begin : begin + size]
            self._transmit(small, length + size)
            self._count[counts.UDP_DATAGRAMS_DOWN] += 1
            return
        if size < 0:
            self._count[counts.UDP_DROPPED_BAD_HEADER] += 1
        elif self._fits(headers, size, True):
            try:
                frame = self._port.large.take()
            except IndexError:
                self._count[counts.NO_FRAMES] += 1
                return
            first = frame + START
            self._tx[first : first + size] = self._scratch[begin : begin + size]
            if size > headers.max_payload:
                frame = self._send_fragments(headers, frame, first, first + size)
            else:
                frame = self._send_run(headers, frame, first, first + size, size, 1)
            if frame >= 0:
                self._port.large.give(frame)

    def _fits(self, headers: DatagramHeaders, size: int, complete: bool) -> bool:
        """Say whether an answer can be sent at all; False: counted."""
        if complete and size <= headers.longest:
            return True
        self._count[counts.UDP_DROPPED_TOO_BIG] += 1
        return False

    def _send_fragments(self, headers: DatagramHeaders, frame: int, first: int, tail: int) -> int:
        """Send an answer above the device's MTU; return the frame to go on with, or -1 if there is none."""
        ip_header, udp_header = headers.of_fragmented(self._tx_view[first:tail])
        self._tx[first - len(udp_header) : first] = udp_header
        self._fragmenting.transmit(ip_header, frame, first - len(udp_header), tail)
        self._count[counts.UDP_DATAGRAMS_DOWN] += 1
        try:
            return self._port.large.take()
        except IndexError:
            return -1

    def _send_run(
        self, headers: DatagramHeaders | None, frame: int, first: int, tail: int, size: int, segments: int
    ) -> int:
        """Send what stands in a large frame; return the frame to go on with, or -1 if there is none."""
        assert headers is not None
        tx = self._tx
        length = headers.length
        total = tail - first
        self._count[counts.UDP_DATAGRAMS_DOWN] += segments
        if segments == 1:
            header = headers.header if size == headers.size else headers.of(size)
            if length + total <= SMALL_SIZE:
                # Few large frames, many small: a copy of so little costs less than a large frame in flight.
                try:
                    small = self._port.small.take()
                except IndexError:
                    pass
                else:
                    tx[small : small + length + total] = header + tx[first:tail]
                    self._transmit(small, length + total)
                    return frame
        else:
            header = headers.of_many(size, total)
        tx[first - length : first] = header
        self._transmit(first - length, length + total)
        try:
            return self._port.large.take()
        except IndexError:
            return -1

    def _note(self, association: Association, answers: int, now: float) -> None:
        """Decide whether the next event deserves a second look."""
        if answers:
            association.active_at = now
        if answers > 1 or (answers and not association.busy):
            association.busy = True
            association.quiet = 0
            association.quiet_next = 1
        else:
            association.busy = False
            association.quiet = association.quiet_next
            association.quiet_next = min(2 * association.quiet_next, LONGEST_QUIET)

    def _new_source(self, association: Association, data: bytes) -> tuple[DatagramHeaders, int] | None:
        """Return headers for the source that a SOCKS header names, and its length; None: counted, and to be dropped."""
        try:
            host, port, behind = parse_datagram(data)
        except ProtocolError:
            self._count[counts.UDP_DROPPED_BAD_HEADER] += 1
            return None
        client = association.client
        if not isinstance(host, str) and len(host) == 16 and host.startswith(_MAPPED) and len(client) == 6:
            host = host[12:]
        if isinstance(host, str) or len(host) != len(client) - 2:
            # A name instead of an address, for a client that asked for none; or the other IP version.
            self._count[counts.UDP_DROPPED_UNMAPPABLE] += 1
            return None
        if not association.permits(host, port):
            self._count[counts.UDP_DROPPED_FILTERED] += 1
            return None
        key = data[:behind]
        headers = association.sources.get(key)
        if headers is None:
            headers = self._remember(association, key, host, port)
        return headers, behind

    def _new_direct_source(self, association: Association, source: tuple[str, int]) -> DatagramHeaders | None:
        family = socket.AF_INET if len(association.client) == 6 else socket.AF_INET6
        host = socket.inet_pton(family, source[0].partition("%")[0])
        if not association.permits(host, source[1]):
            self._count[counts.UDP_DROPPED_FILTERED] += 1
            return None
        return self._remember(association, source, host, source[1])

    def _remember(self, association: Association, key: object, host: bytes, port: int) -> DatagramHeaders:
        if len(association.sources) >= MAX_SOURCES:
            association.sources.clear()
        client = association.client
        headers = DatagramHeaders(host, port, client[:-2], int.from_bytes(client[-2:], "big"), self._mtu, key)
        association.sources[key] = headers
        return headers

    def _failed(self, association: Association, error: OSError) -> None:
        """Take an error that the socket reports; anything but "nothing there" is about a datagram that we sent."""
        if not isinstance(error, BlockingIOError):
            self._count[counts.UDP_DROPPED_SOCKET] += 1

    def deliver(self, key: bytes, payload: bytes) -> None:
        """Send one datagram to the client of a flow, from the flow's destination."""
        source, source_port, destination, port = split_key(key)
        self._scratch[: len(payload)] = payload
        self._send_one(DatagramHeaders(destination, port, source, source_port, self._mtu), 0, len(payload))
