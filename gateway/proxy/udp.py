"""UDP ASSOCIATE: datagrams between one client and whoever it talks to, a full cone, in batches.

    client ──► relay socket: read till empty, header taken off ──► egress socket (one per family) ──► anybody
           ◄── relay socket: equal lengths in one send ◄── header put in front: read till empty ◄──

The relay socket has the address of the control connection and is connected to the client as soon as its first datagram
shows its port: the kernel then refuses everybody else. Datagrams of equal length to one place leave in one call
(UDP_SEGMENT), and a client that sends so is read so (UDP_GRO). The association ends with its control connection.
"""

import errno
import socket
import struct
import sys
from typing import TYPE_CHECKING, Final

from gateway.proxy.address import SocketAddress, family_of, unmapped, with_port
from gateway.proxy.poll import READ
from gateway.proxy.reply import success
from gateway.proxy.resolve import Address
from workers.socks.wire import ProtocolError, datagram_header_length, parse_datagram, write_datagram_header

if TYPE_CHECKING:
    from gateway.proxy.server import Server

SOL_UDP: Final = 17
UDP_SEGMENT: Final = 103  # Linux ≥ 4.18; Python has no names for these
UDP_GRO: Final = 104  # Linux ≥ 5.0
SEGMENT_LENGTH: Final = struct.Struct("=H")
GRO_LENGTH: Final = struct.Struct("=i")
GRO_SPACE: Final = socket.CMSG_SPACE(4)

MAX_DATAGRAM: Final = 65535  # bytes, with room: 65507 over IPv4
MAX_READS: Final = 64  # a turn; then the others have theirs
MAX_SEGMENTS: Final = 64  # the kernel's UDP_MAX_SEGMENTS before 6.9
MAX_SEGMENTED: Final = 65000  # bytes in one call; with its headers it is one IP packet
MAX_SEGMENT: Final = 1452  # bytes; more would not fit MTU 1500 over IPv6, and UDP_SEGMENT does not fragment
MAX_REMEMBERED: Final = 4096  # destinations and sources, each; then they are forgotten and found again
MAX_WAITING: Final = 32  # datagrams for a name that is being looked up
MAX_LOOKUPS: Final = 64  # names at a time
RECEIVE_BUFFER: Final = 4 << 20  # bytes asked for; the kernel gives rmem_max if that is less, and a burst needs it

Destination = tuple[socket.socket, SocketAddress]


