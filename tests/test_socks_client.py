"""The client's handshake: scripts of both sides, any chunking, any garbage."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.socks.client import SocksHandshake
from workers.socks.wire import BIND, CONNECT, UDP_ASSOCIATE, ProtocolError, write_address

TARGET = (b"\x01\x02\x03\x04", 80)
REQUEST = bytes.fromhex("05 01 00 01 01020304 0050")
GRANTED = bytes.fromhex("05 00 00 01 7f000001 1f90")


def handshake(username=None, password=None):
    return SocksHandshake(CONNECT, *TARGET, username, password)


def outcome(socks):
    return socks.done, socks.reply, socks.bound, socks.surplus


def play(socks, pieces):
    """Feed the proxy's bytes piece by piece; return all that was sent, and how it ended."""
    sent = socks.first_bytes
    try:
        for piece in pieces:
            sent += socks.receive(piece)
    except ProtocolError as error:
        return sent, error.reason
    return sent, outcome(socks)


def test_without_credentials_only_method_0_is_offered():
    socks = handshake()
    assert socks.first_bytes == b"\x05\x01\x00"
    assert socks.receive(b"\x05\x00") == REQUEST
    assert not socks.done
    assert socks.receive(GRANTED) == b""
    assert outcome(socks) == (True, 0, (b"\x7f\x00\x00\x01", 8080), b"")


def test_with_credentials_the_password_is_sent_when_asked_for():
    socks = handshake("me", "secret")
    assert socks.first_bytes == b"\x05\x02\x00\x02"
    assert socks.receive(b"\x05\x02") == b"\x01\x02me\x06secret"
    assert socks.receive(b"\x01\x00") == REQUEST
    socks.receive(GRANTED)
    assert outcome(socks) == (True, 0, (b"\x7f\x00\x00\x01", 8080), b"")


def test_a_proxy_may_not_ask_for_the_password():
    assert handshake("me", "secret").receive(b"\x05\x00") == REQUEST


@pytest.mark.parametrize(
    ("command", "host", "wire"),
    [
        (CONNECT, "a.example", "05 01 00 03 09 612e6578616d706c65 0050"),
        (BIND, b"\x01\x02\x03\x04", "05 02 00 01 01020304 0050"),
        (UDP_ASSOCIATE, bytes(16), "05 03 00 04 00000000000000000000000000000000 0050"),
    ],
)
def test_requests(command, host, wire):
    assert SocksHandshake(command, host, 80).receive(b"\x05\x00") == bytes.fromhex(wire)


@pytest.mark.parametrize(
    "host",
    [b"\x00\x00\x00\x00", bytes(15) + b"\x01", "proxy.example", "", "\udcff\udcfe"],
)
def test_the_reply_may_hold_any_address_and_bytes_of_the_flow(host):
    socks = handshake()
    socks.receive(b"\x05\x00")
    socks.receive(b"\x05\x00\x00" + write_address(host, 1) + b"220 hello")
    assert outcome(socks) == (True, 0, (host, 1), b"220 hello")
    socks.receive(b" world")
    assert socks.surplus == b"220 hello world"


@pytest.mark.parametrize("rest", [b"", b"\x00\x01" + bytes(6), b"\x00\x03\x04dead", b"\x00\x99junk"])
def test_a_refusal_is_its_code_whatever_follows(rest):
    for code in range(1, 256):
        socks = handshake()
        socks.receive(b"\x05\x00")
        socks.receive(bytes((5, code)) + rest)
        assert outcome(socks) == (True, code, None, b"")


@pytest.mark.parametrize(
    ("credentials", "answer", "reason"),
    [
        ((), b"\x05\xff", "method-refused"),
        ((), b"\x05\x02", "method-not-offered"),
        (("me", "x"), b"\x05\x80", "method-not-offered"),
        ((), b"HTTP/1.1 400 Bad Request", "socks-version"),
        ((), b"\x00\x5a", "socks-version"),
        (("me", "x"), b"\x05\x02\x01\x01", "password-refused"),
        (("me", "x"), b"\x05\x02\x01\xff", "password-refused"),
        (("me", "x"), b"\x05\x02\x02\x01", "password-refused"),
        ((), b"\x05\x00HTTP/1.1", "socks-version"),
        ((), b"\x05\x00\x05\x00\x00\x02", "address-type"),
    ],
)
def test_what_ends_it(credentials, answer, reason):
    sent, ended = play(handshake(*credentials), [answer])
    assert ended == reason
    assert play(handshake(*credentials), [answer[i : i + 1] for i in range(len(answer))])[1] == reason
    assert sent


