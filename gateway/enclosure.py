"""Enclosure: one command in namespaces of its own, and the gateway outside of them that carries its traffic.

    outer namespaces                                   inner namespaces
    ringway exec ── fork ────────────────────────────► the child: enter(), make_tun(), own_resolver()
         │        ◄── TUN descriptor (SCM_RIGHTS) ─────────┤
         ├─ starts the gateway on it                       │ waits
         ├───────────── "go" ─────────────────────────────►│ exec COMMAND
         │ passes signals on                               │
         ◄───────────── exit status ───────────────────────┘

The command stays in the caller's process group and session: it has the terminal, and what the terminal sends (Ctrl-C,
Ctrl-Z, a new window size) reaches it without our help. It dies with us, and so does the gateway (lifeline.py).
"""

import errno
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Final, NoReturn

import msgspec

from gateway.api import Gateway, GatewayError
from gateway.config import Config
from gateway.device import DeviceError

NOT_EXECUTABLE: Final = 126  # as shells have it
NOT_FOUND: Final = 127
KILLED: Final = 128  # plus the signal's number

TERM_PATIENCE: Final = 5.0  #: seconds that the command has when its gateway has died
_STOP_PATIENCE: Final = 0.1  #: seconds in which a stopped command that is just going on again says so
_MAX_MESSAGE: Final = 4096
_PASSED_ON: Final = frozenset(
    {
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGQUIT,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGALRM,
        signal.SIGWINCH,
        signal.SIGCONT,
    }
)
_WAITED: Final = _PASSED_ON | {signal.SIGCHLD}


class EnclosureError(Exception):
    """The command could not be started; the text is one line."""

    def __init__(self, text: str, exit_code: int = 2) -> None:
        super().__init__(text)
        self.exit_code = exit_code  #: 1 failed, 2 usage, configuration or permission


