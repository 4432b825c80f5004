"""Network namespaces for tests: clients in front of the TUN, the net behind the proxy, and a LAN behind the router.

    ┌ lan ──────────────┐   ┌ gw ──────────────────────────────────┐   ┌ net ─────────────────────────────┐
    │ client programs   │   │ ringway, client programs             │   │ proxies, targets                 │
    │                   │   │                                      │   │                                  │
    │        192.168.7.2├───┤192.168.7.1                10.77.0.1  ├───┤10.77.0.2                         │
    │          fd00:7::2│   │fd00:7::1                fd00:77::1   │   │fd00:77::2                        │
    │ default → gw      │   │ forwards                             │   │ lo: 203.0.113.0/24               │
    └───────────────────┘   │ 203.0.113.0/24, 198.51.100.0/24,     │   │     2001:db8:1::/64              │
                            │ 2001:db8:1::/64, 2001:db8:2::/64     │   │ 203.0.113.200  swallows all      │
                            │        └─► tun0 198.18.0.1           │   │ 203.0.113.201  host unreachable  │
                            │ mark 82 → table 82 → net             │   │ 198.51.100.0/24  no route        │
                            └──────────────────────────────────────┘   └──────────────────────────────────┘

The proxy is reached over the link between gw and net, which no route leads into the TUN; a worker that connects itself (`direct://`)
marks its sockets (`--fwmark 82`) and leaves by table 82. `lan` is made only where a test asks for it.

The namespaces have no names: each is a descriptor of this process, so that the kernel removes them, and the links in
them, however the run ends. To look into one while a test hangs: `nsenter --net=/proc/PID/fd/FD`, as `repr(world.gw)`
prints it.
"""

import contextlib
import ctypes
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest

from tests.peers import find

T = TypeVar("T")

ROOT: Final = Path(__file__).resolve().parents[2]
MARK: Final = 82

GW_NET4, NET_GW4 = "10.77.0.1", "10.77.0.2"
GW_NET6, NET_GW6 = "fd00:77::1", "fd00:77::2"
LAN4, GW_LAN4 = "192.168.7.2", "192.168.7.1"
LAN6, GW_LAN6 = "fd00:7::2", "fd00:7::1"

TARGET4, TARGET6 = "203.0.113.10", "2001:db8:1::10"
SILENT4, SILENT6 = "203.0.113.200", "2001:db8:1::200"
UNREACHABLE4, UNREACHABLE6 = "203.0.113.201", "2001:db8:1::201"
NO_ROUTE4, NO_ROUTE6 = "198.51.100.10", "2001:db8:2::10"
TUN_ROUTES = ("203.0.113.0/24", "198.51.100.0/24", "2001:db8:1::/64", "2001:db8:2::/64")

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _enter(descriptor: int) -> None:
    """Move the calling thread into a network namespace."""
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns failed")


def why_not() -> str:
    """Say why this machine cannot make the namespaces, or "" if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not os.path.exists("/dev/net/tun"):
        return "/dev/net/tun is missing (modprobe tun)"
    try:
        Namespace("trial").close()
    except OSError as error:
        return f"the kernel makes no network namespace: {error.strerror}"
    return ""


def eventually(condition: Callable[[], T], what: str, within: float = 5.0) -> T:
    """Ask `condition` until it is true and return its value; fail naming `what` after `within` seconds."""
    give_up_at = time.monotonic() + within
    pause = 0.001
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > give_up_at:
            pytest.fail(f"not within {within:g} s: {what} (last seen: {value!r})")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


class Namespace:
    """A network namespace, held by one descriptor."""

    __slots__ = ("fd", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.fd = -1
        failure: list[OSError] = []

        def make() -> None:
            # In a thread of its own, since only the thread that calls unshare() changes its namespace.
            if _libc.unshare(_CLONE_NEWNET) != 0:
                failure.append(OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno())))
                return
            self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        self.sysctl("net/ipv6/conf/all/disable_ipv6", 0)
        for scope in ("all", "default"):
            self.sysctl(f"net/ipv6/conf/{scope}/accept_dad", 0)
            self.sysctl(f"net/ipv6/conf/{scope}/dad_transmits", 0)
            self.sysctl(f"net/ipv4/conf/{scope}/rp_filter", 0)
        # The kernel's own defaults, whatever the machine was tuned to: figures and tests shall not depend on it.
        try:
            self.sysctl("net/ipv4/tcp_congestion_control", "cubic")
        except PermissionError:
            # Not where the machine's default is another one (BBR). Reno always is, and no link here loses.
            self.sysctl("net/ipv4/tcp_congestion_control", "reno")
        self.sysctl("net/ipv4/tcp_rmem", "4096 131072 6291456")
        self.sysctl("net/ipv4/tcp_wmem", "4096 16384 4194304")
        # Another daemon's short-lived ports would else collide with ours in a long run.
        self.sysctl("net/ipv4/ip_local_port_range", "10000 65535")
        self.ip("link set lo up")

    def __repr__(self) -> str:
        return f"<Namespace {self.name}: nsenter --net=/proc/{os.getpid()}/fd/{self.fd}>"

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Run the body with the calling thread in this namespace; sockets and processes made there stay in it."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(self.fd)
            try:
                yield
            finally:
                _enter(home)
        finally:
            os.close(home)

    def sysctl(self, key: str, value: object) -> None:
        with self.inside():
            Path("/proc/sys", key).write_text(f"{value}\n")

    def ip(self, *lines: str) -> str:
        """Run iproute2 commands and return what they print; those that begin with "-6" after the others."""
        printed = ""
        for family in ("-4", "-6"):
            batch = [line.removeprefix("-6 ") for line in lines if line.startswith("-6 ") == (family == "-6")]
            if batch:
                command = ["ip", *(["-6"] if family == "-6" else []), "-batch", "-"]
                with self.inside():
                    done = subprocess.run(
                        command, input="\n".join(batch), capture_output=True, text=True, timeout=20, check=False
                    )
                if done.returncode != 0:
                    raise RuntimeError(f"ip {batch!r} in {self.name}: {done.stderr.strip()}")
                printed += done.stdout
        return printed

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, proto: int = 0) -> socket.socket:
        with self.inside():
            return socket.socket(family, kind, proto)

    def run(
        self, argv: Sequence[str], *, timeout: float = 20.0, check: bool = False, env: dict[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run a program to its end in the namespace."""
        with self.inside():
            return subprocess.run(
                argv,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=check,
                env=env,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
            )

    def popen(self, argv: Sequence[str], **options: Any) -> "subprocess.Popen[bytes]":
        """Start a program in the namespace, leader of its own process group.

        It is told to stop when the thread that started it ends, so that a run that is killed leaves little behind: only
        programs that change their user (dante) lose this, as the kernel has it.
        """
        setpriv = find("setpriv")
        if setpriv is not None:
            # It becomes the program by exec: the process id stays.
            argv = [setpriv, "--pdeathsig", "TERM", "--", *argv]
        with self.inside():
            return subprocess.Popen(argv, start_new_session=True, stdin=subprocess.DEVNULL, cwd=ROOT, **options)

    def links(self) -> set[str]:
        with self.inside():
            return {name for _, name in socket.if_nameindex()}

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def veth(left: Namespace, left_name: str, right: Namespace, right_name: str, mtu: int = 1500) -> None:
    """Put a cable between two namespaces and switch it on."""
    left.ip(
        f"link add {left_name} mtu {mtu} type veth peer name {right_name} mtu {mtu} netns {right.path}",
        f"link set {left_name} up",
    )
    right.ip(f"link set {right_name} up")