@pytest.mark.parametrize(("username", "password"), [("x" * 256, "y"), ("x", "y" * 256), ("ä" * 128, "y")])
def test_credentials_that_do_not_fit(username, password):
    with pytest.raises(ValueError, match="does not fit 255"):
        handshake(username, password)


def chunks(data, cuts):
    edges = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


answers = st.tuples(
    st.sampled_from([b"\x05\x00", b"\x05\x02\x01\x00", b"\x05\x02\x01\x01", b"\x05\xff"]),
    st.sampled_from([b"\x05\x00\x00", b"\x05\x05\x00", b"\x05\x00\x00\x09", b"\x04"]),
    st.one_of(
        st.binary(min_size=4, max_size=4).map(lambda host: write_address(host, 9)),
        st.binary(min_size=16, max_size=16).map(lambda host: write_address(host, 9)),
        st.text(max_size=60).map(lambda name: write_address(name.encode("utf-8", "ignore").decode(), 9)),
    ),
    st.binary(max_size=40),
).map(b"".join)


@given(answers, st.lists(st.integers(0, 1000), max_size=8), st.booleans())
def test_any_chunking_gives_the_same_result(answer, cuts, with_password):
    credentials = ("me", "secret") if with_password else ()
    sent, ended = play(handshake(*credentials), [answer])
    sent_in_pieces, ended_in_pieces = play(handshake(*credentials), chunks(answer, cuts))
    assert ended_in_pieces == ended
    # What led to an error in one piece is not sent any more; in pieces it has gone out before.
    assert sent_in_pieces == sent or isinstance(ended, str)


@given(st.binary(max_size=400), st.lists(st.integers(0, 1000), max_size=4), st.sampled_from([b"", b"\x05\x00"]))
def test_random_bytes_are_accepted_or_a_protocol_error(data, cuts, prefix):
    socks = handshake("me", "secret")
    _, ended = play(socks, chunks(prefix + data, cuts))
    assert isinstance(ended, str | tuple)
    assert len(socks._held) <= 261


def test_the_longest_answer_byte_by_byte():
    answer = b"\x05\x00\x00" + write_address("x" * 255, 443)
    socks = handshake()
    socks.receive(b"\x05\x00")
    for i in range(len(answer)):
        assert not socks.done
        assert socks.receive(answer[i : i + 1]) == b""
        assert len(socks._held) <= 261
    assert outcome(socks) == (True, 0, ("x" * 255, 443), b"")
    assert len(answer) == 262


@pytest.mark.parametrize(
    ("credentials", "offered"), [((None, None), b"\x05\x01\x00"), (("me", "pw"), b"\x05\x01\x02\x01\x02me\x02pw")]
)
@given(cuts=st.lists(st.integers(1, 4), max_size=10))
def test_pipelined_all_goes_out_at_once_and_answers_come_in_any_pieces(credentials, offered, cuts):
    socks = SocksHandshake(CONNECT, *TARGET, credentials[0], credentials[1], pipelined=True)
    assert socks.first_bytes == offered + REQUEST
    assert socks.requested
    stream = (b"\x05\x02\x01\x00" if credentials[0] else b"\x05\x00") + GRANTED + b"220"
    at = 0
    for cut in [*cuts, len(stream)]:
        assert socks.receive(stream[at : at + cut]) == b""
        at += cut
    assert outcome(socks) == (True, 0, (b"\x7f\x00\x00\x01", 8080), b"220")


def test_pipelined_one_method_is_offered_and_no_other_taken():
    socks = SocksHandshake(CONNECT, *TARGET, "me", "pw", pipelined=True)
    with pytest.raises(ProtocolError) as caught:
        socks.receive(b"\x05\x00")
    assert caught.value.reason == "method-not-offered"


@pytest.mark.parametrize("credentials", [(), ("me", "pw")])
def test_a_warm_connection_stops_before_its_request(credentials):
    socks = SocksHandshake.warm(*credentials)
    if credentials:
        assert socks.receive(b"\x05\x02") == b"\x01\x02me\x02pw"
        assert not socks.ready
        assert socks.receive(b"\x01\x00") == b""
    else:
        assert socks.receive(b"\x05\x00") == b""
    assert socks.ready and not socks.requested
    socks.ask(CONNECT, *TARGET)
    assert socks.first_bytes == REQUEST
    assert socks.receive(GRANTED) == b""
    assert outcome(socks) == (True, 0, (b"\x7f\x00\x00\x01", 8080), b"")
