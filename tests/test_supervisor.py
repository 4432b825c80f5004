"""The tree of processes with small stand-ins for the roles: real forks, real kills, the exact messages around them."""

import contextlib
import logging
import os
import signal
import socket
import time
from mmap import mmap
from pathlib import Path

import pytest

from gateway import supervisor as supervisor_module
from gateway import tree as tree_module
from gateway.config import Config, ConfigError
from gateway.device import DeviceError
from gateway.loop import EventLoop, wait_readable
from gateway.process import FAILED, Role, fork_child, make_processes
from gateway.status import ask
from gateway.supervisor import Supervisor
from gateway.tree import CRASH_LIMIT, ProcessTree
from ipc.channel import Channel, ChannelClosed

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
WAIT = 20.0


# -- stand-ins for the processes --


def obey(setup, shard: int, channel: Channel) -> None:
    """Be ready, tell every message, confirm every drop, stop when told."""
    channel.send({"event": "ready"})
    while (message := next_message(channel)) is not None:
        channel.send({"event": "told", "message": message})
        what = message["do"]
        if what == "stop":
            return
        if what.startswith("drop-"):
            done = {"done": what}
            channel.send(done | {"shard": message["shard"]} if "shard" in message else done)


def next_message(channel: Channel):
    """Wait for the next message; None when the supervisor is gone, or nothing comes for long."""
    try:
        return channel.receive() if wait_readable(channel.fileno(), 60.0) else None
    except ChannelClosed:
        return None


def fail_at_once(setup, shard: int, channel: Channel) -> None:
    raise PermissionError(1, "Operation not permitted")


def die_when_ready(setup, shard: int, channel: Channel) -> None:
    channel.send({"event": "ready"})
    next_message(channel)  # the first "told" that the tests send, or the stop
    raise RuntimeError("cannot go on")


def crash_whenever_ready(everybody_ready: mmap):
    """Return a main function that waits for a message the first time, and afterwards for nothing."""

    def main(setup, shard: int, channel: Channel) -> None:
        channel.send({"event": "ready"})
        if not everybody_ready[0]:
            next_message(channel)
        os._exit(3)

    return main


def ignore_everything(setup, shard: int, channel: Channel) -> None:
    channel.send({"event": "ready"})
    while next_message(channel) is not None:
        pass


def roles(**mains):
    """Return the table of the pipeline with these main functions, `obey` for the rest."""
    return (
        Role("reader", mains.get("reader", obey), block="reader", keeps_device=True, rings=("rx", "fill")),
        Role(
            "worker",
            mains.get("worker", obey),
            block="worker/{}",
            per_shard=True,
            keeps_upstream_rights=True,
            rings=("rx", "fill", "tx", "completion"),
            gauges=(0,),
        ),
        Role("writer", mains.get("writer", obey), block="writer", keeps_device=True, rings=("tx", "completion")),
    )


class Tree:
    """A ProcessTree in a loop, with what happened to it: messages, clears, forks and events in order."""

    def __init__(self, shards: int = 2, **mains) -> None:
        self.loop = EventLoop()
        self.log: list[tuple] = []
        self.ready = False
        self.processes = make_processes(roles(**mains), shards)
        self.tree = ProcessTree(
            self.loop,
            self.processes,
            fork=self.fork,
            clear=lambda process: self.log.append(("clear", process.label)),
            on_ready=self.on_ready,
            on_event=lambda process, message: self.log.append((process.label, message.get("message", message))),
        )
        self.by_label = {process.label: process for process in self.processes}

    def fork(self, process):
        self.log.append(("fork", process.label))

        def let_go() -> None:
            self.loop.close_in_child()
            self.tree.close_in_child()

        return fork_child(
            process.label,
            lambda channel: process.role.main(None, process.shard, channel),
            let_go=let_go,
            drop_rights=False,
        )

    def on_ready(self) -> None:
        self.ready = True

    def run_until(self, condition) -> None:
        ends_at = time.monotonic() + WAIT
        while not condition():
            assert time.monotonic() < ends_at, f"still waiting after {WAIT} s: {self.processes}, {self.log}"
            self.loop.run_once(0.2)

    def start(self) -> None:
        self.tree.start()
        self.run_until(lambda: self.ready or self.tree.exit_code is not None)

    def kill(self, label: str) -> int:
        pid = self.by_label[label].child.pid
        os.kill(pid, signal.SIGKILL)
        return pid

    def runs_again(self, label: str, pid: int) -> bool:
        process = self.by_label[label]
        return process.state == "running" and process.child.pid != pid

    def has(self, *entries) -> bool:
        return all(entry in self.log for entry in entries)

    def close(self) -> None:
        for process in self.processes:
            if process.child is not None:
                process.child.kill()
                wait_readable(process.child.pidfd, WAIT)
                process.child.reap()
                process.child.close()
        self.loop.close()


