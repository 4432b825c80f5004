"""The embedded SOCKS5 server after the reply: bytes, FIN and RST both ways, and BIND."""

import errno
import os
import socket
import struct
import sys
import threading

import pytest

from tests.proxy_running import (
    PATIENCE,
    RESET,
    Running,
    accept,
    ask,
    exactly,
    listening,
    pysocks,
    to_eof,
    tunnel,
)
from workers.socks.wire import BIND, write_address


@pytest.fixture(params=[False, True], ids=["linux", "portable"])
def portable(request):
    if not request.param and sys.platform != "linux":
        pytest.skip("epoll and splice are Linux's")
    return request.param


@pytest.fixture
def proxy(portable):
    with Running(portable=portable) as running:
        yield running


@pytest.fixture
def target():
    with listening() as listener:
        yield listener


def test_megabytes_both_ways_at_once(proxy, target):
    up, down = os.urandom(6_000_000), os.urandom(6_000_000)
    client, server = tunnel(proxy, target)
    with client, server:
        received = {}

        def send(sock, data):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        def receive(name, sock):
            received[name] = to_eof(sock)

        threads = [
            threading.Thread(target=send, args=(client, up)),
            threading.Thread(target=send, args=(server, down)),
            threading.Thread(target=receive, args=("down", client)),
            threading.Thread(target=receive, args=("up", server)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert received["up"] == up
        assert received["down"] == down


@pytest.mark.parametrize("client_first", [True, False])
def test_half_close(proxy, target, client_first):
    client, server = tunnel(proxy, target)
    with client, server:
        first, second = (client, server) if client_first else (server, client)
        first.sendall(b"question")
        first.shutdown(socket.SHUT_WR)
        assert to_eof(second) == b"question"
        for _ in range(3):
            second.sendall(b"answer")
            assert exactly(first, 6) == b"answer"
        second.shutdown(socket.SHUT_WR)
        assert first.recv(1) == b""


@pytest.mark.parametrize("client_first", [True, False])
@pytest.mark.parametrize("half_closed", [True, False])
def test_a_reset_is_passed_on(proxy, target, client_first, half_closed):
    client, server = tunnel(proxy, target)
    first, second = (client, server) if client_first else (server, client)
    with second:
        if half_closed:  # by the one who is reset: its socket is not read any more
            first.shutdown(socket.SHUT_WR)
            assert second.recv(1) == b""
        first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        first.close()
        if half_closed and proxy.server.portable:
            second.send(b"x")  # without epoll a failure shows only once something is written
        if half_closed:
            wait_for_error(second)  # a read would only say EOF again
        else:
            with pytest.raises(ConnectionResetError):
                second.recv(1)


def wait_for_error(sock):
    import select

    poll = select.poll()
    poll.register(sock, 0)
    assert poll.poll(PATIENCE * 1000), "no reset within the time"
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) in (errno.ECONNRESET, errno.EPIPE)


def test_a_slow_reader_holds_the_sender_up_and_loses_nothing(proxy, target):
    client, server = tunnel(proxy, target)
    with client, server:
        client.settimeout(0.3)
        sent = 0
        block = bytes(range(256)) * 256
        with pytest.raises(TimeoutError):
            while sent < 1 << 28:
                sent += client.send(block[sent % 256 :])
        client.shutdown(socket.SHUT_WR)
        received = to_eof(server)
        assert len(received) == sent
        assert received[:256] == block[:256]
        assert received == (block * (sent // len(block) + 1))[:sent]


def test_a_target_that_speaks_first(proxy):
    with listening() as listener:

        def speak():
            with accept(listener) as server:
                server.sendall(b"220 ready")

        speaker = threading.Thread(target=speak)
        speaker.start()
        with pysocks(proxy) as client:
            client.connect(listener.getsockname())
            assert exactly(client, 9) == b"220 ready"
        speaker.join(PATIENCE)


def test_many_clients_at_once(proxy, target):
    pairs = [tunnel(proxy, target) for _ in range(100)]
    for number, (client, _) in enumerate(pairs):
        client.sendall(struct.pack("I", number))
    for number, (_, server) in enumerate(pairs):
        assert exactly(server, 4) == struct.pack("I", number)
    for client, server in pairs:
        client.close()
        assert server.recv(1) == b""
        server.close()
    assert proxy.server.counters["connected"] == 100


# BIND


def test_bind(proxy):
    with proxy.connect() as client:
        handshake = ask(client, BIND, b"\x7f\x00\x00\x01", 0)
        host, port = handshake.bound
        with socket.create_connection((socket.inet_ntoa(host), port), timeout=PATIENCE) as peer:
            answer = exactly(client, 10)
            assert answer[:4] == b"\x05\x00\x00\x01"
            assert answer[4:] == write_address(socket.inet_aton("127.0.0.1"), peer.getsockname()[1])[1:]
            peer.sendall(b"from the peer")
            assert exactly(client, 13) == b"from the peer"
            client.sendall(b"to the peer")
            assert exactly(peer, 11) == b"to the peer"


def test_bind_lets_no_stranger_in(proxy):
    with proxy.connect() as client:
        # 127.0.0.2 is expected; 127.0.0.1 comes first.
        handshake = ask(client, BIND, b"\x7f\x00\x00\x02", 0)
        where = (socket.inet_ntoa(handshake.bound[0]), handshake.bound[1])
        with socket.create_connection(where, timeout=PATIENCE, source_address=("127.0.0.1", 0)) as stranger:
            assert stranger.recv(1) == b""
        with socket.create_connection(where, timeout=PATIENCE, source_address=("127.0.0.2", 0)):
            assert exactly(client, 10)[:8] == b"\x05\x00\x00\x01\x7f\x00\x00\x02"


def test_bind_ends_with_its_client_and_with_its_time(portable):
    with Running(portable=portable, bind_timeout=0.1) as proxy:
        with proxy.connect() as client:
            host, port = ask(client, BIND, bytes(4), 0).bound
            assert exactly(client, 10)[:2] == b"\x05\x06"
            assert client.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((socket.inet_ntoa(host), port), timeout=PATIENCE)
