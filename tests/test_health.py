"""What is said about the proxy: once when it goes, once when it is back, however many workers report."""

import logging
import socket
import time

import pytest

from gateway import health as health_module
from gateway.health import ProxyHealth, ProxyProbe
from gateway.loop import EventLoop

DOWN = "proxy p:1080 is unreachable: Connection refused; flows are refused until it is back"
BACK = "proxy p:1080 is back"


@pytest.fixture
def loop():
    with EventLoop() as made:
        yield made


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


def turn_until(loop, condition):
    ends_at = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < ends_at
        loop.run_once(0.05)


def test_several_workers_are_one_line_each_way(loop, said):
    health = ProxyHealth(loop, "p:1080")
    health.is_down("worker 0", "Connection refused")
    health.is_down("worker 1", "Connection refused")
    assert health.down
    health.is_up()
    health.is_up()
    assert not health.down
    assert said() == [DOWN, BACK]


def test_flapping_is_bounded_in_lines_and_ends_with_the_truth(loop, said, monkeypatch):
    monkeypatch.setattr(health_module, "QUIET", 0.1)
    health = ProxyHealth(loop, "p:1080")
    for _ in range(50):
        health.is_down("worker 0", "Connection refused")
        health.is_up()
    health.is_down("worker 0", "Connection refused")
    turn_until(loop, lambda: said().count(DOWN) == 2)
    assert said() == [DOWN, BACK, DOWN]


def test_the_word_of_a_dead_worker_counts_until_the_probe_knows_better(loop):
    health = ProxyHealth(loop, "p:1080")
    health.is_down("worker 0", "Connection refused")
    assert not health.only({None, "probe"})
    health.forget("worker 0")
    assert health.down
    assert health.only({None, "probe"})


def probe_of(loop, *addresses, timeout=5.0):
    health = ProxyHealth(loop, "p:1080")
    return health, ProxyProbe(loop, health, lambda: list(addresses), timeout=timeout)


def a_closed_port() -> tuple[str, int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()


def test_a_proxy_that_is_there_is_nothing_to_say(loop, said):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        health, probe = probe_of(loop, a_closed_port(), server.getsockname())
        probe.start()
        turn_until(loop, lambda: probe._socket is None)
        server.accept()[0].close()
        assert not health.down
        assert said() == []
        assert not [timer for _at, _order, timer in loop._timers if timer.callback]


def test_a_proxy_that_comes_later_is_noticed_without_a_flow(loop, said, monkeypatch):
    monkeypatch.setattr(health_module, "PROBE_AGAIN", (0.01,))
    address = a_closed_port()
    health, probe = probe_of(loop, address)
    probe.start()
    turn_until(loop, lambda: health.down)
    with socket.create_server(address):
        turn_until(loop, lambda: not health.down)
    assert said() == [DOWN, BACK]
    probe.close()


def test_while_a_worker_says_down_the_probe_keeps_quiet(loop, monkeypatch):
    """The port may be open and the proxy broken: a worker that speaks SOCKS knows more than a connect."""
    monkeypatch.setattr(health_module, "PROBE_AGAIN", (0.01,))
    address = a_closed_port()
    health, probe = probe_of(loop, address)
    probe.start()
    turn_until(loop, lambda: health.down)
    health.is_down("worker 0", "the answer is not SOCKS5")
    with socket.create_server(address) as server:
        server.settimeout(0)
        loop.run_once(0.05)
        loop.run_once(0.05)
        assert health.down
        with pytest.raises(BlockingIOError):
            server.accept()
    probe.close()


def test_silence_is_a_timeout(loop, said):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        health, probe = probe_of(loop, full.getsockname(), timeout=0.1)
        probe.start()
        turn_until(loop, lambda: health.down)
        for filler in fillers:
            filler.close()
        probe.close()
    assert said() == ["proxy p:1080 is unreachable: no answer within 0.1 s; flows are refused until it is back"]


def test_without_an_address(loop, said):
    health, probe = probe_of(loop)
    probe.start()
    assert health.down
    probe.close()
    assert "its name has no address yet" in said()[0]


def test_wrong_answers_are_said_once_in_a_row(loop, said):
    health = ProxyHealth(loop, "p:1080")
    for error in ("no SOCKS5 proxy", "no SOCKS5 proxy", "refuses the password", "no SOCKS5 proxy"):
        health.answers_wrong(error)
    assert said() == [
        f"proxy p:1080: {error}" for error in ("no SOCKS5 proxy", "refuses the password", "no SOCKS5 proxy")
    ]
