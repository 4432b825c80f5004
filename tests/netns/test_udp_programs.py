"""UDP with programs that people use: STUN tells mapping and filtering apart, iperf3 -u, HTTP/3 by aioquic."""

import hashlib
import json
import select
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.netns.daemon import DIRECT, Ringway
from tests.netns.peers import EMBEDDED, RunningPeer
from tests.netns.stun import StunServer, filtering_of, mapping_of
from tests.netns.world import TARGET4, TARGET6, World
from tests.peers import need, need_module

pytestmark = pytest.mark.netns


def end(program: "subprocess.Popen[bytes]") -> None:
    program.kill()
    program.communicate()


def upstream_flags(world: World, upstream: str) -> tuple[str, ...]:
    if upstream == "direct":
        return DIRECT
    peer = RunningPeer(EMBEDDED, world.net)
    world.on_close(peer.close)
    return ("-p", peer.url)


@pytest.mark.parametrize("upstream", ["direct", "socks"])
@pytest.mark.parametrize(
    ("mapping", "filtering"),
    [
        ("endpoint-independent", "endpoint-independent"),
        ("endpoint-independent", "address"),
        ("endpoint-independent", "address-port"),
        ("address-port", "address-port"),
    ],
)
def test_stun_sees_what_was_configured(world: World, upstream: str, mapping: str, filtering: str) -> None:
    server = StunServer(world.net, ("203.0.113.20", "203.0.113.21"))
    world.on_close(server.close)
    flags = upstream_flags(world, upstream)
    with Ringway(world, *flags, "--workers", "4", "--udp-mapping", mapping, "--udp-filtering", filtering):
        with world.gw.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            assert mapping_of(client, server) == mapping
        with world.gw.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            assert filtering_of(client, server) == filtering


@pytest.mark.peer
@pytest.mark.parametrize("way", [(), ("-R",)], ids=["up", "down"])
@pytest.mark.parametrize("upstream", ["direct", "socks"])
def test_iperf3(world: World, upstream: str, way: tuple[str, ...]) -> None:
    """Datagrams of 1,400 and of 8,000 octets, which are fragments, and none of them lost at a moderate rate."""
    program = need("iperf3")
    server = world.net.popen([program, "-s", "-B", TARGET4], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    world.on_close(partial(end, server))
    assert server.stdout is not None
    select.select([server.stdout], [], [], 5)
    with Ringway(world, *upstream_flags(world, upstream)):
        for size in (1400, 8000):
            argv = [program, "-c", TARGET4, "-u", "-b", "8M", "-l", f"{size}", "-t", "1", "--json", *way]
            done = world.gw.run(argv, timeout=30)
            report = json.loads(done.stdout)
            assert "error" not in report, report["error"]
            total = report["end"]["sum"]
            assert total["packets"] > 50
            assert total["lost_packets"] <= total["packets"] * 0.02, total


@pytest.mark.peer
@pytest.mark.parametrize("address", [TARGET4, TARGET6])
@pytest.mark.parametrize("upstream", ["direct", "socks"])
def test_http3(world: World, tmp_path: Path, upstream: str, address: str) -> None:
    need_module("aioquic", "aioquic")
    size = 2_000_000
    program = [sys.executable, "-m", "tests.netns.http3"]
    server = world.net.popen([*program, "serve", address, "443", str(tmp_path)], stdout=subprocess.PIPE)
    world.on_close(partial(end, server))
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    with Ringway(world, *upstream_flags(world, upstream)) as ringway:
        done = world.gw.run([*program, "get", address, "443", f"{size}"], timeout=60)
        assert done.stdout.split() == [str(size), hashlib.sha256(bytes(size)).hexdigest()], done.stderr
        assert ringway.counters()["udp_datagrams_down"] > 1000