class World:
    """The three namespaces of the picture, and what must be stopped before they go."""

    def __init__(self, mtu: int = 1500) -> None:
        self._closing = contextlib.ExitStack()
        try:
            self.gw = self._closing.enter_context(contextlib.closing(Namespace("gw")))
            self.net = self._closing.enter_context(contextlib.closing(Namespace("net")))
            self._lan: Namespace | None = None
            self._mtu = mtu
            self._wire()
        except BaseException:
            self._closing.close()
            raise

    def _wire(self) -> None:
        veth(self.gw, "net0", self.net, "gw0", max(self._mtu, 1500))
        self.gw.ip(
            f"addr add {GW_NET4}/24 dev net0",
            f"addr add {GW_NET6}/64 dev net0 nodad",
            f"rule add fwmark {MARK} lookup {MARK}",
            f"-6 rule add fwmark {MARK} lookup {MARK}",
            f"route add default via {NET_GW4} table {MARK}",
            f"-6 route add default via {NET_GW6} table {MARK}",
        )
        # Only a host that forwards says by ICMP what it cannot reach.
        self.net.sysctl("net/ipv4/ip_forward", 1)
        self.net.sysctl("net/ipv6/conf/all/forwarding", 1)
        self.net.ip(
            f"addr add {NET_GW4}/24 dev gw0",
            f"addr add {NET_GW6}/64 dev gw0 nodad",
            "tuntap add dev nowhere mode tun",
            "link set nowhere up",
            # Every address of the prefix is this host's own, as if a whole network stood here.
            "route add local 203.0.113.0/24 dev lo",
            "-6 route add local 2001:db8:1::/64 dev lo",
            # Unlike an IPv4 one, an IPv6 socket binds only to addresses that an interface has.
            *(f"addr add 2001:db8:1::{host}/128 dev lo nodad" for host in range(10, 14)),
            # In the local table, which is asked first. A TUN that nobody reads swallows its packets, and every kernel
            # that runs these tests has it (not so the dummy device).
            f"route add unicast {SILENT4}/32 dev nowhere table local",
            f"-6 route add unicast {SILENT6}/128 dev nowhere table local",
            f"route add unreachable {UNREACHABLE4}/32 table local",
            f"-6 route add unreachable {UNREACHABLE6}/128 table local",
            f"route add 192.168.7.0/24 via {GW_NET4}",
            f"-6 route add fd00:7::/64 via {GW_NET6}",
        )

    @property
    def lan(self) -> Namespace:
        """The third namespace, made when first asked for; gw forwards from then on."""
        if self._lan is None:
            lan = self._closing.enter_context(contextlib.closing(Namespace("lan")))
            veth(lan, "eth0", self.gw, "lan0")
            lan.ip(
                f"addr add {LAN4}/24 dev eth0",
                f"addr add {LAN6}/64 dev eth0 nodad",
                f"route add default via {GW_LAN4}",
                f"-6 route add default via {GW_LAN6}",
            )
            self.gw.ip(f"addr add {GW_LAN4}/24 dev lan0", f"addr add {GW_LAN6}/64 dev lan0 nodad")
            self.gw.sysctl("net/ipv4/ip_forward", 1)
            self.gw.sysctl("net/ipv6/conf/all/forwarding", 1)
            self._lan = lan
        return self._lan

    def route_into(self, device: str) -> None:
        """Lead the test networks into the TUN."""
        has_ipv6 = "inet6 fd" in self.gw.ip(f"addr show dev {device}")
        self.gw.ip(
            *(
                f"{'-6 ' if ':' in prefix else ''}route replace {prefix} dev {device}"
                for prefix in TUN_ROUTES
                if has_ipv6 or ":" not in prefix
            )
        )

    def on_close(self, function: Callable[[], object]) -> None:
        self._closing.callback(function)

    def close(self) -> None:
        self._closing.close()

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
