"""DNS over UDP: questions of many sockets share one association, and each answer finds the socket that asked."""

import random

import pytest
from dpkt.dns import DNS

from tests.shard import CLIENT4, CLIENT6, Shard, all_datagrams, udp_packet, unreachable
from tests.socksproxy import Proxy, socks_header
from workers import counts
from workers.udp import Udp
from workers.udp.dns import LIFE, MAX_OUTSTANDING, MAX_UNASKED

RESOLVER = b"\x09\x09\x09\x09"
RESOLVER6 = b"\x26\x20\0\xfe" + bytes(11) + b"\x09"


def question(name="example.org", number=0x1234):
    return bytes(DNS(id=number, qd=[DNS.Q(name=name)]))


def answer(message, octets=b""):
    """Return what a resolver would say to it, nearly."""
    return message[:2] + b"\x81\x80" + message[4:] + octets


@pytest.fixture
def shard():
    shard = Shard(scheme="socks5", dns_timeout=10.0)
    shard.udp = Udp(shard)
    shard.proxy = Proxy(shard)
    yield shard
    shard.proxy.stop()
    shard.close()


def asked(shard, count):
    shard.run_until(lambda: len(shard.proxy.datagrams) >= count)
    return shard.proxy.datagrams


def ask(shard, message, sport, source=CLIENT4, destination=RESOLVER):
    shard.receive(udp_packet(message, source, sport=sport, destination=destination, dport=53))


def test_many_sockets_share_one_association(shard):
    messages = {2000 + which: question(f"host{which}.example", 0x4000) for which in range(40)}
    for sport, message in messages.items():
        ask(shard, message, sport)
    sent = asked(shard, 40)
    assert len(shard.proxy.clients) == 1
    assert len({message[:2] for _, message in sent}) == 40, "ids that clients share are not shared on the wire"
    assert sorted(message[2:] for _, message in sent) == sorted(message[2:] for message in messages.values())
    random.Random(1).shuffle(sent)
    for header, message in sent:
        shard.proxy.answer(header + answer(message))
    shard.run_until(lambda: len(shard.sent) == 40)
    got = {sport: payload for _, _, _, sport, payload in all_datagrams(shard.sent)}
    assert got == {sport: answer(message) for sport, message in messages.items()}
    assert shard.counted(counts.UDP_ASSOCIATIONS) == 1
    assert shard.counted(counts.DNS_QUERIES) == 40


def test_both_ip_versions_share_it(shard):
    ask(shard, question("four.example"), 2000)
    ask(shard, question("six.example"), 2000, CLIENT6, RESOLVER6)
    for header, message in asked(shard, 2):
        shard.proxy.answer(header + answer(message))
    shard.run_until(lambda: len(shard.sent) == 2)
    assert sorted((source, destination) for source, _, destination, _, _ in all_datagrams(shard.sent)) == sorted(
        [(RESOLVER, CLIENT4), (RESOLVER6, CLIENT6)]
    )
    assert len(shard.proxy.clients) == 1


def test_an_answer_above_the_mtu(shard):
    ask(shard, question(), 2000)
    [(header, message)] = asked(shard, 1)
    shard.proxy.answer(header + answer(message, b"." * 4000))
    shard.run_until(lambda: shard.sent)
    assert [each[4][:2] for each in all_datagrams(shard.sent)] == [b"\x12\x34"]
    assert len(all_datagrams(shard.sent)[0][4]) > 4000


def test_forged_answers_are_counted_and_change_the_association(shard):
    ask(shard, question(), 2000)
    [(header, message)] = asked(shard, 1)
    wrong_id = bytes((message[0] ^ 1, message[1])) + message[2:]
    forged = [
        header + answer(wrong_id),
        socks_header(b"\x08\x08\x08\x08", 53) + answer(message),
        socks_header(RESOLVER, 54) + answer(message),
        header + answer(message[:2] + question("evil.example")[2:]),
        header + message,  # a question
        header + message[:2],
    ]
    for each in forged:
        shard.proxy.answer(each)
    shard.run_until(lambda: shard.counted(counts.DNS_UNASKED) == len(forged))
    assert not shard.sent
    for _ in range(MAX_UNASKED):
        shard.proxy.answer(header + answer(wrong_id))
    shard.run_until(lambda: shard.counted(counts.DNS_UNASKED) == len(forged) + MAX_UNASKED)
    shard.proxy.answer(header + answer(message))  # still heard
    shard.run_until(lambda: shard.sent)
    ask(shard, question(), 2001)
    asked(shard, 2)
    assert len(shard.proxy.clients) == 2
    shard.proxy.answer(b"\0\0")
    shard.proxy.answer(b"\0\0\0\3\7example\0\x35" + answer(message))
    shard.run_until(lambda: shard.counted(counts.UDP_DROPPED_UNMAPPABLE))
    assert shard.counted(counts.UDP_DROPPED_BAD_HEADER) == 1


