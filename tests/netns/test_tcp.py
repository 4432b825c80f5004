"""TCP of the kernel through the gateway to TCP of the kernel: bulk, many short flows, half-close, RST, slow readers."""

import errno
import select
import socket
import struct
import threading
import time

import pytest

from tests.netns.stage import Stage
from tests.netns.traffic import (
    CHUNK,
    connect,
    digest_of_stream,
    download,
    echo,
    family_of,
    read_exactly,
    read_to_end,
    reset,
    stream,
    target_address,
    upload,
)
from tests.netns.world import Namespace, eventually

pytestmark = pytest.mark.netns
MEGABYTE = 1 << 20


@pytest.mark.parametrize("version", [4, 6])
def test_bulk_up(stage: Stage, version: int) -> None:
    upload(stage.world.gw, target_address(version), stage.target.port, 64 * MEGABYTE)


@pytest.mark.parametrize("version", [4, 6])
def test_bulk_down(stage: Stage, version: int) -> None:
    download(stage.world.gw, target_address(version), stage.target.port, 64 * MEGABYTE)


def test_bulk_both_ways_at_once_on_one_connection(stage: Stage) -> None:
    count = 16 * MEGABYTE
    failures: list[BaseException] = []

    def send(connection: socket.socket) -> None:
        try:
            for piece in stream(count):
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            failures.append(error)

    with connect(stage.world.gw, target_address(4), stage.target.port, 60) as connection:
        connection.sendall(b"E")
        sender = threading.Thread(target=send, args=(connection,))
        sender.start()
        position = 0
        for piece in stream(count):
            assert read_exactly(connection, len(piece)) == piece, f"other bytes at {position}"
            position += len(piece)
        assert connection.recv(1) == b""
        sender.join(20)
    assert not failures


def test_eight_streams_each_way(stage: Stage) -> None:
    failures: list[BaseException] = []

    def one(which: int) -> None:
        try:
            move = upload if which % 2 else download
            move(stage.world.gw, target_address(4 if which % 4 < 2 else 6), stage.target.port, 4 * MEGABYTE + which)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=(which,)) for which in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


@pytest.mark.parametrize("size", [0, 1, 1447, 1448, 1449, 65535, 65536, 65537, 200_003])
def test_sizes_around_segments_and_frames(stage: Stage, size: int) -> None:
    upload(stage.world.gw, target_address(4), stage.target.port, size)
    download(stage.world.gw, target_address(6), stage.target.port, size)


def test_a_thousand_short_flows(stage: Stage) -> None:
    """Fifty at a time: connect, a byte each way, the client closes; then no flow is left behind."""
    failures: list[BaseException] = []

    def twenty(version: int) -> None:
        try:
            for _ in range(20):
                echo(stage.world.gw, target_address(version), stage.target.port, b"x")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=twenty, args=(4 + 2 * (which % 2),)) for which in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    # The client closed first, so TIME-WAIT is on its side and nothing need stay here.
    eventually(lambda: stage.ringway.flows() < 50, "the short flows are gone", 10)


def test_half_close_by_the_client(stage: Stage) -> None:
    """After our FIN the answer still comes, all of it."""
    with connect(stage.world.gw, target_address(4), stage.target.port) as connection:
        connection.sendall(b"E" + b"z" * 300_000)
        connection.shutdown(socket.SHUT_WR)
        assert read_to_end(connection) == b"z" * 300_000


def test_half_close_by_the_target(stage: Stage) -> None:
    """After the target's FIN our bytes still arrive, at full speed: FIN-WAIT-2 acknowledges as ever."""
    before = stage.target.received_after_close
    with connect(stage.world.gw, target_address(4), stage.target.port) as connection:
        connection.sendall(b"H")
        assert read_to_end(connection) == b"bye"
        count = 16 * CHUNK
        for piece in stream(count):
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
        eventually(lambda: stage.target.received_after_close == before + count, "all bytes behind the FIN arrived", 20)
        # Without ACKs the client would go on by its retransmission timer, 64 KiB at a time.
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        assert struct.unpack_from("I", info, 100)[0] < 5  # tcpi_total_retrans, linux/tcp.h


@pytest.mark.parametrize("version", [4, 6])
def test_reset_by_the_target(stage: Stage, version: int) -> None:
    with connect(stage.world.gw, target_address(version), stage.target.port, 5) as connection:
        connection.sendall(b"R")
        if not stage.proxied:
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
        else:
            # A proxy may turn the reset into an orderly end; it must end.
            try:
                assert connection.recv(1) == b""
            except ConnectionResetError:
                pass


def test_reset_by_the_client(stage: Stage) -> None:
    """The target's side ends as well, and the flow is forgotten."""
    flows = stage.ringway.flows()
    connection = connect(stage.world.gw, target_address(4), stage.target.port)
    connection.sendall(b"E" + b"q")
    assert read_exactly(connection, 1) == b"q"
    open_connections = len(stage.target._connections)
    reset(connection)
    eventually(lambda: len(stage.target._connections) < open_connections, "the target's connection ended")
    eventually(lambda: stage.ringway.flows() <= flows, "the flow is forgotten")


