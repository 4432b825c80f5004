"""The control socket: answers, refusals, and clients that are slow, silent, greedy or talk garbage."""

import os
import socket
import stat
import struct
import threading
import time
from contextlib import contextmanager

import msgpack
import pytest

from gateway import control
from gateway.control import MAX_CLIENTS, MAX_REQUEST, AlreadyRunning, ControlError, ControlServer
from gateway.loop import EventLoop
from gateway.status import ask

WAIT = 10.0


@pytest.fixture
def loop():
    with EventLoop() as made:
        yield made


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "tun0.sock"


def echo(request):
    return {"echo": dict(request)}


@contextmanager
def serving(loop, path, answer=echo):
    server = ControlServer(loop, path, answer)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def connected(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(WAIT)
        client.connect(str(path))
        yield client


def frame(message) -> bytes:
    body = msgpack.packb(message)
    return struct.pack(">I", len(body)) + body


def turn_until(loop, condition) -> None:
    ends_at = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < ends_at
        loop.run_once(0.05)


def received(loop, client) -> bytes:
    """Run the loop until the client has something, or is at the end of file."""
    client.setblocking(False)
    data: list[bytes] = []

    def readable() -> bool:
        try:
            data.append(client.recv(1 << 20))
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data.append(b"")
        return True

    turn_until(loop, readable)
    return data[0]


def parsed(data: bytes):
    (length,) = struct.unpack_from(">I", data)
    assert len(data) == 4 + length
    return msgpack.unpackb(data[4:])


def test_the_real_client_gets_its_answer(loop, path):
    with serving(loop, path):
        answers: list[object] = []
        client = threading.Thread(target=lambda: answers.append(ask(path, {"command": "status"})))
        client.start()
        turn_until(loop, lambda: answers)
        client.join(WAIT)
    assert answers == [{"echo": {"command": "status"}}]


def test_modes_and_the_end(loop, path):
    with serving(loop, path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == (0o755 if os.geteuid() == 0 else 0o700)
    assert not path.exists()
    assert path.parent.exists()


def test_byte_by_byte_and_two_requests_in_one_connection(loop, path):
    with serving(loop, path), connected(path) as client:
        for byte in frame({"n": 1}):
            client.send(bytes([byte]))
            loop.run_once(0.05)
        assert parsed(received(loop, client)) == {"echo": {"n": 1}}
        client.send(frame({"n": 2}))
        assert parsed(received(loop, client)) == {"echo": {"n": 2}}


def test_requests_sent_together_are_answered_in_order(loop, path):
    with serving(loop, path), connected(path) as client:
        client.send(frame({"n": 1}) + frame({"n": 2}))
        expected = frame({"echo": {"n": 1}}) + frame({"echo": {"n": 2}})
        data = b""
        while len(data) < len(expected):
            data += received(loop, client)
        assert data == expected


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (struct.pack(">I", 1) + b"\xc1", "the request is not msgpack"),
        (struct.pack(">I", 0), "the request is not msgpack"),
        (struct.pack(">I", 2) + b"\x01\x01", "the request is not msgpack"),
        (frame([1, 2]), "the request is not a map"),
    ],
)
def test_garbage_gets_an_error(loop, path, request_, error):
    with serving(loop, path), connected(path) as client:
        client.send(request_)
        assert parsed(received(loop, client)) == {"error": error}


def test_a_request_that_is_too_long_ends_the_connection(loop, path):
    with serving(loop, path), connected(path) as client:
        client.send(struct.pack(">I", MAX_REQUEST + 1))
        assert received(loop, client) == b""


def test_an_error_of_ours_is_an_answer(loop, path, caplog):
    def broken(request):
        raise KeyError("x")

    with serving(loop, path, broken), connected(path) as client:
        client.send(frame({}))
        assert parsed(received(loop, client)) == {"error": "internal error: KeyError"}


def test_a_silent_client_is_sent_away(loop, path, monkeypatch):
    monkeypatch.setattr(control, "SILENCE", 0.05)
    with serving(loop, path), connected(path) as client:
        client.send(b"\0")
        assert received(loop, client) == b""


def test_a_client_that_does_not_read_holds_nothing_up(loop, path, monkeypatch):
    monkeypatch.setattr(control, "SILENCE", 0.2)
    big = {"big": b"x" * (8 << 20)}
    with serving(loop, path, lambda request: big) as server, connected(path) as slow:
        slow.send(frame({}) * 2)
        turn_until(loop, lambda: server._clients)
        begun_at = time.monotonic()
        loop.run_once(0)
        assert time.monotonic() - begun_at < 1.0
        # It is sent away in the end, and the loop goes on.
        turn_until(loop, lambda: not server._clients)


def test_too_many_clients_are_sent_away(loop, path):
    with serving(loop, path) as server:
        clients = []
        try:
            for _ in range(MAX_CLIENTS):
                client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                client.connect(str(path))
                clients.append(client)
                loop.run_once(0.05)
            assert len(server._clients) == MAX_CLIENTS
            with connected(path) as one_more:
                assert received(loop, one_more) == b""
            clients[0].send(frame({"n": 1}))
            assert parsed(received(loop, clients[0])) == {"echo": {"n": 1}}
        finally:
            for client in clients:
                client.close()


def test_a_live_socket_is_another_gateway(loop, path):
    with serving(loop, path):
        with pytest.raises(AlreadyRunning, match=r"^already running: a gateway answers on "):
            ControlServer(loop, path, echo)
        assert path.exists()


def test_a_stale_socket_is_replaced(loop, path):
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.is_socket()
    with serving(loop, path), connected(path) as client:
        client.send(frame({}))
        assert parsed(received(loop, client)) == {"echo": {}}


def test_the_socket_of_a_successor_is_left_alone(loop, path):
    first = ControlServer(loop, path, echo)
    path.unlink()
    with serving(loop, path):
        first.close()
        assert path.is_socket()


def test_a_file_in_the_way_is_not_removed(loop, path):
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(ControlError, match="is no socket: remove it"):
        ControlServer(loop, path, echo)
    assert path.read_text() == "mine"


def test_a_path_that_does_not_fit(loop, tmp_path):
    with pytest.raises(ControlError, match=r"has \d+ octets, 107 are allowed"):
        ControlServer(loop, tmp_path / ("x" * 120), echo)


def test_a_directory_that_cannot_be_made(loop, tmp_path):
    with pytest.raises(ControlError, match="cannot make the directory"):
        ControlServer(loop, tmp_path / "a" / "b" / "x.sock", echo)