def run_enclosed(config: Config, command: Sequence[str], log: Callable[[str], object] | None = None) -> int:
    """Run the command to its end, passing signals on, and return its exit status. Raises EnclosureError.

    For a process with one thread; `log` gets the gateway's log, standard error by default.
    """
    # Blocked before there is a second thread, so that only sigwaitinfo below sees them.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)
    default = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would take the exit status with it
    try:
        with Enclosure(config, command, mask=mask, log=log) as enclosure:
            return enclosure.wait()
    finally:
        signal.signal(signal.SIGCHLD, default)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class Enclosure:
    """A command and its gateway, from `with` to the end of the block."""

    def __init__(
        self,
        config: Config,
        command: Sequence[str],
        *,
        mask: Iterable[int] = (),
        stdout: int | None = None,
        log: Callable[[str], object] | None = None,
    ) -> None:
        """`mask` is the command's signal mask, `stdout` the descriptor that becomes its standard output."""
        self.pid = 0  #: of the command while it runs, then 0
        self.gateway: Gateway | None = None
        self._config = config
        self._command = list(command)
        self._mask = mask
        self._stdout = stdout
        self._log = log

    def __enter__(self) -> "Enclosure":
        """Start the command. Raises EnclosureError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            self._be_the_command(theirs, parent)
        theirs.close()
        try:
            with ours:
                tun = _receive_tun(ours)
                try:
                    self._start_gateway(tun)
                finally:
                    os.close(tun)
                ours.send(b"go")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the command, if it still runs, and the gateway."""
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
        if self.gateway is not None:
            self.gateway.stop()

    def wait(self) -> int:
        """Wait for the command, pass signals on, and return its exit status; 1 when the gateway ended before it.

        The signals must be blocked, and SIGCHLD not ignored.
        """
        while True:
            status = self._reap()
            if status is not None:
                return status
            if self.gateway is not None and self.gateway.exit_code is not None:
                code = self.gateway.exit_code
                print(f"ringway: the gateway ended with status {code}; stopping the command", file=sys.stderr)
                self._stop_command()
                return 1
            info = signal.sigwaitinfo(_WAITED)
            # What the kernel sends (SI_KERNEL: the terminal) goes to the whole process group, and the command is in it.
            if info.si_signo in _PASSED_ON and info.si_code <= 0:
                os.kill(self.pid, info.si_signo)

    def finish(self, patience: float) -> int | None:
        """Wait at most `patience` seconds for the command; None when it still runs. Signals need not be blocked."""
        pidfd = os.pidfd_open(self.pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            return self._reap() if poll.poll(patience * 1000) else None
        finally:
            os.close(pidfd)

    def _reap(self) -> int | None:
        """Return the command's exit status once it has ended; stop with it when it stops."""
        pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
        if not pid:
            return None
        if os.WIFSTOPPED(status):
            # Ctrl-Z stops the command and us alike, and "fg" wakes both; a command that stopped by itself needs us to
            # stop as well, so that the shell sees it.
            signal.sigtimedwait({signal.SIGCHLD}, _STOP_PATIENCE)
            if not os.waitpid(self.pid, os.WNOHANG | os.WCONTINUED)[0]:
                os.kill(os.getpid(), signal.SIGSTOP)
                with suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGCONT)
            return None
        self.pid = 0
        return KILLED + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    def _stop_command(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
            os.kill(self.pid, signal.SIGCONT)
        signal.sigtimedwait({signal.SIGCHLD}, TERM_PATIENCE)
        self._reap()

    def _start_gateway(self, tun: int) -> None:
        settings: dict[str, Any] = msgspec.structs.asdict(self._config)
        # The password is in the URL by now; the device is the descriptor.
        del settings["device"], settings["password_file"]
        try:
            self.gateway = Gateway(tun, log=self._log, **settings)
            self.gateway.start()
        except GatewayError as error:
            raise EnclosureError(str(error), error.exit_code) from error

    def _be_the_command(self, end: socket.socket, parent: int) -> NoReturn:
        """Become the command, in the forked child: nothing of the caller's may run here any more."""
        status = 1
        try:
            status = self._prepare_and_exec(end, parent)
        except KeyboardInterrupt:
            status = KILLED + signal.SIGINT
        except BaseException as error:
            with suppress(OSError):
                end.send(f"{type(error).__name__}: {error}".encode()[:_MAX_MESSAGE])
        finally:
            os._exit(status)

    def _prepare_and_exec(self, end: socket.socket, parent: int) -> int:
        from gateway.namespace import NamespaceError, enter, make_tun, own_resolver
        from gateway.privileges import die_with_parent

        try:
            enter()
            # After enter(): the kernel forgets it when the rights change.
            die_with_parent(parent)
            tun = make_tun(self._config)
            if not own_resolver(self._config.tun_dns):
                _say("there is no /etc/resolv.conf to put another in front of: names cannot be looked up")
        except (NamespaceError, DeviceError) as error:
            end.send(str(error).encode())
            return 2
        socket.send_fds(end, [b"tun"], [tun.fileno()])
        if end.recv(2) != b"go":
            return 1
        if self._stdout is not None:
            os.dup2(self._stdout, 1)
        for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(ignored_by_python, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        name = self._command[0]
        try:
            os.execvp(name, self._command)
        except (FileNotFoundError, NotADirectoryError):
            _say(f"command not found: {name}")
            return NOT_FOUND
        except OSError as error:
            _say(f"cannot run {name}: {error.strerror}" + (" (no #! line?)" if error.errno == errno.ENOEXEC else ""))
            return NOT_EXECUTABLE


def _receive_tun(end: socket.socket) -> int:
    message, descriptors, _, _ = socket.recv_fds(end, _MAX_MESSAGE, 1)
    if message == b"tun" and descriptors:
        os.set_inheritable(descriptors[0], False)
        return descriptors[0]
    raise EnclosureError(message.decode(errors="replace") or "the command's process ended before it had begun")


def _say(text: str) -> None:
    # Past Python's buffers, which are the parent's.
    os.write(2, f"ringway: {text}\n".encode())
