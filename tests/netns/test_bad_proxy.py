"""Proxies that are away, lie, dawdle or say nothing: bounded in time and memory, counted, and then recovered from."""

import contextlib
import errno
import socket
import threading

import pytest

from tests.netns import scripted
from tests.netns.daemon import Ringway
from tests.netns.peers import EMBEDDED, PORT, RunningPeer
from tests.netns.scripted import ScriptedProxy
from tests.netns.traffic import Target, UdpTarget, connect, echo, read_exactly, udp_echo
from tests.netns.world import NET_GW4, TARGET4, World, eventually

pytestmark = pytest.mark.netns
PROXY = f"socks5://{NET_GW4}:{PORT}"


def pss(ringway: Ringway) -> int:
    """Return the proportional set size of the whole process tree, in bytes."""
    total = 0
    for process in ringway.tree():
        # A child that asked the proxy something may have ended just now.
        with contextlib.suppress(OSError), open(f"/proc/{process.pid}/smaps_rollup") as rollup:
            total += next(int(line.split()[1]) for line in rollup if line.startswith("Pss:")) * 1024
    return total


@pytest.mark.parametrize("placement", ["pipeline", "single"])
def test_proxy_away_at_the_start_and_back_later(world: World, placement: str) -> None:
    """A warning, ready all the same; flows are refused; then the proxy comes and everything works."""
    with (
        Target(world.net) as target,
        UdpTarget(world.net) as udp,
        Ringway(world, "-p", PROXY, "--placement", placement) as ringway,
    ):
        with pytest.raises(OSError) as refused:
            echo(world.gw, TARGET4, target.port)
        assert refused.value.errno in (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH)
        assert "WARN" in ringway.log()
        server = RunningPeer(EMBEDDED, world.net)
        world.on_close(server.close)
        eventually(lambda: _works(world, target), "TCP works once the proxy is there", 15)
        udp_echo(world.gw, TARGET4, udp.port)


def test_proxy_away_while_running_is_logged_once(world: World) -> None:
    with Target(world.net) as target, Ringway(world, "-p", PROXY, "--connect-timeout", "2s") as ringway:
        for _ in range(2):
            with RunningPeer(EMBEDDED, world.net):
                eventually(lambda: _works(world, target), "the proxy is used again", 15)
            lines = len(ringway.log().splitlines())
            for _ in range(50):
                with pytest.raises(OSError):
                    echo(world.gw, TARGET4, target.port)
            assert len(ringway.log().splitlines()) - lines <= 3, ringway.log()


def test_proxy_killed_under_flows(world: World) -> None:
    """Its clients' connections end; none hangs."""
    with Target(world.net) as target, RunningPeer(EMBEDDED, world.net) as server, Ringway(world, "-p", server.url):
        connections = [connect(world.gw, TARGET4, target.port) for _ in range(20)]
        try:
            for connection in connections:
                connection.sendall(b"E1")
                assert read_exactly(connection, 1) == b"1"
            server.stop()
            for connection in connections:
                connection.settimeout(5)
                try:
                    assert connection.recv(1) == b""
                except ConnectionResetError:
                    pass
        finally:
            for connection in connections:
                connection.close()


@pytest.mark.parametrize("script", scripted.REFUSALS, ids=lambda script: script.__name__)
def test_proxy_that_cannot_be_used(world: World, script: scripted.Script) -> None:
    """Every flow ends within the connect timeout, is counted, costs no memory that stays, and UDP is no trap either."""
    with (
        ScriptedProxy(world.net, script, NET_GW4, PORT),
        Ringway(world, "-p", PROXY, "--connect-timeout", "1s", "--workers", "1") as ringway,
    ):
        before = ringway.counters()
        memory = pss(ringway)
        outcomes: list[int | None] = []

        def attempt() -> None:
            try:
                with connect(world.gw, TARGET4, 80, 10) as connection:
                    connection.recv(1)
                outcomes.append(0)
            except OSError as error:
                outcomes.append(error.errno)

        threads = [threading.Thread(target=attempt) for _ in range(40)]
        for thread in threads:
            thread.start()
        with world.gw.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.connect((TARGET4, 80))
            for _ in range(40):
                try:
                    client.send(b"x" * 1000)
                except OSError:
                    pass  # an ICMP error of ours, told at the next send
        for thread in threads:
            thread.join(15)
        allowed = {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.ETIMEDOUT}
        assert len(outcomes) == 40, "some flows hang"
        assert set(outcomes) <= allowed | {errno.ECONNRESET}, outcomes
        after = ringway.counters()
        assert any(after[name] > before.get(name, 0) for name in after), "nothing was counted"
        eventually(lambda: ringway.flows() == 0, "no flow is left", 5)
        eventually(lambda: ringway.flows("udp") == 0, "no association is left", 8)
        assert pss(ringway) - memory < 24 << 20
        ringway.check_log()
        assert len(ringway.log().splitlines()) < 40, ringway.log()


REPLY_ERRORS = {
    1: (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNRESET),
    2: (errno.EACCES, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EPERM),
    3: (errno.ENETUNREACH, errno.EHOSTUNREACH),
    4: (errno.EHOSTUNREACH,),
    5: (errno.ECONNREFUSED,),
    6: (errno.EHOSTUNREACH, errno.ETIMEDOUT, errno.ECONNREFUSED),
    7: (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.ENOPROTOOPT),
    8: (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.ENOPROTOOPT),
    0x5B: (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES),
}


def test_every_reply_code_is_an_error_of_its_own(world: World) -> None:
    with Ringway(world, "-p", PROXY, "--connect-timeout", "1s"):
        for code, expected in REPLY_ERRORS.items():
            with ScriptedProxy(world.net, scripted.refuse_with(code), NET_GW4, PORT):
                for address in (TARGET4, "2001:db8:1::10"):
                    with pytest.raises(OSError) as refused:
                        connect(world.gw, address, 80, 8).close()
                    assert refused.value.errno in expected, (code, address, refused.value)


@pytest.mark.parametrize("script", [scripted.byte_by_byte, scripted.honest], ids=["byte by byte", "whole"])
def test_slow_but_honest(world: World, script: scripted.Script) -> None:
    with (
        Target(world.net) as target,
        ScriptedProxy(world.net, script, NET_GW4, PORT),
        Ringway(world, "-p", PROXY),
    ):
        for _ in range(10):
            echo(world.gw, TARGET4, target.port)


def test_data_right_behind_the_reply_is_not_lost(world: World) -> None:
    with (
        Target(world.net) as target,
        ScriptedProxy(world.net, scripted.data_behind_the_reply, NET_GW4, PORT),
        Ringway(world, "-p", PROXY),
        connect(world.gw, TARGET4, target.port) as connection,
    ):
        assert read_exactly(connection, 5) == b"early"
        connection.sendall(b"later")
        assert read_exactly(connection, 5) == b"later"


def _works(world: World, target: Target) -> bool:
    try:
        echo(world.gw, TARGET4, target.port)
        return True
    except OSError:
        return False
