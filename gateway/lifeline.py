"""What starts a gateway that must not outlive the process that asked for it.

    python -m gateway.lifeline FD run -d fd://5 …

FD is the reading end of a pipe whose other end only the asking process holds. When that process ends, however it does,
the kernel closes the other end and sends TERM here: a graceful stop. PR_SET_PDEATHSIG would not do: it goes by the
thread that forked, and a library cannot know how long its caller's threads live.
"""

import fcntl
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

_F_SETSIG: Final = 10  # asm-generic/fcntl.h
_ROOT: Final = str(Path(__file__).resolve().parent.parent)


def spawn(
    arguments: Sequence[str],
    *,
    environment: dict[str, str] | None = None,
    descriptors: Sequence[int] = (),
    stdout: int = subprocess.DEVNULL,
    stderr: int | IO[bytes] | None = None,
) -> tuple["subprocess.Popen[bytes]", int]:
    """Start `ringway ARGUMENTS`; return the process and the pipe's end that keeps it alive, which the caller closes.

    It gets a session of its own (Ctrl-C is the caller's to act upon), no standard input, and `descriptors`.
    """
    held, line = os.pipe()
    try:
        process = subprocess.Popen(
            [*python_module("gateway.lifeline"), str(held), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=python_environment(environment),
            pass_fds=[held, *descriptors],
            start_new_session=True,
        )
    except BaseException:
        os.close(line)
        raise
    finally:
        os.close(held)
    return process, line


def python_module(name: str) -> list[str]:
    """Return the command that runs a module of ours, not a folder of that name where the caller stands."""
    return [sys.executable, "-P", "-m", name]


def python_environment(environment: dict[str, str] | None = None) -> dict[str, str]:
    """Return the environment (the process's own by default) in which python_module finds our modules."""
    environment = dict(os.environ if environment is None else environment)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (_ROOT, environment.get("PYTHONPATH"))))
    return environment


def hold(fd: int) -> bool:
    """Have the kernel send TERM to this process when the pipe's other end closes; False when it is closed already.

    One process, no thread: the supervisor forks. The setting belongs to the open pipe and lasts as long as that.
    """
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(fd, _F_SETSIG, signal.SIGTERM)
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return not poll.poll(0)


def main() -> int:
    """Hold the line, then be `ringway`."""
    # A caller that waits for signals has them blocked, and its children inherit that.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if not hold(int(sys.argv[1])):
        return 1
    from gateway.__main__ import main as ringway

    return ringway(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