@pytest.fixture
def make():
    with contextlib.ExitStack() as undo:

        def make_tree(*arguments, **mains) -> Tree:
            tree = Tree(*arguments, **mains)
            undo.callback(tree.close)
            return tree

        yield make_tree


def test_stops_in_the_order_of_the_table(make):
    tree = make()
    tree.start()
    tree.tree.stop()
    tree.run_until(lambda: tree.tree.exit_code is not None)
    assert tree.tree.exit_code == 0
    stop = {"do": "stop"}
    told = [entry for entry in tree.log if entry[0] != "fork"]
    assert told[0] == ("reader", stop)
    assert sorted(told[1:3]) == [("worker 0", stop), ("worker 1", stop)]
    assert told[3:] == [("writer", stop)]
    assert all(process.child is None for process in tree.processes)


def test_a_dead_worker_is_let_go_of_emptied_and_replaced(make, caplog):
    tree = make()
    tree.start()
    tree.log.clear()
    pid = tree.kill("worker 1")
    added = {"do": "add-shard", "shard": 1}
    tree.run_until(lambda: tree.has(("reader", added), ("writer", added)))
    dropped = {"do": "drop-shard", "shard": 1}
    assert tree.log[0] == ("clear", "worker 1")
    assert sorted(tree.log[1:3]) == [("reader", dropped), ("writer", dropped)]
    assert tree.log[3:5] == [("clear", "worker 1"), ("fork", "worker 1")]
    assert sorted(tree.log[5:]) == [("reader", added), ("writer", added)]
    assert tree.runs_again("worker 1", pid)
    assert [process.restarts for process in tree.processes] == [0, 0, 1, 0]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [f"worker 1 (pid {pid}) was killed by SIGKILL; starting it again at once"]


@pytest.mark.parametrize("label", ["reader", "writer"])
def test_a_dead_reader_or_writer_is_let_go_of_by_all_workers(make, label):
    tree = make()
    tree.start()
    tree.log.clear()
    tree.kill(label)
    added = {"do": f"add-{label}"}
    tree.run_until(lambda: tree.has(("worker 0", added), ("worker 1", added)))
    dropped = {"do": f"drop-{label}"}
    assert tree.log[0] == ("clear", label)
    assert sorted(tree.log[1:3]) == [("worker 0", dropped), ("worker 1", dropped)]
    assert tree.log[3:5] == [("clear", label), ("fork", label)]
    assert sorted(tree.log[5:]) == [("worker 0", added), ("worker 1", added)]


def test_neighbours_that_die_together_never_share_a_ring_that_is_emptied_later(make):
    """Whenever a successor is forked, each neighbour has been told to let go by then, or does not run."""
    tree = make()
    tree.start()
    tree.log.clear()
    pids = {label: tree.kill(label) for label in ("worker 0", "reader", "writer", "worker 1")}
    tree.run_until(lambda: all(tree.runs_again(label, pid) for label, pid in pids.items()))
    runs = set()
    dropped: set[tuple[str, str]] = set()
    for label, what in tree.log:
        if label == "fork":
            for neighbour in tree.by_label[what].neighbours(tree.processes):
                assert neighbour.label not in runs or (neighbour.label, what) in dropped, tree.log
            runs.add(what)
            dropped = {(who, of) for who, of in dropped if who != what}
        elif label == "clear":
            runs.discard(what)
        elif what["do"].startswith("drop-"):
            of = f"worker {what['shard']}" if "shard" in what else what["do"].removeprefix("drop-")
            dropped.add((label, of))
    # Nobody is left with a neighbour that it does not serve.
    tree.run_until(lambda: sum("add-" in str(entry) for entry in tree.log) >= sum("drop-" in str(e) for e in tree.log))


