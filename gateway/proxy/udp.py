"""UDP ASSOCIATE: the client's side, SOCKS datagrams to and from one client, in batches.

    client ──► relay socket: read till empty, header taken off ──► out.pass_on
           ◄── relay socket: equal lengths in one send ◄────────── answer

The relay socket has the address of the control connection and is connected to the client as soon as its first datagram
shows its port: the kernel then refuses everybody else. A client that sends segmented is read so (UDP_GRO). The
association ends with its control connection. Clients of gost v1 say UDP ASSOCIATE and mean frames on the control
connection: what comes first, a datagram or a frame, decides.
"""

from typing import TYPE_CHECKING

from gateway.proxy.address import SocketAddress, family_of, with_port
from gateway.proxy.datagrams import Out
from gateway.proxy.framed import FramedClient
from gateway.proxy.poll import READ
from gateway.proxy.reply import write_reply
from gateway.proxy.stream import Layered, Owner
from gateway.proxy.udpsocket import (
    GRO_LENGTH,
    GRO_SPACE,
    MAX_DATAGRAM,
    MAX_READS,
    MAX_SEGMENT,
    MAX_SEGMENTED,
    MAX_SEGMENTS,
    SOL_UDP,
    UDP_GRO,
    cannot_segment,
    count_lost,
    datagram_socket,
    segmentation,
)
from workers.socks.framing import GostFraming
from workers.socks.wire import SUCCEEDED, datagram_header_length

if TYPE_CHECKING:
    from gateway.proxy.server import Server


class UdpClient(Owner):
    """One client's datagrams, and its control connection."""

    __slots__ = (
        "_client_host",
        "_control",
        "_gro",
        "_out",
        "_relay",
        "_segmenting",
        "_server",
        "_settled",
        "reply",
    )

    def __init__(self, server: "Server", control: Layered, out: Out) -> None:
        """Make the relay socket. Raises OSError before anything is taken over."""
        local = with_port(control.local, 0)
        self._client_host = control.peer[0]
        relay = datagram_socket(family_of(local[0]))
        try:
            relay.bind(local)
            self.reply = write_reply(SUCCEEDED, relay.getsockname())  #: what tells the client where it is
        except OSError:
            relay.close()
            raise
        self._server = server
        self._control = control
        self._relay = relay
        self._out = out
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
        out.client = self

    def begin(self, early: bytes) -> None:
        """Listen to the control connection, on which `early` has come already."""
        self._control.owner = self
        if self._control.has_ended:
            self.close()
            return
        self._control.go_on()
        if early:
            self.received(early)

    def received(self, data: bytes) -> None:
        """Take the frames of a client of gost v1; once datagrams have come, what is said here means nothing."""
        if self._settled:
            return
        self._settled = -1
        self._server.close(self._relay)
        framed = FramedClient(
            self._server,
            self._control,
            GostFraming(by_message=self._control.keeps_messages),
            self._out,
            joins=False,
        )
        framed.begin(data)

    def ended(self) -> None:
        self.close()

    def lost(self, number: int) -> None:
        self.close()

    def close(self) -> None:
        """End the association."""
        if self._settled < 0:
            return
        self._settled = -1
        # The control connection last: once the client sees its end, the relay is no more.
        self._server.close(self._relay)
        self._out.close()
        self._control.close()

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
                        self._out.pass_on(header, run)
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
            self._out.pass_on(header, run)

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

    def answer(self, datagrams: memoryview, length: int) -> None:
        """Send the client datagrams of equal length, which stand back to back, headers in front."""
        end = len(datagrams)
        if end > length and self._segmenting and length <= MAX_SEGMENT:
            step = length * min(MAX_SEGMENTS, MAX_SEGMENTED // length)
            control = segmentation(length)
            for first in range(0, end, step):
                piece = datagrams[first : first + step]
                try:
                    self._relay.sendmsg((piece,), control)
                except OSError as error:
                    if cannot_segment(error):
                        self._segmenting = False
                        self._server.counters["udp-segment-refused"] += 1
                        self.answer(piece, length)
                    else:
                        count_lost(self._server.counters, error, len(piece) // length)
            return
        for first in range(0, end, length):
            try:
                self._relay.send(datagrams[first : first + length])
            except OSError as error:
                count_lost(self._server.counters, error, 1)
