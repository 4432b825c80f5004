"""Random and mutated segments: into the parser, into connections in every state, and into live flows of a whole worker.

Nothing raises; no octet and no flow of anybody is lost to somebody who can only guess sequence numbers.
SIMULATION_SEEDS in the environment says how much is tried, as in test_simulation.py.
"""

import random
from math import inf

import pytest

from tests import builders
from tests.builders import NOW, THEIR_CLOCK
from tests.simulation import whole_scenario
from tests.simulation.stranger import STRANGE_FRAMES
from tests.test_simulation import SEEDS
from workers.tcp.segment import ACK, FIN, RST, SYN, Segment
from workers.tcp.states import CLOSED, NAMES, SYN_RECEIVED, TIME_WAIT

MASK = 0xFFFFFFFF
MEMORY = random.Random(5961).randbytes(70_000)
STATES = (
    builders.syn_received,
    builders.established,
    builders.fin_wait_1,
    builders.fin_wait_2,
    builders.closing,
    builders.time_wait,
    builders.close_wait,
    builders.last_ack,
)


@pytest.mark.parametrize("seed", range(4))
def test_options_of_any_octets_are_read_or_ignored(seed):
    dice = random.Random(seed)
    seg = Segment()
    plausible = bytes.fromhex("020405b40402080a000000010000000201030307050a0000000100000002")
    for _ in range(SEEDS):
        options = bytearray(plausible[: dice.randrange(41)] if dice.random() < 0.7 else dice.randbytes(40))
        for _ in range(dice.randrange(5)):
            if options:
                options[dice.randrange(len(options))] = dice.choice((0, 1, 2, 3, 4, 5, 8, 10, 34, 255))
        seg.parse_options(bytes(options))
        assert -1 <= seg.window_scale <= 14
        assert 0 <= seg.mss <= 65535
        assert len(seg.sack) <= 4


def random_segment(dice, conn, clock):
    """Make a segment; most are near what the connection expects, where they do the most harm."""
    rcv, snd = conn.rcv, conn.snd
    seg = Segment()
    near = (0, 0, 0, 1, -1, 100, -100, 1000, 70_000, -70_000, 1 << 20, 1 << 31, dice.getrandbits(32))
    seg.seq = (dice.choice((rcv.nxt, rcv.nxt, rcv.adv, rcv.irs)) + dice.choice(near)) & MASK
    seg.ack = (dice.choice((snd.una, snd.nxt, snd.end)) + dice.choice(near)) & MASK
    seg.flags = dice.choice((ACK, ACK, ACK, ACK | FIN, ACK | RST, RST, SYN, SYN | ACK, FIN, dice.getrandbits(6)))
    seg.wnd = dice.choice((0, 1, 500, 60_000, 65_535))
    seg.len = dice.choice((0, 0, 1, 100, 1000, 60_000))
    seg.text_at = dice.choice((0, 54, 5000))
    if conn.timestamps is (dice.random() < 0.95):
        seg.ts_present = True
        seg.ts_val = (clock + dice.choice((0, 1, -1, 1000, 1 << 31, dice.getrandbits(32)))) & MASK
        seg.ts_ecr = dice.choice((0, int(NOW * 1000), dice.getrandbits(32)))
    if dice.random() < 0.3:
        edges = [(dice.choice((snd.una, snd.nxt)) + dice.choice(near)) & MASK for _ in range(8)]
        seg.sack = tuple(zip(edges[::2], edges[1::2], strict=True))[: dice.randrange(5)]
    if seg.flags & SYN:
        seg.mss, seg.window_scale = dice.choice((0, 1, 536, 65_535)), dice.choice((-1, 0, 14))
        seg.sack_permitted = dice.random() < 0.5
    return seg


def check(conn, now):
    """Demand what holds in every state, and that what is sent can be sent."""
    snd, rcv = conn.snd, conn.rcv
    out = Segment()
    for _ in range(1000):
        if not conn.segment_to_send(out, now) and not conn.ack_to_send(out, now):
            break
        assert (out.seq + out.len - snd.una) & MASK <= (snd.nxt - snd.una) & MASK or not out.len
        assert out.ack == rcv.nxt
        assert 0 <= out.wnd < 65536
        assert out.ts_present == conn.timestamps
        assert not out.sack or (conn.sack and not out.len)
        assert not out.flags & RST or conn.state == CLOSED
    else:
        raise AssertionError("there is no end of what is sent")
    assert (snd.nxt - snd.una) & MASK <= (snd.end + snd.fin - snd.una) & MASK
    assert rcv.wnd <= max(rcv.buffer, 65535) or conn.state in (CLOSED, TIME_WAIT)
    assert conn.deadline == inf or conn.state not in (CLOSED, TIME_WAIT), NAMES[conn.state]
    assert conn.deadline < inf or conn.state == SYN_RECEIVED or snd.una == snd.nxt or conn.state in (CLOSED, TIME_WAIT)
    assert conn.smss >= 32


@pytest.mark.parametrize("first", range(0, SEEDS, 500))
def test_any_segments_in_any_state(first):
    for seed in range(first, first + 500):
        dice = random.Random(seed)
        builder = dice.choice(STATES)
        options = (dice.random() < 0.5, dice.choice((-1, 0, 7))) if builder in STATES[:2] else ()
        conn = builder(*options)
        conn.sack = dice.random() < 0.5
        now, clock = NOW, THEIR_CLOCK
        try:
            for _ in range(30):
                what = dice.randrange(10)
                if what < 7:
                    clock += 1
                    conn.segment_arrives(random_segment(dice, conn, clock), MEMORY, now)
                    if conn.rcv.pieces is not None:
                        conn.take_reassembled()
                elif what == 7 and conn.state not in (CLOSED, TIME_WAIT):
                    if not conn.snd.fin and conn.state != SYN_RECEIVED and conn.room(now):
                        conn.send(min(conn.room(now), dice.choice((1, 1000, 60_000))))
                    conn.want_room(now)
                    if dice.random() < 0.1 and not conn.snd.fin:
                        conn.close()
                else:
                    step = dice.choice((0.001, 0.05, 0.3, 3.0))
                    now += step
                    clock += int(step * 1000)
                    conn.timeout(now)
                    conn.delayed_ack_timeout()
                conn.take_events()
                check(conn, now)
        except Exception as error:
            error.add_note(f"seed {seed}: {builder.__name__}{options}")
            raise


@pytest.mark.parametrize("first", range(0, SEEDS // 10, whole_scenario.RUNS))
def test_live_flows_survive_a_stranger(first):
    shard = whole_scenario.worker_of(first)
    for seed in range(first, first + whole_scenario.RUNS):
        try:
            whole_scenario.run(shard, seed, strange=STRANGE_FRAMES)
        except Exception as error:
            error.add_note(f"with every packet: python -m tests.simulation --stranger {seed}")
            raise
    shard.close()
