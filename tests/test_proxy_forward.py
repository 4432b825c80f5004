"""Two of our servers, one behind the other: every carrier, every dialect of UDP, both ends."""

import itertools
import os
import socket
import threading
import time

import pytest

from gateway.proxy.forward import Forwarder
from gateway.proxy.outbound import Direct
from gateway.proxy.tls import ClientTls, ServerTls
from gateway.proxy.tunnelurl import UDP_MODES, parse_tunnel, parse_via
from gateway.proxyurl import ConfigError
from tests.certificates import CA, LOCALHOST
from tests.httpproxy import HttpProxy
from tests.proxy_running import PATIENCE, Running, accept, ask, exactly, listening, request, to_eof, tunnel
from tests.test_proxy_udp import Associated, Echo, datagrams, settled
from workers.socks.wire import BIND, CONNECT, UDP_ASSOCIATE, parse_address

LOOPBACK = socket.inet_aton("127.0.0.1")
CARRIERS = ("raw", "tls", "ws", "wss", "http")
DIALECTS = ("gost", "gost-v1", "hev", "uot", "uot-v1")


class Pair:
    """A server, and one that forwards to it; `far` and `near` are options of theirs."""

    def __init__(self, carrier="raw", far=None, credentials="", **near):
        self.far = Running(carrier=carrier, tls=ServerTls(LOCALHOST), **far or {})
        scheme = "socks5" if carrier == "raw" else f"socks5+{carrier}"
        port = self.far.server.address[1]
        self.forwarder = Forwarder(
            parse_tunnel(f"{scheme}://{credentials}localhost:{port}"),
            tls=near.pop("tls", None) or ClientTls(ca=CA),
            **near,
        )
        self.near = Running(outbound=self.forwarder)

    def __enter__(self):
        self.far.__enter__()
        self.near.__enter__()
        return self

    def __exit__(self, *_):
        self.near.__exit__()
        self.far.__exit__()
        for side in (self.near, self.far):
            assert side.server.counters["internal-error"] == 0

    @property
    def server(self):
        return self.near.server

    def connect(self):
        return self.near.connect()


@pytest.fixture(params=CARRIERS)
def pair(request):
    with Pair(request.param) as pair:
        yield pair


@pytest.fixture
def target():
    with listening() as listener:
        yield listener


# TCP


@pytest.mark.parametrize("where", ["127.0.0.1", "::1", "localhost"])
def test_connect(pair, where):
    with listening("::1" if where == "::1" else "127.0.0.1") as listener, pair.connect() as client:
        host = where if where == "localhost" else socket.inet_pton(listener.family, where)
        assert ask(client, CONNECT, host, listener.getsockname()[1]).reply == 0
        with accept(listener) as server:
            client.sendall(b"ping")
            assert exactly(server, 4) == b"ping"
            server.sendall(b"pong")
            assert exactly(client, 4) == b"pong"


