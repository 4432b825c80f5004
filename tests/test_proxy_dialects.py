"""The embedded server's dialects of UDP inside TCP: F3, 05, 03 on a tunnel, and UoT, spoken byte by byte."""

import itertools
import os
import socket
import time
from random import Random

import pytest

from tests.proxy_running import PATIENCE, Running, ask, exactly, to_eof
from tests.test_proxy_udp import Echo, datagrams, header
from workers.socks.framing import (
    GOST_UDP,
    HEV_UDP,
    UOT2_NAME,
    UOT_NAME,
    GostFraming,
    HevFraming,
    Uot2Framing,
    UotFraming,
)
from workers.socks.wire import CONNECT, UDP_ASSOCIATE, ProtocolError

LOOPBACK = socket.inet_aton("127.0.0.1")

DIALECTS = {
    "gost": (GOST_UDP, bytes(4), GostFraming),
    "gost-v1": (UDP_ASSOCIATE, bytes(4), GostFraming),
    "hev": (HEV_UDP, bytes(4), HevFraming),
    "uot-v1": (CONNECT, UOT_NAME, UotFraming),
    "uot2": (CONNECT, UOT2_NAME, Uot2Framing),
}


@pytest.fixture
def proxy():
    with Running() as running:
        yield running


@pytest.fixture(params=DIALECTS)
def framed(request, proxy):
    with Framed(proxy, request.param) as framed:
        yield framed


class Framed:
    """The client's side of datagrams in a stream."""

    def __init__(self, proxy, dialect):
        command, host, framing = DIALECTS[dialect]
        self.stream = proxy.connect()
        self.reply = ask(self.stream, command, host, 0)
        assert self.reply.reply == 0
        self.framing = framing()
        self.waiting = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()

    def send(self, data, address):
        self.stream.sendall(self.framing.frame(header(address), data))

    def receive(self):
        while not self.waiting:
            data = self.stream.recv(65536)
            assert data, "EOF"
            self.waiting = self.framing.receive(data)
        return self.waiting.pop(0)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_there_and_back(framed, host):
    with Echo("::1" if host == "::1" else "127.0.0.1") as echo:
        framed.send(b"hello", (host, echo.address[1]))
        assert framed.receive() == header(echo.address) + b"hello"


def test_many_of_all_lengths_to_two_places(framed):
    with Echo() as one, Echo() as two:
        sent = [
            header(place) + bytes([number]) * length
            for number, (place, length) in enumerate(
                zip(
                    itertools.cycle([one.address] * 9 + [two.address]),
                    [100] * 40 + [1400] * 20 + [1, 2, 3],
                    strict=False,
                )
            )
        ]
        framed.stream.sendall(b"".join(framed.framing.frame(datagram[:10], datagram[10:]) for datagram in sent))
        assert sorted(framed.receive() for _ in sent) == sorted(sent)


def test_byte_by_byte(framed):
    with Echo() as echo:
        framed.stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in framed.framing.frame(header(echo.address), b"hello"):
            framed.stream.sendall(bytes((byte,)))
        framed.send(b"again", echo.address)
        assert framed.receive() == header(echo.address) + b"hello"
        assert framed.receive() == header(echo.address) + b"again"


def test_full_cone(framed):
    with datagrams() as first, datagrams() as stranger:
        framed.send(b"hello", first.getsockname())
        _, outside = first.recvfrom(100)
        stranger.sendto(b"unasked", outside)
        assert framed.receive() == header(stranger.getsockname()) + b"unasked"


def test_answers_that_would_break_the_client_are_dropped(proxy, framed):
    with datagrams() as target, Echo() as echo:
        framed.send(b"hello", target.getsockname())
        _, outside = target.recvfrom(100)
        target.sendto(b"", outside)
        target.sendto(bytes(40000), outside)
        framed.send(b"still there", echo.address)
        payloads = [framed.receive()[10:]]
        while payloads[-1] != b"still there":
            payloads.append(framed.receive()[10:])
    expected = []
    for payload in (b"", bytes(40000)):
        try:
            framed.framing.frame(header(echo.address), payload)
        except ProtocolError as error:
            assert proxy.server.counters[error.reason] == 1
        else:
            expected.append(payload)
    assert payloads == [*expected, b"still there"]


def test_a_name_that_is_none_loses_its_datagrams_only(framed):
    with Echo() as echo:
        framed.send(b"lost", ("no..such..name", 53))
        framed.send(b"hello", echo.address)
        assert framed.receive() == header(echo.address) + b"hello"


def test_half_close_ends_it(framed):
    with datagrams() as target:
        framed.send(b"hello", target.getsockname())
        target.recvfrom(100)
        framed.stream.shutdown(socket.SHUT_WR)
        assert to_eof(framed.stream) == b""


