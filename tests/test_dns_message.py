"""DNS messages as the cache reads them, with dpkt as an independent oracle."""

import struct

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.dns import message as dns
from workers.dns.message import MAX_TTL, Query, question_end, retell

A, CNAME, SOA, TXT, AAAA, OPT = 1, 5, 6, 16, 28, 41


def name(text):
    return b"".join(bytes([len(label)]) + label.encode() for label in text.split(".") if label) + b"\0"


def record(owner, kind, ttl, data):
    return owner + struct.pack(">HHIH", kind, 1, ttl, len(data)) + data


def soa(ttl, minimum, owner=b"\xc0\x0c"):
    return record(owner, SOA, ttl, name("ns.example") + name("host.example") + struct.pack(">5I", 1, 2, 3, 4, minimum))


def opt(size=1232, flags=0, options=b"", version=0):
    return b"\0" + struct.pack(">HHIH", OPT, size, version << 16 | flags, len(options)) + options


def question(text="www.example.org", kind=A):
    return name(text) + struct.pack(">HH", kind, 1)


def query(text="www.example.org", kind=A, *, number=7, flags=0x0100, additional=()):
    return struct.pack(">6H", number, flags, 1, 0, 0, len(additional)) + question(text, kind) + b"".join(additional)


def answer(*records, authority=(), additional=(), flags=0x8180, text="www.example.org", kind=A):
    counts = struct.pack(">6H", 7, flags, 1, len(records), len(authority), len(additional))
    return counts + question(text, kind) + b"".join((*records, *authority, *additional))


WWW = b"\xc0\x0c"  # the question's name


def parse(payload) -> Query:
    parsed = dns.parse_query(payload)
    assert parsed is not None
    return parsed


def lives(message) -> tuple[int, tuple[int, ...]]:
    """Return for how long an answer lives, and where its TTLs stand in what is kept, which has no EDNS options."""
    found = dns.reusable(message)
    assert found is not None
    return found.seconds, found.positions


def test_a_plain_question():
    asked = parse(query())
    assert asked == (b"\0\7", question(), 0x0100, False, False, 512, True)


def test_a_question_with_edns():
    assert parse(query(additional=[opt()]))[3:] == (True, False, 1232, True)
    assert parse(query(additional=[opt(flags=0x8000)]))[3:] == (True, True, 1232, True)
    assert parse(query(additional=[opt(size=100)])).limit == 512  # RFC 6891, 6.2.3
    subnet = struct.pack(">HHHBB3s", 8, 7, 1, 24, 0, b"\1\2\3")
    assert not parse(query(additional=[opt(options=subnet)])).plain
    cookie = struct.pack(">HH8s", 10, 8, b"12345678")
    assert parse(query(additional=[opt(options=cookie)])).plain
    assert not parse(query(additional=[opt(options=cookie + subnet)])).plain
    assert not parse(query(additional=[opt(options=cookie + b"\0")])).plain
    assert parse(query(additional=[opt(options=cookie)])).key() == parse(query(additional=[opt()])).key()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        query()[:11],
        query()[:-1],
        query(flags=0x8100),  # an answer
        query(flags=0x2800),  # an update
        query()[:4] + b"\0\2" + query()[6:],  # two questions
        query(additional=[record(b"\0", 250, 0, b"")]),  # TSIG
        query(additional=[opt(version=1)]),
        query(additional=[opt()])[:-1],
        query()[:12] + b"\xc0\x0c\0\1\0\1",  # a name that points to itself
        query()[:12] + b"\x40" + bytes(70),
        query()[:12] + (b"\x3f" + b"a" * 63) * 4 + b"\0\0\1\0\1",  # 257 octets
    ],
)
def test_what_is_no_plain_question(payload):
    assert dns.parse_query(payload) is None


def test_the_longest_name():
    longest = (b"\x3f" + b"a" * 63) * 3 + b"\x3d" + b"b" * 61 + b"\0"
    assert len(longest) == 255
    assert parse(query()[:12] + longest + b"\0\1\0\1").question == longest + b"\0\1\0\1"


def test_capital_letters_do_not_matter_and_all_else_does():
    keys = {
        parse(each).key()
        for each in (
            query(), query(kind=AAAA), query("www.example.com"), query(flags=0), query(flags=0x0110),
            query(flags=0x0120), query(additional=[opt()]), query(additional=[opt(flags=0x8000)]),
        )
    }  # fmt: skip
    assert len(keys) == 8
    assert parse(query("WWW.Example.ORG", number=9)).key() in keys


def test_an_answer_lives_as_long_as_its_shortest_ttl():
    full = answer(record(WWW, CNAME, 300, name("a.b")), record(name("a.b"), A, 60, bytes(4)), additional=[opt()])
    seconds, positions = lives(full)
    assert seconds == 60
    assert [struct.unpack_from(">I", full, at)[0] for at in positions] == [300, 60]


