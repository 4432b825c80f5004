"""Real SOCKS and HTTP servers behind the gateway, each with its own ways: TCP, UDP, names, passwords, and dig."""

import os
import signal
import threading

import pytest

from tests.certificates import CA
from tests.netns.daemon import Ringway
from tests.netns.dns import ANSWER4, ANSWER6, LARGE, NameServer
from tests.netns.peers import (
    CARRIED_KINDS,
    DANTE,
    EMBEDDED,
    MICROSOCKS,
    MICROSOCKS_PASSWORD,
    OTHER_KINDS,
    REAL,
    SHADOWSOCKS,
    SSH,
    TINYPROXY,
    V2RAY,
    V2RAY_HTTP,
    Peer,
    RunningPeer,
    require,
)
from tests.netns.traffic import Target, UdpTarget, download, echo, udp_echo, upload
from tests.netns.world import TARGET4, TARGET6, World, eventually
from tests.peers import need

pytestmark = [pytest.mark.netns, pytest.mark.peer]
PEERS = [EMBEDDED, *REAL]
# These answer a refusal with its code. shadowsocks and v2ray say success and end, ssh ends without an answer,
# asyncio-socks-server calls everything a general failure.
HONEST = ("embedded", "dante", "microsocks", "microsocks-password")


def dig(world: World, *arguments: str) -> str:
    done = world.gw.run([need("dig"), "+time=5", "+tries=1", *arguments])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("placement", ["pipeline", "single"])
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_everything_through(world: World, peer: Peer, placement: str) -> None:
    """TCP bulk and short, refusal, UDP, and DNS, which goes over TCP where the server has no UDP."""
    require(peer, "dig")
    with (
        RunningPeer(peer, world.net) as server,
        Target(world.net) as target,
        UdpTarget(world.net, TARGET4) as udp4,
        UdpTarget(world.net, TARGET6) as udp6,
        NameServer(world.net) as names,
        Ringway(world, "-p", server.url, "--placement", placement) as ringway,
    ):
        gw = world.gw
        download(gw, TARGET4, target.port, 8 << 20)
        with_half_close = peer in (EMBEDDED, DANTE)
        if with_half_close:
            upload(gw, TARGET4, target.port, 8 << 20)
        _short_flows(world, TARGET4, target.port, 40)
        if peer.ipv6:
            download(gw, TARGET6, target.port, 1 << 20)
            _short_flows(world, TARGET6, target.port, 20)
        if peer.name in HONEST:
            with pytest.raises(ConnectionRefusedError):
                echo(gw, TARGET4, 9)
        else:
            with pytest.raises((OSError, EOFError)):
                echo(gw, TARGET4, 9)
        if peer.udp:
            for size in (1, 1400):
                udp_echo(gw, TARGET4, udp4.port, b"u" * size)
            if peer.udp_ipv6:
                udp_echo(gw, TARGET6, udp6.port)
        assert dig(world, f"@{TARGET4}", "name.test", "A", "+short").split() == [ANSWER4]
        assert dig(world, f"@{TARGET4}", "name.test", "AAAA", "+short").split() == [ANSWER6]
        assert names.asked["udp" if peer.udp else "tcp"] >= 2, names.asked
        assert "t" * 250 in dig(world, f"@{TARGET4}", LARGE, "TXT")
        if peer.ipv6 and (peer.udp_ipv6 or not peer.udp):
            assert dig(world, f"@{TARGET6}", "name.test", "A", "+short").split() == [ANSWER4]
        eventually(lambda: ringway.flows() < 10, "the flows are forgotten", 10)


@pytest.mark.parametrize("peer", OTHER_KINDS, ids=lambda peer: peer.name)
def test_other_kinds_of_proxy(world: World, peer: Peer) -> None:
    """SOCKS4, 4a and HTTP CONNECT carry TCP; questions go over TCP, other datagrams are refused at once."""
    require(peer, "dig")
    with (
        RunningPeer(peer, world.net) as server,
        Target(world.net) as target,
        UdpTarget(world.net, TARGET4) as udp,
        NameServer(world.net) as names,
        Ringway(world, "-p", server.url) as ringway,
    ):
        gw = world.gw
        download(gw, TARGET4, target.port, 8 << 20)
        _short_flows(world, TARGET4, target.port, 40)
        if peer.ipv6:
            download(gw, TARGET6, target.port, 1 << 20)
        elif peer.scheme == "socks4":
            with pytest.raises(OSError, match="unreachable"):
                echo(gw, TARGET6, target.port)
        with pytest.raises((OSError, EOFError)):
            echo(gw, TARGET4, 9)
        with pytest.raises(ConnectionRefusedError):
            udp_echo(gw, TARGET4, udp.port)
        assert dig(world, f"@{TARGET4}", "name.test", "A", "+short").split() == [ANSWER4]
        assert names.asked["tcp"] >= 1 and not names.asked["udp"]
        eventually(lambda: ringway.flows() < 10, "the flows are forgotten", 10)


