"""Devices of every kind: MTU 1500 and 9000, small ones, offloads on, partly on and off, inherited, persistent."""

import os
import socket
import struct

import pytest

from tests.netns.daemon import DIRECT, Ringway, ringway_command
from tests.netns.test_udp import SOL_UDP, UDP_SEGMENT
from tests.netns.traffic import Target, UdpTarget, download, echo, family_of, udp_echo, upload
from tests.netns.tun import ALL_OFFLOADS, TUN_F_CSUM, TUN_F_TSO4, open_tun
from tests.netns.world import TARGET4, TARGET6, World

pytestmark = pytest.mark.netns
PLACEMENTS = pytest.mark.parametrize("placement", ["pipeline", "single"])


def everything_works(world: World, ipv6: bool = True, count: int = 8 << 20, mtu: int = 1500) -> None:
    """Bulk both ways with checksums, short flows, datagrams of several sizes, segmented ones."""
    with Target(world.net) as target, UdpTarget(world.net, TARGET4) as udp4, UdpTarget(world.net, TARGET6) as udp6:
        for address, udp in ((TARGET4, udp4), (TARGET6, udp6)):
            if ":" in address and not ipv6:
                continue
            upload(world.gw, address, target.port, count)
            download(world.gw, address, target.port, count)
            for _ in range(10):
                echo(world.gw, address, target.port)
            for size in (1, 500, mtu - 48):
                udp_echo(world.gw, address, udp.port, os.urandom(size))
            _segmented(world, address, udp)


def _segmented(world: World, address: str, udp: UdpTarget) -> None:
    with world.gw.socket(family_of(address), socket.SOCK_DGRAM) as client:
        client.settimeout(3)
        client.connect((address, udp.port))
        client.sendmsg(
            [b"".join(bytes((which,)) * 400 for which in range(20))],
            [(SOL_UDP, UDP_SEGMENT, struct.pack("H", 400))],
        )
        assert [client.recv(2000) for _ in range(20)] == [bytes((which,)) * 400 for which in range(20)]


@PLACEMENTS
@pytest.mark.parametrize("mtu", [1280, 1500, 9000, 65535])
def test_mtu(namespaces_work: None, mtu: int, placement: str) -> None:
    with (
        World(min(mtu, 9000)) as world,
        Ringway(world, *DIRECT, "--mtu", str(mtu), "--placement", placement) as ringway,
    ):
        assert ringway.status()["device"]["mtu"] == mtu
        assert f"mtu {mtu}" in world.gw.ip("link show tun0")
        everything_works(world, mtu=min(mtu, 9000))


def test_mtu_too_small_for_ipv6(world: World) -> None:
    with Ringway(world, *DIRECT, "--mtu", "576"):
        everything_works(world, ipv6=False, count=2 << 20, mtu=576)


@PLACEMENTS
@pytest.mark.parametrize(
    ("vnet_header", "offloads"),
    [(True, None), (True, ()), (True, (TUN_F_CSUM,)), (True, (TUN_F_CSUM | TUN_F_TSO4,)), (False, ())],
    ids=["all offloads", "header but no offload", "checksum only", "checksum and TSO4", "no header"],
)
def test_inherited_descriptor(
    world: World, vnet_header: bool, offloads: "tuple[int, ...] | None", placement: str
) -> None:
    """Whatever the one who opened it asked for, all works; what the device lacks is done in software."""
    fd = open_tun(world.gw, vnet_header=vnet_header, offloads=ALL_OFFLOADS if offloads is None else offloads)
    try:
        with Ringway(world, *DIRECT, "--placement", placement, device=f"fd://{fd}", pass_fds=[fd]):
            world.route_into("tun0")
            everything_works(world)
        assert "tun0" in world.gw.links(), "what we did not make is not ours to remove"
    finally:
        os.close(fd)


def test_persistent_device_is_used_and_left(world: World) -> None:
    world.gw.ip(
        "tuntap add dev tun7 mode tun vnet_hdr",
        "addr add 198.18.0.1/15 dev tun7",
        "link set tun7 up",
    )
    for _ in range(2):
        with Ringway(world, *DIRECT, device="tun://tun7"), Target(world.net) as target:
            world.gw.ip("route replace 203.0.113.0/24 dev tun7")
            echo(world.gw, TARGET4, target.port)
        assert "tun7" in world.gw.links()
        assert "198.18.0.1/15" in world.gw.ip("addr show dev tun7")


def test_device_busy(world: World) -> None:
    """A second gateway on the same device: one line with the fix, exit 2, the first unharmed."""
    with Ringway(world, *DIRECT), Target(world.net) as target:
        done = ringway_command(world.gw, "run", *DIRECT, "-d", "tun://tun0", "--control", "/tmp/ringway-second.sock")
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert "tun0" in done.stderr
        echo(world.gw, TARGET4, target.port)


def test_several_gateways_in_one_namespace(world: World) -> None:
    with Target(world.net) as target:
        two = ("--tun-address", "198.51.100.1", "--tun-mask", "255.255.255.0", "--tun-gw", "198.51.100.2")
        with (
            Ringway(world, *DIRECT),
            Ringway(world, *DIRECT, *two, "--tun-address6", "", device="tun://tun1", routes=False),
        ):
            world.gw.ip("route add 203.0.113.64/26 dev tun1")
            echo(world.gw, TARGET4, target.port)
            echo(world.gw, "203.0.113.70", target.port)


def test_own_names_and_addresses(world: World) -> None:
    """The device's addresses are what the flags say, and Ringway answers from the next ones."""
    flags = ("--tun-address", "172.31.7.1", "--tun-mask", "255.255.255.252", "--tun-gw", "172.31.7.2")
    six = ("--tun-address6", "fd12:3456::1/64", "--tun-gw6", "fd12:3456::2")
    with Ringway(world, *DIRECT, *flags, *six, device="tun://ring7", routes=False):
        shown = world.gw.ip("addr show dev ring7")
        assert "172.31.7.1/30" in shown
        assert "fd12:3456::1/64" in shown
        for own in ("172.31.7.2", "fd12:3456::2"):
            assert world.gw.run(["ping", "-c", "1", "-W", "2", own]).returncode == 0
    assert "ring7" not in world.gw.links()


def test_upstream_leaves_by_the_interface_named(world: World) -> None:
    """`--interface` instead of a mark: the route into the TUN does not catch the worker's own connections."""
    world.gw.ip(
        "rule add oif net0 lookup 83",
        "-6 rule add oif net0 lookup 83",
        "route add default via 10.77.0.2 dev net0 table 83",
        "-6 route add default via fd00:77::2 dev net0 table 83",
    )
    with Ringway(world, "-p", "direct://", "--interface", "net0"):
        everything_works(world, count=1 << 20)
