"""Start, status, stop; twenty times without leftovers; and every way not to start, each one line and exit 2."""

import errno
import os
import signal
import socket
import time

import psutil
import pytest

from tests.netns.daemon import DIRECT, Ringway, ringway_command
from tests.netns.test_bad_proxy import pss
from tests.netns.traffic import Target, UdpTarget, connect, download, echo, read_exactly, udp_echo
from tests.netns.world import TARGET4, World, eventually

pytestmark = pytest.mark.netns


def our_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def shared_memory_kib() -> int:
    with open("/proc/meminfo") as meminfo:
        return next(int(line.split()[1]) for line in meminfo if line.startswith("Shmem:"))


@pytest.mark.parametrize("placement", ["pipeline", "single"])
def test_twenty_times_without_leftovers(world: World, placement: str) -> None:
    """Devices, routes, rules, control sockets, processes, shared memory: after each stop as before the first start."""
    with Target(world.net) as target, UdpTarget(world.net) as udp:
        links = world.gw.links()
        tables = world.gw.ip("route show table all", "rule show", "-6 rule show")
        descriptors = our_descriptors()
        processes = {process.pid for process in psutil.process_iter() if "gateway" in " ".join(_command(process))}
        ringway = Ringway(world, *DIRECT, "--placement", placement)
        memory = shared_memory_kib()
        try:
            for turn in range(20):
                ringway.start()
                echo(world.gw, TARGET4, target.port)
                udp_echo(world.gw, TARGET4, udp.port)
                code = ringway.stop(signal.SIGTERM if turn % 2 else signal.SIGINT)
                assert code == 0, ringway.log()
                assert world.gw.links() == links
                assert not ringway.control.exists()
            ringway.check_log()
        finally:
            ringway.close()
        assert world.gw.ip("route show table all", "rule show", "-6 rule show") == tables
        now = {process.pid for process in psutil.process_iter() if "gateway" in " ".join(_command(process))}
        assert now <= processes | _others(now), "processes are left"
        eventually(lambda: our_descriptors() <= descriptors + 1, "no descriptor of ours is left")
        # Nothing of ours is mapped any more; what other programs of the machine do is within the allowance.
        eventually(lambda: shared_memory_kib() < memory + (32 << 10), "shared memory is given back")


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _others(pids: set[int]) -> set[int]:
    """Return those that are no descendants of ours and no orphans: other people's gateways on this machine."""
    others = set()
    for pid in pids:
        try:
            process = psutil.Process(pid)
            if process.ppid() != 1 and os.getpid() not in [parent.pid for parent in process.parents()]:
                others.add(pid)
        except psutil.Error:
            others.add(pid)
    return others


def test_memory_comes_back_after_load(world: World) -> None:
    """Five thousand short flows and a bulk do not make the idle gateway grow without bound."""
    with Target(world.net) as target, Ringway(world, *DIRECT, "--workers", "1") as ringway:
        for _ in range(300):
            echo(world.gw, TARGET4, target.port)
        download(world.gw, TARGET4, target.port, 32 << 20)
        first = pss(ringway)
        for _ in range(2000):
            echo(world.gw, TARGET4, target.port)
        download(world.gw, TARGET4, target.port, 32 << 20)
        eventually(lambda: ringway.flows() < 10, "the flows are forgotten", 10)
        assert pss(ringway) - first < 6 << 20


def test_stop_with_flows_open_is_quick_and_tells_the_clients(world: World) -> None:
    """Nobody waits for clients that stay: the end is there in seconds, and the clients learn of it."""
    with Target(world.net) as target:
        ringway = Ringway(world, *DIRECT)
        try:
            ringway.start()
            with connect(world.gw, TARGET4, target.port) as connection:
                connection.sendall(b"E!")
                assert read_exactly(connection, 1) == b"!"
                began_at = time.monotonic()
                assert ringway.stop() == 0, ringway.log()
                assert time.monotonic() - began_at < 8
                connection.settimeout(3)
                try:
                    assert connection.recv(1) == b""
                except OSError as error:
                    assert isinstance(error, TimeoutError) or error.errno in (
                        errno.ECONNRESET,
                        errno.ENETUNREACH,
                        errno.EHOSTUNREACH,
                    )
        finally:
            ringway.close()


def test_status(world: World) -> None:
    with Target(world.net) as target, Ringway(world, *DIRECT, "--workers", "2") as ringway:
        with connect(world.gw, TARGET4, target.port) as connection:
            connection.sendall(b"E!")
            assert read_exactly(connection, 1) == b"!"
            shown = ringway.status_json()
            assert shown["flows"]["tcp"] == 1
        assert shown["placement"] == "pipeline"
        assert shown["device"]["name"] == "tun0"
        assert shown["device"]["mtu"] == 1500
        roles = [row["role"] for row in shown["processes"]]
        assert roles.count("worker") == 2
        assert {"reader", "writer"} <= set(roles)
        pids = {row["pid"] for row in shown["processes"]}
        assert pids <= {process.pid for process in ringway.tree()}
        assert any(value for counters in shown["counters"].values() for value in counters.values())
        table = ringway.status_command()
        assert table.returncode == 0
        assert "worker" in table.stdout
        assert "tun0" in table.stdout