def test_slow_reader_at_the_target(stage: Stage) -> None:
    """A target that does not read stops the client through all buffers; then everything arrives."""
    count = 24 * MEGABYTE
    stage.target.read_on.clear()
    with connect(stage.world.gw, target_address(4), stage.target.port, 60) as connection:
        connection.sendall(b"S")
        sent = _push_until_blocked(connection, count)
        assert sent < count, "back-pressure never reached the client"
        echo(stage.world.gw, target_address(4), stage.target.port)  # others are not held up
        stage.target.read_on.set()
        connection.settimeout(60)
        for piece in _from(sent, count):
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
        assert read_to_end(connection) == digest_of_stream(count)


def test_slow_reader_at_the_client(stage: Stage) -> None:
    """A client that does not read closes its window; window probes open it again and everything arrives."""
    count = 24 * MEGABYTE
    with stage.world.gw.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)
        connection.settimeout(60)
        connection.connect((target_address(4), stage.target.port))
        connection.sendall(b"D" + struct.pack(">Q", count))
        eventually(lambda: len(connection.recv(20_000, socket.MSG_PEEK)) > 5_000, "the client's buffer fills")
        # While the window is closed the others go on, whatever the gateway holds for this one.
        download(stage.world.gw, target_address(4), stage.target.port, 8 * MEGABYTE)
        for piece in stream(count):
            assert read_exactly(connection, len(piece)) == piece
        assert connection.recv(1) == b""


def test_interactive_bytes_are_not_held_back(stage: Stage) -> None:
    """A byte each way takes well under a delayed ACK's 40 ms."""
    with connect(stage.world.gw, target_address(4), stage.target.port) as connection:
        connection.sendall(b"E")
        took = []
        for _ in range(50):
            began_at = time.perf_counter()
            connection.sendall(b"k")
            assert connection.recv(1) == b"k"
            took.append(time.perf_counter() - began_at)
        assert sorted(took)[25] < 0.02, f"median round trip {sorted(took)[25] * 1e3:.1f} ms"


def test_urgent_data_does_not_end_the_flow(stage: Stage) -> None:
    with connect(stage.world.gw, target_address(4), stage.target.port) as connection:
        connection.sendall(b"E" + b"a")
        connection.send(b"!", socket.MSG_OOB)
        connection.sendall(b"b")
        received = read_exactly(connection, 2)
        assert received[:1] == b"a"


def _push_until_blocked(connection: socket.socket, count: int) -> int:
    """Send the stream until the socket takes nothing for a second; return how much it took."""
    connection.setblocking(False)
    sent = 0
    for piece in stream(count):
        while len(piece):
            if not select.select([], [connection], [], 1.0)[1]:
                return sent
            try:
                taken = connection.send(piece)
            except BlockingIOError:
                continue
            sent += taken
            piece = piece[taken:]
    return sent


def _from(start: int, count: int) -> "list[memoryview]":
    """Return the rest of the stream of `count` bytes from `start` on."""
    rest, position = [], 0
    for piece in stream(count):
        end = position + len(piece)
        if end > start:
            rest.append(piece[max(0, start - position) :])
        position = end
    return rest


def open_many(namespace: Namespace, address: str, port: int, count: int) -> list[socket.socket]:
    """Open `count` connections at once, without waiting for one another; raise the first error."""
    opening = [namespace.socket(family_of(address)) for _ in range(count)]
    poll = select.poll()
    waiting = {}
    for connection in opening:
        connection.setblocking(False)
        if connection.connect_ex((address, port)) not in (0, errno.EINPROGRESS):
            raise OSError(f"cannot connect to {address}")
        poll.register(connection, select.POLLOUT)
        waiting[connection.fileno()] = connection
    give_up_at = time.monotonic() + 20
    while waiting:
        assert time.monotonic() < give_up_at, f"{len(waiting)} of {count} connections still not open"
        for fd, _ in poll.poll(1000):
            poll.unregister(fd)
            error = waiting.pop(fd).getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            assert error == 0, errno.errorcode[error]
    return opening


def test_hundreds_of_connections_at_once(stage: Stage) -> None:
    connections = open_many(stage.world.gw, target_address(4), stage.target.port, 400)
    try:
        eventually(lambda: stage.ringway.flows() >= 400, "the gauge has them all", 5)
        for connection in connections:
            connection.setblocking(True)
            connection.settimeout(20)
            connection.sendall(b"E!")
        for connection in connections:
            assert connection.recv(1) == b"!"
    finally:
        for connection in connections:
            connection.close()
    eventually(lambda: stage.ringway.flows() < 100, "the flows are forgotten", 10)
