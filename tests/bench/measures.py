"""How each row of the benchmark is measured; a measure returns its figures by name, the first of them the row's own.

| measure | by | figures |
| --- | --- | --- |
| tcp-up, -down, -up-8, -down-8 | iperf3, 1 and 8 streams, what the receiver got | Gbit/s, CPU seconds for a Gbit |
| lan-up, lan-down | the same from the LAN behind the client's namespace | the same |
| ping-pong-tcp, ping-pong-udp | one byte there and back, one at a time | p50, p99 |
| connections | two clients of 16 connections each: connect, HTTP/1.0 request, answer, end | per second, p50, p99, CPU |
| connections-wrk | wrk with `Connection: close`: a client in C, 32 at a time | per second |
| http | wrk, 64 kept-alive connections, nginx | requests per second, CPU for each |
| udp-64, udp-1400 | echo at a fixed rate, the highest with ≤ 1 % lost there and back | per second, CPU for each |
| udp-gso | super-datagrams of 40 × 1,400 octets (UDP_SEGMENT, UDP_GRO) there and back | Gbit/s, CPU for each datagram |
| udp-flows | one question from each of many new client sockets, 64 at a time | answered per second, p50, p99, CPU |
| link-up-…, link-down-… | bulk from behind a bad link, by loss of each way and RTT, what the receiver got | Mbit/s |
| idle | a fresh gateway with two workers and nothing to do | PSS, CPU share, wakeups of the busiest process |
| idle-5000 | the same with 5,000 idle TCP connections | PSS for each connection, CPU share, wakeups |
| idle-udp-10000 | the same with 10,000 idle UDP client sockets | PSS for each client socket, CPU share, wakeups |

CPU is that of all the gateway's processes, not of proxies, clients and targets. The UDP row compares fairly because
nothing about it helps either side: one system call for each datagram in client and echo, one socket, and the same two
cores for client, echo, gateway and kernel; in `direct` client and echo alone fill them. Ping-pong has two regimes: the
scheduler puts both ends on one core, where a wakeup costs little, or on two; the spread over the rounds shows it.

The link rows compare the gateway's TCP with the kernel's own, CUBIC on both sides, over the same emulated link with
the same offloads. Super-segments cross it whole, so that its process is not the limit, but loss meets each MSS-sized
segment (tests/netns/link.py). Without delay the RTT is what the process itself takes, some 0.1 to 0.3 ms. Cells in
which one flow is slow are measured with eight at once: a few losses in a few seconds would say nothing. In cells with
little loss and a short RTT the CPU is the limit: the floor asks for no more than the same gateway carried over the link
without loss and delay, if that row was taken. Without delay, with loss, what a gateway adds to the RTT is most of it.
"""

import contextlib
import json
import select
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from tests.bench.processes import pss, usage
from tests.bench.subjects import NotMeasurable, Subject, parse
from tests.bench.topology import (
    BULK_PORT,
    GSO_PORT,
    HOLD_PORT,
    HTTP_PORT,
    IPERF_PORT,
    TCP_ECHO_PORT,
    UDP_ECHO_PORT,
    Topology,
    traffic_command,
)
from tests.netns.world import Namespace, eventually
from tests.peers import find

Figures = dict[str, float]
IDLE_CONNECTIONS: Final = 5000
IDLE_UDP_CLIENTS: Final = 10_000
UDP_FLOWS_AT_ONCE: Final = 64
LINK_LOSSES: Final = (0.0, 0.001, 0.01, 0.05)  #: share of the segments lost each way
LINK_RTTS: Final = (0.0001, 0.005, 0.05)  #: seconds; the first is a link without delay