def test_an_error_without_a_question_is_an_answer(shard):
    ask(shard, question(), 2000)
    [(header, message)] = asked(shard, 1)
    shard.proxy.answer(header + message[:2] + b"\x81\x81" + bytes(8))
    shard.run_until(lambda: shard.sent)
    assert all_datagrams(shard.sent)[0][4] == b"\x12\x34\x81\x81" + bytes(8)


@pytest.mark.parametrize(
    "payload",
    [b"\1\0\0\0" + bytes(144), b"x", answer(question()), question()[:2] + b"\x28" + question()[3:], question()[:14]],
    ids=["WireGuard", "short", "answer", "update", "cut"],
)
def test_what_is_no_question_goes_its_own_way(shard, payload):
    ask(shard, payload, 2000)
    [(header, came)] = asked(shard, 1)
    assert came == payload
    shard.proxy.answer(header + b"anything")
    shard.run_until(lambda: shard.sent)
    assert all_datagrams(shard.sent)[0][3:] == (2000, b"anything")
    assert shard.counted(counts.DNS_QUERIES) == 0


def test_other_ports_of_the_same_socket_have_their_own_association(shard):
    ask(shard, question(), 2000)
    shard.receive(udp_packet(question(), sport=2000, dport=5353))
    asked(shard, 2)
    assert len(shard.proxy.clients) == 2


def test_a_proxy_without_udp_is_asked_over_tcp(shard):
    shard.proxy.reply = 7
    ask(shard, question(), 2000)
    shard.run_until(lambda: shard.sent)
    assert all_datagrams(shard.sent)[0][4][:4] == b"\x12\x34\x81\x82"  # SERVFAIL: it refuses CONNECT as well
    assert shard.counted(counts.DNS_OVER_TCP_QUERIES) == 1


def test_a_proxy_that_is_down_is_said_at_once(shard):
    shard.proxy.reply = None
    shard.upstream.use_addresses([("127.0.0.1", 1)])
    ask(shard, question(), 2000)
    shard.run_until(lambda: shard.sent)
    assert unreachable(shard.sent[0])[0] == 3


def test_what_waits_is_bounded_and_forgotten(shard, monkeypatch):
    dns = shard.udp.dns_over_udp[12]
    for number in range(MAX_OUTSTANDING + 10):
        dns.ask(CLIENT4 + RESOLVER + number.to_bytes(2) + b"\0\x35", question(), 100.0)
    assert len(dns._queries) == MAX_OUTSTANDING
    assert shard.counted(counts.DNS_UNANSWERED) == 10
    dns.ask(CLIENT4 + RESOLVER + b"\0\1\0\x35", question(), 110.0)
    assert len(dns._queries) == 1


def test_the_association_changes_with_time(shard):
    dns = shard.udp.dns_over_udp[12]
    for at in (100.0, 100.0 + LIFE, 101.0 + LIFE):
        dns.ask(CLIENT4 + RESOLVER + b"\0\1\0\x35", question(), at)
    assert shard.counted(counts.UDP_ASSOCIATIONS) == 2


def test_direct_has_a_socket_for_each(monkeypatch):
    shard = Shard(scheme="direct")
    shard.udp = Udp(shard)
    ask(shard, question(), 2000, destination=b"\x7f\0\0\1")
    ask(shard, question(), 2001, destination=b"\x7f\0\0\1")
    assert shard.counted(counts.UDP_ASSOCIATIONS) == 2
    shard.close()
