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
import sys

_F_SETSIG = 10  # asm-generic/fcntl.h


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