@dataclass(frozen=True, slots=True)
class Measure:
    """A row: its figure, its unit, and the floor that the project holds itself to."""

    name: str
    figure: str
    unit: str
    run: Callable[[Topology, Subject, float], Figures]
    floor: float | None = None  #: a ratio to `direct`, or an absolute value where `direct` has none
    lower_is_better: bool = False
    absolute: bool = False  #: measured on gateways alone
    link: bool = False  #: over the bad link: only without a proxy, and with one placement (both have the same TCP)
    quick: bool = True  #: taken in a quick run that does not name it
    limit: str = ""  #: the row whose figure, the gateway's own, is all that can be asked for

    def takes(self, subject: Subject) -> bool:
        """Say whether the subject has this row."""
        if self.link:
            _, placement, proxy = parse(subject.name)
            return placement == "pipeline" and (not proxy or bool(subject.congestion))
        return not subject.congestion and not (self.absolute and subject.ringway is None)


def _program(name: str) -> str:
    found = find(name)
    if found is None:
        raise NotMeasurable(f"{name} is not installed")
    return found


def _wrapped(subject: Subject, *argv: str) -> list[str]:
    """Put what speaks SOCKS in front of a program that does not."""
    if subject.proxy and not subject.wrapper:
        raise NotMeasurable("proxychains4 is not installed")
    return [*subject.wrapper, *argv]


def _json_of(namespace: Namespace, argv: list[str], seconds: float) -> Any:
    done = namespace.run(argv, timeout=seconds + 20)
    try:
        return json.loads(done.stdout)
    except ValueError:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it printed nothing"]
        raise RuntimeError(f"{argv[0]} ended with {done.returncode}: {last[0]}") from None


class _CpuOf:
    """Measures the CPU seconds that the gateway's processes use inside a `with` block."""

    def __init__(self, subject: Subject) -> None:
        self._ringway = subject.ringway
        self.seconds = 0.0

    def __enter__(self) -> "_CpuOf":
        if self._ringway:
            self._before = usage(self._ringway.tree())
        return self

    def __exit__(self, *_: object) -> None:
        if self._ringway:
            self.seconds = usage(self._ringway.tree()).cpu_since(self._before)

    def per(self, name: str, count: float, scale: float = 1.0) -> Figures:
        return {name: self.seconds / count * scale} if self._ringway and count else {}


def _iperf(*flags: str, lan: bool = False) -> Callable[[Topology, Subject, float], Figures]:
    def run(topology: Topology, subject: Subject, seconds: float) -> Figures:
        if lan and subject.proxy:
            raise NotMeasurable("the LAN row has no SOCKS client")
        argv = _wrapped(subject, _program("iperf3"), "-c", subject.target, "-p", str(IPERF_PORT), "-J", *flags)
        with _CpuOf(subject) as cpu:
            report = _json_of(
                topology.lan if lan else topology.client, [*argv, "-t", f"{max(1, round(seconds))}"], seconds
            )
        if "error" in report:
            raise RuntimeError(f"iperf3: {report['error']}")
        received = report["end"]["sum_received"]
        gigabits = received["bytes"] * 8 / 1e9
        return {
            "gbit_s": gigabits / report["end"]["sum_sent"]["seconds"],
            **cpu.per("cpu_s_per_gbit", gigabits),
            "retransmits": report["end"]["sum_sent"].get("retransmits", 0),
        }

    return run


def _over_link(way: str, loss: float, round_trip: float) -> Callable[[Topology, Subject, float], Figures]:
    # A flow's rate by Mathis' formula, in segments of a round trip: below 25 of them it takes minutes to even out.
    streams = 8 if loss and round_trip > LINK_RTTS[0] and 1.22 / loss**0.5 < 25 else 1

    # All subjects have the same luck in a round, and other luck in the next one.
    turns: Counter[str] = Counter()

    def run(topology: Topology, subject: Subject, seconds: float) -> Figures:
        programs = [
            ("bulk-send", [str(streams), subject.congestion or "cubic"]),
            ("bulk-receive", [str(streams), f"{seconds}"]),
        ]
        if way == "down":
            programs.reverse()
        (near_program, near_flags), (far_program, far_flags) = programs
        turns[subject.name] += 1
        delay = round_trip if round_trip > LINK_RTTS[0] else 0.0
        with topology.bad_link(loss, delay, turns[subject.name]), contextlib.ExitStack() as ends:
            server = ends.enter_context(
                topology.running(topology.net, traffic_command(far_program, "-", str(BULK_PORT), *far_flags))
            )
            assert server.stdout is not None
            server.stdout.readline()
            client = ends.enter_context(
                topology.running(
                    topology.far, traffic_command(near_program, subject.target, str(BULK_PORT), *near_flags)
                )
            )
            receiver = server if way == "up" else client
            output, _ = receiver.communicate(timeout=seconds + 45)
            if receiver.returncode:
                raise RuntimeError("a stream does not begin, or ends early")
        return {"mbit_s": json.loads(output)["bytes_per_second"] * 8 / 1e6}

    return run


