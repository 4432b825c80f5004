"""Gateway: run a gateway from Python.

    from gateway.api import Gateway

    with Gateway(device="tun://tun0", proxy="socks5://127.0.0.1:1080") as gateway:
        print(gateway.status()["flows"])

The gateway is a process tree of its own (`ringway run`), so the caller's threads, event loops and signal handlers do
not matter to it, and it ends when the caller does, however that ends.

| device                              | is                                                                      |
| ----------------------------------- | ----------------------------------------------------------------------- |
| "tun://NAME"                        | made or joined, as on the command line                                  |
| an int, or a socket                 | an open TUN, or an AF_UNIX datagram or seqpacket socket of IP packets   |
| any object with read() and write()  | asked for packets and given packets, each by a thread of its own        |
"""

import contextlib
import itertools
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol, Self

import msgspec

from gateway.config import Config, control_directories, load
from gateway.lifeline import spawn
from gateway.status import ask

START_TIMEOUT: Final = 30.0  #: seconds until ready; the proxy's name may take its time to resolve
STOP_TIMEOUT: Final = 10.0  #: seconds from TERM to KILL
_MAX_PACKET: Final = 65575  # octets; an IPv6 header before the largest payload
_numbers = itertools.count(1)


class GatewayError(Exception):
    """The gateway could not start; the text is its own error line."""

    def __init__(self, text: str, exit_code: int = 1) -> None:
        super().__init__(text)
        self.exit_code = exit_code  #: of the process: 1 failed, 2 usage or configuration


class PacketDevice(Protocol):
    """An object that brings packets and takes packets; each call is one IP packet without any header before it."""

    def read(self) -> bytes:
        """Wait for the next packet of the clients; b"" when there will be none any more."""

    def write(self, packet: bytes, /) -> object:
        """Take one packet for the clients."""