def test_http_password_is_refused(world: World) -> None:
    require(TINYPROXY)
    with RunningPeer(TINYPROXY, world.net) as server, Target(world.net) as target:
        wrong = server.url.rsplit("@", 1)[1]
        with Ringway(world, "-p", f"http://somebody:wrongsecret@{wrong}") as ringway:
            for _ in range(3):
                with pytest.raises(OSError):
                    echo(world.gw, TARGET4, target.port)
            assert ringway.log().count("the proxy refuses the username or password") == 1
            assert "wrongsecret" not in ringway.log()


def test_reject_refuses_everything(world: World) -> None:
    with Target(world.net) as target, UdpTarget(world.net, TARGET4) as udp, Ringway(world, "-p", "reject://"):
        for address in (TARGET4, TARGET6):
            with pytest.raises(ConnectionRefusedError):
                echo(world.gw, address, target.port)
        for port in (udp.port, 53):
            with pytest.raises(ConnectionRefusedError):
                udp_echo(world.gw, TARGET4, port)


def _short_flows(world: World, address: str, port: int, count: int) -> None:
    failures: list[BaseException] = []

    def some() -> None:
        try:
            for _ in range(count // 10):
                echo(world.gw, address, port)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=some) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures


def test_wrong_password(world: World) -> None:
    """Flows are refused, the gateway stays, and the password is in no log."""
    require(MICROSOCKS_PASSWORD)
    with RunningPeer(MICROSOCKS_PASSWORD, world.net) as server, Target(world.net) as target:
        wrong = server.url.rsplit("@", 1)
        with Ringway(world, "-p", f"socks5://somebody:wrongsecret@{wrong[1]}") as ringway:
            for _ in range(3):
                with pytest.raises(OSError):
                    echo(world.gw, TARGET4, target.port)
            assert "wrongsecret" not in ringway.log()
            assert "wrongsecret" not in ringway.status_command("--json").stdout


