"""What a client sees when the target cannot be reached: the error that the host itself would have caused."""

import errno
import socket
import time

import pytest

from tests.netns.daemon import DIRECT, Ringway
from tests.netns.scripted import ScriptedProxy, read_request
from tests.netns.stage import Stage
from tests.netns.traffic import Target, UdpTarget, connect, echo, family_of, target_address, udp_echo
from tests.netns.world import (
    LAN4,
    NET_GW4,
    NO_ROUTE4,
    NO_ROUTE6,
    SILENT4,
    SILENT6,
    TARGET4,
    TARGET6,
    UNREACHABLE4,
    UNREACHABLE6,
    Namespace,
    World,
    eventually,
)

pytestmark = pytest.mark.netns
CLOSED_PORT = 9


def error_of_connect(where: Stage | World | Namespace, address: str, port: int, timeout: float = 8.0) -> str:
    """Try to connect; return the name of the error, or "TIMEOUT" where none came."""
    world = where.world if isinstance(where, Stage) else where
    try:
        connect(world.gw if isinstance(world, World) else world, address, port, timeout).close()
    except TimeoutError as error:
        return "TIMEOUT" if error.errno is None else errno.errorcode[error.errno]
    except OSError as error:
        assert error.errno is not None
        return errno.errorcode[error.errno]
    return "CONNECTED"


@pytest.mark.parametrize("version", [4, 6])
def test_a_closed_port_refuses(stage: Stage, version: int) -> None:
    began_at = time.monotonic()
    assert error_of_connect(stage, target_address(version), CLOSED_PORT) == "ECONNREFUSED"
    assert time.monotonic() - began_at < 1


@pytest.mark.parametrize("address", [UNREACHABLE4, UNREACHABLE6])
def test_an_unreachable_host(stage: Stage, address: str) -> None:
    # A Linux router calls an IPv6 route of type "unreachable" a missing one; only the proxy itself sees EHOSTUNREACH.
    expected = "ENETUNREACH" if address == UNREACHABLE6 and not stage.proxied else "EHOSTUNREACH"
    assert error_of_connect(stage, address, 80) == expected


@pytest.mark.parametrize("address", [NO_ROUTE4, NO_ROUTE6])
def test_an_unreachable_network(stage: Stage, address: str) -> None:
    assert error_of_connect(stage, address, 80) in ("ENETUNREACH", "EHOSTUNREACH")


