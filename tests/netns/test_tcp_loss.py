"""TCP of the kernel and ours over bad ways: loss, delay, reordering, doubles, corruption; clients with half of TCP off.

    ┌ far ─────────────┐       link_process.py        ┌ gw ────────────────────────┐   ┌ net ─────────┐
    │ clients      .1  ├── bad luck, packet by packet ┤ .2   ─► tun0 ─► ringway ───┼───┤ targets      │
    └──────────────────┘         10.9.0.0/24          │ clients ─┴─ nftables drop  │   └──────────────┘
                                                      └────────────────────────────┘

The gateway runs without offloads, so that each packet between a client and our TCP meets its fate alone; one test has
them on and loses whole super-segments. What is asked of every transfer is the same: all bytes, in order, with their
checksum; in the end no flow is left.
"""

import contextlib
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.netns.daemon import DIRECT, Ringway
from tests.netns.link import B4, B6, NAME, Link
from tests.netns.traffic import Target, connect, download, echo, read_exactly, reset, stream, target_address, upload
from tests.netns.world import Namespace, World, eventually
from tests.peers import need

pytestmark = pytest.mark.netns
MEGABYTE = 1 << 20


class Bench:
    """A gateway in the picture's middle, and `far` where a test wants it."""

    def __init__(self, world: World, ringway: Ringway, target: Target, far: Namespace) -> None:
        self.world = world
        self.ringway = ringway
        self.target = target
        self.far = far

    @contextlib.contextmanager
    def losing(self, percent: int) -> Iterator[None]:
        """Drop so many of 100 packets between the kernel of gw and tun0, each way."""
        nft = need("nft")
        rules = "\n".join(
            f"chain {hook} {{ type filter hook {hook} priority 0\n"
            f'{which} "tun0" numgen random mod 100 < {percent} counter drop\n}}'
            for hook, which in (("output", "oifname"), ("input", "iifname"))
        )
        with self.world.gw.inside():
            done = subprocess.run(
                [nft, "-f", "-"], input=f"table inet loss {{\n{rules}\n}}\n",
                capture_output=True, text=True, timeout=10, check=False,
            )  # fmt: skip
        if done.returncode != 0:
            pytest.skip(f"this kernel has no nftables numgen: {done.stderr.strip().splitlines()[:1]}")
        try:
            yield
            dropped = re.findall(r"packets (\d+)", self.world.gw.run([nft, "list", "table", "inet", "loss"]).stdout)
            assert all(int(count) for count in dropped), f"nothing was lost: {dropped}"
        finally:
            self.world.gw.run([nft, "delete", "table", "inet", "loss"])

    @contextlib.contextmanager
    def link(self, *, offloads: bool = False, **luck: float) -> Iterator[Link]:
        """Connect `far` by a link that is as bad both ways."""
        with Link(self.far, self.world.gw, luck, luck, offloads=offloads) as link:
            self.far.ip(f"route add default via {B4} dev {NAME}", f"-6 route add default via {B6} dev {NAME}")
            yield link
            # While there still is a way on which FIN and RST can be sent again.
            self.no_flow_is_left()

    def all_at_once(self, namespace: Namespace, up: int, down: int) -> None:
        """Move so many bytes up and so many down, over IPv4 and over IPv6, at the same time."""
        together(
            lambda: upload(namespace, target_address(4), self.target.port, up),
            lambda: download(namespace, target_address(4), self.target.port, down),
            lambda: upload(namespace, target_address(6), self.target.port, up),
            lambda: download(namespace, target_address(6), self.target.port, down),
        )

    def no_flow_is_left(self) -> None:
        eventually(lambda: self.ringway.flows() == 0, "no flow is left", 30)
        counters = self.ringway.counters()
        assert not counters["internal_errors"], counters


