"""The embedded SOCKS5 server up to the reply: CONNECT and the handshake, with PySocks and by hand."""

import errno
import os
import socket
import sys
import threading

import pytest
import socks

from gateway.proxy.reply import reply_for
from tests.proxy_running import (
    PATIENCE,
    Running,
    accept,
    ask,
    exactly,
    listening,
    pysocks,
    request,
    to_eof,
)
from workers.socks.wire import CONNECT


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


# CONNECT


@pytest.mark.parametrize("where", ["127.0.0.1", "::1", "localhost"])
def test_connect_with_pysocks(proxy, where):
    with listening("::1" if where == "::1" else "127.0.0.1") as listener, pysocks(proxy) as client:
        client.connect((where, listener.getsockname()[1]))
        with accept(listener) as server:
            client.sendall(b"ping")
            assert exactly(server, 4) == b"ping"
            server.sendall(b"pong")
            assert exactly(client, 4) == b"pong"


def test_a_name_that_spells_an_address(proxy, target):
    with proxy.connect() as client:
        assert ask(client, CONNECT, "127.0.0.1", target.getsockname()[1]).reply == 0
        accept(target).close()


def test_the_reply_holds_the_address_that_the_target_sees(proxy, target):
    host, port = target.getsockname()
    with proxy.connect() as client:
        handshake = ask(client, CONNECT, socket.inet_aton(host), port)
        with accept(target) as server:
            host, port = server.getpeername()
            assert handshake.bound == (socket.inet_aton(host), port)


def test_refused_is_reply_5(proxy):
    with listening() as listener:
        host, port = listener.getsockname()
    with proxy.connect() as client:
        assert ask(client, CONNECT, socket.inet_aton(host), port).reply == 5
        assert client.recv(1) == b""


def test_a_network_without_a_route_is_reply_3(proxy):
    with proxy.connect() as client:  # no TCP to a broadcast address: the kernel says ENETUNREACH, nothing leaves
        assert ask(client, CONNECT, b"\xff\xff\xff\xff", 80).reply == 3


def test_an_unknown_name_is_reply_4(proxy):
    with proxy.connect() as client:  # an empty label: no resolver is asked
        assert ask(client, CONNECT, "no..such..name", 80).reply == 4


def test_an_unanswered_connect_is_reply_6(portable):
    # A backlog that is full: Linux ignores further SYNs, as a host that is away would.
    with socket.socket() as full, Running(portable=portable, connect_timeout=0.2) as proxy:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        with proxy.connect() as client:
            assert ask(client, CONNECT, b"\x7f\x00\x00\x01", full.getsockname()[1]).reply == 6
        for filler in fillers:
            filler.close()


def test_the_next_address_of_a_name_is_tried(proxy, target):
    def two(name, answer):
        answer([(socket.AF_INET6, "::1"), (socket.AF_INET, "127.0.0.1")])

    proxy.server.resolver.lookup = two
    with proxy.connect() as client:  # nobody listens at ::1
        assert ask(client, CONNECT, "two.example", target.getsockname()[1]).reply == 0
        accept(target).close()


@pytest.mark.parametrize(
    ("number", "reply"),
    [
        (errno.ECONNREFUSED, 5),
        (errno.ENETUNREACH, 3),
        (errno.EHOSTUNREACH, 4),
        (errno.ETIMEDOUT, 6),
        (errno.EPERM, 2),
        (errno.EACCES, 2),
        (errno.EAFNOSUPPORT, 8),
        (errno.EMFILE, 1),
        (None, 1),
    ],
)
def test_replies_for_errors(number, reply):
    assert reply_for(number) == reply


@pytest.mark.parametrize("command", [0, 4, 0xF1])
def test_an_unknown_command_is_reply_7(proxy, command):
    with proxy.connect() as client:
        assert ask(client, command, b"\x7f\x00\x00\x01", 80).reply == 7


def test_an_unknown_address_type_is_reply_8(proxy):
    with proxy.connect() as client:
        client.sendall(b"\x05\x01\x00\x05\x01\x00\x02" + bytes(7))
        assert to_eof(client)[:4] == b"\x05\x00\x05\x08"


# The handshake


def test_byte_by_byte(proxy, target):
    host, port = target.getsockname()
    with proxy.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"\x05\x03\x00\x09\x02":
            client.send(bytes((byte,)))
        assert exactly(client, 2) == b"\x05\x00"
        for byte in request(CONNECT, (host, port)):
            client.send(bytes((byte,)))
        assert exactly(client, 10)[:2] == b"\x05\x00"
        accept(target).close()


def test_all_at_once_with_early_data_and_fin(portable, target):
    with Running(portable=portable, username="me", password="secret") as proxy, proxy.connect() as client:
        client.sendall(
            b"\x05\x02\x00\x02\x01\x02me\x06secret" + request(CONNECT, target.getsockname()) + b"GET / HTTP/1.0\r\n\r\n"
        )
        client.shutdown(socket.SHUT_WR)
        with accept(target) as server:
            assert to_eof(server) == b"GET / HTTP/1.0\r\n\r\n"
            server.sendall(b"200")
        assert to_eof(client)[:6] == b"\x05\x02\x01\x00\x05\x00"


def test_large_early_data(proxy, target):
    early = os.urandom(300_000)
    with proxy.connect() as client:
        sender = threading.Thread(
            target=lambda: client.sendall(b"\x05\x01\x00" + request(CONNECT, target.getsockname()) + early)
        )
        sender.start()
        with accept(target) as server:
            assert exactly(server, len(early)) == early
        sender.join(PATIENCE)


@pytest.mark.parametrize("user", ["me", "wer bin ich? ä"])
def test_user_and_password_with_pysocks(portable, target, user):
    with Running(portable=portable, username=user, password="secret") as proxy:
        with pysocks(proxy, username=user, password="secret") as client:
            client.connect(target.getsockname())
            accept(target).close()
        with pysocks(proxy, username=user, password="wrong") as client, pytest.raises(socks.ProxyError, match="failed"):
            client.connect(target.getsockname())
        with pysocks(proxy) as client, pytest.raises(socks.ProxyError, match="rejected"):
            client.connect(target.getsockname())
        assert proxy.server.counters["password-refused"] == 1
        assert proxy.server.counters["method-refused"] == 1


def test_without_a_common_method_the_answer_is_ff(proxy):
    for methods in (b"\x05\x00", b"\x05\x02\x02\x80"):
        with proxy.connect() as client:
            client.sendall(methods + b"what follows is never read")
            assert to_eof(client) == b"\x05\xff"


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x04\x01\x00\x50\x7f\x00\x00\x01\x00", b"\xff" * 5000]
)
def test_garbage_is_hung_up_on(proxy, garbage):
    with proxy.connect() as client:
        client.sendall(garbage)
        with_error = b""
        try:
            with_error = to_eof(client)
        except ConnectionResetError:
            pass
        assert with_error == b""
    assert proxy.server.counters["socks-version"] == 1


def test_a_handshake_that_never_ends_is_ended(portable):
    with Running(portable=portable, handshake_timeout=0.1) as proxy, proxy.connect() as silent, proxy.connect() as slow:
        slow.sendall(b"\x05\x05\x00")
        assert silent.recv(1) == b""
        assert slow.recv(1) == b""
        assert proxy.server.counters["handshake-timeout"] == 2
