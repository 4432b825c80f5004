"""Warm associations: a new client's first datagram leaves at once; what stands ready is bounded and renewed."""

from time import monotonic

import pytest

from tests.shard import Shard, all_datagrams, udp_packet
from tests.socksproxy import Proxy
from workers import counts
from workers.socks import modes
from workers.udp import Udp
from workers.udp.associations import WARM_RETRY


@pytest.fixture
def shard():
    shard = Shard(scheme="socks5", udp_warm=2)
    shard.udp = Udp(shard)
    shard.proxy = Proxy(shard)
    shard.proxy.echo = True
    yield shard
    shard.proxy.stop()
    shard.close()


def ready(shard):
    return sum(each.state == 1 for each in shard.udp.associations._warm)


def settle(shard):
    while shard.poll(0.05):
        pass


def test_nothing_is_kept_before_anybody_uses_udp(shard):
    settle(shard)
    assert not shard.proxy.clients


def test_a_new_client_takes_one_and_another_one_follows(shard):
    shard.receive(udp_packet(b"first", sport=2000))
    shard.run_until(lambda: ready(shard) == 2)
    assert len(shard.proxy.clients) == 3
    shard.sent.clear()
    shard.receive(udp_packet(b"second", sport=2001))
    # Without another round trip: the datagram is on its way already.
    assert shard.counted(counts.UDP_DATAGRAMS_UP) == 2
    assert shard.counted(counts.UDP_WARM_TAKEN) == 1
    assert shard.counted(counts.UDP_ASSOCIATIONS) == 2
    shard.run_until(lambda: shard.sent and ready(shard) == 2)
    assert [each[3:] for each in all_datagrams(shard.sent)] == [(2001, b"second")]
    assert len(shard.proxy.clients) == 4


def test_questions_take_one_too(shard):
    shard.receive(udp_packet(b"first", sport=2000))
    shard.run_until(lambda: ready(shard) == 2)
    query = b"\x12\x34\1\0\0\1" + bytes(6) + b"\1a\0\0\1\0\1"
    shard.proxy.echo = False
    shard.receive(udp_packet(query, sport=2001, dport=53))
    assert shard.counted(counts.UDP_DATAGRAMS_UP) == 2
    shard.run_until(lambda: len(shard.proxy.datagrams) == 2)
    header, message = shard.proxy.datagrams[1]
    shard.sent.clear()
    shard.proxy.answer(header + message[:2] + b"\x81" + message[3:])
    shard.run_until(lambda: shard.sent)
    assert all_datagrams(shard.sent)[0][3:] == (2001, b"\x12\x34\x81" + query[3:])


def test_one_that_is_lost_is_replaced_after_a_while(shard, monkeypatch):
    shard.receive(udp_packet(b"first", sport=2000))
    shard.run_until(lambda: ready(shard) == 2)
    for client in shard.proxy.clients[1:]:
        shard.proxy.close(client)
    shard.run_until(lambda: not shard.udp.associations._warm)
    settle(shard)
    assert not shard.udp.associations._warm, "not at once, or a proxy that ends them all would never rest"
    for when in (WARM_RETRY, 2 * WARM_RETRY, 3 * WARM_RETRY):
        shard.timers.run(monotonic() + when)
        settle(shard)
    assert ready(shard) == 2


def test_a_proxy_that_refuses_is_not_asked_again_and_again(shard):
    shard.receive(udp_packet(b"first", sport=2000))
    shard.run_until(lambda: ready(shard) == 2)
    shard.proxy.reply = 7
    shard.receive(udp_packet(b"second", sport=2001))
    shard.run_until(lambda: len(shard.proxy.requests) == 4)
    settle(shard)
    assert len(shard.udp.associations._warm) == 1
    shard.timers.run(monotonic() + WARM_RETRY)
    settle(shard)
    assert len(shard.proxy.requests) == 4


def test_after_a_change_of_mode_those_of_the_old_one_go(shard):
    shard.receive(udp_packet(b"first", sport=2000))
    shard.run_until(lambda: ready(shard) == 2)
    shard.udp.availability.mode = modes.HEV
    shard.receive(udp_packet(b"second", sport=2001))
    assert not shard.udp.associations._warm
    shard.run_until(lambda: len(shard.proxy.clients) >= 2)
    settle(shard)
    assert shard.counted(counts.UDP_WARM_TAKEN) == 0
    assert set(shard.udp.associations._warm.values()) <= {modes.HEV}


def test_one_that_nobody_takes_is_renewed(shard):
    shard.receive(udp_packet(b"first", sport=2000))
    shard.run_until(lambda: ready(shard) == 2)
    before = list(shard.udp.associations._warm)
    shard.timers.run(monotonic() + shard.settings.udp_timeout + 1)
    shard.timers.run(monotonic() + shard.settings.udp_timeout + 2 + WARM_RETRY)
    shard.run_until(lambda: ready(shard) == 2)
    assert not set(before) & set(shard.udp.associations._warm)
