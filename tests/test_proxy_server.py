"""The embedded SOCKS5 server as a whole: clients that vanish, errors of its own, starting and stopping."""

import os
import socket
import sys
import time
from random import Random

import pytest

from gateway.proxy import ListenError, Server
from tests.proxy_running import PATIENCE, RESET, Running, accept, ask, exactly, listening, request, to_eof, tunnel
from workers.socks.wire import BIND, CONNECT, UDP_ASSOCIATE


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


# Clients that go away

GREETING = b"\x05\x01\x00"
SCRIPTS = {
    "connect": GREETING + request(CONNECT, ("127.0.0.1", 9)),
    "bind": GREETING + request(BIND, ("127.0.0.1", 9)),
    "associate": GREETING + request(UDP_ASSOCIATE, ("0.0.0.0", 0)),
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=list(SCRIPTS))
@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_may_vanish_at_any_byte(proxy, script, how):
    for length in range(len(script) + 1):
        with proxy.connect() as client:
            client.sendall(script[:length])
            if how == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    nothing_is_left(proxy)


def test_random_bytes_do_no_harm(proxy):
    random = Random(1080)
    for _ in range(150):
        with proxy.connect() as client:
            # Never a whole request, which might lead out of this machine: no SOCKS5 at all, or too short a name.
            start = random.choice([b"\x00", b"\x04", b"G", GREETING + b"\x06", GREETING + b"\x05\x01\x00\x03\xff"])
            client.sendall(start + random.randbytes(random.randrange(1, 100)))
    nothing_is_left(proxy)


def test_closed_tunnels_leave_nothing(proxy, target):
    for number in range(60):
        client, server = tunnel(proxy, target)
        with client, server:
            client.sendall(os.urandom(1 << (number % 18)))
            if number % 3 == 0:
                server.shutdown(socket.SHUT_WR)
    nothing_is_left(proxy)


def nothing_is_left(proxy):
    """Wait until the server holds only its own two sockets, and no client's deadline."""
    deadline = time.monotonic() + PATIENCE
    server = proxy.server
    while (len(server._sockets), len(server._deadlines)) != (2, 0):
        assert time.monotonic() < deadline, f"left: {server._sockets}, {server._deadlines}"
        os.sched_yield()
    assert not server.counters["internal-error"]


# Starting and stopping


def test_an_address_in_use_is_one_sentence(target):
    with pytest.raises(ListenError, match=r"cannot listen on 127\.0\.0\.1:\d+: Address already in use"):
        Server(target.getsockname())


def test_listening_on_ipv6(portable):
    with listening("::1") as listener, Running(listen=("::1", 0), portable=portable) as proxy:
        with proxy.connect() as client:
            assert ask(client, CONNECT, socket.inet_pton(socket.AF_INET6, "::1"), listener.getsockname()[1]).reply == 0
            accept(listener).close()
        with proxy.connect() as client:
            assert len(ask(client, UDP_ASSOCIATE, bytes(16), 0).bound[0]) == 16


def test_stop_closes_every_socket(portable, target):
    with Running(portable=portable) as proxy:
        client, server = tunnel(proxy, target)
        idle = proxy.connect()
        idle.sendall(b"\x05\x01\x00")
        assert exactly(idle, 2) == b"\x05\x00"
    with client, server, idle:
        assert client.recv(1) == b""
        assert server.recv(1) == b""
        assert idle.recv(1) == b""


def test_an_internal_error_ends_one_client_only(proxy, target, caplog):
    lookup = proxy.server.resolver.lookup

    def broken(name, answer):
        raise RuntimeError("on purpose")

    proxy.server.resolver.lookup = broken
    with proxy.connect() as client:
        client.sendall(b"\x05\x01\x00\x05\x01\x00\x03\x01a\x00\x50")
        assert to_eof(client) == b"\x05\x00"
    proxy.server.resolver.lookup = lookup
    client, server = tunnel(proxy, target)
    client.close()
    server.close()
    assert proxy.server.counters["internal-error"] == 1
