"""DNS over TCP: what a client asks by UDP comes back by UDP, though the proxy has none."""

import struct
import time

import dpkt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.shard import CLIENT4, CLIENT6, Shard, datagrams, udp_packet, unreachable
from tests.socksproxy import Proxy
from workers import counts
from workers.dns.over_tcp import MAX_OUTSTANDING, answer_limit, question_of, without_records
from workers.udp import Udp

RESOLVER4 = b"\x08\x08\x08\x08"
RESOLVER6 = b"\x26\x06" + bytes(13) + b"\x01"


def query(name="Example.Org", number=77, edns=0, kind=1):
    message = dpkt.dns.DNS(id=number, op=dpkt.dns.DNS_RD, qd=[dpkt.dns.DNS.Q(name=name, type=kind)])
    packed = bytes(message)
    if edns:
        packed = packed[:10] + b"\0\1" + packed[12:] + b"\0" + struct.pack(">HHIH", 41, edns, 0, 0)
    return packed


def answer(message, addresses=1):
    """Answer a question as a resolver would."""
    asked = dpkt.dns.DNS(message)
    records = [
        dpkt.dns.DNS.RR(
            name=asked.qd[0].name, type=1, ttl=60, rlen=4, rdata=struct.pack(">I", n), ip=struct.pack(">I", n)
        )
        for n in range(addresses)
    ]
    return bytes(dpkt.dns.DNS(id=asked.id, op=0x8180, qd=asked.qd, an=records))


@pytest.fixture
def shard():
    made = Shard(scheme="socks5")
    made.udp = Udp(made)
    made.proxy = Proxy(made)
    made.proxy.asked = []
    yield made
    made.proxy.stop()
    made.close()


@pytest.fixture
def no_udp(shard):
    """A shard that has learned that its proxy has no UDP; CONNECT works from now on."""
    shard.proxy.reply = 7
    shard.receive(udp_packet(b"x"))
    shard.run_until(lambda: shard.sent)
    shard.sent.clear()
    shard.proxy.requests.clear()
    shard.proxy.reply = 0

    def resolver(message):
        shard.proxy.asked.append(message)
        return answer(message)

    shard.proxy.resolver = resolver
    return shard


def ask(shard, message, source=CLIENT4, sport=1000, resolver=RESOLVER4):
    shard.receive(udp_packet(message, source, sport=sport, destination=resolver, dport=53))


def answers(shard, number):
    shard.run_until(lambda: len(shard.sent) >= number)
    came = [each for frame in shard.sent for each in datagrams(frame)]
    shard.sent.clear()
    return came


@pytest.mark.parametrize(("source", "resolver"), [(CLIENT4, RESOLVER4), (CLIENT6, RESOLVER6)])
def test_a_question_goes_through_connect(no_udp, source, resolver):
    ask(no_udp, query(), source, resolver=resolver)
    [(origin, sport, destination, dport, payload)] = answers(no_udp, 1)
    assert (origin, sport, destination, dport) == (resolver, 53, source, 1000)
    message = dpkt.dns.DNS(payload)
    assert (message.id, message.qr, message.qd[0].name) == (77, 1, "Example.Org")
    assert len(message.an) == 1
    atyp = b"\x01" if len(resolver) == 4 else b"\x04"
    assert no_udp.proxy.requests == [b"\x05\x01\x00" + atyp + resolver + b"\0\x35"]
    assert no_udp.counted(counts.DNS_OVER_TCP_QUERIES) == 1


def test_the_question_that_waited_for_the_association_is_not_lost(shard):
    shard.proxy.reply = 7
    shard.proxy.resolver = answer
    ask(shard, query())
    # The proxy refuses the association, and then does what it can.
    shard.run_until(lambda: shard.proxy.requests)
    shard.proxy.reply = 0
    assert len(answers(shard, 1)) == 1


def test_one_connection_and_distinct_ids_for_all_clients(no_udp):
    for sport in range(2000, 2030):
        ask(no_udp, query(f"name{sport}.example"), sport=sport)
    came = answers(no_udp, 30)
    assert len(no_udp.proxy.requests) == 1
    assert len({message[:2] for message in no_udp.proxy.asked}) == 30
    for _, _, _, dport, payload in came:
        message = dpkt.dns.DNS(payload)
        assert (message.id, message.qd[0].name) == (77, f"name{dport}.example")


def test_answers_in_any_order_and_in_pieces(no_udp):
    held = []

    def resolver(message):
        held.append(answer(message))

    no_udp.proxy.resolver = resolver
    for sport in range(2000, 2010):
        ask(no_udp, query(f"name{sport}.example"), sport=sport)
    no_udp.run_until(lambda: len(held) == 10)
    stream = b"".join(len(each).to_bytes(2) + each for each in reversed(held))
    [connection] = no_udp.proxy.clients
    for at in range(0, len(stream), 7):
        connection.send(stream[at : at + 7])
        no_udp.poll(0.01)
    assert [each[3] for each in answers(no_udp, 10)] == list(range(2009, 1999, -1))


def test_a_question_asked_twice_is_one(no_udp):
    ask(no_udp, query())
    ask(no_udp, query())
    answers(no_udp, 1)
    assert len(no_udp.proxy.asked) == 1


@pytest.mark.parametrize(
    ("edns", "addresses", "truncated"),
    [(0, 20, False), (0, 40, True), (1232, 60, False), (1232, 90, True), (65535, 120, True)],
)
def test_what_is_too_large_is_truncated(no_udp, edns, addresses, truncated):
    no_udp.proxy.resolver = lambda message: answer(message, addresses)
    ask(no_udp, query(edns=edns))
    [(_, _, _, _, payload)] = answers(no_udp, 1)
    message = dpkt.dns.DNS(payload)
    assert bool(message.tc) == truncated
    assert len(message.an) == (0 if truncated else addresses)
    assert (message.id, message.qd[0].name) == (77, "Example.Org")


