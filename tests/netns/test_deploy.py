"""The daemon under those who start daemons: readiness, status and stop over a real NOTIFY_SOCKET, a real supervisord.

┌─ a namespace of the test's own ──────────────────────┐
│  supervisord ─ starts ─► ringway run -p direct://    │      NOTIFY_SOCKET ◄─ READY=1, STATUS=…, STOPPING=1
│                              tun://rw…               │      is a path, seen from every network namespace
└──────────────────────────────────────────────────────┘
"""

import configparser
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.world import Namespace, eventually
from tests.peers import need

pytestmark = pytest.mark.netns

ROOT = Path(__file__).parent.parent.parent
START_WITHIN = 20.0
STOP_WITHIN = 20.0


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    space = Namespace(f"deploy-{os.getpid()}")
    try:
        yield space
    finally:
        space.close()


@pytest.fixture
def device() -> str:
    """A name that no other test has: it names the control socket as well."""
    return f"rwd{os.getpid() % 10_000_000}"


class Manager:
    """A service manager's end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.said: list[str] = []

    def wait_for(self, state: str, process: "subprocess.Popen[bytes]", within: float) -> None:
        """Collect states until one begins with `state`."""
        give_up_at = time.monotonic() + within
        while not any(line.startswith(state) for line in self.said):
            left = give_up_at - time.monotonic()
            assert left > 0, f"no {state} within {within:g} s; said: {self.said}"
            self.socket.settimeout(min(left, 0.5))
            try:
                self.said += self.socket.recv(4096).decode().splitlines()
            except TimeoutError:
                assert process.poll() is None or state == "STOPPING=1", f"ended with {process.returncode}"

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    end = Manager(tmp_path / "notify")
    yield end
    end.close()


@contextlib.contextmanager
def finally_ended(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Leave no process behind, however the test ends."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_WITHIN)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(STOP_WITHIN)


def clean_environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RINGWAY_")}
    return kept | {"PYTHONUNBUFFERED": "1"} | more


@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGINT])
def test_readiness_status_and_stop_over_notify_socket(
    namespace: Namespace, device: str, manager: Manager, tmp_path: Path, stop_signal: signal.Signals
) -> None:
    command = [sys.executable, "-m", "gateway", "run", "-p", "direct://", "-d", f"tun://{device}"]
    command += ["--control", str(tmp_path / "control.sock")]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = namespace.popen(
            command, stdout=output, stderr=output, env=clean_environment(NOTIFY_SOCKET=str(manager.path))
        )
    with finally_ended(process):
        manager.wait_for("READY=1", process, START_WITHIN)
        # Ready means ready: the device is there.
        assert device in namespace.links()
        manager.wait_for("STATUS=", process, START_WITHIN)
        assert "STOPPING=1" not in manager.said
        process.send_signal(stop_signal)
        manager.wait_for("STOPPING=1", process, STOP_WITHIN)
        assert process.wait(STOP_WITHIN) == 0, log.read_text()
    assert device not in namespace.links()


def test_a_daemon_that_cannot_start_never_says_ready(namespace: Namespace, manager: Manager, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gateway", "run", "-p", "direct://", "-d", "fd://99"]
    process = namespace.popen(
        [*command, "--control", str(tmp_path / "control.sock")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(NOTIFY_SOCKET=str(manager.path)),
    )
    with finally_ended(process):
        out, err = process.communicate(timeout=START_WITHIN)
    assert (process.returncode, out) == (2, b"")
    lines = err.decode().splitlines()
    assert lines[-1].startswith("ringway: ") and "99" in lines[-1]
    manager.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            assert not manager.socket.recv(4096).startswith(b"READY=1")


@pytest.mark.peer
def test_supervisord_starts_and_stops_it(namespace: Namespace, device: str, tmp_path: Path) -> None:
    supervisord, supervisorctl = need("supervisord"), need("supervisorctl")
    program = configparser.RawConfigParser(inline_comment_prefixes=(";",))
    program.read(ROOT / "deploy" / "supervisord.conf")
    section = program["program:ringway"]
    # Only what is a place is changed: command and log.
    (tmp_path / "ringway.toml").write_text(
        f'proxy = "direct://"\ndevice = "tun://{device}"\ncontrol = "{tmp_path}/control.sock"\n'
    )
    section["command"] = f"{sys.executable} -m gateway run --config {tmp_path}/ringway.toml"
    section["directory"] = str(ROOT)
    section["stdout_logfile"] = f"{tmp_path}/ringway.log"
    sock = tmp_path / "supervisor.sock"
    program["unix_http_server"] = {"file": str(sock)}
    program["supervisord"] = {
        "logfile": f"{tmp_path}/supervisord.log",
        "pidfile": f"{tmp_path}/supervisord.pid",
        "childlogdir": str(tmp_path),
        "user": "root",
    }
    program["rpcinterface:supervisor"] = {
        "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
    }
    program["supervisorctl"] = {"serverurl": f"unix://{sock}"}
    config = tmp_path / "supervisord.conf"
    with config.open("w") as file:
        program.write(file)

    def control(*words: str) -> str:
        done = subprocess.run(
            [supervisorctl, "-c", str(config), *words], capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout + done.stderr

    def log() -> str:
        return "\n".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))

    with (tmp_path / "output.log").open("wb") as output:
        process = namespace.popen(
            [supervisord, "-n", "-c", str(config)], stdout=output, stderr=output, env=clean_environment()
        )
    with finally_ended(process):
        eventually(sock.exists, f"supervisord listens: {log()}", START_WITHIN)
        eventually(lambda: "RUNNING" in control("status", "ringway"), "supervisord calls it running", START_WITHIN)
        eventually(lambda: device in namespace.links(), f"the device is there: {log()}", START_WITHIN)
        status = subprocess.run(
            [sys.executable, "-m", "gateway", "status", "--control", f"{tmp_path}/control.sock", "--interval", "0.05"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=ROOT,
            env=clean_environment(),
        )
        assert status.returncode == 0, status.stderr
        assert device in status.stdout and "worker" in status.stdout
        assert "stopped" in control("stop", "ringway"), log()
        assert "STOPPED" in control("status", "ringway")
        # By itself on TERM, not by the KILL after stopwaitsecs.
        assert "stopped: ringway (exit status 0)" in log(), log()
        assert device not in namespace.links()
        assert "started" in control("start", "ringway"), log()
        eventually(lambda: device in namespace.links(), f"the device is there again: {log()}", START_WITHIN)
    assert process.returncode == 0
    assert device not in namespace.links()