def test_a_neighbour_that_does_not_let_go_is_replaced_as_well(make, monkeypatch):
    monkeypatch.setattr(tree_module, "DROP_PATIENCE", 0.05)
    tree = make(1, writer=ignore_everything)
    tree.start()
    worker, writer = tree.kill("worker 0"), tree.by_label["writer"].child.pid
    tree.run_until(lambda: tree.by_label["writer"].restarts >= 1)
    assert tree.by_label["writer"].child is None or tree.by_label["writer"].child.pid != writer
    assert tree.by_label["worker 0"].restarts == 1
    assert worker


def test_death_before_ready_ends_the_service_with_one_line(make, caplog):
    tree = make(writer=fail_at_once)
    tree.start()
    tree.run_until(lambda: tree.tree.exit_code is not None)
    assert tree.tree.exit_code == 1
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert errors == [f"writer ended with status {FAILED} before it was ready (Operation not permitted)"]
    assert not any(process.restarts for process in tree.processes)


def test_a_crash_loop_ends_the_service_with_one_clear_line(make, caplog, monkeypatch):
    monkeypatch.setattr(tree_module, "BACK_OFF", (0.0, 0.001))
    everybody_ready = mmap(-1, 1)
    tree = make(1, worker=crash_whenever_ready(everybody_ready))
    tree.start()
    everybody_ready[0] = 1
    tree.tree.broadcast({"do": "anything"}, ("worker",))
    tree.run_until(lambda: tree.tree.exit_code is not None)
    assert tree.tree.exit_code == 1
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert errors == [f"worker 0 ended with status 3, for the {CRASH_LIMIT}th time within 30 s: giving up"]
    assert tree.by_label["worker 0"].restarts == CRASH_LIMIT - 1


def test_the_back_off_grows(make, monkeypatch, caplog):
    tree = make(1)
    tree.start()
    for count in (1, 2, 3):
        pid = tree.kill("reader")
        tree.run_until(lambda pid=pid: tree.runs_again("reader", pid))
        assert tree.by_label["reader"].restarts == count
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.split("; ")[1] for line in lines] == [
        "starting it again at once",
        "starting it again in 0.1 s",
        "starting it again in 0.2 s",
    ]


def test_a_fork_that_fails_is_tried_again(make, monkeypatch, caplog):
    monkeypatch.setattr(tree_module, "FORK_AGAIN", 0.01)
    tree = make(1)
    tree.start()
    fork = tree.tree._fork_child
    failures = [BlockingIOError(11, "Resource temporarily unavailable")] * 2

    def fork_or_fail(process):
        if failures:
            raise failures.pop()
        return fork(process)

    monkeypatch.setattr(tree.tree, "_fork_child", fork_or_fail)
    pid = tree.kill("worker 0")
    tree.run_until(lambda: tree.runs_again("worker 0", pid))
    lines = [record.getMessage() for record in caplog.records if "cannot start" in record.getMessage()]
    assert lines == ["cannot start worker 0: Resource temporarily unavailable; trying again in 0.01 s"] * 2


def test_a_fork_that_fails_at_the_start_ends_the_service(make, monkeypatch, caplog):
    tree = make(1)
    fork = tree.tree._fork_child

    def fork_or_fail(process):
        if process.label == "writer":
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork(process)

    monkeypatch.setattr(tree.tree, "_fork_child", fork_or_fail)
    tree.start()
    assert tree.tree.exit_code == 1
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert errors == ["cannot start writer: Resource temporarily unavailable"]


def test_who_does_not_stop_is_killed(make, monkeypatch):
    monkeypatch.setattr(tree_module, "STOP_PATIENCE", 0.05)
    tree = make(worker=ignore_everything)
    tree.start()
    tree.tree.stop()
    tree.run_until(lambda: tree.tree.exit_code is not None)
    assert tree.tree.exit_code == 0


def test_a_second_stop_kills(make):
    tree = make(worker=ignore_everything)
    tree.start()
    tree.tree.stop()
    tree.run_until(lambda: tree.by_label["reader"].child is None)
    begun_at = time.monotonic()
    tree.tree.stop()
    tree.run_until(lambda: tree.tree.exit_code is not None)
    assert time.monotonic() - begun_at < tree_module.STOP_PATIENCE


