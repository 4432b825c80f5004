"""A LAN client behind the router: its packets come to the TUN through the forward path."""

import os
import socket

import pytest

from tests.netns.daemon import DIRECT, Ringway
from tests.netns.peers import DANTE, RunningPeer, require
from tests.netns.traffic import Target, UdpTarget, connect, download, echo, read_exactly, udp_echo, upload
from tests.netns.world import TARGET4, TARGET6, World

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("placement", ["pipeline", "single"])
@pytest.mark.parametrize("offload", ["on", "off"])
def test_lan_client(world: World, placement: str, offload: str) -> None:
    """Both ways, TCP and UDP, IPv4 and IPv6; super-segments from the LAN, and single ones with real checksums."""
    lan = world.lan
    if offload == "off":
        from tests.peers import need

        lan.run([need("ethtool"), "-K", "eth0", "tx", "off", "tso", "off", "gso", "off"], check=True)
    with (
        Target(world.net) as target,
        UdpTarget(world.net, TARGET4) as udp4,
        UdpTarget(world.net, TARGET6) as udp6,
        Ringway(world, *DIRECT, "--placement", placement),
    ):
        for address, udp in ((TARGET4, udp4), (TARGET6, udp6)):
            upload(lan, address, target.port, 16 << 20)
            download(lan, address, target.port, 16 << 20)
            for _ in range(20):
                echo(lan, address, target.port)
            for size in (1, 1400):
                udp_echo(lan, address, udp.port, os.urandom(size))


def test_lan_client_and_router_at_once(world: World) -> None:
    """Two clients with the same source port, one on the LAN and one on the router, are two flows."""
    lan = world.lan
    with Target(world.net) as target, Ringway(world, *DIRECT):
        connections = []
        try:
            for namespace in (lan, world.gw):
                connection = namespace.socket(socket.AF_INET)
                connection.settimeout(10)
                connection.bind(("0.0.0.0", 44444))
                connection.connect((TARGET4, target.port))
                connections.append(connection)
            for which, connection in enumerate(connections):
                connection.sendall(b"E%d" % which)
            for which, connection in enumerate(connections):
                assert read_exactly(connection, 1) == b"%d" % which
        finally:
            for connection in connections:
                connection.close()


def test_lan_with_masquerade_and_mss_clamp(world: World) -> None:
    """What routers do besides: connection tracking and the usual MSS rule must not disturb the gateway."""
    from tests.peers import need

    lan = world.lan
    clamp = "tcp flags syn tcp option maxseg size set rt mtu"
    track = "ct state established,related accept"
    rules = f"table inet t {{ chain f {{ type filter hook forward priority 0; {clamp}; {track}; }}; }}"
    done = world.gw.run([need("nft"), rules])
    if done.returncode != 0:
        pytest.skip(f"this kernel has no nftables connection tracking: {done.stderr.strip().splitlines()[0]}")
    with Target(world.net) as target, Ringway(world, *DIRECT):
        upload(lan, TARGET4, target.port, 4 << 20)
        download(lan, TARGET4, target.port, 4 << 20)


def test_lan_client_through_a_real_proxy(world: World) -> None:
    require(DANTE)
    lan = world.lan
    with (
        RunningPeer(DANTE, world.net) as server,
        Target(world.net) as target,
        UdpTarget(world.net) as udp,
        Ringway(world, "-p", server.url),
    ):
        download(lan, TARGET4, target.port, 8 << 20)
        udp_echo(lan, TARGET4, udp.port)
        with connect(lan, TARGET4, target.port) as connection:
            connection.sendall(b"H")
            assert read_exactly(connection, 3) == b"bye"
