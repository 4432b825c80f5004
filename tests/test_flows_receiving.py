"""The receiving half of TCP with a whole worker around it: ACKs of many flows, windows, TIME-WAIT, keepalive."""

from contextlib import closing

import pytest

from tests.one_worker import MASK, OneWorker, RawClient
from tests.test_flows import connected, listener, received
from workers import counts, flows
from workers.tcp.segment import ACK, FIN, PSH, RST, SYN

OPTIONS = "mss 1460,sackOK,nop,wscale 7"


class StillWorker(OneWorker):
    """A worker whose clock stands still except in skip(): what a slow machine does is no part of the test."""

    clock = 5000.0

    @property
    def now(self) -> float:
        return self.clock

    def skip(self, seconds: float) -> None:
        """Let time pass: timers run exactly when they are due."""
        end = self.clock + seconds
        while self.clock < end:
            next_at = min(self.worker.timers.next_at, self.worker.tcp.next_at)
            self.clock = min(max(next_at, self.clock + 0.0001), end)
            self.breathe()


@pytest.fixture
def one():
    with closing(StillWorker()) as made:
        yield made


def conn_of(one, client):
    """Return the connection of a client's flow."""
    [conn] = [flow.conn for key, flow in one.table.items() if client.ports in key]
    return conn


def pure_acks(client):
    return [answer.ack for answer in client.unread() if not answer.text]


def test_an_ack_that_waits_for_text_does_not_wait_behind_those_of_other_flows(one):
    first, target = connected(one, OPTIONS, port=1)
    second, other = connected(one, OPTIONS, port=2)
    with target, other:
        for client in (first, second):
            conn_of(one, client).pingpong = True
        first.push(b"one")
        one.skip(0.005)
        received(one, target, 3)
        target.send(b"two")  # carries the ACK; the queue's entry stays
        first.read(3)
        first.unread()
        one.skip(0.010)
        first.push(b"three")  # at 15 ms
        one.skip(0.015)
        second.push(b"four")  # at 30 ms
        one.skip(0.024)
        assert pure_acks(first) == []
        one.skip(0.002)
        assert pure_acks(first) == [first.nxt]
        assert pure_acks(second) == []
        one.skip(0.015)
        assert pure_acks(second) == [second.nxt]


# ── TIME-WAIT ───────────────────────────────────────────────────────────────────────────────────────────────────────


def ended_by_the_target(one, options=OPTIONS, port=40000):
    """Return a client whose flow is in TIME-WAIT: the target closed first."""
    client, target = connected(one, options, port=port)
    target.close()
    client.answer(lambda answer: answer.flags & FIN)
    client.fin()
    assert client.answer(lambda answer: answer.ack == client.nxt)
    client.unread()
    assert one.counted(counts.TCP_TIME_WAIT) == 1
    return client


def again(client, **fields):
    """Send the client's FIN once more, and return what is answered."""
    client.send(FIN | ACK, seq=(client.nxt - 1) & MASK, **fields)
    return pure_acks(client)


def test_the_fin_again_begins_time_wait_anew(one):
    client = ended_by_the_target(one)
    one.skip(50)
    assert again(client) == [client.nxt]
    one.skip(50)
    assert again(client) == [client.nxt]
    one.skip(59)
    assert one.counted(counts.TCP_TIME_WAIT) == 1
    one.skip(3)
    assert one.counted(counts.TCP_TIME_WAIT) == 0
    assert not one.table
    assert not one.worker.tcp._time_wait
    assert one.counted(counts.TCP_TIME_WAIT_OVERFLOW) == 0


def test_only_the_fin_begins_it_anew(one):
    client = ended_by_the_target(one)
    one.skip(50)
    client.send(ACK)
    client.send(ACK | PSH, b"text", seq=client.nxt - 5)
    client.send(FIN | ACK, seq=client.nxt + 5)
    one.skip(11.5)
    assert not one.table


def test_a_flood_of_fins_fills_no_queue(one):
    client = ended_by_the_target(one)
    for _ in range(300):
        one.skip(0.1)
        assert again(client) == [client.nxt]
    assert len(one.worker.tcp._time_wait) <= 32