def test_an_exception_is_one_error_line_and_a_restart(make, caplog):
    tree = make(1, writer=die_when_ready)
    tree.start()
    tree.tree.broadcast({"do": "anything"}, ("writer",))
    tree.run_until(lambda: tree.by_label["writer"].restarts == 1)
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert errors[0].endswith("ended with status 70 (RuntimeError: cannot go on); starting it again at once")


def test_nonsense_from_a_process_is_its_own_end(make):
    def talk_nonsense(setup, shard, channel):
        channel.send({"event": "ready"})
        next_message(channel)
        socket.socket(fileno=os.dup(channel.fileno())).send(b"\xc1\xc1\xc1")
        next_message(channel)

    tree = make(1, reader=talk_nonsense)
    tree.start()
    pid = tree.by_label["reader"].child.pid
    tree.tree.broadcast({"do": "anything"}, ("reader",))
    tree.run_until(lambda: tree.runs_again("reader", pid))


def test_an_idle_tree_sleeps(make):
    tree = make()
    tree.start()
    wakeups = tree.loop.wakeups
    tree.loop.run_once(1.0)
    assert tree.loop.wakeups - wakeups == 1


# -- the whole supervisor, in a process of its own, with a socket for a device --


def supervise(config: Config, **mains):
    """Return a main function that runs a supervisor with stand-ins, and exits as the command would."""

    def main(channel: Channel) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        table = roles(**mains)
        names = {"reader": (), "writer": (), "worker/0": ("tcp_flows",), "worker/1": ("tcp_flows",)}
        try:
            code = Supervisor(config, roles=lambda placement: (table, lambda shards: names)).run()
        except (ConfigError, DeviceError) as error:
            channel.send({"refused": str(error)})
            code = 2
        os._exit(code)

    return main


@pytest.fixture
def device():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        yield theirs


