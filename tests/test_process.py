"""One child: what it inherits, what it lets go of, how it ends, and how its end is told."""

import logging
import os
import signal
import socket
from contextlib import contextmanager

import pytest

from gateway.loop import wait_readable
from gateway.process import FAILED, Rights, Role, describe, fork_child, how_it_ended, make_processes
from ipc.channel import Channel, ChannelClosed

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
WAIT = 10.0


def nothing() -> None:
    """Let go of nothing."""


@contextmanager
def forked(main, let_go=nothing, **rights):
    child = fork_child("test", main, let_go=let_go, **rights)
    try:
        yield child
    finally:
        child.kill()
        wait_readable(child.pidfd, WAIT)
        child.reap()
        child.close()


def receive(child):
    assert wait_readable(child.channel.fileno(), WAIT)
    return child.channel.receive()


def end_of(child) -> int:
    assert wait_readable(child.pidfd, WAIT)
    status = child.reap()
    assert status is not None
    return status


def wait_for_stop(channel: Channel) -> None:
    """Block until a message or the end of the supervisor comes."""
    wait_readable(channel.fileno(), WAIT)
    channel.receive()


def test_a_main_that_returns_is_status_0():
    with forked(lambda channel: channel.send({"event": "ready"})) as child:
        assert receive(child) == {"event": "ready"}
        assert end_of(child) == 0
        with pytest.raises(ChannelClosed):
            child.channel.receive()


def test_an_exception_is_told_and_never_comes_back_into_the_parents_stack(caplog):
    def main(channel: Channel) -> None:
        raise OSError(77, "File descriptor in bad state")

    before = os.getpid()
    with caplog.at_level(logging.DEBUG), forked(main) as child:
        assert receive(child) == {"event": "failed", "reason": "File descriptor in bad state"}
        assert end_of(child) == FAILED
    assert os.getpid() == before


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_system_exit_is_a_failure_too(error):
    def main(channel: Channel) -> None:
        raise error

    with forked(main) as child:
        assert end_of(child) == FAILED


def test_the_signals_of_a_terminal_are_ignored_and_the_rest_is_as_it_was():
    def main(channel: Channel) -> None:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        channel.send({"blocked": len(blocked), "child": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL})
        wait_for_stop(channel)

    with forked(main) as child:
        assert receive(child) == {"blocked": 0, "child": True}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            child.kill(number)
        child.channel.send({"do": "stop"})
        assert end_of(child) == 0


def test_killed_from_outside():
    with forked(wait_for_stop) as child:
        assert child.reap() is None
        child.kill()
        assert end_of(child) == -signal.SIGKILL
        child.kill()  # harmless
        assert child.reap() == -signal.SIGKILL


def test_the_child_has_the_standard_streams_its_channel_and_nothing_of_the_parents_that_was_let_go():
    secret, other = socket.socketpair()

    def main(channel: Channel) -> None:
        names = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in map(int, os.listdir("/proc/self/fd")) if fd_open(fd)}
        channel.send({"fds": sorted(names), "own": channel.fileno()})

    def fd_open(fd: int) -> bool:
        try:
            os.fstat(fd)
        except OSError:
            return False
        return True

    def let_go() -> None:
        secret.close()
        other.close()

    inherited = {fd for fd in map(int, os.listdir("/proc/self/fd")) if fd_open(fd)} - {secret.fileno(), other.fileno()}
    with forked(main, let_go) as child:
        answer = receive(child)
        assert set(answer["fds"]) <= inherited | {answer["own"]}
        assert secret.fileno() >= 0, "the parent's stays open"
    secret.close()
    other.close()


def test_the_title_is_set():
    with forked(lambda channel: channel.send({"title": open("/proc/self/cmdline").read()})) as child:
        assert receive(child)["title"].rstrip("\0 ") == "ringway: test"


def test_a_child_dies_with_its_parent():
    """A process forks a grandchild and is killed: the pidfd of the grandchild tells its end."""

    def parent(channel: Channel) -> None:
        grandchild = fork_child("grandchild", wait_for_ever, let_go=nothing)
        channel.send({"pid": grandchild.pid, "said": receive(grandchild)})
        wait_for_stop(channel)

    def wait_for_ever(channel: Channel) -> None:
        channel.send({"event": "ready"})
        signal.pause()

    with forked(parent) as child:
        answer = receive(child)
        assert answer["said"] == {"event": "ready"}
        pidfd = os.pidfd_open(answer["pid"])
        child.kill()
        assert wait_readable(pidfd, WAIT)
        os.close(pidfd)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "ended with status 0"),
        (70, "ended with status 70"),
        (-9, "was killed by SIGKILL"),
        (-64, "was killed by SIGRTMAX"),
        (-99, "was killed by signal 99"),
    ],
)
def test_how_it_ended(status, words):
    assert how_it_ended(status) == words


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(13, "Permission denied", "/etc/x"), "Permission denied: /etc/x"),
        (OSError(77, "File descriptor in bad state"), "File descriptor in bad state"),
        (OSError("odd"), "OSError: odd"),
        (ValueError("two\nlines"), "ValueError: two lines"),
        (IndexError(), "IndexError"),
    ],
)
def test_describe(error, words):
    assert describe(error) == words


def main_of_nothing(setup, shard, channel):
    """Stand for a main function."""


READER = Role("reader", main_of_nothing, block="reader", rings=("rx", "fill"))
WORKER = Role("worker", main_of_nothing, block="worker/{}", per_shard=True, rings=("rx", "fill", "tx", "completion"))
WRITER = Role("writer", main_of_nothing, block="writer", rings=("tx", "completion"))


def test_neighbours_are_those_who_share_a_ring():
    processes = make_processes((READER, WORKER, WRITER), 2)
    assert [process.label for process in processes] == ["reader", "worker 0", "worker 1", "writer"]
    reader, first, second, writer = processes
    assert reader.neighbours(processes) == [first, second]
    assert first.neighbours(processes) == [reader, writer]
    assert writer.neighbours(processes) == [first, second]


def test_what_the_neighbours_are_told():
    assert WORKER.message("drop", 3) == {"do": "drop-shard", "shard": 3}
    assert READER.message("add", 0) == {"do": "add-reader"}


def test_without_a_user_to_become_the_rights_stay():
    assert Rights().identity is None
    assert Rights().upstream == frozenset()
