"""The gateway as a test runs it: `ringway run` as a process of its own, its readiness, its status, its end."""

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import msgpack
import psutil
import pytest

from tests.netns.world import MARK, Namespace, World, eventually

RINGWAY: Final = (sys.executable, "-m", "gateway")
START_WITHIN: Final = 15.0  # seconds; half a second is usual, but many tests may share two cores
STOP_WITHIN: Final = 10.0
DIRECT: Final = ("-p", "direct://", "--fwmark", str(MARK))
_LENGTH: Final = struct.Struct(">I")


class Ringway:
    """One `ringway run`. Used as a context manager it starts at the top and stops, checked, at the bottom."""

    def __init__(
        self,
        world: World | None,
        *flags: str,
        device: str = "tun://tun0",
        namespace: Namespace | None = None,
        pass_fds: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
        routes: bool = True,
    ) -> None:
        self._world = world
        chosen = namespace or (world.gw if world else None)
        assert chosen is not None
        self._namespace = chosen
        self._directory = Path(tempfile.mkdtemp(prefix="ringway-test-"))
        self.control = self._directory / "control.sock"
        self._log = self._directory / "log"
        self._pass_fds = tuple(pass_fds)
        self._env = dict(env or {})
        self._routes = routes
        self._device = device
        self.argv = [*RINGWAY, "run", "-d", device, "--control", str(self.control), *flags]
        self.process: subprocess.Popen[bytes] | None = None
        self._known: set[int] = set()

    # -- life --

    def start(self, *, wait: bool = True) -> "Ringway":
        notify_path = self._directory / "notify.sock"
        notify_path.unlink(missing_ok=True)  # of an earlier start
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with notify:
            notify.bind(str(notify_path))
            notify.setblocking(False)
            env = {k: v for k, v in os.environ.items() if not k.startswith("RINGWAY_")}
            env |= {"NOTIFY_SOCKET": str(notify_path), "PYTHONUNBUFFERED": "1"} | self._env
            with open(self._log, "ab") as log:
                self.process = self._namespace.popen(
                    self.argv, stdout=log, stderr=log, env=env, pass_fds=self._pass_fds
                )
            if wait:
                eventually(lambda: self._told_ready(notify), f"{' '.join(self.argv)} says READY=1", START_WITHIN)
                self._known = {process.pid for process in self.tree()}
                if self._world and self._routes and self._device.startswith("tun://"):
                    self._world.route_into(self._device.removeprefix("tun://"))
        return self

    def _told_ready(self, notify: socket.socket) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            pytest.fail(f"ringway ended with {self.process.returncode} instead of becoming ready:\n{self.log()}")
        try:
            return b"READY=1" in notify.recv(4096)
        except BlockingIOError:
            return False

    def stop(self, how: int = signal.SIGTERM) -> int:
        """Ask for the end, wait for it, and return the exit code; fail if a process of the tree outlives it."""
        process = self.process
        if process is None:
            return 0
        if process.poll() is None:
            self._known |= {child.pid for child in self.tree()}
            process.send_signal(how)
        try:
            code = process.wait(STOP_WITHIN)
            eventually(lambda: not self._survivors(), "every process of the gateway is gone", 3.0)
        finally:
            self.kill()
        return code

    def kill(self) -> None:
        """End whatever is left, without asking."""
        if self.process is None:
            return
        for process in [*self._survivors(), *self.tree()]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        self.process.wait(STOP_WITHIN)

    def wait(self, within: float) -> int:
        """Wait for the gateway to end by itself; return its exit code."""
        assert self.process is not None
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            pytest.fail(f"ringway still runs after {within:g} s:\n{self.log()}")

    def _survivors(self) -> list[psutil.Process]:
        assert self.process is not None
        alive = []
        for pid in self._known - {self.process.pid}:
            try:
                process = psutil.Process(pid)
                # The leader's process group marks our own: a pid may have been given to somebody else meanwhile.
                if process.status() != psutil.STATUS_ZOMBIE and os.getpgid(pid) == self.process.pid:
                    alive.append(process)
            except (psutil.NoSuchProcess, ProcessLookupError):
                pass
        return alive

    def __enter__(self) -> "Ringway":
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if self.process is not None and self.process.poll() is None:
                code = self.stop()
                if error is None:
                    assert code == 0, f"ringway stopped with {code}:\n{self.log()}"
                    self.check_log()
        finally:
            if error is not None:
                # pytest shows it under "Captured stdout" of the test that failed.
                print(f"-- log of {' '.join(self.argv[3:])} --\n{self.log()}")
            self.close()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    # -- what it says --

    def log(self) -> str:
        try:
            return self._log.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def check_log(self) -> None:
        """Fail if a traceback stands in the log: bad input and dying peers are counted, never an exception."""
        assert "Traceback" not in self.log(), self.log()

    def status(self) -> dict[str, Any]:
        """Ask the control socket."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
            control.settimeout(5)
            control.connect(str(self.control))
            request = msgpack.packb({"command": "status"})
            control.sendall(_LENGTH.pack(len(request)) + request)
            answer = control.makefile("rb")
            with answer:
                (length,) = _LENGTH.unpack(answer.read(_LENGTH.size))
                status: dict[str, Any] = msgpack.unpackb(answer.read(length))
        return status

    def status_command(self, *flags: str) -> "subprocess.CompletedProcess[str]":
        """Run `ringway status` against this gateway."""
        return self._namespace.run([*RINGWAY, "status", "--control", str(self.control), *flags])

    def status_json(self) -> dict[str, Any]:
        done = self.status_command("--json")
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def counters(self) -> dict[str, int]:
        """Return every counter, summed over the processes that have one of its name."""
        total: dict[str, int] = {}
        for of_process in self.status()["counters"].values():
            for name, value in of_process.items():
                total[name] = total.get(name, 0) + value
        return total

    def flows(self, kind: str = "tcp") -> int:
        return int(self.status()["flows"][kind])

    # -- its processes --

    def processes(self, role: str) -> list[dict[str, Any]]:
        """Return the status rows of the processes that do `role`; where roles share a process, that one."""
        rows = self.status()["processes"]
        found = [row for row in rows if row["role"] == role]
        return found or [row for row in rows if row["role"] != "supervisor"]

    def pid(self, role: str, shard: int = 0) -> int:
        found = self.processes(role)
        return int(next((row for row in found if row.get("shard") == shard), found[0])["pid"])

    def tree(self) -> list[psutil.Process]:
        """Return the supervisor and its children, as far as they live."""
        assert self.process is not None
        try:
            supervisor = psutil.Process(self.process.pid)
            return [p for p in (supervisor, *supervisor.children(recursive=True)) if p.status() != psutil.STATUS_ZOMBIE]
        except psutil.NoSuchProcess:
            return []


def ringway_command(namespace: Namespace, *arguments: str, timeout: float = 15) -> "subprocess.CompletedProcess[str]":
    """Run `ringway ARGUMENTS` to its end."""
    return namespace.run([*RINGWAY, *arguments], timeout=timeout)