@pytest.mark.parametrize("reply", [1, 2, 5, None])
def test_a_resolver_out_of_reach_is_servfail_at_once(no_udp, reply):
    no_udp.proxy.reply = reply
    ask(no_udp, query())
    [(_, _, _, _, payload)] = answers(no_udp, 1)
    message = dpkt.dns.DNS(payload)
    assert (message.id, message.qr, message.rd, message.rcode) == (77, 1, 1, 2)
    assert payload[12:] == query()[12:]
    assert no_udp.counted(counts.DNS_OVER_TCP_FAILED) == 1


def test_the_proxy_went_away(no_udp):
    no_udp.proxy.stop()
    ask(no_udp, query())
    [(_, _, _, _, payload)] = answers(no_udp, 1)
    assert dpkt.dns.DNS(payload).rcode == 2
    no_udp.proxy = Proxy(no_udp)


def test_a_connection_that_the_resolver_closed_is_made_again(no_udp):
    ask(no_udp, query("one.example"))
    answers(no_udp, 1)
    no_udp.proxy.close(no_udp.proxy.clients[0])
    ask(no_udp, query("two.example"))
    assert dpkt.dns.DNS(answers(no_udp, 1)[0][4]).qd[0].name == "two.example"


def test_a_resolver_that_always_closes_is_asked_twice(no_udp):
    def close(message):
        no_udp.proxy.asked.append(message)
        no_udp.proxy.close(no_udp.proxy.clients[-1])

    no_udp.proxy.resolver = close
    ask(no_udp, query())
    assert dpkt.dns.DNS(answers(no_udp, 1)[0][4]).rcode == 2
    assert len(no_udp.proxy.asked) == 2


def test_silence_is_silence_and_the_next_question_gets_a_new_connection(no_udp, monkeypatch):
    no_udp.proxy.resolver = lambda message: None
    ask(no_udp, query("one.example"))
    no_udp.run_until(lambda: len(no_udp.proxy.requests) == 1)
    monkeypatch.setattr("tests.shard.monotonic", lambda: time.monotonic() + 11)
    no_udp.run_until(lambda: no_udp.counted(counts.DNS_OVER_TCP_FAILED) == 1)
    assert not no_udp.sent
    no_udp.proxy.resolver = answer
    ask(no_udp, query("two.example"))
    assert len(answers(no_udp, 1)) == 1
    assert len(no_udp.proxy.requests) == 2
    # and after some idle time nothing is left of it
    monkeypatch.setattr("tests.shard.monotonic", lambda: time.monotonic() + 40)
    no_udp.run_until(lambda: not no_udp.proxy.clients)
    assert not no_udp.udp.dns._resolvers


def test_outstanding_questions_are_bounded(no_udp):
    no_udp.proxy.resolver = lambda message: None
    for number in range(MAX_OUTSTANDING + 5):
        ask(no_udp, query(number=number))
    assert [dpkt.dns.DNS(each[4]).rcode for each in answers(no_udp, 5)] == [2] * 5


@pytest.mark.parametrize(
    "damage",
    [
        lambda message: b"\xff\xff" + message[2:],  # an id that nobody has
        lambda message: message[:2] + b"\x01" + message[3:],  # no answer
        lambda message: message.replace(b"xample", b"xomple"),  # to another question
        lambda message: message[:5],
    ],
)
def test_wrong_answers_are_ignored(no_udp, damage):
    no_udp.proxy.resolver = lambda message: damage(answer(message))
    ask(no_udp, query())
    no_udp.run_until(lambda: no_udp.proxy.requests)
    for _ in range(5):
        no_udp.poll(0.02)
    assert not no_udp.sent


def test_an_answer_with_other_capital_letters_is_taken(no_udp):
    no_udp.proxy.resolver = lambda message: answer(message).replace(b"Example", b"eXAMPLE")
    ask(no_udp, query())
    assert len(answers(no_udp, 1)) == 1


def test_what_is_no_question_is_dropped(no_udp):
    for payload in (b"x", bytes(12), query()[:-2], b"\0\0\x80" + query()[3:]):
        ask(no_udp, payload)
    assert not no_udp.sent and not no_udp.proxy.requests
    assert no_udp.counted(counts.DNS_OVER_TCP_FAILED) == 4


def test_other_ports_stay_unreachable(no_udp):
    no_udp.receive(udp_packet(query(), dport=5353))
    assert unreachable(no_udp.sent[0])[:2] == (3, 3)


def test_names_that_are_no_text():
    message = query()[:12] + b"\x03\xff\xfe\xfd\x00\0\1\0\1"
    assert question_of(message) == message[12:].lower()
    assert without_records(message, 2)[12:] == message[12:]


@given(st.binary(max_size=80))
@settings(deadline=None)
def test_random_octets_never_raise(garbage):
    question_of(garbage)
    answer_limit(garbage)
    question_of(query()[:12] + garbage)
    assert answer_limit(query() + garbage) >= 512


@given(st.binary(max_size=200))
@settings(max_examples=30, deadline=None)
def test_a_resolver_may_send_anything(garbage):
    shard = Shard(scheme="socks5")
    shard.udp = Udp(shard)
    shard.proxy = Proxy(shard)
    shard.proxy.resolver = lambda message: garbage
    shard.udp.availability.no_udp(time.monotonic())
    ask(shard, query())
    shard.run_until(lambda: shard.proxy.requests)
    for _ in range(3):
        shard.poll(0.01)
    shard.proxy.stop()
    shard.close()
