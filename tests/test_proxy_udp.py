"""UDP ASSOCIATE of the embedded server: real datagrams on loopback."""

import socket
import struct
import threading

import pytest
import socks

from tests.proxy_running import PATIENCE, Running, ask, pysocks
from workers.socks.wire import UDP_ASSOCIATE, parse_datagram, write_datagram_header

LOOPBACK = socket.inet_aton("127.0.0.1")


@pytest.fixture(params=[False, True], ids=["linux", "portable"])
def proxy(request):
    with Running(portable=request.param) as running:
        yield running


class Echo:
    """A UDP service that sends everything back."""

    def __init__(self, host="127.0.0.1"):
        self.sock = datagrams(host)
        self.address = self.sock.getsockname()[:2]
        self.thread = threading.Thread(target=self._run)

    def _run(self):
        while True:
            data, source = self.sock.recvfrom(65535)
            if data == b"stop":
                return
            self.sock.sendto(data, source)

    def __enter__(self):
        self.sock.settimeout(None)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.sock.sendto(b"stop", self.address)
        self.thread.join(PATIENCE)
        self.sock.close()


def datagrams(host="127.0.0.1"):
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(PATIENCE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    try:
        sock.bind((host, 0))
    except OSError as error:
        sock.close()
        pytest.skip(f"this machine has no {host}: {error}")
    return sock


class Associated:
    """The client's side of an association: the control connection, and a socket connected to the relay."""

    def __init__(self, proxy, host="127.0.0.1"):
        self.control = proxy.connect()
        bound, port = ask(self.control, UDP_ASSOCIATE, bytes(4), 0).bound
        self.relay = (socket.inet_ntoa(bound), port)
        self.sock = datagrams(host)
        self.sock.connect(self.relay)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.control.close()
        self.sock.close()

    def send(self, data, address):
        self.sock.send(header(address) + data)

    def receive(self):
        data = self.sock.recv(65535)
        host, port, at = parse_datagram(data)
        return data[at:], (host, port)


def header(address):
    host, port = address[:2]
    try:
        packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    except OSError:
        packed = host
    return write_datagram_header(packed, port)


def settled(proxy, associated, address):
    """Send and receive one datagram: afterwards the proxy has worked off all that was sent before."""
    associated.send(b"settled", address)
    while associated.receive()[0] != b"settled":
        pass


def test_pysocks(proxy):
    with Echo() as echo, pysocks(proxy, socket.SOCK_DGRAM) as client:
        client.bind(("127.0.0.1", 0))
        client.sendto(b"hello", echo.address)
        assert client.recvfrom(100) == (b"hello", echo.address)


def test_the_reply_is_the_control_connections_address(proxy):
    with proxy.connect() as control:
        host, port = ask(control, UDP_ASSOCIATE, "0", 4711).bound
        assert host == LOOPBACK
        assert port not in (0, proxy.server.address[1])


@pytest.mark.parametrize("where", ["127.0.0.1", "::1"])
def test_both_families_over_an_ipv4_association(proxy, where):
    with Echo(where) as echo, Associated(proxy) as client:
        client.send(b"hello", echo.address)
        family = socket.AF_INET6 if ":" in where else socket.AF_INET
        assert client.receive() == (b"hello", (socket.inet_pton(family, where), echo.address[1]))


def test_names_are_looked_up_while_their_datagrams_wait(proxy):
    with Echo() as echo, Associated(proxy) as client:
        for number in range(5):
            client.send(b"%d" % number, ("localhost", echo.address[1]))
        assert [client.receive() for _ in range(5)] == [(b"%d" % n, (LOOPBACK, echo.address[1])) for n in range(5)]
        client.send(b"again", ("localhost", echo.address[1]))
        assert client.receive()[0] == b"again"


def test_a_name_that_is_none_loses_its_datagrams_only(proxy):
    with Echo() as echo, Associated(proxy) as client:
        client.send(b"lost", ("no..such..name", 53))
        settled(proxy, client, echo.address)


@pytest.mark.parametrize("size", [0, 1, 64, 1452, 1453, 9000, 65507 - 10])
def test_sizes(proxy, size):
    with Echo() as echo, Associated(proxy) as client:
        client.send(b"x" * size, echo.address)
        assert client.receive() == (b"x" * size, (LOOPBACK, echo.address[1]))


def test_bursts_of_all_lengths_and_places_arrive_in_order(proxy):
    with Echo() as one, Echo() as two, Associated(proxy) as client:
        places = [one.address] * 40 + [two.address] * 20 + [one.address, two.address] * 10
        sizes = [64] * 30 + [100] * 10 + [64] * 15 + [0] * 3 + [1400] * 10 + [200] * 12
        sent = {one.address[1]: [], two.address[1]: []}
        received = {one.address[1]: [], two.address[1]: []}
        for number, (place, size) in enumerate(zip(places, sizes, strict=True)):
            payload = struct.pack("I", number).ljust(size, b".")[:size]
            sent[place[1]].append(payload)
            client.send(payload, place)
        for _ in places:
            payload, (_, port) = client.receive()
            received[port].append(payload)
        assert received == sent


def test_a_client_that_sends_segmented(proxy):
    with Echo() as echo, Associated(proxy) as client:
        pieces = [header(echo.address) + struct.pack("I", n) * 16 for n in range(20)]
        pieces.append(header(echo.address) + b"short")
        try:
            client.sock.sendmsg(pieces, [(17, 103, struct.pack("H", len(pieces[0])))])
        except OSError as error:
            pytest.skip(f"no UDP_SEGMENT here: {error}")
        assert [client.receive()[0] for _ in pieces] == [piece[10:] for piece in pieces]


def test_full_cone(proxy):
    with datagrams() as first, datagrams() as stranger, Associated(proxy) as client:
        client.send(b"hello", first.getsockname())
        _, outside = first.recvfrom(100)
        stranger.sendto(b"unasked", outside)
        assert client.receive() == (b"unasked", (LOOPBACK, stranger.getsockname()[1]))
        client.send(b"answer", stranger.getsockname())
        assert stranger.recvfrom(100) == (b"answer", outside)


def test_only_the_first_source_is_listened_to(proxy):
    with Echo() as echo, Associated(proxy) as client, datagrams() as second, datagrams("127.0.0.2") as other_host:
        other_host.sendto(header(echo.address) + b"from another host", client.relay)
        settled(proxy, client, echo.address)
        second.sendto(header(echo.address) + b"from a second port", client.relay)
        other_host.sendto(header(echo.address) + b"from another host", client.relay)
        settled(proxy, client, echo.address)
        second.settimeout(0.05)
        with pytest.raises((TimeoutError, ConnectionRefusedError)):
            second.recv(100)
        assert proxy.server.counters["datagram-stranger"] >= 1


def test_malformed_datagrams_are_dropped_and_the_association_lives(proxy):
    with Echo() as echo, Associated(proxy) as client:
        good = header(echo.address) + b"fragment"
        settled(proxy, client, echo.address)
        for bad in (
            b"",
            b"x",
            b"\x00" * 6,
            b"\x00\x00\x01" + good[3:],
            b"\x00\x00\x00\x07" + good[4:],
            b"\0\0\0\x03\xff",
        ):
            client.sock.send(bad)
        client.send(b"port 0", ("127.0.0.1", 0))
        client.send(b"broadcast", ("255.255.255.255", 9))
        client.sock.send(b"\x12\x34" + header(echo.address)[2:] + b"RSV is not judged")
        assert client.receive()[0] == b"RSV is not judged"
        assert proxy.server.counters["datagram-malformed"] == 5
        assert proxy.server.counters["datagram-fragment"] == 1


def test_it_ends_with_its_control_connection(proxy):
    with Echo() as echo, Associated(proxy) as client:
        settled(proxy, client, echo.address)
        client.control.sendall(b"means nothing")
        settled(proxy, client, echo.address)
        client.control.shutdown(socket.SHUT_WR)
        assert client.control.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            client.send(b"anybody?", echo.address)
            client.sock.recv(100)


def test_the_target_going_away_does_no_harm(proxy):
    with Echo() as echo, Associated(proxy) as client:
        with datagrams() as closed:
            address = closed.getsockname()
        for _ in range(5):
            client.send(b"nobody there", address)
        settled(proxy, client, echo.address)


def test_pysocks_with_user_and_password():
    with Running(username="me", password="secret") as proxy, Echo() as echo:
        with pysocks(proxy, socket.SOCK_DGRAM, username="me", password="secret") as client:
            client.bind(("127.0.0.1", 0))
            client.sendto(b"hello", echo.address)
            assert client.recvfrom(100) == (b"hello", echo.address)
        with pysocks(proxy, socket.SOCK_DGRAM, username="me", password="no") as client, pytest.raises(socks.ProxyError):
            client.bind(("127.0.0.1", 0))
