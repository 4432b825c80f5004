"""The proxy's name: numeric at once, names in a child, failures and slowness warned about and tried again."""

import logging
import signal
import time

import pytest

from gateway import resolve
from gateway.loop import EventLoop
from gateway.process import fork_child
from gateway.resolve import NameLookup, is_numeric, look_up

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
ADDRESSES = [("192.0.2.1", 1080), ("2001:db8::1", 1080)]


@pytest.fixture
def loop():
    with EventLoop() as made:
        yield made


@pytest.fixture
def answers(monkeypatch):
    """Replace the lookup in the children by answers that the test sets."""
    answers: dict[str, object] = {"now": {"addresses": ADDRESSES}}

    def answer(host, port):
        if answers["now"] == "never":
            signal.pause()  # in the child, which is killed
        return answers["now"]

    monkeypatch.setattr(resolve, "look_up", answer)
    return answers


def lookup_of(loop, host, changes):
    def fork(label, main):
        return fork_child(label, main, let_go=loop.close_in_child, drop_rights=False)

    return NameLookup(loop, host, 1080, fork=fork, on_change=changes.append)


def turn_until(loop, condition):
    ends_at = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < ends_at
        loop.run_once(0.05)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "fe80::1%eth0"])
def test_an_address_needs_no_lookup(loop, host):
    assert is_numeric(host)
    lookup = lookup_of(loop, host, [])
    lookup.begin()
    assert lookup.wait() == [(host, 1080)]
    lookup.refresh()
    lookup.close()


def test_a_name_is_known_before_the_start(loop, answers):
    changes = []
    lookup = lookup_of(loop, "proxy.example", changes)
    lookup.begin()
    assert lookup.wait() == ADDRESSES
    assert changes == [], "the settings have them from the beginning"
    lookup.close()


def test_a_name_that_does_not_resolve_is_tried_again(loop, answers, caplog, monkeypatch):
    monkeypatch.setattr(resolve, "BACK_OFF", (0.01,))
    answers["now"] = {"failed": "Name or service not known"}
    changes = []
    lookup = lookup_of(loop, "proxy.example", changes)
    lookup.begin()
    assert lookup.wait() == []
    answers["now"] = {"addresses": ADDRESSES}
    turn_until(loop, lambda: changes)
    assert changes == [ADDRESSES]
    assert lookup.addresses == ADDRESSES
    lookup.close()
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "the name of the proxy, proxy.example, does not resolve: Name or service not known",
        "the name of the proxy, proxy.example, resolves again",
    ]


def test_a_slow_lookup_does_not_hold_up_the_start(loop, answers, caplog, monkeypatch):
    monkeypatch.setattr(resolve, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(resolve, "GIVE_UP", 0.05)
    monkeypatch.setattr(resolve, "BACK_OFF", (0.01,))
    answers["now"] = "never"
    changes = []
    lookup = lookup_of(loop, "proxy.example", changes)
    lookup.begin()
    assert lookup.wait() == []
    assert "takes long" in caplog.text
    answers["now"] = {"addresses": ADDRESSES}
    turn_until(loop, lambda: changes)
    lookup.close()


def test_addresses_that_move_are_told_once(loop, answers, monkeypatch):
    monkeypatch.setattr(resolve, "REFRESH", 0.01)
    changes = []
    lookup = lookup_of(loop, "proxy.example", changes)
    lookup.begin()
    lookup.wait()
    answers["now"] = {"addresses": ADDRESSES[1:]}
    turn_until(loop, lambda: changes)
    answers["now"] = {"failed": "Temporary failure in name resolution"}
    turn_until(loop, lambda: lookup._failures)
    assert lookup.addresses == ADDRESSES[1:], "a failure keeps what is known"
    assert changes == [ADDRESSES[1:]]
    lookup.close()


def test_asking_often_looks_up_seldom(loop, answers):
    lookup = lookup_of(loop, "proxy.example", [])
    lookup.begin()
    lookup.wait()
    for _ in range(100):
        lookup.refresh()
        assert lookup._child is None
    lookup.close()


def test_closing_ends_a_lookup_that_is_under_way(loop, answers):
    answers["now"] = "never"
    lookup = lookup_of(loop, "proxy.example", [])
    lookup.begin()
    lookup.close()
    assert lookup._child is None


def test_the_real_thing_without_a_network():
    assert look_up("127.0.0.1", 1080) == {"addresses": [("127.0.0.1", 1080)]}
    assert ("::1", 1080) in look_up("::1", 1080)["addresses"]
    assert "failed" in look_up("a" * 64 + ".example", 1080)
