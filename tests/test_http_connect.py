"""HTTP CONNECT: golden bytes, answers of real proxies in any pieces, and h11 as the judge of the rest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.socks.http import MAX_HEAD, basic_credentials, http_handshake
from workers.socks.wire import CONNECT, UDP_ASSOCIATE, ProtocolError

TARGET = b"\x01\x02\x03\x04"
NOWHERE = (bytes(4), 0)


def handshake(credentials=""):
    return http_handshake(CONNECT, TARGET, 80, credentials)


def outcome(shake):
    return shake.done, shake.reply, shake.bound, shake.surplus


@pytest.mark.parametrize(
    ("host", "name"),
    [(TARGET, "1.2.3.4"), (bytes(15) + b"\1", "[::1]"), ("a.example", "a.example"), ("ä.example", "xn--4ca.example")],
)
def test_requests(host, name):
    shake = http_handshake(CONNECT, host, 443)
    assert shake.first_bytes == f"CONNECT {name}:443 HTTP/1.1\r\nHost: {name}:443\r\n\r\n".encode()
    assert shake.requested and not shake.done


def test_credentials_go_out_at_once():
    assert basic_credentials("Aladdin", "open sesame") == "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="
    assert basic_credentials("test", "123£") == "Basic dGVzdDoxMjPCow=="  # RFC 7617, 2.1
    assert handshake("Basic QTpC").first_bytes.endswith(b"\r\nProxy-Authorization: Basic QTpC\r\n\r\n")


def test_there_is_only_connect():
    shake = http_handshake(UDP_ASSOCIATE, TARGET, 80)
    assert (shake.done, shake.reply) == (True, 7)


SUCCESSES = [
    b"HTTP/1.0 200 Connection established\r\nProxy-agent: tinyproxy/1.11.1\r\n\r\n",
    b"HTTP/1.1 200 Connection established\r\n\r\n",  # v2ray, privoxy
    b"HTTP/1.1 200 Connection established\r\nConnection: close\r\n\r\n",  # pproxy
    b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\nHTTP/1.1 299 \r\n\r\n",
    b"HTTP/1.0 200\n\n",
]


@pytest.mark.parametrize("head", SUCCESSES)
@pytest.mark.parametrize("surplus", [b"", b"220 hello\r\n", b"\r\n\r\n", b"\n"])
def test_successes_in_any_pieces(head, surplus):
    stream = head + surplus
    for piece in (1, 2, 3, 7, len(stream)):
        shake = handshake()
        for at in range(0, len(stream), piece):
            assert shake.receive(stream[at : at + piece]) == b""
        assert outcome(shake) == (True, 0, NOWHERE, surplus)


@pytest.mark.parametrize(
    ("status", "reply"),
    [(403, 2), (404, 1), (405, 7), (500, 4), (501, 7), (502, 4), (503, 4), (504, 6), (302, 1), (451, 2)],
)
def test_refusals(status, reply):
    shake = handshake()
    shake.receive(f"HTTP/1.1 {status} Because\r\nContent-Length: 5\r\n\r\nsorry".encode())
    shake.receive(b"more")
    assert outcome(shake) == (True, reply, None, b"")


@pytest.mark.parametrize("status", [401, 407])
@pytest.mark.parametrize(("credentials", "says"), [("", "wants a username"), ("Basic x", "refuses the username")])
def test_authentication(credentials, says, status):
    with pytest.raises(ProtocolError, match=says) as caught:
        handshake(credentials).receive(b'HTTP/1.1 %d No\r\nProxy-Authenticate: Basic realm="x"\r\n\r\n' % status)
    assert caught.value.reason == "password-refused"


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x05\x00",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 099 \r\n\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        b"\n\n",
    ],
)
def test_what_is_no_status_line(garbage):
    with pytest.raises(ProtocolError) as caught:
        handshake().receive(garbage)
    assert caught.value.reason == "http-status-line"


@pytest.mark.parametrize("first", [b"HTTP/1.1 200 OK\r\n", b""])
def test_a_head_without_end_is_given_up(first):
    shake = handshake()
    shake.receive(first)
    again = b"X: y\r\n" if first else b"HTTP/1.1 100 Continue\r\n\r\n"
    with pytest.raises(ProtocolError) as caught:
        for _ in range(MAX_HEAD // len(again) + 2):
            shake.receive(again)
    assert caught.value.reason == "http-head-long"


@given(st.binary(max_size=60).map(lambda tail: b"HTTP/1.1 200" + tail) | st.binary(max_size=60))
def test_any_bytes(data):
    shake = handshake()
    try:
        assert shake.receive(data) == b""
    except ProtocolError as error:
        assert error.reason in ("http-status-line", "http-head-long", "password-refused")


@given(
    st.integers(200, 599),
    st.lists(
        st.tuples(st.from_regex(r"[A-Z][a-z]{1,8}", fullmatch=True), st.from_regex(r"[ -~]{0,20}", fullmatch=True)),
        max_size=4,
    ),
    st.binary(max_size=20),
)
def test_h11_sees_the_same(status, fields, surplus):
    h11 = pytest.importorskip("h11")
    if status in (401, 407):
        return
    stream = f"HTTP/1.1 {status} Reason\r\n".encode()
    stream += b"".join(f"{name}: {value}\r\n".encode() for name, value in fields) + b"\r\n" + surplus
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="CONNECT", target="1.2.3.4:80", headers=[("Host", "1.2.3.4:80")]))
    client.send(h11.EndOfMessage())
    client.receive_data(stream)
    event = client.next_event()
    shake = handshake()
    shake.receive(stream)
    assert event.status_code == status
    if status < 300:
        assert client.next_event() is h11.PAUSED
        assert outcome(shake) == (True, 0, NOWHERE, client.trailing_data[0])
    else:
        assert shake.done and shake.reply