def _link_rows() -> Iterator[Measure]:
    for way in ("up", "down"):
        for loss in LINK_LOSSES:
            for rtt in LINK_RTTS:
                clean = not loss and rtt == LINK_RTTS[0]
                yield Measure(
                    f"link-{way}-{loss * 100:g}%-{rtt * 1000:g}ms", "mbit_s", "Mbit/s", _over_link(way, loss, rtt),
                    None if clean else 0.8, link=True, limit=f"link-{way}-0%-{LINK_RTTS[0] * 1000:g}ms",
                    quick=(loss, rtt) in ((0.0, 0.0001), (0.01, 0.0001), (0.001, 0.005), (0.05, 0.05)),
                )  # fmt: skip


def _ping_pong(kind: str) -> Callable[[Topology, Subject, float], Figures]:
    def run(topology: Topology, subject: Subject, seconds: float) -> Figures:
        _udp_allowed(subject, kind)
        port = TCP_ECHO_PORT if kind == "tcp" else UDP_ECHO_PORT
        argv = traffic_command("ping-pong", kind, subject.target, str(port), f"{seconds / 2}", *subject.socks_flags)
        figures: Figures = _json_of(topology.client, argv, seconds)
        return figures

    return run


def _udp_allowed(subject: Subject, kind: str) -> None:
    if kind == "udp" and not subject.has_udp:
        raise NotMeasurable("the proxy has no UDP")