def together(*parts: Callable[[], None]) -> None:
    """Run the parts at once and raise the first failure."""
    failures: list[BaseException] = []

    def run(part: Callable[[], None]) -> None:
        try:
            part()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(110)
    assert not any(thread.is_alive() for thread in threads), "a transfer hangs"
    if failures:
        raise failures[0]


@contextlib.contextmanager
def _bench(*flags: str) -> Iterator[Bench]:
    with (
        World() as world,
        contextlib.closing(Namespace("far")) as far,
        Target(world.net) as target,
        Ringway(world, *DIRECT, "--workers", "2", *flags) as ringway,
    ):
        world.gw.sysctl("net/ipv4/ip_forward", 1)
        world.gw.sysctl("net/ipv6/conf/all/forwarding", 1)
        for namespace in (far, world.gw, world.net):
            # What one test's link was like is no advice for the next.
            namespace.sysctl("net/ipv4/tcp_no_metrics_save", 1)
        yield Bench(world, ringway, target, far)


@pytest.fixture(scope="module")
def _packets(namespaces_work: None) -> Iterator[Bench]:
    with _bench("--offloads=false") as bench:
        yield bench


@pytest.fixture
def bench(_packets: Bench) -> Iterator[Bench]:
    """The gateway without offloads, shared by the tests of this file."""
    yield _packets
    _packets.no_flow_is_left()


# -- losses, by nftables --


