"""The carriers byte by byte, as real gost v1 speaks them: WebSocket and HTTP; and any chunking of any of them."""

import itertools
import os
import socket
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.proxy.forward import Forwarder
from gateway.proxy.httpserver import MAX_KEPT
from gateway.proxy.tls import ClientTls, ServerTls, Tls
from gateway.proxy.tunnelurl import parse_tunnel
from gateway.proxy.websocket import WebSocket
from tests.certificates import CA, LOCALHOST
from tests.proxy_running import PATIENCE, Running, accept, exactly, listening, request, to_eof
from tests.test_proxy_udp import Echo, header
from workers.socks.wire import CONNECT, ProtocolError

MASK = b"\x01\x02\x03\x04"
ASSOCIATE = bytes.fromhex("05 03 00 01 00000000 0000")


def masked(payload, first=0x82):
    assert len(payload) < 126
    return bytes((first, 0x80 | len(payload))) + MASK + bytes(a ^ b for a, b in zip(payload, itertools.cycle(MASK)))


def unmasked(frame):
    length = frame[1] & 0x7F
    return bytes(a ^ b for a, b in zip(frame[6 : 6 + length], itertools.cycle(frame[2:6])))


UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455, 1.3


def head(sock):
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        data += exactly(sock, 1)
    return data


@pytest.fixture
def ws():
    with Running(carrier="ws") as proxy, proxy.connect() as sock:
        sock.sendall(UPGRADE)
        answer = head(sock)
        assert answer.startswith(b"HTTP/1.1 101 ")
        assert ACCEPT in answer
        yield sock


# WebSocket, the server's end


def test_udp_in_websocket_as_gost_1_7_does_it(ws):
    with Echo() as echo:
        ws.sendall(masked(b"\x05\x01\x00"))
        assert exactly(ws, 4) == bytes.fromhex("8202 0500")
        ws.sendall(masked(ASSOCIATE))
        reply = exactly(ws, 12)
        assert reply[:6] == bytes.fromhex("820a 05000001")
        frame = b"\x00\x05\x00" + header(echo.address)[3:] + b"hello"
        for _ in range(2):
            ws.sendall(masked(frame))
            assert exactly(ws, 17) == bytes.fromhex("820f") + frame
        ws.sendall(masked(frame) + masked(frame))
        assert exactly(ws, 34) == (bytes.fromhex("820f") + frame) * 2


def test_text_fragments_and_pings(ws):
    ws.sendall(masked(b"\x05", 0x01) + masked(b"ping", 0x89) + masked(b"\x01\x00", 0x80))
    assert exactly(ws, 6) == b"\x8a\x04ping"
    assert exactly(ws, 4) == bytes.fromhex("8202 0500")


def test_byte_by_byte_in_one_message_each(ws):
    for byte in b"\x05\x01\x00":
        ws.sendall(masked(bytes((byte,))))
    assert exactly(ws, 4) == bytes.fromhex("8202 0500")


def test_pings_without_end_and_nobody_reads_the_pongs(monkeypatch):
    monkeypatch.setattr("gateway.proxy.stream.MAX_ANSWERS", 0)
    with Running(carrier="ws") as proxy, proxy.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(UPGRADE)
        with pytest.raises((ConnectionError, TimeoutError)):
            for _ in range(1000):
                sock.sendall(masked(bytes(100), 0x89) * 1000)
        assert proxy.server.counters["carrier-flood"] == 1


@given(cut=st.integers(1, len(UPGRADE) + 20))
def test_frames_right_behind_the_request_are_not_lost(cut):
    stream = UPGRADE + masked(b"one") + masked(b"two")
    server = WebSocket()
    assert [message for piece in chunks(stream, [cut]) if piece for message in server.receive(piece)[0]] == [
        b"one",
        b"two",
    ]