def test_the_oldest_time_wait_goes_first(one, monkeypatch):
    monkeypatch.setattr(flows, "MAX_TIME_WAIT", 1)
    first = ended_by_the_target(one, port=1)
    second, target = connected(one, OPTIONS, port=2)
    target.close()
    second.answer(lambda answer: answer.flags & FIN)
    second.fin()
    second.answer(lambda answer: answer.ack == second.nxt)
    [left] = one.table.values()
    assert second.ports in left.key
    assert one.counted(counts.TCP_TIME_WAIT_OVERFLOW) == 1
    assert first.ports not in left.key


@pytest.mark.parametrize(
    ("before", "after", "distance", "gives_way"),
    [
        # RFC 6191, section 2: timestamps before and after, before only, after only, never
        ("TS val 5000000 ecr 0", "TS val 6000002 ecr 0", -5, True),
        ("TS val 5000000 ecr 0", "TS val 6000000 ecr 0", -5, False),
        ("TS val 5000000 ecr 0", "TS val 6000000 ecr 0", 5, True),
        ("TS val 5000000 ecr 0", "TS val 5999999 ecr 0", 5, False),
        ("TS val 5000000 ecr 0", "", 5, True),
        ("TS val 5000000 ecr 0", "", -5, False),
        ("", "TS val 1 ecr 0", -5, True),
        ("", "", 5, True),
        ("", "", -5, False),
    ],
)
def test_a_syn_takes_the_place_of_time_wait(one, before, after, distance, gives_way):
    client, target = connected(one, f"mss 1460,{before}" if before else "mss 1460")
    conn = conn_of(one, client)
    target.close()
    client.answer(lambda answer: answer.flags & FIN)
    client.timestamps = False
    client.send(FIN | ACK, options="nop,nop,TS val 6000000 ecr 0" if before else "")
    assert one.counted(counts.TCP_TIME_WAIT) == 1
    [waiting] = one.table.values()
    client.send(SYN, seq=(conn.rcv.nxt + distance) & MASK, options=f"mss 1460,{after}" if after else "mss 1460")
    assert (waiting not in one.table.values()) == gives_way


def test_the_next_connection_of_the_pair_begins_behind_the_last(one):
    client = ended_by_the_target(one)
    [waiting] = one.table.values()
    clock = one.worker.tcp.initial_sequence_number
    used = waiting.conn.snd.nxt
    assert waiting.iss_behind(used + 7 & MASK) == used + 7 & MASK
    assert waiting.iss_behind(used - 7 & MASK) == used + 65537 & MASK
    one.worker.tcp.initial_sequence_number = lambda key, now: used - 1000 & MASK
    client.send(SYN, seq=client.nxt + 10, options="mss 1460")
    [dial] = one.table.values()
    assert dial._iss == used + 65537 & MASK
    one.worker.tcp.initial_sequence_number = clock


def test_connections_in_time_wait_do_not_count_against_max_flows():
    with closing(StillWorker(max_flows=1)) as one:
        ended_by_the_target(one, port=1)
        client, target = connected(one, port=2)
        target.close()
        assert client.answer(lambda answer: answer.flags & FIN)


# ── keepalive, and flows that are idle ──────────────────────────────────────────────────────────────────────────────

PROBE_OPTIONS = {"tcp_keepalive": 100, "tcp_keepalive_interval": 30, "tcp_keepalive_count": 2, "tcp_timeout": 300}


def probes(client):
    """Return how many probes came: without text, just before the window."""
    return sum(answer.seq == client.rcv_nxt - 1 & MASK and not answer.text for answer in client.unread())


@pytest.mark.parametrize("version", [4, 6])
def test_a_silent_client_is_probed_and_given_up(version):
    with closing(StillWorker(**PROBE_OPTIONS)) as one:
        client, target = connected(one, OPTIONS, version)
        with target:
            one.skip(99)
            assert probes(client) == 0
            one.skip(16)
            assert probes(client) == 1
            one.skip(31)
            assert probes(client) == 1
            one.skip(29)
            assert client.answer(lambda answer: answer.flags & RST).seq == client.rcv_nxt
            assert one.counted(counts.TCP_RETRANSMIT_TIMEOUTS) == 1
            assert not one.table


def test_a_client_that_answers_stays_for_ever():
    with closing(StillWorker(**PROBE_OPTIONS)) as one:
        client, target = connected(one, OPTIONS)
        with target:
            for _ in range(10):
                one.skip(116)
                assert probes(client) == 1
                client.send(ACK)
            target.send(b"still here")
            assert client.read(10) == b"still here"


