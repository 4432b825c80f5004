"""Kill −9 of each process under load: the others go on, the lost one comes back, its clients hear RST."""

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.netns.daemon import DIRECT, Ringway
from tests.netns.test_tcp import open_many
from tests.netns.traffic import Target, UdpTarget, download, echo, udp_echo, upload
from tests.netns.world import TARGET4, World, eventually

pytestmark = pytest.mark.netns


class Load:
    """Transfers that go round and round until told to stop; `failures` holds what went wrong.

    A client of a lost worker learns of it when it sends: one that only receives waits. Hence `move`: where workers are
    killed the load is uploads.
    """

    def __init__(
        self, world: World, target: Target, count: int = 2, move: Callable[..., None] = download
    ) -> None:  # fmt: skip
        self._move = move
        self.failures: list[BaseException] = []
        self.rounds = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._pull, args=(world, target)) for _ in range(count)]

    def _pull(self, world: World, target: Target) -> None:
        while not self._stop.is_set():
            try:
                self._move(world.gw, TARGET4, target.port, 4 << 20)
                self.rounds += 1
            except (OSError, AssertionError) as error:
                self.failures.append(error)
                # A lost shard refuses for a moment: do not spin on it.
                self._stop.wait(0.05)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        self.goes_on()
        return self

    def goes_on(self) -> None:
        """Wait until some more rounds were completed."""
        enough = self.rounds + 4
        eventually(lambda: self.rounds > enough, "the load goes on", 20)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


def replaced(ringway: Ringway, role: str, old: int, shard: int = 0) -> int:
    """Wait until the process of a role has another pid, and return it."""

    def another() -> int:
        rows = [row for row in ringway.processes(role) if row.get("shard", 0) == shard] or ringway.processes(role)
        new = int(rows[0]["pid"])
        return new if new not in (0, old) and os.path.exists(f"/proc/{new}") else 0

    return eventually(another, f"{role} {shard} was replaced", 10)


@pytest.mark.parametrize("role", ["reader", "writer"])
def test_reader_or_writer_dies(world: World, role: str) -> None:
    """To the flows it is packet loss: all of them go on and no byte is lost or wrong."""
    with (
        Target(world.net) as target,
        UdpTarget(world.net) as udp,
        Ringway(world, *DIRECT, "--workers", "2") as ringway,
        _echoing(world, target, 30) as connections,
        Load(world, target) as load,
    ):
        for _ in range(2):
            old = ringway.pid(role)
            os.kill(old, signal.SIGKILL)
            replaced(ringway, role, old)
            load.goes_on()
        assert not load.failures
        for connection in connections:
            assert _answers(connection) == "answered"
        udp_echo(world.gw, TARGET4, udp.port)
        echo(world.gw, TARGET4, target.port)
        assert sum(row["restarts"] for row in ringway.status()["processes"]) == 2


def test_worker_dies(world: World) -> None:
    """The flows of the other worker never notice; those of the lost one get RST; new ones work."""
    with (
        Target(world.net) as target,
        UdpTarget(world.net) as udp,
        Ringway(world, *DIRECT, "--workers", "2") as ringway,
        _echoing(world, target, 60) as connections,
    ):
        old = ringway.pid("worker", 0)
        other = ringway.pid("worker", 1)
        os.kill(old, signal.SIGKILL)
        replaced(ringway, "worker", old)
        outcomes = [_answers(connection) for connection in connections]
        assert set(outcomes) == {"answered", "reset"}, {o: outcomes.count(o) for o in set(outcomes)}
        # Sixty flows over two shards: a fair hash does not leave fewer than ten to either.
        assert outcomes.count("answered") >= 10
        assert outcomes.count("reset") >= 10
        assert ringway.pid("worker", 1) == other
        for _ in range(40):
            echo(world.gw, TARGET4, target.port)
            udp_echo(world.gw, TARGET4, udp.port)


def test_worker_dies_under_load(world: World) -> None:
    with (
        Target(world.net) as target,
        Ringway(world, *DIRECT, "--workers", "2") as ringway,
        Load(world, target, 4, upload) as load,
    ):
        for _ in range(2):
            old = ringway.pid("worker", 0)
            os.kill(old, signal.SIGKILL)
            replaced(ringway, "worker", old)
            load.goes_on()
        # Each kill may end what ran through that shard: at most four uploads, and the attempts of the moment.
        assert len(load.failures) < 30, load.failures[:5]
        assert not [error for error in load.failures if isinstance(error, AssertionError)]


def test_single_placement_dies(world: World) -> None:
    """Everything is in the one process: its clients hear RST, and the successor serves."""
    with (
        Target(world.net) as target,
        Ringway(world, *DIRECT, "--placement", "single") as ringway,
        _echoing(world, target, 20) as connections,
    ):
        old = ringway.pid("worker")
        os.kill(old, signal.SIGKILL)
        replaced(ringway, "worker", old)
        assert {_answers(connection) for connection in connections} == {"reset"}
        for _ in range(20):
            echo(world.gw, TARGET4, target.port)


@pytest.mark.parametrize("role", ["worker", "reader", "writer"])
def test_a_crash_loop_ends_the_service(world: World, role: str) -> None:
    """Exit code 1 and one clear line, not a restart for ever."""
    ringway = Ringway(world, *DIRECT, "--workers", "1")
    try:
        ringway.start()
        process = ringway.process
        assert process is not None
        give_up_at = time.monotonic() + 60
        killed: set[int] = set()
        while process.poll() is None and time.monotonic() < give_up_at:
            try:
                pid = ringway.pid(role)
            except (OSError, ValueError, KeyError, IndexError, EOFError):
                pid = 0  # it is ending, or between two lives
            if pid and pid not in killed and pid != process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            select.select([], [], [], 0.01)
        assert process.poll() == 1, f"after {len(killed)} kills: {process.poll()}\n{ringway.log()}"
        last = [line for line in ringway.log().splitlines() if line.strip()][-1]
        assert role in last, ringway.log()
        ringway.check_log()
        eventually(lambda: "tun0" not in world.gw.links(), "the device is gone")
    finally:
        ringway.close()


def test_the_supervisor_dies(world: World) -> None:
    """Everything stops and the device goes."""
    ringway = Ringway(world, *DIRECT, "--workers", "2")
    try:
        ringway.start()
        children = [process for process in ringway.tree() if process.pid != ringway.process.pid]  # type: ignore[union-attr]
        assert len(children) >= 4
        os.kill(ringway.process.pid, signal.SIGKILL)  # type: ignore[union-attr]
        ringway.wait(5)
        eventually(lambda: not any(child.is_running() for child in children), "the children are gone", 5)
        eventually(lambda: "tun0" not in world.gw.links(), "the device is gone")
    finally:
        ringway.close()


@contextlib.contextmanager
def _echoing(world: World, target: Target, count: int) -> Iterator[list[socket.socket]]:
    """Open connections to the echo that have moved a byte each way."""
    connections = open_many(world.gw, TARGET4, target.port, count)
    try:
        for connection in connections:
            connection.setblocking(True)
            connection.settimeout(10)
            connection.sendall(b"E!")
        for connection in connections:
            assert connection.recv(1) == b"!"
        yield connections
    finally:
        for connection in connections:
            connection.close()


def _answers(connection: socket.socket) -> str:
    """Send a byte; tell whether it came back or the connection was reset."""
    try:
        connection.sendall(b"?")
        return "answered" if connection.recv(1) == b"?" else "ended"
    except ConnectionResetError:
        return "reset"
    except TimeoutError:
        return "hangs"