def _connections(topology: Topology, subject: Subject, seconds: float) -> Figures:
    argv = traffic_command("connections", subject.prefix, str(HTTP_PORT), f"{seconds}", "16", *subject.socks_flags)
    with _CpuOf(subject) as cpu:
        clients = [topology.client.popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
        outputs = []
        try:
            for client in clients:
                outputs.append(client.communicate(timeout=seconds + 20))
        finally:
            for client in clients:
                client.kill()
                client.communicate()
    if any(client.returncode for client in clients):
        raise RuntimeError(outputs[0][1].decode().strip().splitlines()[-1])
    reports = [json.loads(output) for output, _ in outputs]
    return {
        "per_second": sum(report["per_second"] for report in reports),
        "p50_us": sum(report["p50_us"] for report in reports) / 2,
        "p99_us": max(report["p99_us"] for report in reports),
        **cpu.per("cpu_us_each", sum(report["count"] for report in reports), 1e6),
        "failed": sum(report["failed"] for report in reports),
    }


def _wrk(*flags: str) -> Callable[[Topology, Subject, float], Figures]:
    def run(topology: Topology, subject: Subject, seconds: float) -> Figures:
        if "close" in " ".join(flags) and subject.proxy:
            raise NotMeasurable("proxychains4 would connect one at a time")
        url = f"http://{subject.target}:{HTTP_PORT}/"
        argv = _wrapped(subject, _program("wrk"), "-d", f"{max(1, round(seconds))}", *flags, url)
        with _CpuOf(subject) as cpu:
            done = topology.client.run(argv, timeout=seconds + 20)
        lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
        if "Requests/sec:" not in lines:
            raise RuntimeError(f"wrk ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-100:]}")
        requests = next(int(line.split()[0]) for line in done.stdout.splitlines() if " requests in " in line)
        errors = [line.strip() for line in done.stdout.splitlines() if "errors" in line or "Non-2xx" in line]
        figures = {"per_second": float(lines["Requests/sec:"].split()[1]), **cpu.per("cpu_us_each", requests, 1e6)}
        if errors:
            figures["failed"] = sum(int(word.strip(",")) for word in errors[0].split() if word.strip(",").isdigit())
        return figures

    return run


def _udp_rate(size: int) -> Callable[[Topology, Subject, float], Figures]:
    def run(topology: Topology, subject: Subject, seconds: float) -> Figures:
        _udp_allowed(subject, "udp")
        flags = [subject.target, str(UDP_ECHO_PORT), str(size), f"{seconds / 6}", *subject.socks_flags]
        with _CpuOf(subject) as cpu:
            figures: Figures = _json_of(topology.client, traffic_command("udp-rate", *flags), seconds * 6)
        return figures | cpu.per("cpu_us_each", figures.pop("count", 0), 1e6)

    return run


def _udp_gso(topology: Topology, subject: Subject, seconds: float) -> Figures:
    if subject.proxy:
        raise NotMeasurable("the client would have to write SOCKS headers between its datagrams")
    _udp_allowed(subject, "udp")
    echo = traffic_command("gso-echo", subject.target, str(GSO_PORT), file="datagrams.py")
    argv = traffic_command("gso", subject.target, str(GSO_PORT), "1400", f"{seconds}", file="datagrams.py")
    with topology.running(topology.net, echo) as server, _CpuOf(subject) as cpu:
        assert server.stdout is not None
        server.stdout.readline()
        figures: Figures = _json_of(topology.client, argv, seconds)
    return figures | cpu.per("cpu_us_each", figures.pop("count", 0), 1e6)


def _udp_flows(topology: Topology, subject: Subject, seconds: float) -> Figures:
    if subject.proxy:
        raise NotMeasurable("the client would measure its own handshakes")
    _udp_allowed(subject, "udp")
    argv = traffic_command(
        "flows", subject.target, str(UDP_ECHO_PORT), f"{seconds}", f"{UDP_FLOWS_AT_ONCE}", file="datagrams.py"
    )
    with _CpuOf(subject) as cpu:
        figures: Figures = _json_of(topology.client, argv, seconds)
    return figures | cpu.per("cpu_us_each", figures.pop("count", 0), 1e6)


def _fresh_gateway(topology: Topology, subject: Subject, *flags: str) -> Subject:
    """Start a gateway of the subject's kind for itself: PSS shall not hold what earlier rows left."""
    _, placement, proxy = parse(subject.name)
    if proxy or subject.ringway is None:
        raise NotMeasurable("measured with direct:// only")
    workers = ("--workers", "2") if placement == "pipeline" else ()
    ringway, prefix = topology.start_gateway(
        "-p", "direct://", "--placement", placement, *workers, *flags, *subject.flags
    )
    return Subject(subject.name, prefix, ringway=ringway)


def _resting(subject: Subject, seconds: float) -> Figures:
    """Measure CPU and wakeups of a gateway that nobody uses."""
    assert subject.ringway is not None
    processes = subject.ringway.tree()
    before = usage(processes)
    select.select([], [], [], seconds)  # the measuring time itself
    after = usage(processes)
    return {
        "cpu_percent": after.cpu_since(before) / (after.at - before.at) * 100,
        "wakeups_s": max(after.wakeups_since(before).values()),
    }


def _idle(topology: Topology, subject: Subject, seconds: float) -> Figures:
    fresh = _fresh_gateway(topology, subject)
    assert fresh.ringway is not None
    try:
        # Start is over when a second passes without CPU.
        eventually(lambda: _resting(fresh, 0.5)["cpu_percent"] < 2, "the gateway rests", 10)
        return {"pss_mb": pss(fresh.ringway.tree()) / 1e6, **_resting(fresh, max(seconds, 2.0))}
    finally:
        fresh.ringway.stop()


def _idle_connections(topology: Topology, subject: Subject, seconds: float) -> Figures:
    command = lambda target: traffic_command("idle", target, str(HOLD_PORT), str(IDLE_CONNECTIONS))  # noqa: E731
    return _held(topology, _fresh_gateway(topology, subject), command, IDLE_CONNECTIONS, seconds)


def _idle_udp(topology: Topology, subject: Subject, seconds: float) -> Figures:
    fresh = _fresh_gateway(topology, subject, "--max-associations", str(IDLE_UDP_CLIENTS))
    topology.echo_udp_on(fresh.target)
    port, count = str(UDP_ECHO_PORT), str(IDLE_UDP_CLIENTS)
    command = lambda target: traffic_command("idle", target, port, count, file="datagrams.py")  # noqa: E731
    return _held(topology, fresh, command, IDLE_UDP_CLIENTS, seconds)


def _held(
    topology: Topology, fresh: Subject, command: Callable[[str], list[str]], count: int, seconds: float
) -> Figures:
    """Measure a gateway of its own that holds `count` idle flows of a client program."""
    assert fresh.ringway is not None
    client = None
    try:
        eventually(lambda: _resting(fresh, 0.5)["cpu_percent"] < 2, "the gateway rests", 10)
        before = pss(fresh.ringway.tree())
        with topology.client.inside():
            client = subprocess.Popen(
                command(fresh.target), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        assert client.stdout is not None
        readable, _, _ = select.select([client.stdout], [], [], 60)
        line = client.stdout.readline() if readable else b""
        if not line:
            client.kill()
            reason = client.communicate()[1].decode().strip().splitlines()[-1:] or ["a minute was not enough"]
            raise RuntimeError(
                f"{count} flows do not open: {reason[0]}; there are {fresh.ringway.flows()} and "
                f"{fresh.ringway.flows('udp')} of UDP"
            )
        # What follows a storm of connections (ACKs, probes) is over when a second stays quiet.
        quiet = time.monotonic() + 10
        while _resting(fresh, 1.0)["cpu_percent"] > 0.5 and time.monotonic() < quiet:
            pass
        after = pss(fresh.ringway.tree())
        return {
            "kb_each": (after - before) / count / 1e3,
            "pss_mb": after / 1e6,
            **_resting(fresh, max(seconds, 2.0)),
        }
    finally:
        if client is not None:
            client.kill()
            client.communicate()
        fresh.ringway.stop()


MEASURES: Final[tuple[Measure, ...]] = (
    Measure("tcp-up", "gbit_s", "Gbit/s", _iperf(), 0.15),
    Measure("tcp-down", "gbit_s", "Gbit/s", _iperf("-R"), 0.20),
    Measure("tcp-up-8", "gbit_s", "Gbit/s", _iperf("-P", "8"), 0.15),
    Measure("tcp-down-8", "gbit_s", "Gbit/s", _iperf("-P", "8", "-R"), 0.20),
    Measure("ping-pong-tcp", "p50_us", "µs", _ping_pong("tcp"), 3.5, lower_is_better=True),
    Measure("ping-pong-udp", "p50_us", "µs", _ping_pong("udp"), lower_is_better=True),
    Measure("connections", "per_second", "1/s", _connections, 0.15),
    Measure("connections-wrk", "per_second", "1/s", _wrk("-t", "2", "-c", "32", "-H", "Connection: close")),
    Measure("http", "per_second", "1/s", _wrk("-t", "1", "-c", "64"), 0.28),
    Measure("udp-64", "per_second", "1/s", _udp_rate(64), 0.30),
    Measure("udp-1400", "per_second", "1/s", _udp_rate(1400)),
    Measure("udp-gso", "gbit_s", "Gbit/s", _udp_gso),
    Measure("udp-flows", "per_second", "1/s", _udp_flows),
    Measure("lan-up", "gbit_s", "Gbit/s", _iperf(lan=True), 0.15),
    Measure("lan-down", "gbit_s", "Gbit/s", _iperf("-R", lan=True), 0.15),
    *_link_rows(),
    Measure("idle", "pss_mb", "MB", _idle, 60.0, lower_is_better=True, absolute=True),
    Measure("idle-5000", "kb_each", "KB", _idle_connections, 12.0, lower_is_better=True, absolute=True),
    Measure("idle-udp-10000", "kb_each", "KB", _idle_udp, None, lower_is_better=True, absolute=True),
)