def test_by_default_idle_flows_are_probed_before_they_end(one):
    client, target = connected(one, OPTIONS)
    with target:
        one.skip(7199)
        assert probes(client) == 0
        one.skip(240)
        assert client.answers == []
        assert not one.table
        assert one.counted(counts.TCP_IDLE_TIMEOUTS) == 0


def test_without_keepalive_nothing_is_asked():
    with closing(StillWorker(tcp_keepalive=0, tcp_timeout=300)) as one:
        client, target = connected(one, OPTIONS)
        with target:
            one.skip(320)
            assert probes(client) == 0
            assert one.counted(counts.TCP_IDLE_TIMEOUTS) == 1
            assert not one.table


def test_half_closed_for_hours(one):
    client, target = connected(one, OPTIONS)
    with target:
        client.fin()
        assert received(one, target, 1) == b""
        for _ in range(3):
            one.skip(7100)
            target.send(b"late")
            client.read(4)
            client.received = b""
        one.skip(7100)
        assert one.table
        one.skip(120)
        assert not one.table
        assert one.counted(counts.TCP_IDLE_TIMEOUTS) == 1


# ── packets that look otherwise than most ───────────────────────────────────────────────────────────────────────────


class OptionsClient(RawClient):
    """A client whose packets have IPv4 options, or IPv6 extension headers: hop by hop, then destination options."""

    def packet(self, *arguments, **fields) -> bytes:
        packet = super().packet(*arguments, **fields)
        if self.version == 4:
            return bytes((0x47, packet[1])) + (len(packet) + 8).to_bytes(2) + packet[4:20] + b"\x01" * 8 + packet[20:]
        extensions = bytes((60, 0, 1, 4, 0, 0, 0, 0)) + bytes((6, 0, 1, 4, 0, 0, 0, 0))
        return packet[:4] + (len(packet) - 24).to_bytes(2) + b"\x00" + packet[7:40] + extensions + packet[40:]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("options", [OPTIONS, "mss 1460,sackOK,TS val 1 ecr 0,nop,wscale 7"])
def test_options_and_extension_headers_change_nothing(one, version, options):
    with closing(listener(version)) as listening:
        client = OptionsClient(one, listening.getsockname()[:2])
        client.open(options)
        target, _ = listening.accept()
    target.setblocking(False)
    with target:
        client.push(b"question")
        assert received(one, target, 8) == b"question"
        client.unread()
        client.send(ACK | PSH, b"later", seq=client.nxt + 100)
        [answer] = client.unread()
        assert answer.options.sack == ((client.nxt + 100 & MASK, client.nxt + 105 & MASK),)
        target.send(b"answer")
        assert client.read(6) == b"answer"
        client.fin()
        assert received(one, target, 1) == b""


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("options", [OPTIONS, "mss 1460,sackOK,TS val 1 ecr 0,nop,wscale 7"])
def test_blocks_of_what_is_out_of_order_and_what_came_twice(one, version, options):
    client, target = connected(one, options, version)
    with target:
        first = client.nxt
        blocks = []
        for at in (100, 300, 500, 700, 300):
            client.send(ACK, b"x" * 100, seq=first + at)
            [answer] = client.unread()
            assert answer.ack == first
            blocks.append([((left - first) & MASK, (right - first) & MASK) for left, right in answer.options.sack])
        room = 3 if client.timestamps else 4
        assert blocks == [
            [(100, 200)],
            [(300, 400), (100, 200)],
            [(500, 600), (300, 400), (100, 200)],
            [(700, 800), (500, 600), (300, 400), (100, 200)][:room],
            [(300, 400), (300, 400), (700, 800), (500, 600)][:room],
        ]
        client.push(b"y" * 100)
        client.nxt = first + 200 & MASK
        assert received(one, target, 200) == b"y" * 100 + b"x" * 100


def test_the_window_grows_with_a_fast_flow_and_is_given_back(one):
    client, target = connected(one, OPTIONS)
    policy = one.worker.tcp.policy
    whole = policy.growth
    with target:
        conn = conn_of(one, client)
        assert conn.rcv.buffer == 128 << 10
        for _ in range(12):
            size = min(conn.rcv.wnd, 60_000)
            for _ in range(2):
                client.push(bytes(min(size, conn.rcv.wnd)))
                received(one, target, 1)
            one.skip(0.2)
        assert conn.rcv.buffer > 200 << 10
        assert policy.growth == whole - conn.rcv.tuning.grown < whole
        client.send(RST, seq=client.nxt)
    assert policy.growth == whole