class Association:
    """One client's UDP: up to four sockets, closed together."""

    __slots__ = (
        "_client_host",
        "_control",
        "_destinations",
        "_egress",
        "_gro",
        "_headers",
        "_lookups",
        "_relay",
        "_segmenting",
        "_server",
        "_settled",
    )

    def __init__(self, server: "Server", control: socket.socket) -> None:
        """Make the relay socket and tell the client where it is. Raises OSError before anything is taken over."""
        local = with_port(unmapped(control.getsockname()), 0)
        relay = _datagram_socket(family_of(local[0]))
        try:
            relay.bind(local)
            self._client_host = unmapped(control.getpeername())[0]
            answer = success(relay)
        except OSError:
            relay.close()
            raise
        self._server = server
        self._control = control
        self._relay = relay
        self._egress: dict[int, socket.socket | None] = {}  #: by family; None if the machine has no such
        self._destinations: dict[bytes, Destination] = {}  #: by header
        self._lookups: dict[bytes, list[bytes]] = {}  #: header → payloads that wait for its name
        self._headers: dict[SocketAddress, bytes] = {}  #: by source
        self._settled = 0  #: 0 the client's port is unknown, 1 connected to it, 2 and no stranger is left in the queue
        self._segmenting = not server.portable
        self._gro = False
        if not server.portable:
            try:
                relay.setsockopt(SOL_UDP, UDP_GRO, 1)
                self._gro = True
            except OSError:
                pass  # an older kernel
        server.add(relay, READ, self._client_sends)
        server.poller.handlers[control.fileno()] = self._control_ready
        server.counters["associated"] += 1
        try:
            control.send(answer)
        except OSError:
            pass  # it is gone, and the poller will say so

    # Client → anybody

    def _client_sends(self, _: int) -> None:
        """Read what the client has sent, and pass runs of datagrams with the same header and length on together."""
        batch = self._server.batch
        view = self._server.batch_view
        header = b""
        length = 0  # of each datagram in the run, header included
        run: list[memoryview] = []
        room = len(batch) - MAX_DATAGRAM
        at = 0
        for _ in range(MAX_READS):
            if at > room:
                break
            try:
                count, segment = self._read_client(view[at:])
            except BlockingIOError:
                if self._settled == 1:
                    self._settled = 2
                break
            except OSError:
                continue  # an ICMP error that an earlier send brought about
            if count <= 0:
                self._server.counters["datagram-stranger" if count else "datagram-malformed"] += 1
                continue
            end = at + count
            while at < end:
                stop = min(at + segment, end)
                size = stop - at
                if not (size == length and batch.startswith(header, at)):
                    if run:
                        self._pass_on(header, run)
                    header = bytes(view[at : at + datagram_header_length(view[at:stop])])
                    length = size
                    run = []
                if header:
                    run.append(view[at + len(header) : stop])
                else:
                    self._server.counters["datagram-malformed"] += 1
                    length = 0
                at = stop
        if run:
            self._pass_on(header, run)

    def _read_client(self, into: memoryview) -> tuple[int, int]:
        """Return how many bytes came and the length of each datagram in them; −1 for a stranger's."""
        if self._gro:
            count, ancillary, _, source = self._relay.recvmsg_into((into,), GRO_SPACE)
            segment = GRO_LENGTH.unpack(ancillary[0][2])[0] if ancillary else count
        else:
            count, source = self._relay.recvfrom_into(into)
            segment = count
        if self._settled != 2 and not self._is_client(source):
            return -1, 0
        return count, segment

    def _is_client(self, source: SocketAddress) -> bool:
        """Judge the source of a datagram: the control connection's host, and from the first on, its port."""
        if source[0] != self._client_host:
            return False
        if self._settled:
            return bool(source[1] == self._relay.getpeername()[1])
        self._relay.connect(source)
        self._settled = 1
        return True

    def _pass_on(self, header: bytes, run: list[memoryview]) -> None:
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
            control = ((SOL_UDP, UDP_SEGMENT, SEGMENT_LENGTH.pack(length)),)
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
            self._lost(error, 1)

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
        if self._settled < 0:
            return  # the association has ended meanwhile
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
            sock = _datagram_socket(family)
            sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 0))
        except OSError:
            return None
        room = 22 if family == socket.AF_INET6 else 10  # the header that an answer gets
        self._server.add(sock, READ, lambda _: self._answers_come(sock, room))
        return sock

    # Anybody → client

    def _answers_come(self, sock: socket.socket, room: int) -> None:
        """Read answers back to back, each behind the header it needs; equal lengths go to the client in one send."""
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
                    self._answer(start, at, length)
                start = at
                length = size
            at += size
            if at > last:
                break
        if at > start:
            self._answer(start, at, length)

    def _answer(self, start: int, end: int, length: int) -> None:
        """Send the datagrams of equal length between two offsets of the batch to the client."""
        view = self._server.batch_view
        if end - start > length and self._segmenting and length <= MAX_SEGMENT:
            step = length * min(MAX_SEGMENTS, MAX_SEGMENTED // length)
            control = ((SOL_UDP, UDP_SEGMENT, SEGMENT_LENGTH.pack(length)),)
            for first in range(start, end, step):
                stop = min(first + step, end)
                try:
                    self._relay.sendmsg((view[first:stop],), control)
                except OSError as error:
                    if self._cannot_segment(error, (stop - first) // length):
                        self._answer(first, stop, length)
            return
        for first in range(start, end, length):
            try:
                self._relay.send(view[first : first + length])
            except OSError as error:
                self._lost(error, 1)

    def _header_for(self, source: SocketAddress) -> bytes:
        if len(self._headers) >= MAX_REMEMBERED:
            self._headers.clear()
        host = socket.inet_pton(family_of(source[0]), source[0].partition("%")[0])
        header = self._headers[source] = write_datagram_header(host, source[1])
        return header

    # Both ways

    def _cannot_segment(self, error: OSError, datagrams: int) -> bool:
        """Say whether to send these one by one instead, and from now on all."""
        if error.errno in (errno.EINVAL, errno.EIO, errno.EMSGSIZE, errno.EOPNOTSUPP):
            self._segmenting = False
            self._server.counters["udp-segment-refused"] += 1
            return True
        self._lost(error, datagrams)
        return False

    def _lost(self, error: OSError, datagrams: int) -> None:
        self._server.counters[f"datagram-{errno.errorcode.get(error.errno or 0, 'lost')}"] += datagrams

    def _control_ready(self, _: int) -> None:
        """End with the control connection; what the client says on it means nothing."""
        try:
            gone = not self._control.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            gone = True
        if gone:
            self._settled = -1
            self._lookups.clear()
            # The control connection last: once the client sees its end, the relay is no more.
            for sock in (self._relay, *self._egress.values(), self._control):
                if sock:
                    self._server.close(sock)


def associate(server: "Server", control: socket.socket, early: bytes) -> None:
    """Grant a UDP ASSOCIATE. Raises OSError if there is no socket for it.

    The address in the request is not looked at: clients put anything there. What they send behind it is dropped.
    """
    Association(server, control)


def _datagram_socket(family: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.setblocking(False)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        if sys.platform == "linux":
            try:
                sock.setsockopt(socket.SOL_SOCKET, 33, RECEIVE_BUFFER)  # SO_RCVBUFFORCE, for those who may
                return sock
            except PermissionError:
                pass
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    except OSError:
        pass
    return sock