@pytest.fixture
def listener(tmp_path):
    """Return a NOTIFY_SOCKET, and a function that waits for the next notification."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        path = str(tmp_path / "notify")
        server.bind(path)
        server.settimeout(WAIT)
        yield path, lambda: server.recv(4096).decode()


@contextlib.contextmanager
def running(config: Config, let_go=lambda: None, **mains):
    child = fork_child("supervisor", supervise(config, **mains), let_go=let_go, drop_rights=False)
    try:
        yield child
    finally:
        child.kill()
        wait_readable(child.pidfd, WAIT)
        child.reap()
        child.close()


def exit_code(child) -> int:
    assert wait_readable(child.pidfd, WAIT)
    return child.reap()


def test_ready_status_restart_and_stop(device, listener, tmp_path, monkeypatch):
    path, notification = listener
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    control = tmp_path / "run" / "x.sock"
    config = Config(proxy="direct://", device=f"fd://{device.fileno()}", workers=2, control=str(control))
    with running(config) as child:
        ready = notification()
        assert ready.startswith("READY=1\nSTATUS=fd")
        assert ready.endswith("(MTU 1500) → direct://, 2 workers, pipeline")
        assert control.stat().st_mode & 0o777 == 0o600
        answer = ask(control, {"command": "status"})
        assert [(p["role"], p["shard"], p["state"]) for p in answer["processes"]] == [
            ("supervisor", None, "running"),
            ("reader", None, "running"),
            ("worker", 0, "running"),
            ("worker", 1, "running"),
            ("writer", None, "running"),
        ]
        assert all(p["pss"] > 0 and p["cpu_seconds"] >= 0 for p in answer["processes"])
        assert answer["flows"] == {"tcp": 0, "udp": 0}
        assert answer["proxy"] == "direct://"
        os.kill(answer["processes"][2]["pid"], signal.SIGKILL)
        ends_at = time.monotonic() + WAIT
        while not any(p["restarts"] and p["state"] == "running" for p in answer["processes"]):
            assert time.monotonic() < ends_at
            answer = ask(control, {"command": "status"})
        os.kill(child.pid, signal.SIGHUP)  # ignored
        pids = [p["pid"] for p in ask(control, {"command": "status"})["processes"]]
        child.kill(signal.SIGTERM)
        assert notification() == "STOPPING=1\nSTATUS=stopping"
        assert exit_code(child) == 0
    assert not control.exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids[1:])


def test_children_die_with_a_killed_supervisor(device, listener, tmp_path, monkeypatch):
    path, notification = listener
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    control = tmp_path / "x.sock"
    config = Config(proxy="direct://", device=f"fd://{device.fileno()}", workers=1, control=str(control))
    with running(config) as child:
        notification()
        pidfds = [os.pidfd_open(p["pid"]) for p in ask(control, {"command": "status"})["processes"][1:]]
        child.kill()
        for pidfd in pidfds:
            assert wait_readable(pidfd, WAIT)
            os.close(pidfd)
    with running(config) as child:  # the socket that was left behind is in nobody's way
        notification()
        assert ask(control, {"command": "status"})["uptime"] < WAIT


@pytest.mark.parametrize("reader_dies", [True, False])
def test_a_device_that_is_gone_ends_the_service(listener, tmp_path, monkeypatch, reader_dies):
    path, notification = listener
    monkeypatch.setattr(supervisor_module, "LOOK_AT_DEVICE", 60.0 if reader_dies else 0.05)
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control = tmp_path / "x.sock"
    config = Config(proxy="direct://", device=f"fd://{theirs.fileno()}", workers=1, control=str(control))
    with theirs, running(config, let_go=ours.close) as child:
        notification()
        reader = next(p for p in ask(control, {"command": "status"})["processes"] if p["role"] == "reader")
        ours.close()
        if reader_dies:
            os.kill(reader["pid"], signal.SIGKILL)
        assert exit_code(child) == 1


def test_death_at_the_start_is_exit_1(device, tmp_path):
    config = Config(device=f"fd://{device.fileno()}", proxy="direct://", workers=1, control=str(tmp_path / "x.sock"))
    with running(config, worker=fail_at_once) as child:
        assert exit_code(child) == 1


def test_a_second_gateway_on_the_same_socket_is_refused(device, listener, tmp_path, monkeypatch):
    path, notification = listener
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    config = Config(device=f"fd://{device.fileno()}", proxy="direct://", workers=1, control=str(tmp_path / "x.sock"))
    with running(config) as first:
        notification()
        with running(config) as second:
            assert exit_code(second) == 2
            assert second.channel.receive()["refused"].startswith("already running: a gateway answers on ")
        first.kill(signal.SIGINT)
        assert exit_code(first) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"interface": "none-such0"}, "interface none-such0 does not exist; there are: "),
        ({"device": "fd://9999"}, "descriptor 9999 of the device fd://9999 is not open"),
        ({"user": "nobody-such"}, "user 'nobody-such' does not exist"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(device, tmp_path, changes, words):
    if "user" in changes and os.geteuid() != 0:
        pytest.skip("only root's children become somebody else")
    values = {"device": f"fd://{device.fileno()}", "proxy": "direct://", "control": str(tmp_path / "x.sock")}
    with running(Config(**values | changes)) as child:
        assert exit_code(child) == 2
        assert child.channel.receive()["refused"].startswith(words)


def descriptor_name(fd) -> str:
    """Return what a descriptor of this process is, "/fd" when it is gone."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return "/fd"


def test_the_workers_have_neither_the_device_nor_anything_of_the_supervisors(device, listener, tmp_path, monkeypatch):
    path, notification = listener
    monkeypatch.setenv("NOTIFY_SOCKET", path)

    def tell_descriptors(setup, shard, channel):
        (tmp_path / f"worker-{shard}").write_text("\n".join(map(descriptor_name, os.listdir("/proc/self/fd"))))
        obey(setup, shard, channel)

    before = set(map(descriptor_name, os.listdir("/proc/self/fd")))
    the_device = descriptor_name(device.fileno())
    config = Config(
        device=f"fd://{device.fileno()}", proxy="direct://", workers=2, control=str(tmp_path / "x.sock"), user=""
    )
    with running(config, worker=tell_descriptors) as child:
        notification()
        child.kill(signal.SIGTERM)
        assert exit_code(child) == 0
    for shard in (0, 1):
        names = (tmp_path / f"worker-{shard}").read_text().splitlines()
        assert the_device not in names
        new = [name for name in names if name not in before and "eventfd" not in name and "/fd" not in name]
        # Its channel, and the one between this test and the supervisor.
        assert len(new) == 2, new
        assert all(name.startswith("socket:") for name in new), new
