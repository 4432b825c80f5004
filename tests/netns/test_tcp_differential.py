"""The same programs over the kernel's TCP and over ours: both ends see the same bytes, errors and poll masks, in order.

    gw:  client ── mark 82 ──────────────► net0 ──► server      the kernel's TCP from end to end
         client ── route ── tun0 ─ ringway ─ mark ─► server      ours, then the kernel's
                                      └──── proxy ─► server      the same through `ringway proxy`

What cannot be the same stands in `INHERENT`, with the reason.
"""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.netns import scenarios, scenarios_of_resets
from tests.netns.daemon import DIRECT, Ringway
from tests.netns.diary import WITHIN, End, Scenario, Steps
from tests.netns.peers import EMBEDDED, RunningPeer
from tests.netns.traffic import family_of
from tests.netns.world import (
    MARK,
    NO_ROUTE4,
    NO_ROUTE6,
    SILENT4,
    SILENT6,
    TARGET4,
    TARGET6,
    UNREACHABLE4,
    UNREACHABLE6,
    World,
    eventually,
)

pytestmark = pytest.mark.netns

SO_MARK = 36  # asm-generic/socket.h
ADDRESSES = {
    "host": (TARGET4, TARGET6),
    "unreachable": (UNREACHABLE4, UNREACHABLE6),
    "no-route": (NO_ROUTE4, NO_ROUTE6),
    "silent": (SILENT4, SILENT6),
}
SCENARIOS = [
    kind
    for module in (scenarios, scenarios_of_resets)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Scenario) and kind is not Scenario
]
Diaries = dict[str, list[str]]

#: (scenario, gateway, IP version) → the reason, and what turns the kernel's diaries into those of the gateway
INHERENT: dict[tuple[str, str, int], tuple[str, Callable[[Diaries], Diaries]]] = {
    ("HostUnreachable", "proxy", 6): (
        "a Linux router calls an IPv6 route of type `unreachable` a missing one; the proxy, for which it is a local "
        "route, sees EHOSTUNREACH and says so",
        lambda _: {"client": ["connect: EHOSTUNREACH"]},
    ),
}


class Way:
    """A gateway, and the kernel's way past it."""

    def __init__(self, world: World, ringway: Ringway, name: str) -> None:
        self.world = world
        self.ringway = ringway
        self.name = name

    def play(self, kind: type[Scenario], version: int, mark: int) -> Diaries:
        """Run a scenario; return the diaries of both ends."""
        scenario = kind()
        steps = Steps()
        address = ADDRESSES[scenario.target][version == 6]
        family = family_of(address)

        def open_client() -> socket.socket:
            opened = self.world.gw.socket(family)
            opened.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
            return opened

        with contextlib.ExitStack() as closing:
            port = 9
            servers: list[End] = []
            threads: list[threading.Thread] = []
            failures: list[BaseException] = []

            def run(action: Callable[[End, Steps], None], end: End) -> None:
                try:
                    action(end, steps)
                except BaseException as error:
                    failures.append(error)

            def serve() -> None:
                for _ in range(scenario.connections):
                    try:
                        end = End(lambda: listener.accept()[0] if scenario.accepts else listener)
                    except OSError as error:
                        failures.append(error)
                        return
                    closing.callback(end.socket.close)
                    servers.append(end)
                    assert scenario.server is not None
                    run(scenario.server, end)

            if scenario.server is not None:
                listener = closing.enter_context(self.world.net.socket(family))
                listener.bind((address, 0))
                listener.listen()
                listener.settimeout(WITHIN)
                port = listener.getsockname()[1]
                threads.append(threading.Thread(target=serve, daemon=True))
            client = End(open_client, (address, port))
            threads.append(threading.Thread(target=run, args=(scenario.client, client), daemon=True))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(4 * WITHIN)
            hanging = any(thread.is_alive() for thread in threads)
            client.socket.close()
            diaries = {"client": client.diary}
            for number, server in enumerate(servers):
                diaries[f"server {number + 1}"] = server.diary
            assert not hanging, f"it hangs: {diaries}"
            if failures:
                raise AssertionError(f"{failures[0]!r} after {diaries}") from failures[0]
        return diaries


@pytest.fixture(scope="module", params=["direct", "proxy"])
def way(request: pytest.FixtureRequest, namespaces_work: None) -> Iterator[Way]:
    with World() as world:
        # Clients send text in a SYN even without a cookie, where a scenario asks for it.
        world.gw.sysctl("net/ipv4/tcp_fastopen", 0x5)
        # Else an ICMP error comes once a second.
        world.net.sysctl("net/ipv4/icmp_ratelimit", 0)
        world.net.sysctl("net/ipv6/icmp/ratelimit", 0)
        flags: tuple[str, ...] = DIRECT
        if request.param == "proxy":
            peer = RunningPeer(EMBEDDED, world.net)
            world.on_close(peer.close)
            flags = ("-p", peer.url)
        with Ringway(world, *flags) as ringway:
            yield Way(world, ringway, request.param)
            eventually(lambda: ringway.flows() == 0, "no flow is left", 20)
            assert not ringway.counters()["internal_errors"]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("kind", SCENARIOS, ids=lambda kind: kind.__name__)
def test_same_as_the_kernel(way: Way, kind: type[Scenario], version: int) -> None:
    expected = way.play(kind, version, MARK)
    _, transform = INHERENT.get((kind.__name__, way.name, version), ("", lambda diaries: diaries))
    assert way.play(kind, version, 0) == transform(expected)
