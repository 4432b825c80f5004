"""Names from the cache: the resolver behind the gateway is asked once, whichever worker a client's question meets."""

import os
import signal

import pytest

from tests.netns.daemon import DIRECT, Ringway
from tests.netns.dns import ANSWER4, NameServer
from tests.netns.peers import EMBEDDED, MICROSOCKS, RunningPeer, require
from tests.netns.test_kill import replaced
from tests.netns.test_socks_servers import dig
from tests.netns.world import TARGET4, World

pytestmark = [pytest.mark.netns, pytest.mark.peer]


def _ask(world: World, name: str = "name.test") -> int:
    """Ask for a name from a new socket; return the TTL of its one answer."""
    [line] = dig(world, f"@{TARGET4}", name, "A", "+noall", "+answer").splitlines()
    _, ttl, _, _, address = line.split()
    assert address == ANSWER4
    return int(ttl)


@pytest.mark.parametrize("upstream", ["udp", "tcp", "direct"])
def test_a_resolver_is_asked_once(world: World, upstream: str) -> None:
    """Twenty sockets and four workers; then one of them is killed, and its successor knows the name as well."""
    peer = MICROSOCKS if upstream == "tcp" else EMBEDDED
    require(peer, "dig")
    with (
        RunningPeer(peer, world.net) as server,
        NameServer(world.net) as names,
        Ringway(
            world, *(DIRECT if upstream == "direct" else ("-p", server.url)), "--enable-dns-cache", "--workers", "4"
        ) as ringway,
    ):
        assert _ask(world) == 60
        for _ in range(20):
            assert 1 <= _ask(world) <= 60
        assert sum(names.asked.values()) == 1
        assert ringway.counters()["dns_cache_hits"] == 20
        for shard in range(4):
            pid = ringway.pid("worker", shard)
            os.kill(pid, signal.SIGKILL)
            replaced(ringway, "worker", pid, shard)
        for _ in range(4):
            assert _ask(world) <= 60
        assert sum(names.asked.values()) == 1
        _ask(world, "other.test")
        assert sum(names.asked.values()) == 2