def test_bulk_both_ways_at_once(pair, target):
    data = os.urandom(3 << 20)
    client, server = tunnel(pair, target)
    with client, server:
        got = {}

        def read(name, sock):
            got[name] = to_eof(sock)

        def write(sock):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        threads = [
            threading.Thread(target=call, args=arguments)
            for call, arguments in (
                (read, ("client", client)),
                (read, ("server", server)),
                (write, (client,)),
                (write, (server,)),
            )
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(4 * PATIENCE)
        assert got["client"] == data
        assert got["server"] == data


@pytest.mark.parametrize("first", ["client", "server"])
def test_half_close(pair, target, first):
    client, server = tunnel(pair, target)
    with client, server:
        one, other = (client, server) if first == "client" else (server, client)
        one.sendall(b"question")
        one.shutdown(socket.SHUT_WR)
        assert to_eof(other) == b"question"
        other.sendall(b"answer")
        other.close()
        assert to_eof(one) == b"answer"


def test_a_client_that_sends_all_and_its_fin_at_once(pair, target):
    with pair.connect() as client:
        client.sendall(b"\x05\x01\x00" + request(CONNECT, target.getsockname()) + b"early")
        client.shutdown(socket.SHUT_WR)
        with accept(target) as server:
            assert to_eof(server) == b"early"
            server.sendall(b"late")
        assert to_eof(client)[12:] == b"late"


def test_refusals_come_through(pair, target):
    with listening() as closed:
        address = closed.getsockname()
    with pair.connect() as client:
        assert ask(client, CONNECT, LOOPBACK, address[1]).reply == 5
    with pair.connect() as client:
        assert ask(client, CONNECT, "no..such..name", 80).reply == 4
    assert not pair.forwarder._is_down


def test_bind(pair):
    with pair.connect() as client:
        host, port = ask(client, BIND, bytes(4), 0).bound
        with socket.create_connection((socket.inet_ntoa(host), port), timeout=PATIENCE) as peer:
            reply = exactly(client, 10)
            assert reply[:3] == b"\x05\x00\x00"
            assert parse_address(reply, 3) == (LOOPBACK, peer.getsockname()[1], 10)
            client.sendall(b"ping")
            assert exactly(peer, 4) == b"ping"
            peer.sendall(b"pong")
            assert exactly(client, 4) == b"pong"


def test_nothing_is_left(pair, target):
    with Echo() as echo:
        for number in range(20):
            client, server = tunnel(pair, target)
            client.sendall(os.urandom(1 << (number % 18)))
            client.close()
            server.close()
            with Associated(pair) as associated:
                settled(pair, associated, echo.address)
    deadline = time.monotonic() + PATIENCE
    for side in (pair.near.server, pair.far.server):
        while (len(side._sockets), len(side._deadlines)) != (2, 0):
            assert time.monotonic() < deadline, f"left: {side._sockets}, {side._deadlines}"
            os.sched_yield()


# UDP


@pytest.fixture(params=itertools.product(CARRIERS, DIALECTS), ids="-".join)
def udp(request):
    carrier, mode = request.param
    with Pair(carrier, udp_mode=mode) as pair:
        yield pair


def test_udp(udp):
    with Echo() as echo, Echo("::1") as echo6, Associated(udp) as client:
        client.send(b"hello", echo.address)
        assert client.receive() == (b"hello", (LOOPBACK, echo.address[1]))
        client.send(b"hello", echo6.address)
        assert client.receive() == (b"hello", (bytes(15) + b"\x01", echo6.address[1]))
        client.send(b"hello", ("localhost", echo.address[1]))
        assert client.receive() == (b"hello", (LOOPBACK, echo.address[1]))
        sizes = [1, 64, 64, 64, 1400, 1400, 300] * 3
        for size in sizes:
            client.send(bytes(size), echo.address)
        assert [len(client.receive()[0]) for _ in sizes] == sizes
        client.send(b"", echo.address)
        settled(udp, client, echo.address)


def test_udp_is_a_full_cone(udp):
    with datagrams() as first, datagrams() as stranger, Associated(udp) as client:
        client.send(b"hello", first.getsockname())
        _, outside = first.recvfrom(100)
        stranger.sendto(b"unasked", outside)
        assert client.receive() == (b"unasked", (LOOPBACK, stranger.getsockname()[1]))


def test_udp_ends_on_both_sides(udp):
    with Echo() as echo, Associated(udp) as client:
        settled(udp, client, echo.address)
        client.control.close()
        deadline = time.monotonic() + PATIENCE
        while len(udp.far.server._sockets) != 2:
            assert time.monotonic() < deadline
            os.sched_yield()


def test_udp_beside_the_tunnel():
    with Pair(udp_mode="udp") as pair, Echo() as echo, Associated(pair) as client:
        for size in (1, 0, 64, 64, 9000):
            client.send(bytes(size), echo.address)
            assert client.receive() == (bytes(size), (LOOPBACK, echo.address[1]))


@pytest.mark.parametrize(("carrier", "way"), [("raw", "udp"), ("ws", "gost")])
def test_auto_takes_what_is_granted_first_and_says_so(carrier, way, caplog):
    caplog.set_level("INFO")
    with Pair(carrier) as pair, Echo() as echo:
        for _ in range(2):
            with Associated(pair) as client:
                settled(pair, client, echo.address)
        assert pair.forwarder._found == way
    assert sum("UDP goes" in record.message for record in caplog.records) == 1


def test_a_tunnel_that_breaks_ends_the_association():
    with Pair("tls") as pair, Echo() as echo, Associated(pair) as client:
        settled(pair, client, echo.address)
        pair.far.server.stop()
        assert to_eof(client.control) == b""
        assert pair.near.server.counters["tunnel-ended"] == 1


def test_chained():
    with Pair("wss", udp_mode="hev") as last:
        address = last.near.server.address
        forwarder = Forwarder(parse_tunnel(f"socks5://127.0.0.1:{address[1]}"), udp_mode="uot")
        with Running(outbound=forwarder) as proxy, Echo() as echo, Associated(proxy) as client:
            client.send(b"hello", echo.address)
            assert client.receive() == (b"hello", (LOOPBACK, echo.address[1]))


@pytest.mark.parametrize("mode", ["udp", "gost"])
def test_every_socket_that_leaves_can_be_marked(mode):
    opened = []

    def open_socket(family, kind):
        opened.append(kind)
        return socket.socket(family, kind)

    with Running(open_socket=open_socket) as far:
        forwarder = Forwarder(parse_tunnel(f"socks5://127.0.0.1:{far.server.address[1]}"), udp_mode=mode)
        with Running(outbound=forwarder, open_socket=open_socket) as near, Echo() as echo, Associated(near) as client:
            settled(near, client, echo.address)
    # The tunnel, the way out behind it, and beside it the way to the other server's relay.
    assert sorted(opened) == [socket.SOCK_STREAM, *[socket.SOCK_DGRAM] * (2 if mode == "udp" else 1)]


class Tcp(Direct):
    """The outbound of a server that has no UDP."""

    def associate(self, server, session):
        session.refuse(7, "no-udp")


def test_a_server_without_udp_is_asked_once_for_each_dialect(caplog):
    with Running(outbound=Tcp()) as far:
        forwarder = Forwarder(parse_tunnel(f"socks5://localhost:{far.server.address[1]}"))
        with Running(outbound=forwarder) as near:
            for _ in range(3):
                with near.connect() as client:
                    assert ask(client, UDP_ASSOCIATE, bytes(4), 0).reply == 7
        assert far.server.counters["no-udp"] == len(UDP_MODES["auto"]) + 1
        assert near.server.counters["tunnel-no-udp"] == 2
    assert sum("carries no UDP" in record.message for record in caplog.records) == 1


def test_a_success_that_is_not_meant_leads_to_another_way():
    with listening() as listener:
        forwarder = Forwarder(parse_tunnel(f"socks5://127.0.0.1:{listener.getsockname()[1]}"))
        forwarder._ways = ("uot", "gost-v1")
        with Running(outbound=forwarder) as near:
            for command in (CONNECT, UDP_ASSOCIATE):
                with near.connect() as client:
                    client.sendall(b"\x05\x01\x00" + request(UDP_ASSOCIATE, ("0.0.0.0", 0)))
                    with accept(listener) as server:
                        assert exactly(server, 3) == b"\x05\x01\x00"
                        server.sendall(b"\x05\x00")
                        assert server.recv(100)[1] == command
                        server.sendall(bytes.fromhex("05000001 00000000 0000"))
                        assert exactly(client, 12)[3] == 0
                    assert to_eof(client) == b""


# Who is let in


@pytest.mark.parametrize("carrier", ["raw", "wss"])
@pytest.mark.parametrize("socks_tls", ["off", "gost", "gost-v1"])
@pytest.mark.parametrize("password", ["", "secret"])
def test_passwords_and_tls_methods(carrier, socks_tls, password, target):
    far = {"username": "me", "password": password} if password else {}
    credentials = f"me:{password}@" if password else ""
    with Pair(carrier, far, credentials, socks_tls=socks_tls) as pair, Echo() as echo:
        client, server = tunnel(pair, target)
        with client, server:
            client.sendall(b"ping")
            assert exactly(server, 4) == b"ping"
        with Associated(pair) as associated:
            settled(pair, associated, echo.address)


@pytest.mark.parametrize("socks_tls", ["off", "gost", "gost-v1"])
def test_a_wrong_password(socks_tls, caplog):
    far = {"username": "me", "password": "secret"}
    with Pair("raw", far, "me:wrong@", socks_tls=socks_tls) as pair:
        for _ in range(2):
            with pair.connect() as client:
                assert ask(client, CONNECT, LOOPBACK, 9).reply == 1
    assert ["refuses the username or password" in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize("carrier", ["tls", "wss"])
@pytest.mark.parametrize("how", ["unknown-ca", "wrong-name", "insecure"])
def test_certificates_are_checked(carrier, how, caplog, target):
    tls = {
        "unknown-ca": ClientTls,
        "wrong-name": lambda: ClientTls(ca=CA, server_name="elsewhere.example"),
        "insecure": lambda: ClientTls(insecure=True),
    }[how]()
    with Pair(carrier, tls=tls) as pair, pair.connect() as client:
        host, port = target.getsockname()
        reply = ask(client, CONNECT, socket.inet_aton(host), port).reply
        assert (reply == 0) == (how == "insecure")
        if how != "insecure":
            assert pair.near.server.counters["tls-certificate"] == 1
            assert any("certificate is refused" in record.message for record in caplog.records)


def test_client_certificates(target):
    tls = ServerTls(LOCALHOST, client_ca=CA)
    shown = ClientTls(ca=CA, certificate=LOCALHOST)
    for client_tls, reply in ((shown, 0), (ClientTls(ca=CA), 1)):
        with Running(carrier="tls", tls=tls) as far:
            url = parse_tunnel(f"socks5+tls://localhost:{far.server.address[1]}")
            with Running(outbound=Forwarder(url, tls=client_tls)) as near, near.connect() as client:
                assert ask(client, CONNECT, LOOPBACK, target.getsockname()[1]).reply == reply


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("garbage", [b"HTTP/1.1 200 OK\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"\x05\xff", b""])
def test_a_server_that_speaks_something_else(carrier, garbage):
    with listening() as listener:
        port = listener.getsockname()[1]
        scheme = "socks5" if carrier == "raw" else f"socks5+{carrier}"
        forwarder = Forwarder(parse_tunnel(f"{scheme}://127.0.0.1:{port}"), tls=ClientTls(ca=CA))
        with Running(outbound=forwarder) as near, near.connect() as client:
            client.sendall(b"\x05\x01\x00" + request(CONNECT, ("127.0.0.1", 9)))
            with accept(listener) as server:
                server.recv(1)
                server.sendall(garbage)
                server.shutdown(socket.SHUT_WR)
                assert exactly(client, 12)[3] != 0
            assert near.server.counters["internal-error"] == 0


# The proxy before the tunnel


@pytest.mark.parametrize("carrier", CARRIERS)
def test_via_http(carrier, target):
    with HttpProxy() as via, Pair(carrier, via=parse_via(f"http://via:me@127.0.0.1:{via.port}")) as pair:
        for _ in range(2):
            client, server = tunnel(pair, target)
            with client, server:
                for _ in range(3):
                    client.sendall(b"ping")
                    assert exactly(server, 4) == b"ping"
                server.sendall(b"pong" * 100000)
                assert exactly(client, 400000) == b"pong" * 100000
        with Echo() as echo, Associated(pair) as associated:
            settled(pair, associated, echo.address)
        methods = {head[0].split()[0] for head in via.heads}
        assert methods == ({"GET", "POST"} if carrier == "http" else {"CONNECT"})


@pytest.mark.parametrize("carrier", ["raw", "http"])
def test_via_http_with_a_wrong_password(carrier, caplog):
    with (
        HttpProxy() as via,
        Pair(carrier, via=parse_via(f"http://via:wrong@127.0.0.1:{via.port}")) as pair,
        pair.connect() as client,
    ):
        assert ask(client, CONNECT, LOOPBACK, 9).reply == 1
    assert any("407" in record.message for record in caplog.records)


@pytest.mark.parametrize("carrier", [carrier for carrier in CARRIERS if carrier != "http"])
def test_via_socks(carrier, target):
    with Running(username="via", password="me") as via:
        proxy = parse_via(f"socks5://via:me@127.0.0.1:{via.server.address[1]}")
        with Pair(carrier, via=proxy) as pair:
            client, server = tunnel(pair, target)
            with client, server:
                client.sendall(b"ping")
                assert exactly(server, 4) == b"ping"
            assert via.server.counters["connected"] == 1
            with Echo() as echo, Associated(pair) as associated:
                settled(pair, associated, echo.address)
            assert via.server.counters["connected"] == 2


# URLs


def test_a_host_as_http_has_it():
    assert Forwarder(parse_tunnel("socks5+ws://bücher.example")).authority == "xn--bcher-kva.example:80"
    assert Forwarder(parse_tunnel("socks5+wss://[::1]:1")).authority == "[::1]:1"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("localhost", "socks5://localhost:1080"),
        ("socks5://me:secret@[::1]", "socks5://me@[::1]:1080"),
        ("socks5+tls://a.example:443/", "socks5+tls://a.example:443"),
        ("socks5+ws://a.example/ws?x=1", "socks5+ws://a.example:80/ws?x=1"),
        ("SOCKS5+WSS://a.example", "socks5+wss://a.example:443"),
    ],
)
def test_urls(text, shown):
    assert str(parse_tunnel(text)) == shown
    assert parse_tunnel(shown) == parse_tunnel(text) or "secret" in text


@pytest.mark.parametrize(
    "text",
    ["http://a", "socks5://", "socks5+tls://a/x", "socks5+ws://a/ä", "socks5+ws://a/ b", "a:x", "::1", "x://y://z"],
)
def test_urls_that_are_none(text):
    with pytest.raises(ConfigError):
        parse_tunnel(text)
