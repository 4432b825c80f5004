"""`ringway exec` for real: exit status, signals, terminal, names, both families, with and without root, nothing left.

┌ inner (made by exec) ──┐     ┌ gw ──────────────────┐   ┌ net ─────────────────────────────────┐
│ COMMAND                │     │ ringway exec         │   │ SOCKS server 10.77.0.2:1080          │
│ default → tun0 ────────┼─fd──┤ gateway    10.77.0.1 ├───┤ name server, HTTP on every address of│
│ resolv.conf: TARGET4   │     │                      │   │ 203.0.113.0/24 and 2001:db8:1::/64   │
└────────────────────────┘     └──────────────────────┘   └──────────────────────────────────────┘
"""

import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from gateway.config import control_directories
from tests.netns.daemon import RINGWAY
from tests.netns.dns import NameServer
from tests.netns.peers import EMBEDDED, MICROSOCKS, Peer, RunningPeer, require
from tests.netns.traffic import Service
from tests.netns.unprivileged import unprivileged
from tests.netns.world import TARGET4, TARGET6, Namespace, World, eventually
from tests.peers import need

pytestmark = pytest.mark.netns
WITHIN = 20.0  # seconds for one command; one takes less than a second

SHOWS_ITS_SIGNALS = """
import os, signal, sys
def caught(number, frame):
    print("caught", number, flush=True)
    if number == signal.SIGTERM:
        sys.exit(3)
for name in ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "WINCH"):
    signal.signal(getattr(signal, "SIG" + name), caught)
print("ready", flush=True)
while True:
    signal.pause()
"""

PING = """
import os, socket, sys
for family, protocol, address, kind in (
    (socket.AF_INET, socket.IPPROTO_ICMP, "198.18.0.2", 8),
    (socket.AF_INET6, socket.IPPROTO_ICMPV6, "fd72:6e67:7761:7900::2", 128),
):
    with socket.socket(family, socket.SOCK_DGRAM, protocol) as endpoint:
        endpoint.settimeout(5)
        endpoint.connect((address, 0))
        endpoint.send(bytes((kind, 0)) + (b"\\xf7\\xfe" if kind == 8 else b"\\0\\0") + bytes(4))
        print(endpoint.recv(100)[0])
"""


@pytest.fixture(scope="module")
def shared(namespaces_work: None) -> Iterator[World]:
    """One world with the embedded proxy, for the tests that change nothing in it."""
    with World() as world, RunningPeer(EMBEDDED, world.net) as peer:
        world.proxy = peer.url  # type: ignore[attr-defined]
        yield world


def exec_command(world: World, *command: str, flags: tuple[str, ...] = ()) -> list[str]:
    return [*RINGWAY, "exec", "-p", world.proxy, *flags, "--", *command]  # type: ignore[attr-defined]


