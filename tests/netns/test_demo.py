"""`make run`: the demonstration as root and as nobody, its summary, its exit codes, and nothing left of it."""

import os
import re
import signal
import socket
import subprocess
import sys

import psutil
import pytest

from gateway.demo.client import down, up
from gateway.demo.servers import BLOCK, Blocks
from gateway.demo.show import amount, speed, summary
from tests.netns.unprivileged import unprivileged
from tests.netns.world import ROOT, eventually

WITHIN = 60.0  # seconds; it takes about eight
KINDS = ("ping", "TCP up", "TCP down", "TCP connections", "UDP echo")
DEMO = (sys.executable, "-m", "gateway.demo")


def run(*arguments: str, env: dict[str, str] | None = None, argv: list[str] | None = None):
    return subprocess.run(
        argv or [*DEMO, *arguments],
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WITHIN,
        check=False,
    )


def check(done) -> None:
    """Every step ended well, both families, and the last lines say so."""
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    ended = re.findall(r"^  (.+?), (IPv[46]) .* ok ", done.stdout, re.MULTILINE)
    assert ended == [(kind, family) for family in ("IPv4", "IPv6") for kind in KINDS]
    assert re.search(
        r"^Moved [\d,]+ MB over TCP, 300 short connections, [\d,]+ datagrams and 30 pings", done.stdout, re.M
    )
    assert done.stdout.splitlines()[-1].startswith("Checked: streams by SHA-256 at both ends")


@pytest.mark.netns
def test_the_demonstration_as_root() -> None:
    links = {name for _, name in socket.if_nameindex()}
    check(run())
    assert {name for _, name in socket.if_nameindex()} == links


@pytest.mark.netns
def test_the_demonstration_as_nobody() -> None:
    with unprivileged() as nobody:
        check(run(argv=nobody.module("gateway.demo"), env=nobody.env))


@pytest.mark.netns
def test_a_command_instead() -> None:
    done = run("--shell", "echo $((6 * 7)); cat /sys/class/net/lo/ifindex >/dev/null; exit 9")
    assert (done.returncode, done.stdout, done.stderr) == (9, "42\n", "")


@pytest.mark.netns
def test_a_command_reaches_the_machines_own_network() -> None:
    """Through the embedded proxy, which stays outside: a listener on one of the machine's addresses."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; the kernel picks the source address
        except OSError:
            pytest.skip("this machine has no IPv4 address besides loopback")
        address = probe.getsockname()[0]
    with socket.create_server((address, 0)) as listener:
        port = listener.getsockname()[1]
        script = f"import socket; print(socket.create_connection(('{address}', {port}), 10).recv(9))"
        with subprocess.Popen(
            [*DEMO, "--shell", f'{sys.executable} -c "{script}"'], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as demo:
            listener.settimeout(20)
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"here I am")
            stdout, _ = demo.communicate(timeout=WITHIN)
    assert (demo.returncode, stdout) == (0, "b'here I am'\n")


@pytest.mark.netns
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_in_the_middle_it_leaves_nothing(number: signal.Signals) -> None:
    with subprocess.Popen(
        DEMO, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as demo:
        assert demo.stdout is not None
        while b"TCP up" not in demo.stdout.readline():
            assert demo.poll() is None
        tree = psutil.Process(demo.pid).children(recursive=True)
        assert len(tree) >= 6, "proxy, servers, client, and the gateway's processes"
        demo.send_signal(number)
        demo.communicate(timeout=WITHIN)
        eventually(
            lambda: not [p for p in tree if p.is_running() and p.status() != psutil.STATUS_ZOMBIE],
            "every process has gone",
            15.0,
        )
    assert demo.returncode != 0


def test_a_machine_that_forbids_it_gets_one_line() -> None:
    script = (
        "import gateway.namespace as n\n"
        "def refuse(flags): raise PermissionError(1, 'no', 'unshare')\n"
        "n._unshare = refuse\n"
        "import sys; sys.argv = ['demo']\n"
        "from gateway.demo.__main__ import main\n"
        "main()\n"
    )
    done = run(argv=[sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ringway: ")
    assert done.stderr.count("\n") == 1


# -- its own checks can fail --


class Sink:
    """A connection of the client's to a server that alters what it serves."""

    def __init__(self, answer: bytes) -> None:
        self._answer = memoryview(answer)

    def __enter__(self) -> "Sink":
        return self

    def __exit__(self, *_: object) -> None: ...

    def sendall(self, data: bytes) -> None: ...

    def shutdown(self, how: int) -> None: ...

    def recv(self, most: int) -> bytes:
        piece, self._answer = bytes(self._answer[:most]), self._answer[most:]
        return piece

    def recv_into(self, buffer: memoryview) -> int:
        piece = self.recv(min(len(buffer), 7))
        buffer[: len(piece)] = piece
        return len(piece)


@pytest.mark.parametrize("step", [up, down])
def test_a_wrong_digest_fails_the_step(monkeypatch, step) -> None:
    from gateway.demo import client

    monkeypatch.setattr(client, "_connect", lambda address: Sink(bytes(100)))
    with pytest.raises(client.CheckFailed):
        step("203.0.113.1", 0.0, lambda moved: None)


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 1000])
def test_a_right_digest_passes_in_any_chunks(monkeypatch, count) -> None:
    import hashlib

    from gateway.demo import client

    data = os.urandom(count)
    monkeypatch.setattr(client, "_connect", lambda address: Sink(data + hashlib.sha256(data).digest()))
    moved = []
    assert down("203.0.113.1", 0.0, moved.append) == "SHA-256 equal at both ends"
    assert moved[-1] == count


def test_no_two_blocks_are_equal() -> None:
    blocks = Blocks(bytearray(BLOCK))
    assert len({bytes(blocks.next()[:16]) for _ in range(100)}) == 100


def test_figures_are_written_for_people() -> None:
    bulk = {"step": "TCP up, IPv4", "moved": 125_000_000, "seconds": 1.0}
    counted = {"step": "UDP echo, IPv6", "moved": 2000, "seconds": 0.5}
    assert (amount(bulk), speed(bulk)) == ("125.0 MB", "1,000 Mbit/s")
    assert (amount(counted), speed(counted)) == ("2,000", "4,000/s")
    assert summary([bulk, counted]) == (
        "Moved 125 MB over TCP, 0 short connections, 2,000 datagrams and 0 pings in 1.5 s over IPv4 and IPv6."
    )