@pytest.mark.parametrize(
    ("percent", "up", "down"),
    [(1, 50 * MEGABYTE, 50 * MEGABYTE), (5, 8 * MEGABYTE, 8 * MEGABYTE), (20, MEGABYTE // 5, MEGABYTE // 5)],
)
def test_random_loss(bench: Bench, percent: int, up: int, down: int) -> None:
    with bench.losing(percent):
        bench.all_at_once(bench.world.gw, up, down)
    assert bench.ringway.counters()["tcp_retransmitted"]


def test_loss_of_whole_super_segments(namespaces_work: None) -> None:
    """A local device's full queue loses forty segments at a time, in the middle of a window."""
    with _bench() as bench:
        with bench.losing(1):
            bench.all_at_once(bench.world.gw, 50 * MEGABYTE, 50 * MEGABYTE)
        bench.no_flow_is_left()


def test_short_flows_under_loss(bench: Bench) -> None:
    """SYN, SYN-ACK, FIN and their ACKs are lost as well as text: every flow opens, answers, ends, and is forgotten."""

    def ten(version: int) -> None:
        for size in range(10):
            echo(bench.world.gw, target_address(version), bench.target.port, b"x" * (1 + 700 * size))

    with bench.losing(10):
        together(*(lambda version=version: ten(version) for version in (4, 6) * 10))


def test_resets_under_loss(bench: Bench) -> None:
    """A lost RST is not sent again, yet no flow stays: the target's side ends, and the client's next segment tells."""

    def one(version: int) -> None:
        connection = connect(bench.world.gw, target_address(version), bench.target.port, 60)
        connection.sendall(b"Eq")
        assert read_exactly(connection, 1) == b"q"
        reset(connection)

    with bench.losing(10):
        together(*(lambda version=version: one(version) for version in (4, 6) * 10))
    # Those whose RST was lost are known to the gateway alone; the target talks to them until RST answers.
    for connection in list(bench.target._connections):
        with contextlib.suppress(OSError):
            connection.sendall(b"is anybody there?")


# -- everything else that happens to packets, by a link --

LUCK = {
    "reordered": {"reorder": 0.05, "late": 0.002},
    "reordered far": {"reorder": 0.01, "late": 0.03, "delay": 0.005},
    "doubled": {"double": 0.1},
    "corrupted": {"corrupt": 0.01},
    "delayed": {"delay": 0.025},
    "all of it": {"loss": 0.01, "reorder": 0.02, "double": 0.02, "corrupt": 0.005, "delay": 0.002},
}


@pytest.mark.parametrize("luck", LUCK.values(), ids=LUCK)
def test_bad_link(bench: Bench, luck: dict[str, float]) -> None:
    before = bench.ringway.counters()
    with bench.link(**luck) as link:
        bench.all_at_once(bench.far, 8 * MEGABYTE, 8 * MEGABYTE)
        there, back = link.counts()
    happened = {"reorder": "reordered", "double": "doubled", "corrupt": "corrupted", "loss": "lost"}
    for kind in luck.keys() & happened.keys():
        assert there[happened[kind]], there
        assert back[happened[kind]], back
    # A packet whose every bit counts is never taken with one of them turned over.
    if "corrupt" in luck:
        assert bench.ringway.counters()["bad_checksum"] > before["bad_checksum"]


def test_a_hundred_megabytes_each_way_over_a_link_that_loses(bench: Bench) -> None:
    """With super-segments, of which single segments are lost."""
    with bench.link(offloads=True, loss=0.01) as link:
        together(
            lambda: upload(bench.far, target_address(4), bench.target.port, 100 * MEGABYTE),
            lambda: download(bench.far, target_address(6), bench.target.port, 100 * MEGABYTE),
        )
        assert all(way["lost"] > 100 for way in link.counts())


def test_a_link_that_breaks_for_a_while(bench: Bench) -> None:
    """Three seconds of nothing in the middle of a transfer each way: both go on when the link is back."""

    def both_ways(version: int) -> None:
        with connect(bench.far, target_address(version), bench.target.port, 60) as connection:
            connection.sendall(b"E")

            def send() -> None:
                for piece in stream(2 * MEGABYTE):
                    connection.sendall(piece)

            sender = threading.Thread(target=send)
            sender.start()
            for piece in stream(2 * MEGABYTE):
                assert read_exactly(connection, len(piece)) == piece
                under_way.set()
                assert back.wait(20)
            sender.join(20)
            assert not sender.is_alive()

    def break_it() -> None:
        assert under_way.wait(20)
        link.pause()
        time.sleep(3)  # the outage itself
        link.go_on()
        back.set()

    under_way, back = threading.Event(), threading.Event()
    with bench.link(delay=0.005) as link:
        together(lambda: both_ways(4), lambda: both_ways(6), break_it)


# -- clients whose TCP has less, or more --

WITHOUT = {
    "no SACK": {"tcp_sack": 0},
    "no DSACK": {"tcp_dsack": 0},
    "no timestamps": {"tcp_timestamps": 0},
    "no window scaling": {"tcp_window_scaling": 0},
    "no options at all": {"tcp_sack": 0, "tcp_timestamps": 0, "tcp_window_scaling": 0},
    "ECN": {"tcp_ecn": 1},
    "tiny receive buffer": {"tcp_rmem": "4096 4096 8192"},
    "tiny buffers": {"tcp_rmem": "2304 2304 4608", "tcp_wmem": "4608 4608 4608"},
    "no RACK": {"tcp_recovery": 0},
    "Reno": {"tcp_congestion_control": "reno"},
}


@pytest.mark.parametrize("settings", WITHOUT.values(), ids=WITHOUT)
@pytest.mark.parametrize("loss", [0.0, 0.02], ids=["clean", "losing"])
def test_clients_of_every_kind(bench: Bench, loss: float, settings: dict[str, object]) -> None:
    kept = {}
    with bench.far.inside():
        for key in settings:
            with open(f"/proc/sys/net/ipv4/{key}") as file:
                kept[key] = file.read().strip()
    tiny = "tcp_rmem" in settings
    try:
        for key, value in settings.items():
            bench.far.sysctl(f"net/ipv4/{key}", value)
        with bench.link(loss=loss, reorder=loss / 2):
            count = (MEGABYTE if loss else 4 * MEGABYTE) if tiny else (4 if loss else 16) * MEGABYTE
            bench.all_at_once(bench.far, count, count)
    finally:
        for key, value in kept.items():
            bench.far.sysctl(f"net/ipv4/{key}", value)