def run(world: World, *command: str, flags: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    return world.gw.run(exec_command(world, *command, flags=flags), timeout=WITHIN)


@contextmanager
def running(
    world: World, *command: str, flags: tuple[str, ...] = (), namespace: Namespace | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a command that says "ready" when it is."""
    process = (namespace or world.gw).popen(
        exec_command(world, *command, flags=flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        line = _line(process)
        assert line == "ready", line or process.stderr.read()
        yield process
    finally:
        for child in _tree(process.pid):
            child.kill()
        process.kill()
        process.wait(5)
        process.stdout.close()
        process.stderr.close()


def _line(process: "subprocess.Popen[bytes]") -> str:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], WITHIN)[0], "the command said nothing"
    line: bytes = process.stdout.readline()
    return line.decode().strip()


def _tree(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def http(connection: socket.socket) -> None:
    """Answer one request with the address that it was sent to."""
    request = b""
    while b"\r\n\r\n" not in request:
        request += connection.recv(4096) or b"\r\n\r\n"
    body = connection.getsockname()[0].encode() + b"\n"
    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)


# -- the exit status --


@pytest.mark.parametrize(
    ("command", "status", "says"),
    [
        (("true",), 0, ""),
        (("sh", "-c", "exit 7"), 7, ""),
        (("sh", "-c", "kill -TERM $$"), 128 + 15, ""),
        (("sh", "-c", "kill -KILL $$"), 128 + 9, ""),
        (("no-such-program",), 127, "ringway: command not found: no-such-program\n"),
        (("/etc/passwd",), 126, "ringway: cannot run /etc/passwd: Permission denied\n"),
    ],
)
def test_the_exit_status_is_the_commands(shared: World, command: tuple[str, ...], status: int, says: str) -> None:
    done = run(shared, *command)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", says)


def test_standard_streams_are_the_commands(shared: World) -> None:
    with shared.gw.inside():
        done = subprocess.run(
            exec_command(shared, "sh", "-c", "cat; echo err >&2"),
            input=b"in",
            capture_output=True,
            timeout=WITHIN,
            check=False,
        )
    assert (done.stdout, done.stderr) == (b"in", b"err\n")


# -- signals and the terminal --


def test_signals_are_passed_on(shared: World) -> None:
    with running(shared, sys.executable, "-c", SHOWS_ITS_SIGNALS) as process:
        for name in ("INT", "HUP", "QUIT", "USR1", "USR2", "WINCH", "TERM"):
            number = getattr(signal, f"SIG{name}")
            process.send_signal(number)
            assert _line(process) == f"caught {int(number)}"
        assert process.wait(WITHIN) == 3


class Terminal:
    """A command with a terminal of its own, as a person has it."""

    def __init__(self, world: World, *command: str) -> None:
        self._master, slave = pty.openpty()
        name = os.ttyname(slave)
        # The leader of a new session that opens a terminal gets it as its controlling one.
        self.process = world.gw.popen(["sh", "-c", f'exec "$@" <{name} >{name} 2>&1', "sh", *command])
        self.seen = b""
        self._slave = slave

    def type(self, text: bytes) -> None:
        os.write(self._master, text)

    def read_until(self, text: bytes) -> None:
        give_up_at = time.monotonic() + WITHIN
        while text not in self.seen:
            left = give_up_at - time.monotonic()
            assert left > 0, f"{text!r} did not come: {self.seen!r}"
            if select.select([self._master], [], [], left)[0]:
                self.seen += os.read(self._master, 4096)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        for child in _tree(self.process.pid):
            child.kill()
        self.process.kill()
        self.process.wait(5)
        os.close(self._master)
        os.close(self._slave)


def test_ctrl_c_reaches_the_command_once(shared: World) -> None:
    with Terminal(shared, *exec_command(shared, sys.executable, "-c", SHOWS_ITS_SIGNALS)) as terminal:
        terminal.read_until(b"ready")
        terminal.type(b"\x03")
        terminal.read_until(b"caught 2")
        terminal.type(b"\x1c")
        terminal.read_until(b"caught 3")
        # A second SIGINT of ours would have come before this one.
        terminal.process.send_signal(signal.SIGTERM)
        terminal.read_until(b"caught 15")
        assert terminal.seen.count(b"caught 2") == 1
        assert terminal.process.wait(WITHIN) == 3


def test_an_interactive_shell_has_job_control(shared: World) -> None:
    with Terminal(shared, *exec_command(shared, "bash", "--norc", "--noprofile", "-i")) as terminal:
        # Said by the job itself: then it is in the foreground.
        terminal.type(b"sh -c 'echo $((6*7)); exec sleep 100'\n")
        terminal.read_until(b"\r42\r\n")
        terminal.type(b"\x1a")  # Ctrl-Z stops the sleep, not the shell
        terminal.read_until(b"Stopped")
        # A shell that has not yet heard of the job's end refuses the first "exit".
        terminal.type(b"kill -KILL %1\nexit 5\nexit 5\n")
        assert terminal.process.wait(WITHIN) == 5
        assert b"no job control" not in terminal.seen


def test_a_command_that_stops_stops_exec_with_it(shared: World) -> None:
    with running(shared, "sh", "-c", "echo ready; kill -STOP $$; echo again") as process:
        eventually(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, "exec has stopped", WITHIN)
        process.send_signal(signal.SIGCONT)
        assert _line(process) == "again"
        assert process.wait(WITHIN) == 0


# -- the network --


@pytest.mark.parametrize("peer", [EMBEDDED, MICROSOCKS], ids=lambda peer: peer.name)
def test_names_and_both_families(world: World, peer: Peer) -> None:
    """curl by name; MICROSOCKS has no UDP, so that the query goes over TCP."""
    require(peer, "curl")
    with RunningPeer(peer, world.net) as running_peer, NameServer(world.net) as names, Service(world.net, http) as web:
        world.proxy = running_peer.url  # type: ignore[attr-defined]
        for family, address in (("-4", "203.0.113.77"), ("-6", "2001:db8:1::77")):
            if family == "-6":
                world.net.ip(f"addr add {address}/128 dev lo nodad")
            url = f"http://www.example.test:{web.port}/"
            done = run(world, "curl", "-sS", "-m", "10", family, url, flags=("--tun-dns", TARGET4))
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.strip().removeprefix("::ffff:") == address
        assert bool(names.asked["tcp"]) == (not peer.udp)
        assert bool(names.asked["udp"]) == peer.udp


def test_only_the_tun_leads_out(shared: World) -> None:
    done = run(shared, "sh", "-c", "ip -o link; ip route; ip -6 route")
    assert "net0" not in done.stdout
    assert "default dev tun0" in done.stdout
    # Straight to the proxy's machine, past the proxy: it is reached all the same, but through the TUN.
    with Service(shared.net, http) as web:
        done = run(shared, need("curl"), "-sS", "-m", "10", f"http://{TARGET4}:{web.port}/")
        assert (done.returncode, done.stdout.strip()) == (0, f"::ffff:{TARGET4}")
        done = run(shared, need("curl"), "-sS", "-m", "10", f"http://[{TARGET6}]:{web.port}/")
        assert (done.returncode, done.stdout.strip()) == (0, TARGET6)


def test_ping(shared: World) -> None:
    done = run(shared, sys.executable, "-c", PING)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n129\n", "")


def test_the_resolv_conf_is_its_own(shared: World) -> None:
    before = Path("/etc/resolv.conf").read_text()
    done = run(shared, "cat", "/etc/resolv.conf", flags=("--tun-dns", "9.9.9.9,149.112.112.112"))
    assert done.stdout.splitlines()[1:] == ["nameserver 9.9.9.9", "nameserver 149.112.112.112"]
    assert Path("/etc/resolv.conf").read_text() == before
    assert not list(Path("/tmp").glob("ringway-resolv-*"))


def test_who_answers_past_it_is_masked(shared: World) -> None:
    """Stand-ins for the sockets of resolved and nscd, in a mount namespace of their own."""
    need("unshare")
    script = (
        "mount -t tmpfs x /run && mkdir -p /run/systemd/resolve /run/nscd && "
        "touch /run/systemd/resolve/io.systemd.Resolve /run/nscd/socket && "
        "printf 'nameserver 127.0.0.53\\n' >/run/systemd/resolve/stub-resolv.conf && "
        # As systemd has it: resolv.conf is a link into resolved's directory.
        "cp -a /etc /run/etc && rm /run/etc/resolv.conf && "
        "ln -s /run/systemd/resolve/stub-resolv.conf /run/etc/resolv.conf && mount --bind /run/etc /etc && "
        'exec "$@"'
    )
    inner = "find /run/systemd/resolve /run/nscd -type f; cat /etc/resolv.conf"
    done = shared.gw.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *exec_command(shared, "sh", "-c", inner)], timeout=WITHIN
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "/run/systemd/resolve/stub-resolv.conf"
    assert lines[2:] == ["nameserver 8.8.8.8", "nameserver 8.8.4.4"]


def test_root_stays_root_and_can_become_others(shared: World) -> None:
    """As apt does, which fetches as _apt."""
    done = run(shared, need("setpriv"), "--reuid=65534", "--regid=65534", "--clear-groups", "id", "-u")
    assert (done.returncode, done.stdout) == (0, "65534\n")
    assert run(shared, "cat", "/proc/self/uid_map").stdout == Path("/proc/self/uid_map").read_text()


@pytest.mark.parametrize("placement", ["pipeline", "single"])
def test_without_ipv6_there_is_ipv4(shared: World, placement: str) -> None:
    with Service(shared.net, http) as web:
        flags = ("--tun-address6=", "--placement", placement)
        done = run(shared, need("curl"), "-sS", "-m", "10", f"http://{TARGET4}:{web.port}/", flags=flags)
        assert (done.returncode, done.stdout.strip()) == (0, f"::ffff:{TARGET4}")


# -- without root --


def test_nobody_needs_no_root(shared: World) -> None:
    with unprivileged() as nobody, Service(shared.net, http) as web:
        command = (
            f"id -u; cat /etc/resolv.conf; curl -sS -m 10 http://{TARGET4}:{web.port}/ http://[{TARGET6}]:{web.port}/"
        )
        argv = nobody.module("gateway", "exec", "-p", shared.proxy, "--", "sh", "-c", command + "; exit 7")  # type: ignore[attr-defined]
        need("curl")
        with shared.gw.inside():
            done = subprocess.run(argv, env=nobody.env, capture_output=True, text=True, timeout=WITHIN, check=False)
        assert (done.returncode, done.stderr) == (7, "")
        assert done.stdout.splitlines() == [
            "65534",
            "# of ringway exec",
            "nameserver 8.8.8.8",
            "nameserver 8.8.4.4",
            f"::ffff:{TARGET4}",
            TARGET6,
        ]
        with shared.gw.inside():
            argv = nobody.module("gateway", "exec", "-p", "direct://", "--", nobody.python, "-c", PING)
            done = subprocess.run(argv, env=nobody.env, capture_output=True, text=True, timeout=WITHIN, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "0\n129\n", "")


def test_a_device_node_that_is_closed_to_nobody_is_named(shared: World) -> None:
    with unprivileged(tun_mode="0600") as nobody, shared.gw.inside():
        argv = nobody.module("gateway", "exec", "-p", "direct://", "--", "true")
        done = subprocess.run(argv, env=nobody.env, capture_output=True, text=True, timeout=WITHIN, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "ringway: no permission to open /dev/net/tun: run as root, or let everybody open it (chmod 0666 /dev/net/tun)\n"
    )


# -- what is left --


def leftovers(pid: int) -> list[str]:
    """Return what a gateway of that process may have left in the file system."""
    return [str(path) for directory in control_directories() for path in directory.glob(f"{pid}-*")]


def test_nothing_is_left_behind(shared: World) -> None:
    with running(shared, "sh", "-c", "echo ready; sleep 0.2") as process:
        tree = _tree(process.pid)
        assert len(tree) >= 4, "the command, and the gateway's processes"
        assert process.wait(WITHIN) == 0
        eventually(lambda: not _alive(tree), "every process has gone", 5.0)
        assert not leftovers(process.pid)
        assert "tun0" not in shared.gw.links()


def test_killed_it_takes_everything_along(shared: World) -> None:
    with running(shared, "sh", "-c", "echo ready; exec sleep 1000") as process:
        tree = _tree(process.pid)
        process.kill()
        eventually(lambda: not _alive(tree), "every process has gone", 10.0)
        assert not leftovers(process.pid)


def test_a_gateway_that_dies_ends_the_command(shared: World) -> None:
    with running(
        shared, "sh", "-c", "trap 'echo told; exit 0' TERM; echo ready; while :; do sleep 0.05; done"
    ) as process:
        gateway = next(p for p in _tree(process.pid) if len(p.children()) >= 3)
        gateway.kill()
        assert _line(process) == "told"
        assert process.wait(WITHIN) == 1
        assert process.stderr is not None
        assert b"the gateway ended with status -9; stopping the command" in process.stderr.read()
        assert not leftovers(process.pid)


def test_many_at_a_time(shared: World) -> None:
    """Each has a device, a gateway and a control socket of its own."""
    with Service(shared.net, http) as web:
        argv = exec_command(shared, need("curl"), "-sS", "-m", "10", f"http://{TARGET4}:{web.port}/")
        processes = [shared.gw.popen(argv, stdout=subprocess.PIPE) for _ in range(3)]
        for process in processes:
            stdout, _ = process.communicate(timeout=2 * WITHIN)
            assert (process.returncode, stdout.decode().strip()) == (0, f"::ffff:{TARGET4}")
