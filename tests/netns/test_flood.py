"""Floods of garbage and of forged SYNs: they cost their frames, not the flows that run, nor memory without bound."""

import os
import socket
import threading
import time

import pytest

from tests.netns.daemon import DIRECT, Ringway
from tests.netns.frames import ACK, Injector, forged_syns, malformed, tcp
from tests.netns.stage import Stage
from tests.netns.test_bad_proxy import pss
from tests.netns.traffic import Target, UdpTarget, download, echo, udp_echo, upload
from tests.netns.world import SILENT4, TARGET4, World, eventually

pytestmark = pytest.mark.netns


def test_malformed_frames_are_dropped_and_counted(stage: Stage) -> None:
    """Ten thousand, each wrong in its own way; no process dies, no exception is logged, and everything still works."""
    before = stage.ringway.counters()
    with Injector(stage.world.gw) as injector:
        for frame in malformed(1, 10_000):
            injector.send(frame)
        assert injector.sent > 8_000
    udp_echo(stage.world.gw, TARGET4, stage.udp4.port)
    upload(stage.world.gw, TARGET4, stage.target.port, 4 << 20)
    download(stage.world.gw, TARGET4, stage.target.port, 4 << 20)
    stage.ringway.check_log()
    after = stage.ringway.counters()
    grown = {name: after[name] - before.get(name, 0) for name in after if after[name] > before.get(name, 0)}
    # Not one counter for everything: each reason has its own.
    assert len(grown) >= 8, grown


def test_malformed_frames_from_a_socket(world: World) -> None:
    """A device that is a datagram socket has no kernel in front of it: it may bring anything, an empty frame too."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        with Ringway(
            world, *DIRECT, device=f"fd://{theirs.fileno()}", pass_fds=[theirs.fileno()], routes=False
        ) as ringway:
            theirs.close()
            # Not blocking at all: a timeout would make recv() wait even with MSG_DONTWAIT.
            ours.setblocking(False)
            for frame in malformed(2, 5_000):
                eventually(lambda frame=frame: _sent(ours, frame), "the device takes a frame")  # type: ignore[misc]
                _drain(ours)
            ringway.check_log()
            # An echo request to Ringway's own address is answered: it is alive and well.
            from tests.netns.frames import ICMP, checksum, ipv4

            body = b"\0\x01\0\x01" + os.urandom(16)
            value = checksum(b"\x08\0\0\0" + body)
            ours.send(ipv4(ICMP, "198.18.0.1", "198.18.0.2", b"\x08\0" + value.to_bytes(2, "big") + body))

            def replied() -> bool:
                return any(reply[9:10] == b"\x01" and reply[-len(body) :] == body for reply in _drain(ours))

            eventually(replied, "the ping is answered", 5)


def test_syn_flood_while_a_bulk_flow_runs(world: World) -> None:
    """Forged SYNs to an open port and to a silent host; the download goes on, new clients get through afterwards."""
    with (
        Target(world.net) as target,
        UdpTarget(world.net) as udp,
        Ringway(world, *DIRECT, "--connect-timeout", "2s", "--max-pending", "256", "--workers", "2") as ringway,
    ):
        download(world.gw, TARGET4, target.port, 16 << 20)
        memory = pss(ringway)
        flood = _Flood(world, [*forged_syns(20_000, 81), *forged_syns(5_000, target.port, 2)])
        with flood:
            give_up_at = time.monotonic() + 40
            while flood.sent < 10_000:
                download(world.gw, TARGET4, target.port, 16 << 20)
                udp_echo(world.gw, TARGET4, udp.port, tries=6)
                assert time.monotonic() < give_up_at, f"{flood.sent} forged SYNs in 40 s"
        assert pss(ringway) - memory < 64 << 20
        ringway.check_log()

        def works() -> bool:
            try:
                echo(world.gw, TARGET4, target.port)
                return True
            except OSError:
                return False

        eventually(works, "new clients get through", 15)
        eventually(lambda: ringway.flows() < 600, "the forged flows are forgotten", 90)


def test_pending_connects_are_bounded(world: World) -> None:
    """SYNs to a host that never answers hold at most max-pending connects for each worker."""
    with Ringway(
        world, *DIRECT, "--connect-timeout", "5s", "--max-pending", "50", "--workers", "1"
    ) as ringway, Injector(world.gw) as injector:  # fmt: skip
        for port in range(2000):
            injector.send(tcp(("198.18.0.1", 1024 + port), (SILENT4, 80), 2))

        def connecting() -> int:
            return len(world.gw.run(["ss", "-Htan", "state", "syn-sent"]).stdout.splitlines())

        eventually(lambda: connecting() >= 50, "connects are under way", 3)
        most = max(connecting() for _ in range(20))
        assert most <= 50, f"{most} connects at once"
        assert ringway.flows() <= 50


def test_segments_of_no_flow_are_answered_with_reset(world: World) -> None:
    """A stray ACK hears RST (RFC 9293, 3.10.7.1), and a flood of them costs no flow."""
    with Target(world.net) as target, Ringway(world, *DIRECT) as ringway, Injector(world.gw) as injector:
        for which in range(5000):
            injector.send(tcp(("198.18.0.1", 20000 + which), (TARGET4, target.port), ACK, payload=b"stray"))
        echo(world.gw, TARGET4, target.port)
        assert ringway.flows() < 10
        ringway.check_log()


class _Flood:
    """Frames sent round and round from a thread."""

    def __init__(self, world: World, frames: list[bytes]) -> None:
        self._frames = frames
        self._injector = Injector(world.gw)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._pour)

    @property
    def sent(self) -> int:
        return self._injector.sent

    def _pour(self) -> None:
        while not self._stop.is_set():
            for start in range(0, len(self._frames), 50):
                if self._stop.is_set():
                    return
                for frame in self._frames[start : start + 50]:
                    self._injector.send(frame)
                # About ten thousand a second at most; the interpreter is shared with the download's own threads.
                self._stop.wait(0.005)

    def __enter__(self) -> "_Flood":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)
        self._injector.__exit__()


def _sent(end: socket.socket, frame: bytes) -> bool:
    try:
        end.send(frame)
        return True
    except BlockingIOError:
        return False


def _drain(end: socket.socket) -> list[bytes]:
    """Return what is there."""
    received = []
    try:
        while True:
            received.append(end.recv(65536))
    except BlockingIOError:
        return received
