"""Packets: payloads from the upstream become packets to the device, and each source of answers its prepared headers.

A single answer is copied into a small frame behind its headers: few are large, and a large frame in flight costs more.
What is above the device's MTU leaves as IP fragments.
"""

from __future__ import annotations

import socket
from mmap import mmap
from typing import TYPE_CHECKING, Final

from ipc.layout import FRAME_SIZE, SMALL_SIZE
from workers import counts
from workers.fragmenting import Fragmenting
from workers.socks.wire import ProtocolError, parse_datagram
from workers.wire.udp import DatagramHeaders, split_key

if TYPE_CHECKING:
    from workers.udp.association import Association
    from workers.worker import Worker

START: Final = 64  #: octets in a frame before what is received: 58 of IPv6 headers, with no SOCKS header, fit
MAX_SOURCES: Final = 1024  #: sources that one association has prepared headers for

_MAPPED: Final = bytes(10) + b"\xff\xff"


class Packets:
    """The way to the device of one worker's UDP."""

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

    def send_one(self, headers: DatagramHeaders, begin: int, size: int) -> None:
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
                frame = self.send_fragments(headers, frame, first, first + size)
            else:
                frame = self.send_run(headers, frame, first, first + size, size, 1)
            if frame >= 0:
                self._port.large.give(frame)

    def _fits(self, headers: DatagramHeaders, size: int, complete: bool) -> bool:
        """Say whether an answer can be sent at all; False: counted."""
        if complete and size <= headers.longest:
            return True
        self._count[counts.UDP_DROPPED_TOO_BIG] += 1
        return False

    def send_fragments(self, headers: DatagramHeaders, frame: int, first: int, tail: int) -> int:
        """Send an answer above the device's MTU; return the frame to go on with, or -1 if there is none."""
        ip_header, udp_header = headers.of_fragmented(self._tx_view[first:tail])
        self._tx[first - len(udp_header) : first] = udp_header
        self._fragmenting.transmit(ip_header, frame, first - len(udp_header), tail)
        self._count[counts.UDP_DATAGRAMS_DOWN] += 1
        try:
            return self._port.large.take()
        except IndexError:
            return -1

    def send_run(
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

    def new_source(self, association: Association, data: bytes) -> tuple[DatagramHeaders, int] | None:
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

    def new_direct_source(self, association: Association, source: tuple[str, int]) -> DatagramHeaders | None:
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

    def deliver(self, key: bytes, payload: bytes) -> None:
        """Send one datagram to the client of a flow, from the flow's destination."""
        source, source_port, destination, port = split_key(key)
        self._scratch[: len(payload)] = payload
        self.send_one(DatagramHeaders(destination, port, source, source_port, self._mtu), 0, len(payload))
