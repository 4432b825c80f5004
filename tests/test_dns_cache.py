"""The cache of names in a worker: a hit never touches the proxy, and is right for who asks; what is old is renewed."""

import struct
import time

import pytest
from dpkt.dns import DNS

from ipc.cache import SharedCache
from tests.shard import CLIENT4, Shard, all_datagrams, udp_packet
from tests.socksproxy import Proxy
from workers import counts
from workers.dns.cache import DnsCache
from workers.udp import Udp

RESOLVER = b"\x09\x09\x09\x09"
OTHER = b"\x08\x08\x08\x08"


def question(name="example.org", number=0x1234, edns=0):
    message = bytes(DNS(id=number, qd=[DNS.Q(name=name)]))
    if edns:
        message = message[:10] + b"\0\1" + b"" + message[12:] + b"\0" + struct.pack(">HHIH", 41, edns, 0, 0)
    return message


def answer(message, ttl=60, records=1):
    """Return what a resolver would say to it: addresses."""
    end = message.index(b"\0\0\1\0\1", 12) + 5
    record = b"\xc0\x0c" + struct.pack(">HHIH4s", 1, 1, ttl, 4, b"\1\2\3\4")
    return message[:2] + b"\x81\x80\0\1" + struct.pack(">HHH", records, 0, 0) + message[12:end] + record * records


class Client:
    """A shard with a cache, in front of a proxy of the test; each question comes from a new socket."""

    def __init__(self, cache, **settings):
        self.shard = shard = Shard(scheme="socks5", dns_timeout=10.0, **settings)
        shard.dns_cache = DnsCache(cache, shard.count)
        shard.udp = Udp(shard)
        self.proxy = shard.proxy = Proxy(shard)
        self._sport = 2000

    def asks(self, message, resolver=RESOLVER):
        self._sport += 1
        self.shard.receive(udp_packet(message, CLIENT4, sport=self._sport, destination=resolver, dport=53))

    def is_asked(self, count):
        """Wait until the proxy has had so many questions; return the last one and its header."""
        self.shard.run_until(lambda: len(self.proxy.datagrams) >= count)
        assert len(self.proxy.datagrams) == count
        return self.proxy.datagrams[-1]

    def told(self, count):
        """Wait for so many answers in all; return the last one."""
        self.shard.run_until(lambda: len(self.shard.sent) >= count)
        return all_datagrams(self.shard.sent)[-1][4]

    def close(self):
        self.shard.proxy.stop()
        self.shard.close()


@pytest.fixture
def cache():
    made = SharedCache(1 << 20)
    yield made
    made.close()


@pytest.fixture
def client(cache):
    made = Client(cache)
    yield made
    made.close()


def learn(client, message=None, ttl=60, records=1):
    """Have one question answered by the resolver."""
    client.asks(message or question())
    header, asked = client.is_asked(1)
    client.proxy.answer(header + answer(asked, ttl, records))
    client.told(1)


def test_the_second_question_never_touches_the_proxy(client):
    learn(client)
    client.asks(question("Example.ORG", 0x4321))
    read = DNS(client.told(2))
    assert (read.id, read.qd[0].name, read.an[0].ip) == (0x4321, "Example.ORG", b"\1\2\3\4")
    assert 58 <= read.an[0].ttl <= 60
    client.is_asked(1)
    shard = client.shard
    assert (shard.counted(counts.DNS_CACHE_HITS), shard.counted(counts.DNS_CACHE_MISSES)) == (1, 1)


def test_another_worker_has_the_same_answers(client, cache):
    learn(client)
    other = Client(cache)
    try:
        other.asks(question())
        assert DNS(other.told(1)).an[0].ip == b"\1\2\3\4"
        assert not other.proxy.datagrams
    finally:
        other.close()


@pytest.mark.parametrize("different", [question("example.com"), question(edns=1232)])
def test_another_question_is_asked(client, different):
    learn(client)
    client.asks(different)
    client.is_asked(2)


def test_another_resolver_is_asked(client):
    learn(client)
    client.asks(question(), OTHER)
    client.is_asked(2)


def test_a_dead_answer_is_not_told(client, cache):
    now = time.monotonic()
    learn(client)
    later = DnsCache(cache, client.shard.count)
    from workers.dns.message import parse_query

    asked = parse_query(question())
    resolver = RESOLVER + b"\0\x35"
    assert later.answer(resolver, asked, now + 59) is not None
    assert later.answer(resolver, asked, time.monotonic() + 60) is None


def test_near_its_end_an_answer_is_told_and_renewed_once(client, cache):
    shard = client.shard
    learn(client, ttl=1000)
    asked_at = time.monotonic() + 950
    names = shard.udp.dns_over_udp[12]
    key = CLIENT4 + RESOLVER + b"\x0b\xb8\0\x35"
    for number in range(3):
        assert names.ask(key, question(number=number), asked_at)
    header, again = client.is_asked(2)
    assert all(48 <= DNS(each[4]).an[0].ttl <= 50 for each in all_datagrams(shard.sent)[1:])
    assert len(shard.sent) == 4
    client.proxy.answer(header + answer(again, 2000))
    shard.run_until(lambda: not names._renewing)
    assert len(shard.sent) == 4, "nobody hears of it"
    assert shard.counted(counts.DNS_CACHE_RENEWED) == 1
    assert names.ask(key, question(number=9), time.monotonic() + 1500)
    assert 400 <= DNS(client.told(5)).an[0].ttl <= 500


def test_an_answer_too_large_for_who_asks_is_truncated(client):
    learn(client, records=40)
    client.asks(question(number=7))
    read = DNS(client.told(2))
    assert (read.id, read.tc, len(read.an)) == (7, 1, 0)


def test_a_failure_is_not_kept(client):
    client.asks(question())
    header, asked = client.is_asked(1)
    client.proxy.answer(header + asked[:2] + b"\x81\x82" + asked[4:])
    client.told(1)
    client.asks(question())
    client.is_asked(2)


def test_a_forged_answer_is_not_kept(client):
    client.asks(question())
    header, asked = client.is_asked(1)
    client.proxy.answer(header + answer(bytes((asked[0] ^ 1, asked[1])) + asked[2:]))
    client.shard.run_until(lambda: client.shard.counted(counts.DNS_UNASKED))
    client.asks(question())
    client.is_asked(2)


def test_direct_names_are_kept_as_well(cache):
    """Without a proxy one socket asks for all clients, and answers are kept the same way."""
    import socket

    shard = Shard(dns_timeout=10.0)
    shard.dns_cache = DnsCache(cache, shard.count)
    shard.udp = Udp(shard)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver:
        try:
            resolver.bind(("127.0.0.1", 0))
            resolver.settimeout(5)
            names = shard.udp.dns_over_udp[12]
            key = CLIENT4 + b"\x7f\0\0\1" + b"\x0b\xb8" + resolver.getsockname()[1].to_bytes(2, "big")
            assert names.ask(key, question(), 1.0)
            asked, where = resolver.recvfrom(512)
            resolver.sendto(answer(asked), where)
            shard.run_until(lambda: shard.sent)
            assert names.ask(key, question(number=5), time.monotonic())
            assert [DNS(each[4]).id for each in all_datagrams(shard.sent)] == [0x1234, 5]
        finally:
            shard.udp.stop(1.0)
            shard.close()
