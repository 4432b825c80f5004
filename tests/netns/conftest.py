"""What the namespace tests share: worlds, and a gateway that many tests in a row use."""

from collections.abc import Iterator

import pytest

from tests.netns.daemon import DIRECT, Ringway
from tests.netns.peers import EMBEDDED, RunningPeer
from tests.netns.stage import Stage
from tests.netns.traffic import Target, UdpTarget
from tests.netns.world import TARGET4, TARGET6, World, why_not


@pytest.fixture(scope="session")
def namespaces_work() -> None:
    """Skip, saying why, where the kernel makes no network namespaces although we are root (a container)."""
    reason = why_not()
    if reason:
        pytest.skip(reason)


@pytest.fixture
def world(namespaces_work: None) -> Iterator[World]:
    """A world of the test's own: some twenty milliseconds to make."""
    with World() as world:
        yield world


@pytest.fixture(scope="session", params=["direct-pipeline", "socks-pipeline", "socks-single"])
def _stage(request: pytest.FixtureRequest, namespaces_work: None) -> Iterator[Stage]:
    upstream, placement = request.param.split("-")
    with (
        World() as world,
        Target(world.net) as target,
        UdpTarget(world.net, TARGET4) as udp4,
        UdpTarget(world.net, TARGET6) as udp6,
    ):
        flags = ["--placement", placement, "--connect-timeout", "2s"]
        if placement == "pipeline":
            flags += ["--workers", "2"]
        if upstream == "socks":
            peer = RunningPeer(EMBEDDED, world.net)
            world.on_close(peer.close)
            flags += ["-p", peer.url]
        else:
            flags += DIRECT
        ringway = Ringway(world, *flags)
        try:
            ringway.start()
            yield Stage(world, ringway, target, udp4, udp6, upstream == "socks", placement)
            assert ringway.stop() == 0, ringway.log()
            ringway.check_log()
        finally:
            ringway.close()


@pytest.fixture
def stage(_stage: Stage) -> Iterator[Stage]:
    """A gateway that many tests share: directly, through a proxy, and in both placements."""
    ringway = _stage.ringway
    if ringway.process is None or ringway.process.poll() is not None:
        ringway.close()
        pytest.fail(f"an earlier test ended the shared gateway:\n{ringway.log()}")
    supervisor = ringway.process.pid
    before = sorted((row["role"], row["restarts"]) for row in ringway.status()["processes"])
    yield _stage
    assert ringway.process.poll() is None, f"the gateway (pid {supervisor}) ended during this test:\n{ringway.log()}"
    after = sorted((row["role"], row["restarts"]) for row in ringway.status()["processes"])
    assert after == before, f"a process of the gateway died during this test:\n{ringway.log()}"
