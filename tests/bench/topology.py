"""The namespaces of the benchmark: the same client reaches the same targets through the same middle, whatever is there.

    ┌ lan ──────┐   ┌ client ──────────────────────┐   ┌ gateway ───────────────┐   ┌ net ─────────────────────────┐
    │ lan rows  │   │ all other client programs    │   │ the gateway's processes│   │ proxies 10.77.0.2 …          │
    │  10.4.0.2 ├───┤10.4.0.1   10.1.0.1 (veth)    ├───┤10.1.0.2     10.77.0.1  ├───┤ iperf3, nginx, echoes on     │
    └───────────┘   │ 203.0.96.0/24  → 10.1.0.2    │   │ forwards (`direct`)    │   │ 203.0.0.0/16, all of it      │
    ┌ far ──────┐   │ 203.0.97.0/24  → TUN rw1 ─ ─ ┼ ─ ┤ ─ fd of rw1, rw2, …    │   │                              │
    │ link rows │   │ 203.0.98.0/24  → TUN rw2 ─ ─ ┼ ─ ┤                        │   │                              │
    │  10.9.0.1 ├─≈─┤10.9.0.2                      │   │                        │   │                              │
    └───────────┘   └──────────────────────────────┘   └────────────────────────┘   └──────────────────────────────┘

The prefix of the target's address chooses the way. `direct` is the kernel alone: the namespace in the middle forwards
between its two veth links, with all of veth's offloads. For every gateway measured there is a TUN of its own, made in
`client` and handed as a descriptor to the processes in `gateway`, whose own connections then leave like anybody's, with
no mark or rule. All gateways run at once, and all but the measured one are idle. MTU 1500 everywhere; the kernel's
default TCP buffers, and CUBIC wherever the machine allows it. `far` lies behind a bad link (tests/netns/link.py), which
is made anew for each figure and crossed by every subject: for `direct` it lies between two kernels, for a gateway
between the client's kernel and the gateway's own TCP.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from gateway.addresses import QUEUE_LENGTH
from tests.netns.daemon import Ringway
from tests.netns.link import B4, NAME, Link
from tests.netns.peers import RunningPeer
from tests.netns.tun import open_tun
from tests.netns.world import Namespace, eventually, veth
from tests.peers import find

MTU: Final = 1500
PREFIX: Final = "203.0.{}"
DIRECT_PREFIX: Final = 96  #: 203.0.96.0/24 goes through the kernel alone
IPERF_PORT, HTTP_PORT, TCP_ECHO_PORT, UDP_ECHO_PORT, HOLD_PORT, BULK_PORT, GSO_PORT = (
    5201, 8080, 7001, 7002, 7003, 7004, 7005,
)  # fmt: skip

_NGINX: Final = """
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
worker_rlimit_nofile 65536;
events {{ worker_connections 16384; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fcgi;
    uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
    keepalive_requests 1000000000; keepalive_timeout 1h; tcp_nodelay on;
    server {{ listen 0.0.0.0:{port} backlog=16384; location / {{ return 200 "ringway\\n"; }} }}
}}
"""


class Topology:
    """The namespaces and the servers in `net`; a context manager that leaves nothing behind."""

    def __init__(self) -> None:
        self._closing = contextlib.ExitStack()
        self.directory = Path(tempfile.mkdtemp(prefix="ringway-bench-"))
        self._closing.callback(lambda: subprocess.run(["rm", "-rf", str(self.directory)], check=False))
        self._tuns = 0
        self._echoes: set[str] = set()
        try:
            self.lan, self.far, self.client, self.gateway, self.net = (
                self._closing.enter_context(contextlib.closing(Namespace(name)))
                for name in ("lan", "far", "client", "gateway", "net")
            )
            self._wire()
            self._serve()
        except BaseException:
            self._closing.close()
            raise

    def _wire(self) -> None:
        veth(self.lan, "eth0", self.client, "lan0", MTU)
        veth(self.client, "gw0", self.gateway, "client0", MTU)
        veth(self.gateway, "net0", self.net, "gw0", MTU)
        self.lan.ip("addr add 10.4.0.2/24 dev eth0", "route add default via 10.4.0.1")
        self.client.ip(
            "addr add 10.4.0.1/24 dev lan0", "addr add 10.1.0.1/24 dev gw0",
            f"route add 203.0.{DIRECT_PREFIX}.0/24 via 10.1.0.2", "route add 10.77.0.0/24 via 10.1.0.2",
        )  # fmt: skip
        self.gateway.ip(
            "addr add 10.1.0.2/24 dev client0", "addr add 10.77.0.1/24 dev net0", "route add 10.4.0.0/24 via 10.1.0.1",
            "route add 10.9.0.0/24 via 10.1.0.1", "route add 203.0.0.0/16 via 10.77.0.2",
        )  # fmt: skip
        self.net.ip(
            *(f"addr add 10.77.0.{host}/24 dev gw0" for host in range(2, 8)),
            "addr add fd00:77::2/64 dev gw0 nodad",
            "route add 10.1.0.0/24 via 10.77.0.1",
            "route add 10.4.0.0/24 via 10.77.0.1",
            "route add 10.9.0.0/24 via 10.77.0.1",
            "route add local 203.0.0.0/16 dev lo",
        )
        for namespace in (self.client, self.gateway):
            namespace.sysctl("net/ipv4/ip_forward", 1)
        for namespace in (self.lan, self.far, self.client, self.gateway, self.net):
            # Else a connection begins with the ssthresh that the last one to this address, over another link, came to.
            namespace.sysctl("net/ipv4/tcp_no_metrics_save", 1)
            # Thousands of connections a second leave that many TIME-WAITs; none may be the limit.
            namespace.sysctl("net/ipv4/tcp_max_tw_buckets", 1 << 18)
            namespace.sysctl("net/ipv4/tcp_max_syn_backlog", 16384)
        self.net.sysctl("net/core/somaxconn", 16384)

    def _serve(self) -> None:
        configuration = self.directory / "nginx.conf"
        configuration.write_text(_NGINX.format(directory=self.directory, port=HTTP_PORT))
        if nginx := find("nginx"):
            self.spawn(self.net, [nginx, "-c", str(configuration), "-p", str(self.directory)])
            self._listening(HTTP_PORT)
        if iperf3 := find("iperf3"):
            self.spawn(self.net, [iperf3, "-s", "-p", str(IPERF_PORT)])
            self._listening(IPERF_PORT)
        for kind, port in (("tcp-echo", TCP_ECHO_PORT), ("hold", HOLD_PORT)):
            self.spawn(self.net, traffic_command(kind, str(port)))
            self._listening(port)

    def _listening(self, port: int) -> None:
        def listens() -> bool:
            with self.net.socket() as trial:
                return trial.connect_ex((f"203.0.{DIRECT_PREFIX}.10", port)) == 0

        eventually(listens, f"a server listens on port {port}", 10)

    def echo_udp_on(self, address: str) -> None:
        """Start a UDP echo for one address, unless it has one: bound to it, it answers from it without looking."""
        if address in self._echoes:
            return
        self._echoes.add(address)
        process = self.spawn(self.net, traffic_command("udp-echo", address, str(UDP_ECHO_PORT)), stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()

    def spawn(self, namespace: Namespace, argv: list[str], **options: int) -> "subprocess.Popen[bytes]":
        """Start a server that ends with the topology."""
        options.setdefault("stdout", subprocess.DEVNULL)
        process = namespace.popen(argv, stderr=subprocess.DEVNULL, **options)
        self._closing.callback(_end, process)
        return process

    @contextlib.contextmanager
    def running(self, namespace: Namespace, argv: list[str]) -> "Iterator[subprocess.Popen[bytes]]":
        """Start a program whose output matters, and end it with the `with` block."""
        process = namespace.popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            yield process
        finally:
            _end(process)

    def proxy(self, peer: RunningPeer) -> RunningPeer:
        return self._closing.enter_context(peer)

    def start_gateway(self, *flags: str) -> tuple[Ringway, str]:
        """Start a gateway with a TUN of its own; return it and the prefix, such as 203.0.97, that leads through it."""
        self._tuns += 1
        number, name, prefix = self._tuns, f"rw{self._tuns}", PREFIX.format(DIRECT_PREFIX + self._tuns)
        fd = open_tun(self.client, name, mtu=MTU, address4=f"198.18.{number}.1/24", address6="")
        try:
            self.client.ip(f"link set {name} txqueuelen {QUEUE_LENGTH}")  # as a device that Ringway makes
            own = (
                "--tun-address",
                f"198.18.{number}.1",
                "--tun-mask",
                "255.255.255.0",
                "--tun-gw",
                f"198.18.{number}.2",
            )
            ringway = Ringway(
                None, *own, "--tun-address6", "", "--mtu", str(MTU), *flags,
                namespace=self.gateway, device=f"fd://{fd}", pass_fds=[fd],
            )  # fmt: skip
            self._closing.enter_context(ringway)
        finally:
            os.close(fd)
        self.client.ip(f"route add {prefix}.0/24 dev {name}")
        return ringway, prefix

    @contextlib.contextmanager
    def bad_link(self, loss: float, round_trip: float, seed: int) -> Iterator[None]:
        """Connect `far`: `loss` is a share of the segments each way, `round_trip` the seconds of both ways together."""
        way = {"loss": loss, "delay": round_trip / 2}
        with Link(self.far, self.client, way, way, seed=seed):
            self.far.ip(f"route add default via {B4} dev {NAME}")
            yield

    def __enter__(self) -> "Topology":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()


def traffic_command(*arguments: str, file: str = "traffic.py") -> list[str]:
    """Return the command line of a traffic program: isolated Python, which starts in a third of the time."""
    import sys

    return [sys.executable, "-I", "-S", str(Path(__file__).with_name(file)), *arguments]


def _end(process: "subprocess.Popen[bytes]") -> None:
    # The whole group, of which popen() made it the leader: nginx's worker would outlive a master that is killed.
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
