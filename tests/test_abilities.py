"""What auto keys come to: find_abilities against scripted servers, and the probe that asks in a child."""

import os
import socket

import pytest

from gateway import abilities as abilities_module
from gateway.abilities import AbilityProbe, find_abilities
from gateway.loop import EventLoop
from gateway.process import fork_child
from gateway.proxyurl import ProxyUrl
from tests.test_probe import answering, answering_tunnel, granting, greeting, server, silent, silent_tunnel, take


def find(proxy: ProxyUrl, *, pipelined: bool = False, udp: bool = True) -> dict[str, object]:
    return find_abilities(
        proxy, [(proxy.host, proxy.port)], timeout=0.5, resolver="192.0.2.53", udp=udp, pipelined=pipelined
    )


@pytest.mark.parametrize(
    ("script", "mode"),
    [
        (answering(associate=b"\0"), "udp"),
        (answering(associate=b"\x07", connect=b"\x05"), "none"),
        (granting(0xF3, silent_tunnel), "gost"),
        (granting(5, silent_tunnel), "hev"),
        (granting(1, silent_tunnel), "none"),  # anybody may grant a CONNECT
    ],
)
def test_how_datagrams_go(script, mode):
    with server(script) as proxy:
        assert find(proxy) == {"udp": mode, "pipelined": False}


def closing_at_request(connection: socket.socket) -> None:
    greeting(connection)
    take(connection, 10)


def test_a_server_that_closes_instead_of_saying_no():
    with server(closing_at_request) as proxy:
        assert find(proxy) == {"udp": "none", "pipelined": False}


@pytest.mark.parametrize("associate", [b"\0", b"\x07"])
def test_a_pipelined_handshake_that_works(associate):
    with server(answering(associate=associate, connect=b"\x05")) as proxy:
        assert find(proxy, pipelined=True) == {"udp": "none" if associate[0] else "udp", "pipelined": True}


def one_read_is_one_message(connection: socket.socket) -> None:
    """Lose what is pipelined, as microsocks and gost do."""
    connection.recv(1000)
    connection.sendall(b"\x05\0")
    connection.recv(1000)
    connection.sendall(b"\x05\0\0\x01\0\0\0\0\0\0")
    connection.recv(1)


def test_a_pipelined_handshake_that_hangs(monkeypatch):
    monkeypatch.setattr(abilities_module, "PIPELINED_PATIENCE", 0.1)
    with server(one_read_is_one_message) as proxy:
        assert find(proxy, pipelined=True) == {"udp": "udp", "pipelined": False}


def test_uot_must_answer_and_http_has_nothing_else():
    def script(connection: socket.socket) -> None:
        asked = b""
        while not asked.endswith(b"\r\n\r\n"):
            asked += take(connection, 1)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        assert take(connection, 8) == b"\0\x01\xc0\0\x02\x35\0\x35"  # the request of UoT 2
        header = take(connection, 9)
        query = bytearray(take(connection, int.from_bytes(header[7:])))
        query[2] |= 0x80
        connection.sendall(header + query)
        connection.recv(1)

    with server(script) as proxy:
        assert find(ProxyUrl("http", proxy.host, proxy.port)) == {"udp": "uot", "pipelined": False}


@pytest.mark.parametrize("script", [silent, lambda connection: None])
def test_who_cannot_be_asked_is_not_judged(script):
    with server(script) as proxy:
        assert find(proxy) == {}


def test_the_next_address_is_asked():
    with socket.socket() as gone, server(answering(associate=b"\0")) as proxy:
        gone.bind(("127.0.0.1", 0))
        addresses = [gone.getsockname(), (proxy.host, proxy.port)]
        found = find_abilities(proxy, addresses, timeout=1, resolver="192.0.2.53", udp=True, pipelined=False)
        assert found["udp"] == "udp"


def test_a_tunnel_that_answers():
    with server(granting(0xF3, answering_tunnel)) as proxy:
        assert find(proxy)["udp"] == "gost"


def test_a_child_asks_and_is_asked_again():
    found: list[object] = []
    asked = 0

    with EventLoop() as loop:

        def fork(label, main):
            nonlocal asked
            asked += 1
            return fork_child(label, main, let_go=loop.close_in_child)

        def on_found(udp, pipelined):
            found.append((udp, pipelined))

        probe = AbilityProbe(loop, fork, lambda: {"udp": "udp", "pipelined": os.getpid() > 0}, on_found)
        probe.start()
        probe.start()  # while one runs: one more when it is done
        probe.learned({"event": "udp-failed"})
        while len(found) < 2:
            loop.run_once(5.0)
        assert found == [("udp", True)] * 2
        probe.learned({"event": "udp-failed"})  # too soon
        assert asked == 2
        probe.learned({"event": "udp-found", "udp": "gost-v1"})
        probe.learned({"event": "pipelining-failed"})
        assert found[2:] == [("gost-v1", True), ("gost-v1", False)]
        probe.start()
        while len(found) < 5:
            loop.run_once(5.0)
        assert found[4] == ("udp", False)  # the worker's word counts
        probe.close()