def test_edns_options_are_not_kept():
    cookie = struct.pack(">HH16s", 10, 16, b"1234567890123456")
    records = record(WWW, A, 60, bytes(4)), record(WWW, A, 50, bytes(4))
    for additional in ([opt(options=cookie)], [opt(options=cookie), record(WWW, TXT, 40, b"")]):
        found = dns.reusable(answer(*records, additional=additional))
        assert found is not None
        assert found.message == answer(*records, additional=[opt(), *additional[1:]])
        ttls = [struct.unpack_from(">I", found.message, at)[0] for at in found.positions]
        assert ttls == [60, 50, 40][: len(ttls)] and len(ttls) == 1 + len(additional)


def test_a_negative_answer_lives_as_long_as_its_soa_says():
    assert lives(answer(authority=[soa(900, 30)], flags=0x8183))[0] == 30
    assert lives(answer(authority=[soa(20, 300)]))[0] == 20  # NODATA
    assert lives(answer(record(WWW, CNAME, 10, name("a.b")), authority=[soa(20, 300)], flags=0x8183))[0] == 10


@pytest.mark.parametrize(
    "message",
    [
        answer(flags=0x8183),  # NXDOMAIN without SOA
        answer(),  # no records and no SOA: a referral, or lame
        answer(record(WWW, CNAME, 60, name("a.b"))),  # a chain that leads nowhere
        answer(record(WWW, A, 60, bytes(4)), flags=0x8382),  # truncated, and a failure
        answer(record(WWW, A, 60, bytes(4)), flags=0x8380),
        answer(flags=0x8182, authority=[soa(9, 9)]),  # SERVFAIL
        answer(record(WWW, A, 0, bytes(4))),
        answer(record(WWW, A, 1 << 31, bytes(4))),  # RFC 2181, 8
        answer(record(WWW, A, 60, bytes(4)), flags=0x0100),  # no answer at all
        answer(record(WWW, A, 60, bytes(4)))[:-1],
        answer(record(WWW, A, 60, bytes(4))) + b"\0",
        b"",
    ],
)
def test_what_is_not_kept(message):
    assert dns.reusable(message) is None


def test_a_long_life_is_cut():
    assert lives(answer(record(WWW, A, 10 * MAX_TTL, bytes(4))))[0] == MAX_TTL


def test_an_answer_told_again():
    kept = answer(record(WWW, A, 60, bytes(4)), record(WWW, A, 5, b"1234"), flags=0x8580, additional=[opt()])
    asked = parse(query("wWw.example.ORG", number=0xABCD, additional=[opt()]))
    told = retell(kept, lives(kept)[1], asked, 7.2)
    read = dpkt.dns.DNS(told)
    assert (read.id, read.aa, read.qd[0].name) == (0xABCD, 0, "wWw.example.ORG")
    assert [each.ttl for each in read.an] == [52, 0]
    assert [each.ip for each in read.an] == [bytes(4), b"1234"]
    assert len(told) == len(kept)
    assert told.endswith(opt())


labels = st.lists(st.binary(min_size=1, max_size=20), max_size=6)
ttls = st.integers(1, 1 << 30)


@given(
    labels, st.lists(st.tuples(st.sampled_from([A, AAAA, TXT]), ttls, st.binary(max_size=40)), min_size=1), st.data()
)
def test_no_ttl_is_above_what_remains(parts, records, data):
    owner = b"".join(bytes([len(part)]) + part for part in parts) + b"\0"
    kind = records[0][0]
    body = owner + struct.pack(">HH", kind, 1) + b"".join(record(WWW, k, t, d) for k, t, d in records)
    message = struct.pack(">6H", 1, 0x8180, 1, len(records), 0, 0) + body
    seconds, positions = lives(message)
    assert seconds == min(MAX_TTL, *(ttl for _, ttl, _ in records))
    asked = parse(struct.pack(">6H", 2, 0x0100, 1, 0, 0, 0) + owner + struct.pack(">HH", kind, 1))
    age = data.draw(st.floats(0, seconds))
    told = retell(message, positions, asked, age)
    for at, (_, ttl, _) in zip(positions, records, strict=True):
        assert struct.unpack_from(">I", told, at)[0] <= max(ttl - age, 0)


@given(st.binary(max_size=300))
def test_octets_of_any_kind_are_read_without_an_exception(data):
    dns.parse_query(data)
    question_end(data)
    dns.reusable(data)


@given(st.integers(0, 200), st.binary(min_size=1, max_size=4))
def test_an_answer_with_some_octets_changed(at, change):
    message = bytearray(
        answer(record(WWW, CNAME, 9, name("a.b")), record(name("a.b"), A, 9, bytes(4)), authority=[soa(9, 9)])
    )
    message[at : at + len(change)] = change
    dns.reusable(bytes(message))
    dns.parse_query(bytes(message))
