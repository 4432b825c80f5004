"""The processes beside the supervisor: one table of roles, and what it takes to fork one.

    role     count  keeps             shares with its neighbours
    reader   1      device            rx fill                      of every worker
    worker   N      upstream rights   rx fill tx completion        of its shard
    writer   1      device            tx completion                of every worker
    single   1      both              nothing: reader, worker and writer in one
    carrier  1      upstream rights   nothing: only where the proxy is inside something else (carrier.py)

The order of a table is the way of a frame, and the order in which the processes are told to stop. Two roles are
neighbours when they share a ring; who dies is let go of by its neighbours before its rings are emptied.
"""

import gc
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from setproctitle import setproctitle

from gateway.loop import wait_readable
from gateway.privileges import Identity, die_with_parent, give_up
from ipc.channel import Channel, ChannelClosed, Message
from ipc.layout import RINGS

if TYPE_CHECKING:
    from gateway.device import Device
    from gateway.loop import Timer
    from ipc.memory import SharedMemory
    from workers.settings import Settings

log = logging.getLogger("ringway")

FAILED: Final = 70  #: exit status of a process that an exception ended; EX_SOFTWARE of sysexits.h

#: The supervisor decides what these mean; a terminal and a service manager send them to the whole group.
IGNORED_SIGNALS: Final = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGPIPE,
)


@dataclass(frozen=True, slots=True)
class Setup:
    """What the processes inherit: everything is made before the first fork."""

    shared: "SharedMemory"
    device: "Device"
    settings: "Settings"


@dataclass(frozen=True, slots=True)
class Role:
    """One row of the table."""

    name: str
    main: Callable[[Setup, int, Channel], None]  #: (setup, shard, channel); returns when told to stop
    block: str = ""  #: its counters; "worker/{}" with the shard in the place of the braces
    per_shard: bool = False  #: one process for each shard, else one
    keeps_device: bool = False
    keeps_upstream_rights: bool = False  #: what fwmark needs
    rings: tuple[str, ...] = ()  #: of its shard, or of every shard when it is the only one of its role
    gauges: tuple[int, ...] = ()  #: words of its counters that describe a state, and die with it

    def label(self, shard: int) -> str:
        """Return the name of a process as people read it: "reader", "worker 0"."""
        return f"{self.name} {shard}" if self.per_shard else self.name

    def message(self, verb: str, shard: int) -> Message:
        """Return what its neighbours are told: `verb` is "drop" or "add"."""
        if self.per_shard:
            return {"do": f"{verb}-shard", "shard": shard}
        return {"do": f"{verb}-{self.name}"}

    def is_neighbour(self, other: "Role") -> bool:
        """Tell whether a ring leads from one to the other."""
        return self is not other and not set(self.rings).isdisjoint(other.rings)


@dataclass(frozen=True, slots=True)
class Rights:
    """What becomes of a child's rights."""

    identity: Identity | None = None  #: whom it becomes; None: it stays who it is
    upstream: frozenset[int] = frozenset()  #: capabilities for roles that keep upstream rights


class Child:
    """A process that was forked here, seen by the supervisor: pid, pidfd and channel."""

    __slots__ = ("_status", "channel", "pid", "pidfd")

    def __init__(self, pid: int, pidfd: int, channel: Channel) -> None:
        self.pid = pid
        self.pidfd = pidfd  #: readable when the process has ended
        self.channel = channel
        self._status: int | None = None

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal; harmless when the process is gone."""
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except OSError:
            pass

    def reap(self) -> int | None:
        """Return how the process ended, as os.waitstatus_to_exitcode has it, or None while it runs."""
        if self._status is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                # Somebody set SIGCHLD to be ignored, so nobody knows how it ended.
                self._status = FAILED
            else:
                if pid:
                    self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def end(self) -> None:
        """Kill it, wait until it is gone, and close the descriptors."""
        self.kill()
        wait_readable(self.pidfd, 1.0)
        self.reap()
        self.close()

    def close(self) -> None:
        """Close the descriptors; in the parent after the end, in other children at once."""
        self.channel.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def fork_child(
    label: str,
    main: Callable[[Channel], None],
    *,
    let_go: Callable[[], None],
    identity: Identity | None = None,
    keep: frozenset[int] = frozenset(),
    drop_rights: bool = True,
) -> Child:
    """Fork a process that runs `main` with its end of a channel and ends with it. OSError when there is no room for it.

    `let_go` closes, in the child, what is the parent's alone. All imports must have happened: the new uid may not be
    able to read the interpreter's files. The caller owns the Child.
    """
    ours, theirs = Channel.pair()
    # What is garbage now would be freed in each child, copying its pages; what is left will not be looked at again.
    gc.collect()
    gc.freeze()
    parent = os.getpid()
    # No signal may reach the parent's handlers in the child, which would write to the parent's wake-up descriptor.
    before = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            status = FAILED
            try:
                signal.set_wakeup_fd(-1)
                for number in IGNORED_SIGNALS:
                    signal.signal(number, signal.SIG_IGN)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, ())
                ours.close()
                let_go()
                setproctitle(f"ringway: {label}")
                if drop_rights:
                    give_up(identity, keep)
                die_with_parent(parent)
                # Do not preempt whoever wakes us: it finishes its batch, and ours grows (two cores, 8 TCP streams
                # down: 5.0 → 8.9 Gbit/s in the median of three runs each, keepalive requests + 6 %).
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
                main(theirs)
                status = 0
            except BaseException as error:
                _confess(label, theirs, error)
            finally:
                # Never back into the parent's stack: it holds the parent's clean-up.
                os._exit(status)
    except OSError:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
    try:
        return Child(pid, os.pidfd_open(pid), ours)
    except OSError:
        # Out of descriptors: nobody could watch it.
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        ours.close()
        raise


def _confess(label: str, channel: Channel, error: BaseException) -> None:
    """Tell the supervisor why; it writes the one line. The traceback is for whoever asked for it."""
    try:
        log.debug("%s failed", label, exc_info=error)
        channel.send({"event": "failed", "reason": describe(error)})
    except (ChannelClosed, OSError, ValueError):
        pass


def describe(error: BaseException) -> str:
    """Return an exception as the end of a sentence: an OSError by its meaning, others by name and text."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__