def test_password_from_a_file_and_from_the_environment(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests.netns.peers import PASSWORD, USER
    from tests.netns.world import NET_GW4

    require(MICROSOCKS_PASSWORD)
    secret = tmp_path_factory.mktemp("secret") / "password"
    secret.write_text(PASSWORD + "\n")
    with RunningPeer(MICROSOCKS_PASSWORD, world.net) as server, Target(world.net) as target:
        with Ringway(world, "-p", f"socks5://{USER}@{NET_GW4}:1080", "--password-file", str(secret)):
            echo(world.gw, TARGET4, target.port)
        with Ringway(world, env={"RINGWAY_PROXY": server.url}):
            echo(world.gw, TARGET4, target.port)


def test_udp_association_ends_with_dante_and_comes_back(world: World) -> None:
    """Dante stops relaying when it dies; after it is back, the same client socket is served by a new association."""
    _restart_under_udp(world, DANTE)


def test_udp_association_outlived_by_shadowsocks_and_back(world: World) -> None:
    _restart_under_udp(world, SHADOWSOCKS)


def _restart_under_udp(world: World, peer: Peer) -> None:
    import socket

    require(peer)
    with (
        RunningPeer(peer, world.net) as server,
        UdpTarget(world.net) as target,
        Ringway(world, "-p", server.url),
        world.gw.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        client.connect(target.address)
        client.settimeout(3)
        client.send(b"one")
        assert client.recv(10) == b"one"
        server.stop()
        server.start()
        client.settimeout(0.3)

        def answered() -> bool:
            try:
                client.send(b"two")
                return client.recv(10) == b"two"
            except OSError:
                return False

        eventually(answered, f"UDP works again after {peer.name} was restarted", 20)


@pytest.mark.parametrize("mode", ["gost", "hev", "uot"])
def test_datagrams_inside_tcp(world: World, mode: str) -> None:
    """Each dialect, as our own proxy serves it: single datagrams of each size, a burst, DNS, both IP versions."""
    with (
        RunningPeer(EMBEDDED, world.net) as server,
        UdpTarget(world.net, TARGET4) as udp4,
        UdpTarget(world.net, TARGET6) as udp6,
        NameServer(world.net) as names,
        Ringway(world, "-p", server.url, "--udp-mode", mode) as ringway,
    ):
        for size in (1, 1400):
            udp_echo(world.gw, TARGET4, udp4.port, b"u" * size)
        udp_echo(world.gw, TARGET6, udp6.port)
        assert dig(world, f"@{TARGET4}", "name.test", "A", "+short").split() == [ANSWER4]
        assert names.asked["udp"] == 1 and not names.asked["tcp"]
        counters = ringway.counters()
        assert counters["udp_opened"] >= 3 and not counters.get("dns_over_tcp_queries")


@pytest.mark.parametrize("peer", [EMBEDDED, MICROSOCKS, SSH, V2RAY_HTTP], ids=lambda peer: peer.name)
def test_what_auto_finds_is_said_once_and_shown(world: World, peer: Peer) -> None:
    require(peer)
    found = "udp" if peer.udp else "none"
    with (
        RunningPeer(peer, world.net) as server,
        UdpTarget(world.net) as target,
        Ringway(world, "-p", server.url) as ringway,
    ):
        eventually(lambda: ringway.status()["udp"]["found"], "the probe is done", 15)
        assert ringway.status()["udp"] == {"mode": "auto", "found": found}
        if found == "udp":
            udp_echo(world.gw, TARGET4, target.port)
        else:
            with pytest.raises(ConnectionRefusedError):
                udp_echo(world.gw, TARGET4, target.port)
        said = "by UDP ASSOCIATE" if found == "udp" else "not at all: DNS goes over TCP, the rest is refused"
        assert ringway.log().count(f"datagrams go to the proxy {said}") == 1
        assert f"datagrams go to the proxy {said}" in ringway.status_command().stdout


@pytest.mark.parametrize("peer", [EMBEDDED, DANTE, SHADOWSOCKS, V2RAY, SSH, MICROSOCKS], ids=lambda peer: peer.name)
def test_a_pipelined_handshake_where_the_server_takes_it(world: World, peer: Peer) -> None:
    """Auto asks first: microsocks loses what comes at once, and ssh, asked for UDP, closes: both go step by step."""
    require(peer)
    with RunningPeer(peer, world.net) as server, Target(world.net) as target:
        with Ringway(world, "-p", server.url) as ringway:
            eventually(lambda: ringway.status()["udp"]["found"], "the probe is done", 15)
            assert ringway.status()["pipelined"] == (peer not in (MICROSOCKS, SSH))
            _short_flows(world, TARGET4, target.port, 40)
        with Ringway(world, "-p", server.url, "--pipelined-handshake", "no") as ringway:
            _short_flows(world, TARGET4, target.port, 10)
            assert not ringway.status()["pipelined"]


@pytest.mark.parametrize("placement", ["pipeline", "single"])
@pytest.mark.parametrize("peer", CARRIED_KINDS, ids=lambda peer: peer.name)
def test_inside_something_else(world: World, peer: Peer, placement: str) -> None:
    """One more process speaks TLS, WebSocket or HTTP to the proxy; killed, it is replaced and all goes on."""
    require(peer, "dig")
    in_tls = peer.scheme in ("https", "socks5+tls", "socks5+wss")
    tls = ["--tls-ca", CA, "--tls-server-name", "localhost"] if in_tls else []
    with (
        RunningPeer(peer, world.net) as server,
        Target(world.net) as target,
        UdpTarget(world.net, TARGET4) as udp,
        NameServer(world.net) as names,
        Ringway(world, "-p", server.url, "--placement", placement, *tls) as ringway,
    ):
        gw = world.gw
        download(gw, TARGET4, target.port, 4 << 20)
        _short_flows(world, TARGET4, target.port, 20)
        if peer.udp:
            upload(gw, TARGET4, target.port, 1 << 20)
            with pytest.raises(OSError):
                echo(gw, TARGET4, 9)
            for size in (1, 1200):
                udp_echo(gw, TARGET4, udp.port, b"u" * size)
        else:
            with pytest.raises(ConnectionRefusedError):
                udp_echo(gw, TARGET4, udp.port)
        assert dig(world, f"@{TARGET4}", "name.test", "A", "+short").split() == [ANSWER4]
        assert names.asked["udp" if peer.udp else "tcp"] >= 1
        assert ringway.counters()["carrier_connections"] >= 20
        os.kill(ringway.pid("carrier"), signal.SIGKILL)
        eventually(lambda: ringway.processes("carrier")[0]["restarts"] == 1, "the carrier is replaced", 10)
        echo(gw, TARGET4, target.port)


def test_a_certificate_that_is_not_trusted(world: World) -> None:
    with (
        RunningPeer(CARRIED_KINDS[0], world.net) as server,
        Target(world.net) as target,
        Ringway(world, "-p", server.url, "--tls-server-name", "localhost") as ringway,
    ):
        with pytest.raises(OSError):
            echo(world.gw, TARGET4, target.port)
        assert ringway.log().count("the certificate is refused") == 1


@pytest.mark.parametrize("peer", [EMBEDDED, DANTE, MICROSOCKS_PASSWORD, TINYPROXY], ids=lambda peer: peer.name)
def test_warm_connections(world: World, peer: Peer) -> None:
    require(peer)
    with (
        RunningPeer(peer, world.net) as server,
        Target(world.net) as target,
        Ringway(world, "-p", server.url, "--warm-connections", "4") as ringway,
    ):
        _short_flows(world, TARGET4, target.port, 40)
        eventually(lambda: ringway.counters()["tcp_warm"] >= 4, "connections are warm", 10)
        _short_flows(world, TARGET4, target.port, 40)
        assert ringway.counters()["tcp_warm_used"] >= 4
