"""ProcessTree: starts the processes of a table, replaces those that die, and stops them in order.

What happens when P dies, with N for each neighbour (a process at the other end of one of its rings):

    0. What P left in its rings is emptied: a dead process adds nothing more, so N, who learns of it only in step 1,
       finds nothing to take after it has let go.
    1. N lives: it is told to drop P, and confirms. N is dead as well: nothing to tell, its successor is told in step 3.
    2. All have confirmed and the back-off is over: the rings of P are emptied, and its successor is forked.
    3. The successor is told to drop every neighbour that is dead by now; that one is forked only when it has confirmed.
    4. The successor is ready: every N that was told to drop P, and lives, is told to take it back.

So whenever rings are emptied, the process on one side does not exist, and the one on the other has let go of them or
does not exist either. A successor always begins with empty rings and takes everybody to be there.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from gateway.loop import EventLoop
from gateway.process import Child, Process, describe, how_it_ended
from ipc.channel import ChannelClosed, Message

log = logging.getLogger("ringway")

START_PATIENCE: Final = 30.0  #: seconds; the very first start, on a machine that is booting
RESTART_PATIENCE: Final = 10.0  #: seconds from the fork of a successor to its "ready"
DROP_PATIENCE: Final = 10.0  #: seconds for a neighbour to let go; it may be starting itself
STOP_PATIENCE: Final = 3.0  #: seconds for all processes of one role to stop
LINGER_PATIENCE: Final = 2.0  #: seconds from the end of a process's channel to its own

BACK_OFF: Final = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0)  #: seconds before the next start, by recent deaths
FORK_AGAIN: Final = 1.0  #: seconds after a fork that failed
CRASH_WINDOW: Final = 30.0  #: seconds
CRASH_LIMIT: Final = 8  #: deaths of one process within the window that end the service; a real loop is there in 7 s
_MAX_TEXT: Final = 300  # characters of what a process says in a log line


class ProcessTree:
    """The processes beside the supervisor; everything happens in the callbacks of the loop."""

    def __init__(
        self,
        loop: EventLoop,
        processes: list[Process],
        *,
        fork: Callable[[Process], Child],
        clear: Callable[[Process], None],
        on_ready: Callable[[], None],
        on_event: Callable[[Process, Message], None],
        on_death: Callable[[Process], None] = lambda _process: None,
    ) -> None:
        """Keep `processes`, in the order in which they stop.

        `fork` forks the child for a place; `clear` empties what a dead child left (its rings and gauges), at its death
        and again before the next fork; `on_ready` is called once, when all have been ready; `on_event` gets every event
        but "ready" and "failed"; `on_death` is called before anything is done about a death.
        """
        self.processes = processes
        self._loop = loop
        self._fork_child = fork
        self._clear = clear
        self._on_ready = on_ready
        self._on_event = on_event
        self._on_death = on_death
        self._confirmations = {
            (message["do"], message.get("shard")): process
            for process in processes
            for message in [process.role.message("drop", process.shard)]
        }
        self.was_ready = False  #: all processes have been ready, once
        self.stopping = False
        self.exit_code: int | None = None  #: when everything has stopped: 0 as asked, 1 failed

        self._failed = False
        self._roles = list(dict.fromkeys(process.role.name for process in processes))  # those that have not stopped

    # -- start --

    def start(self) -> None:
        """Fork everything; the rings are empty, and everybody takes everybody to be there."""
        for process in self.processes:
            try:
                self._fork(process)
            except OSError as error:
                self.fail(f"cannot start {process.label}: {describe(error)}")
                return
        self._loop.call_later(START_PATIENCE, self._end_of_patience)

    def _end_of_patience(self) -> None:
        late = [process.label for process in self.processes if process.state == "starting"]
        if not self.was_ready and not self.stopping:
            self.fail(f"{', '.join(late)} did not get ready within {START_PATIENCE:.0f} s")

    def _fork(self, process: Process) -> None:
        child = process.child = self._fork_child(process)
        process.state = "starting"
        process.reason = ""
        self._loop.register(child.channel.fileno(), lambda: self._readable(process, child))
        self._loop.register(child.pidfd, lambda: self._ended(process, child))

    # -- messages --

    def send(self, process: Process, message: Message) -> None:
        """Send a message to a process, if there is one; one that has stopped reading is killed, and so replaced."""
        if process.child is None:
            return
        try:
            process.child.channel.send(message)
        except ChannelClosed:
            pass  # its pidfd says the rest
        except BlockingIOError:
            log.warning("%s (pid %d) does not read its messages; killing it", process.label, process.child.pid)
            process.child.kill()

    def broadcast(self, message: Message, role_names: tuple[str, ...]) -> None:
        """Send a message to all processes of some roles."""
        for process in self.processes:
            if process.role.name in role_names:
                self.send(process, message)

    def _readable(self, process: Process, child: Child) -> None:
        try:
            while process.child is child:
                message = child.channel.receive()
                if message is None:
                    return
                self._receive(process, message)
        except ChannelClosed:
            self._loop.unregister(child.channel.fileno())
            self._loop.call_later(LINGER_PATIENCE, child.kill)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s (pid %d) sends nonsense (%s); killing it", process.label, child.pid, error)
            self._loop.unregister(child.channel.fileno())
            child.kill()

    def _receive(self, process: Process, message: Message) -> None:
        if "done" in message:
            lost = self._confirmations.get((message["done"], message.get("shard")))
            if lost is not None:
                lost.awaiting.discard(process)
                self._replace_if_due(lost)
            return
        event = message.get("event")
        if event == "ready":
            self._is_ready(process)
        elif event == "failed":
            process.reason = printable(message.get("reason", ""))
        else:
            self._on_event(process, message)

    def _is_ready(self, process: Process) -> None:
        if process.state != "starting":
            return
        process.state = "running"
        if process.timer is not None:
            process.timer.cancel()
        for other in self.processes:
            if process in other.dropped:
                other.dropped.discard(process)
                self.send(other, process.role.message("add", process.shard))
        if self.was_ready:
            log.info("%s runs again (pid %d)", process.label, process.child.pid if process.child else 0)
        elif all(each.state == "running" for each in self.processes):
            self.was_ready = True
            self._on_ready()

    # -- death --

    def _ended(self, process: Process, child: Child) -> None:
        if process.child is not child:
            return
        status = child.reap()
        if status is None:
            return
        self._last_words(process, child)
        self._loop.unregister(child.channel.fileno())
        self._loop.unregister(child.pidfd)
        child.close()
        process.child = None
        process.state = "stopped" if self.stopping else "restarting"
        process.dropped.clear()
        if process.timer is not None:
            process.timer.cancel()
        # Whoever waited for it to let go need not wait any longer.
        for other in self.processes:
            if process in other.awaiting:
                other.awaiting.discard(process)
                self._replace_if_due(other)
        self._on_death(process)
        if self.stopping:
            self._stopped(process, status)
        else:
            self._lost(process, child.pid, how_it_ended(status))

    def _last_words(self, process: Process, child: Child) -> None:
        """Read what it still sent, for the sake of "failed"."""
        try:
            while (message := child.channel.receive()) is not None:
                if message.get("event") == "failed":
                    process.reason = printable(message.get("reason", ""))
        except (ChannelClosed, ValueError, AttributeError):
            pass

    def _lost(self, process: Process, pid: int, how: str) -> None:
        why = f" ({process.reason})" if process.reason else ""
        if not self.was_ready:
            self.fail(f"{process.label} {how} before it was ready{why}")
            return
        now = time.monotonic()
        process.deaths = [at for at in process.deaths if now - at < CRASH_WINDOW] + [now]
        if len(process.deaths) >= CRASH_LIMIT:
            self.fail(
                f"{process.label} {how}{why}, for the {CRASH_LIMIT}th time within {CRASH_WINDOW:.0f} s: giving up"
            )
            return
        process.restarts += 1
        delay = BACK_OFF[min(len(process.deaths), len(BACK_OFF)) - 1]
        level = logging.ERROR if process.reason else logging.WARNING
        again = f"in {delay:g} s" if delay else "at once"
        log.log(level, "%s (pid %d) %s%s; starting it again %s", process.label, pid, how, why, again)
        self._clear(process)
        for other in process.neighbours(self.processes):
            if other.child is not None and process not in other.dropped:
                self._drop(process, other)
        process.timer = self._loop.call_later(delay, lambda: self._replace_if_due(process))

    def _drop(self, lost: Process, neighbour: Process) -> None:
        """Tell a neighbour to let go; one that does not confirm in time hangs, and goes too."""
        child = neighbour.child
        assert child is not None
        neighbour.dropped.add(lost)
        lost.awaiting.add(neighbour)
        self.send(neighbour, lost.role.message("drop", lost.shard))

        def hangs() -> None:
            if neighbour.child is child and neighbour in lost.awaiting:
                log.warning("%s (pid %d) does not let go of %s; killing it", neighbour.label, child.pid, lost.label)
                child.kill()

        self._loop.call_later(DROP_PATIENCE, hangs)

    def _replace_if_due(self, process: Process) -> None:
        backing_off = process.timer is not None and process.timer.callback is not None
        if self.stopping or process.state != "restarting" or process.awaiting or backing_off:
            return
        self._clear(process)
        try:
            self._fork(process)
        except OSError as error:
            # Out of memory, processes or descriptors: the others go on, and this one later.
            log.warning("cannot start %s: %s; trying again in %g s", process.label, describe(error), FORK_AGAIN)
            process.timer = self._loop.call_later(FORK_AGAIN, lambda: self._replace_if_due(process))
            return
        child = process.child
        assert child is not None
        for other in process.neighbours(self.processes):
            if other.child is None:
                self._drop(other, process)

        def hangs() -> None:
            if process.child is child and process.state == "starting":
                log.warning("%s (pid %d) does not get ready; killing it", process.label, child.pid)
                child.kill()

        process.timer = self._loop.call_later(RESTART_PATIENCE, hangs)

    # -- the end --

    def fail(self, reason: str) -> None:
        """Say in one line why the service ends, and stop what still runs."""
        if not self.stopping:
            log.error("%s", reason)
            self._failed = True
            self.stop()

    def stop(self) -> None:
        """Begin to stop, role by role in the order of the table; the second call kills what is left."""
        if self.stopping:
            self.kill()
            return
        self.stopping = True
        for process in self.processes:
            if process.timer is not None:
                process.timer.cancel()
            if process.child is None:
                process.state = "stopped"
        self._stop_next()

    def _stop_next(self) -> None:
        while self._roles:
            name = self._roles[0]
            living = [p for p in self.processes if p.role.name == name and p.child is not None]
            if living:
                for process in living:
                    process.state = "stopping"
                    self.send(process, {"do": "stop"})
                self._loop.call_later(STOP_PATIENCE, partial(self._kill_late, name))
                return
            self._roles.pop(0)
        self.exit_code = 1 if self._failed else 0

    def _kill_late(self, role_name: str) -> None:
        for process in self.processes:
            if process.role.name == role_name and process.child is not None:
                log.warning(
                    "%s (pid %d) did not stop within %g s; killing it", process.label, process.child.pid, STOP_PATIENCE
                )
                process.child.kill()

    def _stopped(self, process: Process, status: int) -> None:
        if status:
            log.debug("%s %s while stopping", process.label, how_it_ended(status))
        if self._roles and all(p.child is None for p in self.processes if p.role.name == self._roles[0]):
            self._stop_next()

    def kill(self) -> None:
        """Kill all children at once; the loop learns of their ends."""
        for process in self.processes:
            if process.child is not None:
                process.child.kill()

    def close_in_child(self) -> None:
        """Close, in a fresh child, the descriptors of all the others."""
        for process in self.processes:
            if process.child is not None:
                process.child.close()


def printable(text: Any) -> str:
    """Return what a process said as one bounded line."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:_MAX_TEXT])
