"""LAN clients behind a link that is narrower than the device: the router's ICMP "too big" comes to us, and is obeyed.

lan 1500 ──── 1400 lan0 ─ gw ─ tun0 1500     a packet of 1,500 octets from tun0 does not fit the way to the LAN
"""

import pytest

from tests.netns.daemon import DIRECT, Ringway
from tests.netns.traffic import Target, download, echo, upload
from tests.netns.world import LAN4, LAN6, TARGET4, TARGET6, World

pytestmark = pytest.mark.netns


def narrow(world: World, mtu: int) -> None:
    """Let the router send no larger packets to the LAN, whose hosts do not know (their MSS says 1,500)."""
    world.gw.ip(
        f"route replace {LAN4}/32 dev lan0 mtu {mtu}",
        f"-6 route replace {LAN6}/128 dev lan0 mtu {mtu}",
    )


@pytest.mark.parametrize(
    ("mtu", "flags"),
    [
        (1400, ["--placement", "pipeline", "--workers", "2"]),
        (1400, ["--placement", "single"]),
        (1400, ["--placement", "pipeline", "--offloads=false"]),
        (1280, ["--placement", "single"]),
    ],
)
def test_a_narrow_link_behind_the_router(world: World, mtu: int, flags: list[str]) -> None:
    lan = world.lan
    narrow(world, mtu)
    with Target(world.net) as target, Ringway(world, *DIRECT, *flags) as ringway:
        for address in (TARGET4, TARGET6):
            for _ in range(3):
                download(lan, address, target.port, 8 << 20)
            upload(lan, address, target.port, 8 << 20)
            echo(lan, address, target.port, bytes(100_000))
        counters = ringway.counters()
        assert 2 <= counters["tcp_path_mtu"] <= 16, counters  # at least once for each version, and then it is known
        assert not counters["tcp_retransmit_timeouts"]


def test_a_link_that_becomes_narrow_under_a_flow(world: World) -> None:
    from tests.netns.traffic import connect, read_exactly

    lan = world.lan
    with Target(world.net) as target, Ringway(world, *DIRECT) as ringway:
        flows = [connect(lan, address, target.port) for address in (TARGET4, TARGET6)]
        try:
            for mtu in (1500, 1400, 1300):
                narrow(world, mtu)
                for flow in flows:
                    flow.sendall((b"E" if mtu == 1500 else b"") + bytes(200_000))
                    assert read_exactly(flow, 200_000) == bytes(200_000)
        finally:
            for flow in flows:
                flow.close()
        assert ringway.counters()["tcp_path_mtu"] == 4