def test_a_frame_that_cannot_be_is_counted(caplog):
    with Running(carrier="ws") as proxy, proxy.connect() as sock:
        sock.sendall(UPGRADE)
        head(sock)
        sock.sendall(bytes.fromhex("8203 050100"))  # not masked
        assert exactly(sock, 4)[2:] == struct.pack("!H", 1002)
        assert proxy.server.counters["websocket-failed"] == 1
    assert "unmasked" in caplog.text


def test_a_close_frame_ends_it(ws):
    ws.sendall(masked(struct.pack("!H", 1000), 0x88))
    assert exactly(ws, 4) == bytes.fromhex("8802 03e8")
    assert to_eof(ws) == b""


@pytest.mark.parametrize(
    "garbage",
    [b"\x05\x01\x00", UPGRADE.replace(b"127.0.0.1", b"a\xff"), b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\x00" * 20000],
)
def test_no_websocket_is_400(garbage):
    with Running(carrier="ws") as proxy, proxy.connect() as sock:
        sock.sendall(garbage)
        sock.shutdown(socket.SHUT_WR)
        try:
            assert to_eof(sock)[:12] in (b"HTTP/1.1 400", b"")
        except ConnectionResetError:
            pass


# WebSocket, the client's end


def test_what_the_client_says_in_websocket():
    with listening() as listener:
        port = listener.getsockname()[1]
        forwarder = Forwarder(parse_tunnel(f"socks5+ws://127.0.0.1:{port}"), udp_mode="gost-v1")
        with Running(outbound=forwarder) as proxy, proxy.connect() as client:
            client.sendall(b"\x05\x01\x00" + ASSOCIATE)
            with accept(listener) as server:
                asked = head(server).decode().split("\r\n")
                assert asked[0] == "GET / HTTP/1.1"
                assert f"Host: 127.0.0.1:{port}" in asked
                unwanted = ("Origin", "Sec-WebSocket-Protocol", "Sec-WebSocket-Extensions")
                assert not any(line.startswith(unwanted) for line in asked)
                answer = WebSocket()
                server.sendall(answer.receive(("\r\n".join(asked)).encode())[1])
                assert unmasked(exactly(server, 9)) == b"\x05\x01\x00"
                server.sendall(bytes.fromhex("8202 0500"))
                assert unmasked(exactly(server, 16)) == ASSOCIATE
                # gost v1 over IPv6 leaves the address out, in the reply and in frames.
                server.sendall(bytes.fromhex("8206 05000001 ab60"))
                assert exactly(client, 12)[:4] == bytes.fromhex("0500 0500")
                server.sendall(bytes.fromhex("8208 0002 0001 4a38 6869"))
                server.sendall(bytes.fromhex("820c 0002 0001 7f000001 4a38 6869"))
                server.shutdown(socket.SHUT_WR)
                assert to_eof(client) == b""
        assert proxy.server.counters["frame-nameless"] == 1


# HTTP, the server's end


@pytest.fixture
def web():
    with Running(carrier="http") as proxy:
        yield proxy


def chunk(sock):
    size = b""
    while not size.endswith(b"\r\n"):
        size += exactly(sock, 1)
    data = exactly(sock, int(size, 16))
    assert exactly(sock, 2) == b"\r\n"
    return data


class Web:
    """gost v1's client: a downlink, and a connection for POSTs."""

    def __init__(self, proxy):
        self.down = proxy.connect()
        self.down.sendall(b"GET /s2c HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nUser-Agent: Go-http-client/1.1\r\n\r\n")
        answer = head(self.down).lower()
        assert answer.startswith(b"http/1.1 200 ")
        assert b"content-type: text/plain; charset=utf-8\r\n" in answer
        assert b"transfer-encoding: chunked\r\n" in answer
        self.token = chunk(self.down)
        assert len(self.token) == 36
        assert self.token == self.token.lower()
        self.up = proxy.connect()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.down.close()
        self.up.close()

    def post(self, body, how=None, target=None):
        how = how if how is not None else b"Content-Length: %d\r\nAccept-Encoding: gzip\r\n\r\n" % len(body)
        self.up.sendall(b"POST %s HTTP/1.1\r\nHost: a\r\n%s%s" % (target or b"/c2s?token=" + self.token, how, body))
        answer = head(self.up)
        assert b"content-length: 0\r\n" in answer.lower()
        return int(answer[9:12])


def test_udp_over_http_as_gost_1_7_asks_for_it(web):
    with Echo() as echo, Web(web) as client:
        assert client.post(b"\x05\x01\x00") == 200
        assert chunk(client.down) == b"\x05\x00"
        assert client.post(ASSOCIATE) == 200
        assert chunk(client.down)[:4] == bytes.fromhex("05000001")
        frame = b"\x00\x05\x00" + header(echo.address)[3:] + b"hello"
        for _ in range(3):
            assert client.post(frame) == 200
            assert chunk(client.down) == frame


@pytest.mark.parametrize("how", [b"Content-Length: 0\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"])
def test_an_empty_post_is_the_end(web, how):
    with listening() as target, Web(web) as client:
        client.post(b"\x05\x01\x00")
        chunk(client.down)
        client.post(request(CONNECT, target.getsockname()))
        chunk(client.down)
        with accept(target) as server:
            client.post(b"question")
            assert client.post(b"", how) == 200
            assert to_eof(server) == b"question"
            server.sendall(b"answer")
            assert chunk(client.down) == b"answer"
        assert chunk(client.down) == b""
        assert client.post(b"", how) == 400


def test_posts_that_are_refused(web):
    with Web(web) as client:
        assert client.post(b"x", target=b"/c2s?token=nobody") == 400
    with Web(web) as client:
        assert client.post(b"x", target=b"/elsewhere") == 404
    with Web(web) as client:
        client.up.sendall(b"GET /c2s?token=%s HTTP/1.1\r\nHost: a\r\n\r\n" % client.token)
        assert head(client.up).startswith(b"HTTP/1.1 405 ")
    with Web(web) as client:
        client.up.sendall(b"GET http://[::1 HTTP/1.1\r\nHost: a\r\n\r\n")
        assert head(client.up).startswith(b"HTTP/1.1 400 ")
    with Web(web) as client:
        client.up.sendall(b"nonsense\r\n\r\n")
        assert head(client.up).startswith(b"HTTP/1.1 400 ")


def test_large_bodies_and_back_pressure(web):
    data = os.urandom(1 << 20)
    with listening() as target, Web(web) as client:
        target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.post(b"\x05\x01\x00")
        chunk(client.down)
        client.post(request(CONNECT, target.getsockname()))
        chunk(client.down)
        with accept(target) as server:
            # What nobody reads is not answered, so the client posts no more: here after a few of these at most.
            client.up.settimeout(0.1)
            posted = 0
            with pytest.raises(TimeoutError):
                while posted < 64:
                    client.post(data)
                    posted += 1
            assert posted < 32
            assert exactly(server, len(data)) == data
            client.up.settimeout(PATIENCE)


def test_a_body_whose_end_comes_alone_is_not_empty(web):
    data = bytes(MAX_KEPT + 1)
    with listening() as target, Web(web) as client:
        client.post(b"\x05\x01\x00")
        chunk(client.down)
        client.post(request(CONNECT, target.getsockname()))
        chunk(client.down)
        with accept(target) as server:
            client.up.sendall(
                b"POST /c2s?token=%s HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n"
                % (client.token, len(data), data)
            )
            assert exactly(server, len(data)) == data
            client.up.sendall(b"0\r\n\r\n")
            assert head(client.up).startswith(b"HTTP/1.1 200 ")
            assert client.post(b"more") == 200
            assert exactly(server, 4) == b"more"


def test_a_client_that_vanishes(web):
    with listening() as target:
        with Web(web) as client:
            client.post(b"\x05\x01\x00")
            client.post(request(CONNECT, target.getsockname()))
            server = accept(target)
        with server, pytest.raises(ConnectionResetError):  # not as if all had been said
            to_eof(server)
    deadline = time.monotonic() + PATIENCE
    while web.server._http.streams or len(web.server._sockets) > 2:
        assert time.monotonic() < deadline
        os.sched_yield()


# HTTP, the client's end


def test_what_the_client_says_in_http():
    with listening() as listener:
        port = listener.getsockname()[1]
        forwarder = Forwarder(parse_tunnel(f"socks5+http://127.0.0.1:{port}"), udp_mode="gost-v1")
        with Running(outbound=forwarder) as proxy, proxy.connect() as client:
            client.sendall(b"\x05\x01\x00" + ASSOCIATE)
            with accept(listener) as down:
                asked = head(down).decode()
                assert asked.startswith("GET /s2c HTTP/1.1\r\n")
                token = "01234567-89ab-cdef-0123-456789abcdef"
                down.sendall(
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
                    b"24\r\n" + token.encode() + b"\r\n"
                )
                with accept(listener) as up:
                    for body, answer in (
                        (b"\x05\x01\x00", b"\x05\x00"),
                        (ASSOCIATE, bytes.fromhex("0500 0001 7f000001 ab60")),
                    ):
                        posted = head(up).decode()
                        assert posted.startswith(f"POST /c2s?token={token} HTTP/1.1\r\n")
                        assert f"\r\ncontent-length: {len(body)}\r\n" in posted.lower()
                        assert "content-type" not in posted.lower()
                        assert exactly(up, len(body)) == body
                        up.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                        down.sendall(b"%x\r\n%s\r\n" % (len(answer), answer))
                    assert exactly(client, 12)[:4] == bytes.fromhex("0500 0500")
                    client.close()
                    last = head(up).decode().lower()
                    assert last.startswith("post /c2s?token=")
                    assert "\r\ncontent-length: 0\r\n" in last
                    up.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                    assert to_eof(up) == b""
        assert proxy.server.counters["internal-error"] == 0


# Any chunking


def chunks(data, cuts):
    edges = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def shake_hands(client, server):
    down = client.start()
    while down:
        _, up = server.receive(down)
        _, down = client.receive(up) if up else ([], b"")
    assert client.ready
    assert server.ready


cuts = st.lists(st.integers(0, 1 << 20), max_size=10)
SERVER, CLIENT = ServerTls(LOCALHOST), ClientTls(ca=CA)


@given(messages=st.lists(st.binary(max_size=300), max_size=6), cuts=cuts, tls=st.booleans(), up=st.booleans())
def test_any_chunking_of_a_layer_gives_the_same_bytes(messages, cuts, tls, up):
    client, server = (CLIENT.connect("localhost"), SERVER.serve()) if tls else (WebSocket("localhost"), WebSocket())
    shake_hands(client, server)
    sender, receiver = (client, server) if up else (server, client)
    stream = b"".join(sender.send(message) for message in messages)
    received = [message for piece in chunks(stream, cuts) for message in receiver.receive(piece)[0]]
    assert b"".join(received) == b"".join(messages)
    if not tls:
        assert received == [message for message in messages if message]


@given(stream=st.binary(max_size=200), cuts=cuts, kind=st.sampled_from(["tls", "ws", "client-ws", "open-ws"]))
def test_random_bytes_are_bytes_or_a_protocol_error(stream, cuts, kind):
    layer = SERVER.serve() if kind == "tls" else WebSocket("a" if kind == "client-ws" else "")
    layer.start()
    if kind == "open-ws":
        layer.receive(UPGRADE)
    try:
        for piece in chunks(stream, cuts):
            if piece:
                layer.receive(piece)
    except ProtocolError as error:
        assert error.reason.startswith(("tls-", "websocket-"))
    assert isinstance(layer, Tls | WebSocket)