@pytest.mark.parametrize("address", [SILENT4, SILENT6])
def test_a_silent_host_is_silent_then_refuses(stage: Stage, address: str) -> None:
    """Nothing until connect-timeout (2 s here), so that a client tries its next address as it would without us."""
    began_at = time.monotonic()
    error = error_of_connect(stage, address, 80, 15)
    took = time.monotonic() - began_at
    assert error in ("ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "EHOSTUNREACH")
    assert took > 1.5, f"answered after {took:.2f} s"


def test_no_syn_ack_before_the_target_answered(stage: Stage) -> None:
    """While the target is silent the client's socket is not writable: nothing looks open that is not."""
    with stage.world.gw.socket() as client:
        client.settimeout(1.0)
        with pytest.raises(TimeoutError):
            client.connect((SILENT4, 443))


def test_refusals_leave_nothing_behind(stage: Stage) -> None:
    for _ in range(200):
        assert error_of_connect(stage, TARGET4, CLOSED_PORT) == "ECONNREFUSED"
    eventually(lambda: stage.ringway.flows() < 20, "refused flows are forgotten")


def refuse_by_port(connection: socket.socket) -> None:
    """Refuse with the code that the port's last three digits name."""
    _, _, port = read_request(connection)
    connection.sendall(bytes((5, port % 1000)) + b"\x00\x01" + bytes(6))
    connection.recv(1)


#: REP code → errno of connect() over IPv4, over IPv6
REPLIES = {
    1: ("ECONNREFUSED", "ECONNREFUSED"),
    2: ("EHOSTUNREACH", "EACCES"),  # "administratively prohibited", in the kernel's words
    3: ("ENETUNREACH", "ENETUNREACH"),
    4: ("EHOSTUNREACH", "EHOSTUNREACH"),
    5: ("ECONNREFUSED", "ECONNREFUSED"),
    6: ("EHOSTUNREACH", "EHOSTUNREACH"),
    7: ("ECONNREFUSED", "ECONNREFUSED"),
    8: ("ENETUNREACH", "ENETUNREACH"),
    9: ("ECONNREFUSED", "ECONNREFUSED"),
    255: ("ECONNREFUSED", "ECONNREFUSED"),
}


@pytest.mark.parametrize("placement", ["pipeline", "single"])
def test_what_connect_says_of_every_reply_code(world: World, placement: str) -> None:
    lan = world.lan
    with (
        ScriptedProxy(world.net, refuse_by_port, NET_GW4, 1080),
        Ringway(world, "-p", f"socks5://{NET_GW4}:1080", "--placement", placement) as ringway,
    ):
        for namespace in (world.gw, lan):
            seen = {
                code: tuple(error_of_connect(namespace, address, 1000 + code) for address in (TARGET4, TARGET6))
                for code in REPLIES
            }
            assert seen == REPLIES
        assert ringway.counters()["tcp_refused"] == 4 * len(REPLIES)


def test_early_accept_connects_at_once_and_resets_later(world: World) -> None:
    """The price of the key, seen by a client: what cannot be reached looks open first."""
    with Target(world.net) as target, Ringway(world, *DIRECT, "--early-accept", "--connect-timeout", "1s"):
        for address in (TARGET4, TARGET6):
            echo(world.gw, address, target.port, bytes(300_000))
        for address in (SILENT4, SILENT6, UNREACHABLE4, UNREACHABLE6):
            with pytest.raises(ConnectionResetError), connect(world.gw, address, 80, 8) as client:
                client.sendall(b"question")
                client.recv(1)


@pytest.mark.parametrize("placement", ["pipeline", "single"])
def test_public_only(world: World, placement: str) -> None:
    """Private destinations are refused with ICMP "administratively prohibited" and counted; our own answer."""
    with Ringway(world, *DIRECT, "--public-only", "--placement", placement) as ringway:
        world.gw.ip("route add 10.99.0.0/16 dev tun0", "-6 route add fd99::/64 dev tun0")
        # The kernel maps codes 9, 10, 13 of ICMPv4 to EHOSTUNREACH or EACCES by version and protocol.
        before = sum(ringway.counters().values())
        for address in ("10.99.1.1", "fd99::1"):
            assert error_of_connect(world, address, 80, 5) in ("EHOSTUNREACH", "ENETUNREACH", "EACCES", "EPERM")
            with world.gw.socket(family_of(address), socket.SOCK_DGRAM) as client:
                client.settimeout(5)
                client.connect((address, 80))
                client.send(b"?")
                with pytest.raises(OSError) as refused:
                    client.recv(10)
                assert refused.value.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EPERM)
        named = {name: value for name, value in ringway.counters().items() if "public" in name and value}
        assert named, f"no counter says so: {ringway.counters()}"
        assert sum(ringway.counters().values()) > before
        for own in ("198.18.0.2", "fd72:6e67:7761:7900::2"):
            assert world.gw.run(["ping", "-c", "1", "-W", "2", own]).returncode == 0


def test_without_public_only_private_targets_are_reached(world: World) -> None:
    world.net.ip("addr add 10.99.1.1/32 dev lo")
    with (
        Target(world.net) as target,
        UdpTarget(world.net, "10.99.1.1") as udp,
        Ringway(world, *DIRECT),
    ):
        world.gw.ip("route add 10.99.0.0/16 dev tun0")
        echo(world.gw, "10.99.1.1", target.port)
        udp_echo(world.gw, "10.99.1.1", udp.port)


def test_a_lan_client_gets_the_errors_too(world: World) -> None:
    """ICMP and RST travel the forward path back."""
    lan = world.lan
    with Ringway(world, *DIRECT):
        for address, expected in ((TARGET4, "ECONNREFUSED"), (UNREACHABLE4, "EHOSTUNREACH")):
            with pytest.raises(OSError) as refused:
                connect(lan, address, CLOSED_PORT, 5).close()
            assert refused.value.errno is not None, f"timeout from {LAN4} to {address}"
            assert errno.errorcode[refused.value.errno] == expected