def test_a_frame_that_cannot_be_ends_it_in_one_line(proxy, caplog):
    for _ in range(2):
        with Framed(proxy, "gost") as framed:
            framed.stream.sendall(bytes.fromhex("0002 00 07 01020304 0035 6869"))
            assert to_eof(framed.stream) == b""
    assert proxy.server.counters["frame-address-type"] == 2
    assert len(caplog.records) == 1


@pytest.mark.parametrize("dialect", DIALECTS)
def test_random_frames_do_no_harm(proxy, dialect):
    random = Random(5)
    for _ in range(30):
        with Framed(proxy, dialect) as framed:
            # An address type first that no dialect has, sooner or later: nothing must leave this machine.
            framed.stream.sendall(random.randbytes(2) + b"\xee" + b"\xee" * random.randrange(300))
    with Echo() as echo, Framed(proxy, dialect) as framed:
        framed.send(b"hello", echo.address)
        assert framed.receive() == header(echo.address) + b"hello"
    assert proxy.server.counters["internal-error"] == 0


def test_replies(proxy):
    with Framed(proxy, "gost") as gost, Framed(proxy, "hev") as hev, Framed(proxy, "uot2") as uot:
        assert gost.reply.bound[0] == LOOPBACK
        assert hev.reply.bound == (bytes(4), 0)
        assert uot.reply.bound == (bytes(4), 0)
    with proxy.connect() as client:
        assert ask(client, HEV_UDP, bytes(16), 0).bound == (bytes(16), 0)


@pytest.mark.parametrize("method", range(0x81, 0x8A))
def test_ciphers_are_refused_in_one_line(proxy, method, caplog):
    for _ in range(2):
        with proxy.connect() as client:
            client.sendall(bytes((5, 1, method)))
            assert to_eof(client) == b"\x05\xff"
    assert [f"{method:#x}" in record.message for record in caplog.records] == [True]


def test_gost_may_not_have_a_port_of_this_machine(proxy):
    with proxy.connect() as client:
        assert ask(client, GOST_UDP, bytes(4), 5353).reply == 2
    assert proxy.server.counters["remote-forward-refused"] == 1


def test_uot_in_one_write_as_sing_does(proxy):
    with Echo() as echo, proxy.connect() as client:
        client.sendall(b"\x05\x01\x00")
        assert exactly(client, 2) == b"\x05\x00"
        address = header(echo.address)[3:]
        name = UOT2_NAME.encode()
        client.sendall(
            b"\x05\x01\x00\x03" + bytes((len(name),)) + name + b"\0\0" + b"\x01" + address + b"\x00\x02hi\x00\x00"
        )
        assert exactly(client, 10 + 4) == b"\x05\x00\x00\x01" + bytes(6) + b"\x00\x02hi"
        assert exactly(client, 2) == b"\x00\x00"


def test_what_comes_first_decides_what_03_means(proxy):
    with Echo() as echo, proxy.connect() as control:
        bound, port = ask(control, UDP_ASSOCIATE, bytes(4), 0).bound
        control.sendall(GostFraming().frame(header(echo.address), b"frame"))
        answer = GostFraming().receive(exactly(control, 15))
        assert answer == [header(echo.address) + b"frame"]
        with datagrams() as sock:
            sock.connect((socket.inet_ntoa(bound), port))
            sock.send(header(echo.address) + b"datagram")
            with pytest.raises(ConnectionRefusedError):
                sock.recv(100)


def test_a_stream_that_stops_within_a_frame_or_is_idle_is_closed():
    with Running(stall_timeout=0.05, idle_timeout=1.0) as proxy, Framed(proxy, "gost") as stuck:
        with Framed(proxy, "hev") as idle, Echo() as echo:
            stuck.stream.sendall(b"\x00\x05\x00")
            idle.send(b"alive", echo.address)
            assert idle.receive() == header(echo.address) + b"alive"
            assert to_eof(stuck.stream) == b""
            assert to_eof(idle.stream) == b""
        assert proxy.server.counters["tunnel-stalled-in-frame"] == 1
        assert proxy.server.counters["tunnel-idle"] == 1


def test_a_client_that_does_not_read_loses_datagrams_and_holds_nobody_up():
    with Running(stall_timeout=0.3) as proxy, Framed(proxy, "gost") as deaf, Echo() as echo:
        with datagrams() as outside:
            deaf.send(b"hello", outside.getsockname())
            _, place = outside.recvfrom(100)
            while not proxy.server.counters["tunnel-full"]:
                outside.sendto(bytes(16000), place)
        with Framed(proxy, "gost") as other:
            other.send(b"hello", echo.address)
            assert other.receive() == header(echo.address) + b"hello"
        deadline = time.monotonic() + PATIENCE
        while not proxy.server.counters["tunnel-stalled"]:
            assert time.monotonic() < deadline
            os.sched_yield()
