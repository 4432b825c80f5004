"""The library: a gateway from Python, on a socket, on an object, and what it says when it cannot start."""

import contextlib
import os
import queue
import runpy
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import dpkt
import pytest

from gateway.api import Gateway, GatewayError
from gateway.config import ConfigError, load
from gateway.lifeline import python_environment, python_module, spawn

ROOT = Path(__file__).resolve().parent.parent
OWN4, OWN6 = "198.18.0.2", "fd72:6e67:7761:7900::2"


def ping4(sequence: int, source: str = "198.18.0.1") -> bytes:
    echo = dpkt.icmp.ICMP.Echo(id=7, seq=sequence, data=b"x" * 32)
    icmp = dpkt.icmp.ICMP(type=dpkt.icmp.ICMP_ECHO, data=echo)
    return bytes(dpkt.ip.IP(src=socket.inet_aton(source), dst=socket.inet_aton(OWN4), p=1, data=icmp))


def is_reply(packet: bytes, sequence: int) -> bool:
    ip = dpkt.ip.IP(packet)
    return ip.src == socket.inet_aton(OWN4) and ip.icmp.type == 0 and ip.icmp.data.seq == sequence


def gone(pid: int, within: float = 10.0) -> bool:
    """Wait for the end of a process that may be nobody's child."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], within)[0])
    finally:
        os.close(pidfd)


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_a_socket_is_a_device(kind):
    packets, device = socket.socketpair(socket.AF_UNIX, kind)
    packets.settimeout(10)
    with packets, device, Gateway(device, proxy="direct://", workers=1, loglevel="warn") as gateway:
        for sequence in range(5):
            packets.send(ping4(sequence))
            assert is_reply(packets.recv(65535), sequence)
        status = gateway.status()
        assert status["proxy"] == "direct://"
        pid = gateway.pid
    assert gateway.exit_code == 0
    assert gone(pid, 0)
    assert gateway.stop() == 0, "stopping again is harmless"


class Queues:
    """A device that is a Python object."""

    def __init__(self) -> None:
        self.up: queue.Queue[bytes] = queue.Queue()
        self.down: queue.Queue[bytes] = queue.Queue()

    def read(self) -> bytes:
        return self.up.get(timeout=60)

    def write(self, packet: bytes) -> None:
        self.down.put(packet)


def test_an_object_is_a_device():
    device = Queues()
    with Gateway(device, proxy="direct://", workers=1, loglevel="warn"):
        for sequence in range(5):
            device.up.put(ping4(sequence))
            assert is_reply(device.down.get(timeout=10), sequence)
        device.up.put(b"")


@pytest.mark.parametrize("placement", ["pipeline", "single"])
def test_a_connection_through_an_object(placement):
    """A SYN to a listener of this machine is answered by SYN-ACK, one to a closed port by RST."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        device = Queues()
        with Gateway(device, proxy="direct://", placement=placement, loglevel="warn"):
            for port, flags in (
                (listener.getsockname()[1], dpkt.tcp.TH_SYN | dpkt.tcp.TH_ACK),
                (closed.getsockname()[1], dpkt.tcp.TH_RST | dpkt.tcp.TH_ACK),
            ):
                tcp = dpkt.tcp.TCP(sport=40000, dport=port, seq=1000, flags=dpkt.tcp.TH_SYN, win=64240)
                ip = dpkt.ip.IP(src=socket.inet_aton("198.18.0.1"), dst=socket.inet_aton("127.0.0.1"), p=6, data=tcp)
                device.up.put(bytes(ip))
                answer = dpkt.ip.IP(device.down.get(timeout=10)).tcp
                assert (answer.sport, answer.dport, answer.ack) == (port, 40000, 1001)
                assert answer.flags & ~(dpkt.tcp.TH_ECE | dpkt.tcp.TH_CWR) == flags
            device.up.put(b"")


def test_the_example_runs(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["library.py"])
    runpy.run_path(str(ROOT / "examples" / "library.py"), run_name="__main__")
    assert capsys.readouterr().out.count("198.18.0.2 answers ping") == 3


def test_settings_are_checked_before_anything_starts():
    with pytest.raises(ConfigError, match="mtu"):
        Gateway("tun://tun7", mtu=7)
    with pytest.raises(ConfigError, match="nearest known one is workers"):
        Gateway("tun://tun7", worker=7)
    with pytest.raises(ConfigError, match="proxy"):
        Gateway("tun://tun7", proxy="gopher://x")


def test_a_gateway_that_cannot_start_raises_with_its_own_words():
    reader, writer = os.pipe()
    with pytest.raises(GatewayError, match="neither an attached TUN device nor a datagram socket") as caught:
        Gateway(reader, proxy="direct://").start()
    assert caught.value.exit_code == 2
    os.close(reader)
    os.close(writer)
    with pytest.raises(GatewayError, match="is not open"):
        Gateway(reader, proxy="direct://").start()


def test_a_gateway_starts_once():
    packets, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    gateway = Gateway(device, proxy="direct://", loglevel="silent")
    with packets, device, gateway, pytest.raises(GatewayError, match="started before"):
        gateway.start()


def test_the_log_goes_to_the_callers_function():
    packets, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lines: list[str] = []
    with packets, device, Gateway(device, proxy="direct://", log=lines.append):
        pass
    assert any("ready" in line for line in lines), lines


def test_settings_reach_the_gateway_as_they_are(monkeypatch):
    settings = {
        "proxy": "socks5://us%40er:pa%2Fss@[::1]:9",
        "mtu": 1400,
        "public_only": True,
        "tun_dns": ["9.9.9.9", "149.112.112.112"],
        "tun_address6": "",
        "udp_timeout": 33.5,
        "loglevel": "error",
        "placement": "single",
    }
    monkeypatch.setenv("RINGWAY_CONNECT_TIMEOUT", "3s")
    gateway = Gateway(7, **settings)
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in gateway._flags())
    assert flags.pop("control") == gateway._control
    assert "proxy" not in flags, "a password has no place on a command line"
    again = load(None, {"RINGWAY_PROXY": gateway.config.proxy}, flags)
    assert again == gateway.config
    assert (again.connect_timeout, again.tun_address6, again.public_only) == (3.0, "", True)


def test_what_was_spawned_ends_with_its_lifeline():
    process, line = spawn(["proxy", "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"listening on")
    os.close(line)
    assert process.wait(10) == 0, "TERM, as a service manager sends it"
    process.stdout.close()


CALLER = """
import socket, sys, time
from gateway.api import Gateway
packets, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
gateway = Gateway(device, proxy="direct://", workers=1, loglevel="warn").start()
print(gateway.pid, gateway._control, flush=True)
sys.stdin.read()
"""


def test_a_killed_caller_leaves_nothing_behind():
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER], env=python_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert caller.stdout is not None
    pid, control = caller.stdout.readline().decode().split()
    assert Path(control).is_socket()
    caller.send_signal(signal.SIGKILL)
    caller.wait(10)
    assert gone(int(pid))
    assert not Path(control).exists()
    for stream in (caller.stdin, caller.stdout):
        with contextlib.suppress(OSError):
            stream.close()


def test_a_folder_of_the_same_name_is_not_taken_for_ours(tmp_path):
    (tmp_path / "gateway").mkdir()
    (tmp_path / "gateway" / "__init__.py").write_text("raise SystemExit('wrong one')")
    done = subprocess.run(
        [*python_module("gateway"), "--version"],
        cwd=tmp_path,
        env=python_environment(),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.stdout.startswith("ringway ")