def how_it_ended(status: int) -> str:
    """Return an exit code of os.waitstatus_to_exitcode in words: "was killed by SIGKILL", "ended with status 70"."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"was killed by {name}"


class Process:
    """A place in the tree: one role, one shard, and the child that holds the place now, if any."""

    __slots__ = (
        "awaiting",
        "child",
        "deaths",
        "dropped",
        "label",
        "reason",
        "restarts",
        "role",
        "shard",
        "state",
        "timer",
    )

    def __init__(self, role: Role, shard: int) -> None:
        self.role = role
        self.shard = shard
        self.label = role.label(shard)
        self.child: Child | None = None
        self.state = "stopped"  #: stopped, starting, running, restarting
        self.timer: Timer | None = None  #: the end of patience with it, or of its back-off
        self.restarts = 0
        self.deaths: list[float] = []  #: moments of the last deaths
        self.reason = ""  #: why it says it failed
        self.awaiting: set[Process] = set()  #: neighbours that have not yet confirmed to have let go of it
        self.dropped: set[Process] = set()  #: whom this child was told to let go of, and not yet told to take back

    def neighbours(self, processes: "list[Process]") -> "list[Process]":
        """Return those of `processes` that share a ring with it."""
        return [other for other in processes if self.role.is_neighbour(other.role)]

    def __repr__(self) -> str:
        return f"<{self.label}: {self.state}>"


def make_processes(roles: tuple[Role, ...], shards: int) -> list[Process]:
    """Return a place for each process of a table, in its order."""
    return [Process(role, shard) for role in roles for shard in range(shards if role.per_shard else 1)]


def roles_for(placement: str) -> tuple[tuple[Role, ...], Callable[[int], dict[str, tuple[str, ...]]]]:
    """Return the table of a placement, and a function that names the counters of every process for N shards.

    Imports everything that the processes will need, so that it is shared, and read before the rights are given up.
    """
    import encodings.idna  # noqa: F401

    from gateway.reader import COUNTERS as READER_COUNTERS
    from gateway.writer import COUNTERS as WRITER_COUNTERS
    from workers import counts
    from workers.worker import worker_main

    gauges = (counts.TCP_FLOWS, counts.TCP_PENDING, counts.TCP_TIME_WAIT, counts.TCP_WARM, counts.UDP_ASSOCIATIONS)

    def counters(shards: int) -> dict[str, tuple[str, ...]]:
        workers = {f"worker/{shard}": counts.NAMES for shard in range(shards)}
        return {"reader": READER_COUNTERS, **workers, "writer": WRITER_COUNTERS}

    if placement == "single":
        from gateway.single import DirectPort

        def single(setup: Setup, shard: int, channel: Channel) -> None:
            port = DirectPort(setup.shared, setup.device)
            worker_main(
                port, setup.settings, setup.shared.counters.block(f"worker/{shard}"), channel, setup.shared.dns_cache
            )

        everything = Role(
            "single", single, block="worker/{}", keeps_device=True, keeps_upstream_rights=True, gauges=gauges
        )
        return (everything,), counters

    from gateway.reader import reader_main
    from gateway.writer import writer_main
    from workers.port import RingPort

    def read(setup: Setup, _shard: int, channel: Channel) -> None:
        reader_main(setup.shared, setup.device, channel, setup.settings)

    def work(setup: Setup, shard: int, channel: Channel) -> None:
        port = RingPort(setup.shared, shard)
        worker_main(
            port, setup.settings, setup.shared.counters.block(f"worker/{shard}"), channel, setup.shared.dns_cache
        )

    def write(setup: Setup, _shard: int, channel: Channel) -> None:
        writer_main(setup.shared, setup.device, channel, setup.settings.busy_poll)

    pipeline = (
        Role("reader", read, block="reader", keeps_device=True, rings=("rx", "fill")),
        Role("worker", work, block="worker/{}", per_shard=True, keeps_upstream_rights=True, rings=RINGS, gauges=gauges),
        Role("writer", write, block="writer", keeps_device=True, rings=("tx", "completion")),
    )
    return pipeline, counters
