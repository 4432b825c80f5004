"""Egress: datagrams out of this machine and back, a full cone, in batches.

    header and payloads ──► (name looked up) ──► egress socket (one per family) ──► anybody
    client.answer       ◄── header put in front: read till empty ◄──────────────────

Datagrams of equal length to one place leave in one call (UDP_SEGMENT); answers are read back to back.
"""

import socket
from typing import TYPE_CHECKING, Final

from gateway.proxy.address import SocketAddress, family_of
from gateway.proxy.datagrams import Client
from gateway.proxy.poll import READ
from gateway.proxy.resolve import Address
from gateway.proxy.udpsocket import (
    MAX_DATAGRAM,
    MAX_READS,
    MAX_SEGMENT,
    MAX_SEGMENTED,
    MAX_SEGMENTS,
    cannot_segment,
    count_lost,
    datagram_socket,
    segmentation,
)
from workers.socks.wire import ProtocolError, parse_datagram, write_datagram_header

if TYPE_CHECKING:
    from gateway.proxy.server import Server

MAX_REMEMBERED: Final = 4096  # destinations and sources, each; then they are forgotten and found again
MAX_WAITING: Final = 32  # datagrams for a name that is being looked up
MAX_LOOKUPS: Final = 64  # names at a time

Destination = tuple[socket.socket, SocketAddress]


class Egress:
    """The sockets of one client's datagrams."""

    __slots__ = ("_destinations", "_egress", "_headers", "_is_closed", "_lookups", "_segmenting", "_server", "client")

    def __init__(self, server: "Server") -> None:
        self._server = server
        self.client: Client | None = None
        self._egress: dict[int, socket.socket | None] = {}  #: by family; None if the machine has no such
        self._destinations: dict[bytes, Destination] = {}  #: by header
        self._lookups: dict[bytes, list[bytes]] = {}  #: header → payloads that wait for its name
        self._headers: dict[SocketAddress, bytes] = {}  #: by source
        self._segmenting = not server.portable
        self._is_closed = False

    def close(self) -> None:
        """Close the sockets."""
        self._is_closed = True
        self._lookups.clear()
        for sock in self._egress.values():
            if sock:
                self._server.close(sock)
        self._egress.clear()

    def pass_on(self, header: bytes, run: list[memoryview]) -> None:
        """Send payloads of equal length, all with the same header, to where it says."""
        destination = self._destinations.get(header)
        if destination is None:
            destination = self._find(header, run)
            if destination is None:
                return
        sock, address = destination
        length = len(run[0])
        if len(run) > 1 and self._segmenting and 0 < length <= MAX_SEGMENT:
            step = min(MAX_SEGMENTS, MAX_SEGMENTED // length)
            control = segmentation(length)
            for first in range(0, len(run), step):
                pieces = run[first : first + step]
                try:
                    sock.sendmsg(pieces, control, 0, address)
                except OSError as error:
                    if not self._cannot_segment(error, len(pieces)):
                        continue
                    for piece in pieces:
                        self._send_one(sock, piece, address)
            return
        for piece in run:
            self._send_one(sock, piece, address)

    def _send_one(self, sock: socket.socket, payload: memoryview | bytes, address: SocketAddress) -> None:
        try:
            sock.sendto(payload, address)
        except OSError as error:
            count_lost(self._server.counters, error, 1)

    def _find(self, header: bytes, run: list[memoryview]) -> Destination | None:
        """Return where datagrams with this header go; None if that is nowhere, or not known yet: then they wait."""
        waiting = self._lookups.get(header)
        if waiting is not None:
            self._wait(waiting, run)
            return None
        try:
            host, port, _ = parse_datagram(header)
        except ProtocolError as error:
            self._server.counters[error.reason] += len(run)
            return None
        if not isinstance(host, str):
            family = socket.AF_INET if len(host) == 4 else socket.AF_INET6
            return self._remember(header, (family, socket.inet_ntop(family, host)), port)
        if len(self._lookups) >= MAX_LOOKUPS:
            self._server.counters["datagram-too-many-names"] += len(run)
            return None
        waiting = self._lookups[header] = []
        self._wait(waiting, run)
        self._server.resolver.lookup(host, lambda addresses: self._resolved(header, addresses, port))
        return None

    def _wait(self, waiting: list[bytes], run: list[memoryview]) -> None:
        room = MAX_WAITING - len(waiting)
        waiting.extend(bytes(piece) for piece in run[:room])
        self._server.counters["datagram-waiting-dropped"] += max(0, len(run) - room)

    def _resolved(self, header: bytes, addresses: list[Address], port: int) -> None:
        waiting = self._lookups.pop(header, [])
        if self._is_closed:
            return
        # IPv4 first: UDP gets no error back that would tell us to try the next one.
        addresses.sort(key=lambda address: address[0] != socket.AF_INET)
        destination = self._remember(header, addresses[0], port) if addresses else None
        if not destination:
            self._server.counters["datagram-name-unknown"] += len(waiting)
            return
        for payload in waiting:
            self._send_one(destination[0], payload, destination[1])

    def _remember(self, header: bytes, address: Address, port: int) -> Destination | None:
        family, host = address
        if family not in self._egress:
            self._egress[family] = self._open_egress(family)
        sock = self._egress[family]
        if not sock:
            self._server.counters["datagram-no-route"] += 1
            return None
        if len(self._destinations) >= MAX_REMEMBERED:
            self._destinations.clear()
        destination: Destination = (sock, (host, port))
        self._destinations[header] = destination
        return destination

    def _open_egress(self, family: int) -> socket.socket | None:
        try:
            sock = datagram_socket(family, self._server.open_socket)
            sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 0))
        except OSError:
            return None
        room = 22 if family == socket.AF_INET6 else 10  # the header that an answer gets
        self._server.add(sock, READ, lambda _: self._answers_come(sock, room))
        return sock

    def _answers_come(self, sock: socket.socket, room: int) -> None:
        """Read answers back to back, each behind the header it needs; equal lengths go to the client in one send."""
        client = self.client
        if not client:
            return
        batch = self._server.batch
        view = self._server.batch_view
        headers = self._headers
        receive = sock.recvfrom_into
        start = at = 0  # of the run; of the next datagram
        length = 0  # of each in the run, header included
        last = len(batch) - MAX_DATAGRAM - room
        for _ in range(MAX_READS):
            try:
                count, source = receive(view[at + room :])
            except BlockingIOError:
                break
            except OSError:
                continue
            header = headers.get(source)
            if header is None:
                header = self._header_for(source)
            batch[at : at + room] = header
            size = room + count
            if size != length:
                if at > start:
                    client.answer(view[start:at], length)
                start = at
                length = size
            at += size
            if at > last:
                break
        if at > start:
            client.answer(view[start:at], length)

    def _header_for(self, source: SocketAddress) -> bytes:
        if len(self._headers) >= MAX_REMEMBERED:
            self._headers.clear()
        host = socket.inet_pton(family_of(source[0]), source[0].partition("%")[0])
        header = self._headers[source] = write_datagram_header(host, source[1])
        return header

    def _cannot_segment(self, error: OSError, datagrams: int) -> bool:
        """Say whether to send these one by one instead, and from now on all."""
        if cannot_segment(error):
            self._segmenting = False
            self._server.counters["udp-segment-refused"] += 1
            return True
        count_lost(self._server.counters, error, datagrams)
        return False