def test_status_without_a_gateway(world: World) -> None:
    done = ringway_command(world.gw, "status", "--control", "/nonexistent/ringway.sock")
    assert done.returncode != 0
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_children_are_nobody(world: World) -> None:
    """Run as root, the processes that touch packets do not stay root."""
    with Target(world.net) as target, Ringway(world, "-p", "socks5://10.77.0.2:1080") as ringway:
        assert ringway.process is not None
        for process in ringway.tree():
            if process.pid != ringway.process.pid:
                assert process.uids().effective != 0, process.cmdline()
                assert process.uids().saved != 0
        assert target.port


WRONG = [
    (["--mtu", "100"], "mtu"),
    (["--mtu", "many"], "mtu"),
    (["--workers", "-1"], "workers"),
    (["--placement", "sideways"], "placement"),
    (["--no-such-flag"], "no-such-flag"),
    (["-p", "gopher://127.0.0.1"], "gopher"),
    (["-p", "socks5://127.0.0.1:99999"], "99999"),
    (["-p", "socks5://"], "proxy"),
    (["-d", "tap://x"], "tap"),
    (["-d", "tun://a-name-far-too-long"], "a-name-far-too-long"),
    (["-d", "fd://99"], "99"),
    (["--tun-address", "300.1.1.1"], "300.1.1.1"),
    (["--tun-mask", "255.0.255.0"], "255.0.255.0"),
    (["--udp-timeout", "soon"], "soon"),
    (["--connect-timeout", "-1"], "connect-timeout"),
    (["--loglevel", "chatty"], "chatty"),
    (["-c", "/nonexistent/ringway.toml"], "/nonexistent/ringway.toml"),
    (["--interface", "nowhere0"], "nowhere0"),
    (["--user", "no-such-user"], "no-such-user"),
    (["--password-file", "/nonexistent/secret"], "/nonexistent/secret"),
]


@pytest.mark.parametrize(("flags", "named"), WRONG, ids=[" ".join(flags) for flags, _ in WRONG])
def test_wrong_flags(world: World, flags: list[str], named: str) -> None:
    """One line that names it, exit 2, nothing started."""
    links = world.gw.links()
    done = ringway_command(world.gw, "run", "--control", "/tmp/ringway-wrong.sock", *flags)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert named in done.stderr
    assert world.gw.links() == links


def test_wrong_file(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("config") / "ringway.toml"
    for text, named in (
        ("mtuu = 1500\n", "mtu"),
        ("mtu = 'x'\n", "mtu"),
        ("mtu = \n", "ringway.toml"),
        ("workers = [1]\n", "workers"),
    ):
        path.write_text(text)
        done = ringway_command(world.gw, "run", "-c", str(path))
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert named in done.stderr
        assert "ringway.toml" in done.stderr


def test_file_environment_and_flag(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Flag beats environment beats file."""
    path = tmp_path_factory.mktemp("config") / "ringway.toml"
    path.write_text('proxy = "direct://"\nfwmark = 82\nmtu = 1400\nworkers = 1\nloglevel = "debug"\n')
    env = {"RINGWAY_MTU": "1450", "RINGWAY_WORKERS": "2"}
    with Target(world.net) as target, Ringway(world, "-c", str(path), "--mtu", "1480", env=env) as ringway:
        status = ringway.status()
        assert status["device"]["mtu"] == 1480
        assert len(ringway.processes("worker")) == 2
        echo(world.gw, TARGET4, target.port)


def test_flags_of_gotun2socks(world: World) -> None:
    """The old command line works as it stands: one dash, no subcommand."""
    from tests.netns.peers import EMBEDDED, RunningPeer

    with RunningPeer(EMBEDDED, world.net), Target(world.net) as target:
        ringway = Ringway(world)
        ringway.argv[3:] = [
            "-tun-device", "tun0", "-tun-address", "10.0.0.2", "-tun-mask", "255.255.255.0", "-tun-gw", "10.0.0.1",
            "-tun-dns", "8.8.8.8,8.8.4.4", "-local-socks-addr", "10.77.0.2:1080", "-public-only=false",
            "-enable-dns-cache=true", f"--control={ringway.control}",
        ]  # fmt: skip
        with ringway:
            echo(world.gw, TARGET4, target.port)
            assert "10.0.0.2/24" in world.gw.ip("addr show dev tun0")


def test_not_root(world: World) -> None:
    """No permission: one line with the fix, exit 2."""
    nobody = 65534
    command = ["setpriv", f"--reuid={nobody}", f"--regid={nobody}", "--clear-groups", "--inh-caps=-all"]
    from tests.netns.daemon import RINGWAY

    done = world.gw.run([*command, *RINGWAY, "run", "-p", "direct://", "--control", "/tmp/ringway-nobody.sock"])
    unreadable = "Permission denied" in done.stderr and "/dev/net/tun" not in done.stderr
    if unreadable or "ModuleNotFoundError" in done.stderr:
        pytest.skip("the interpreter lives where an unprivileged user cannot read it")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_hangup_of_the_client_side_during_start(world: World) -> None:
    """A stop that comes before readiness is a stop, not an error."""
    ringway = Ringway(world, *DIRECT)
    try:
        ringway.start(wait=False)
        process = ringway.process
        assert process is not None
        eventually(lambda: "tun0" in world.gw.links() or process.poll() is not None, "the device is made", 10)
        process.send_signal(signal.SIGTERM)
        assert ringway.wait(10) in (0, -signal.SIGTERM)
        eventually(lambda: "tun0" not in world.gw.links(), "the device is gone")
        assert socket.if_nameindex()
    finally:
        ringway.close()