class Gateway:
    """One gateway: made, started once, asked, stopped. Not for several threads at a time."""

    def __init__(
        self,
        device: "str | int | socket.socket | PacketDevice" = "tun://tun0",
        *,
        config_file: str | os.PathLike[str] | None = None,
        log: Callable[[str], object] | None = None,
        **settings: object,
    ) -> None:
        """Settle the configuration: `settings` by the names of Config (proxy=…, mtu=…), as flags of the command line.

        What they leave open comes from the environment (RINGWAY_…), `config_file` and the defaults. `log` gets the
        gateway's log line by line from a thread; standard error does by default. A descriptor or socket stays the
        caller's. Raises ConfigError.
        """
        if isinstance(device, str):
            settings["device"] = device
        self.config = load(config_file, os.environ, settings)
        self._device = device
        self._log = log or _to_stderr
        self._process: subprocess.Popen[bytes] | None = None
        self._resources = contextlib.ExitStack()
        self._lines: list[str] = []  # what the gateway said before it was ready
        self._ready = False
        self._lines_lock = threading.Lock()
        self._reader: threading.Thread | None = None
        name = f"{os.getpid()}-{next(_numbers)}"
        self._control = self.config.control or str(control_directories()[0] / f"{name}.sock")

    @property
    def pid(self) -> int | None:
        """The supervisor's process id while there is one."""
        return self._process.pid if self._process else None

    @property
    def exit_code(self) -> int | None:
        """The exit code after the gateway has ended, None before."""
        return self._process.poll() if self._process else None

    def start(self, timeout: float = START_TIMEOUT) -> Self:
        """Start the gateway and wait until it carries packets. Raises GatewayError with the gateway's own words."""
        if self._process is not None:
            raise GatewayError("this gateway was started before; make a new one")
        if isinstance(self._device, (int, socket.socket)):
            # First of all: what is opened below would get the number of a closed one.
            try:
                os.fstat(_number(self._device))
            except OSError:
                raise GatewayError(f"descriptor {_number(self._device)} of the device is not open", 2) from None
        try:
            self._spawn(timeout)
        except BaseException:
            self.stop()
            raise
        return self

    def status(self, timeout: float = 5.0) -> dict[str, Any]:
        """Return what `ringway status --json` is made from. Raises StatusError when the gateway does not answer."""
        return ask(Path(self._control), {"command": "status"}, timeout)

    def stop(self, timeout: float = STOP_TIMEOUT) -> int | None:
        """Stop the gateway gracefully, or by force after `timeout` seconds; return its exit code. May be repeated."""
        process = self._process
        if process is not None:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(timeout)
                except subprocess.TimeoutExpired:
                    process.kill()  # its children go with it
                    process.wait()
            if self._reader is not None:
                self._reader.join(1.0)
            # A gateway that was killed had no time to.
            Path(self._control).unlink(missing_ok=True)
        self._resources.close()
        return process.returncode if process is not None else None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- starting --

    def _spawn(self, timeout: float) -> None:
        keep = self._resources.enter_context
        # An abstract name, so that nothing lies about when this process is killed.
        notify_name = f"ringway-{secrets.token_hex(8)}"
        ready = keep(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC))
        ready.bind("\0" + notify_name)
        flags = self._flags()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RINGWAY_")}
        environment["NOTIFY_SOCKET"] = "@" + notify_name
        # Not on the command line: it may hold a password.
        environment["RINGWAY_PROXY"] = self.config.proxy
        with contextlib.ExitStack() as handed_over:
            device = self._hand_over(handed_over)
            self._process, line = spawn(
                ["run", *flags, *([] if device is None else [f"--device=fd://{device}"])],
                environment=environment,
                descriptors=[] if device is None else [device],
                stderr=subprocess.PIPE,
            )
        self._resources.callback(os.close, line)
        self._reader = threading.Thread(target=self._read_log, name="ringway-log", daemon=True)
        self._reader.start()
        self._await_ready(ready, timeout)
        with self._lines_lock:
            self._ready = True
            for text in self._lines:
                self._log(text)
            self._lines.clear()

    def _flags(self) -> list[str]:
        """Write the settled configuration as flags, all that is not the default."""
        given: dict[str, Any] = msgspec.structs.asdict(self.config)
        given["control"] = self._control
        if not isinstance(self._device, str):
            given["device"] = Config().device  # named by its descriptor instead
        default = msgspec.structs.asdict(Config())
        return [
            f"--{name.replace('_', '-')}={_text(value)}"
            for name, value in given.items()
            if value != default[name] and name not in ("proxy", "password_file")
        ]

    def _hand_over(self, handed_over: contextlib.ExitStack) -> int | None:
        """Return the descriptor for the gateway; what it has for itself alone is closed here by `handed_over`."""
        device = self._device
        if isinstance(device, str):
            return None
        if isinstance(device, (int, socket.socket)):
            return _number(device)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._resources.enter_context(ours)
        # Wakes both threads; the one in device.read() only when that returns.
        self._resources.callback(_shut, ours)
        handed_over.enter_context(theirs)
        for pump in (_pump_up, _pump_down):
            threading.Thread(target=pump, args=(device, ours), name=f"ringway{pump.__name__}", daemon=True).start()
        return theirs.fileno()

    def _await_ready(self, ready: socket.socket, timeout: float) -> None:
        assert self._process is not None
        give_up_at = time.monotonic() + timeout
        pidfd = os.pidfd_open(self._process.pid)
        try:
            poll = select.poll()
            poll.register(ready, select.POLLIN)
            poll.register(pidfd, select.POLLIN)
            while left := max(0.0, give_up_at - time.monotonic()):
                for fd, _ in sorted(poll.poll(left * 1000), reverse=True):
                    if fd == ready.fileno() and b"READY=1" in ready.recv(4096).split(b"\n"):
                        return
                    if fd == pidfd:
                        raise self._last_words()
        finally:
            os.close(pidfd)
        raise GatewayError(f"the gateway was not ready within {timeout:g} s")

    def _last_words(self) -> GatewayError:
        assert self._process is not None
        assert self._reader is not None
        code = self._process.wait()
        self._reader.join(1.0)
        with self._lines_lock:
            said = [text for text in self._lines if text.strip()]
        for text in said[:-1]:
            self._log(text)
        words = said[-1].removeprefix("ringway: ") if said else f"the gateway ended at once with status {code}"
        return GatewayError(words, code if code > 0 else 1)

    def _read_log(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            for raw in stream:
                text = raw.decode(errors="replace").rstrip("\n")
                with self._lines_lock:
                    if self._ready:
                        self._log(text)
                    else:
                        self._lines.append(text)


def _number(device: int | socket.socket) -> int:
    return device if isinstance(device, int) else device.fileno()


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


def _pump_up(device: PacketDevice, end: socket.socket) -> None:
    """Carry packets from the device to the gateway until either has no more."""
    try:
        while packet := device.read():
            end.send(packet)
    except OSError:
        pass  # the gateway stopped, or the device was closed


def _pump_down(device: PacketDevice, end: socket.socket) -> None:
    """Carry packets from the gateway to the device until either has no more."""
    try:
        while packet := end.recv(_MAX_PACKET):
            device.write(packet)
    except OSError:
        pass
