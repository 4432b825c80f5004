"""What is measured: the kernel alone, clients that speak SOCKS themselves, and the gateway in its placements.

| subject | the way from client to target |
| --- | --- |
| direct | the kernel forwards |
| direct-bbr | the same, and the link rows' senders use BBR instead of CUBIC; it has no other rows |
| socks-PROXY | the client speaks SOCKS to the proxy: iperf3 and wrk under proxychains4, the others by themselves |
| ringway, ringway-single | the gateway, whose workers connect themselves (`-p direct://`): no proxy's speed is in it |
| ringway-PROXY, ringway-PROXY-single | the gateway in front of the proxy |

PROXY is `embedded` (`ringway proxy`), `dante` or `microsocks` (which has no UDP). Without `-single` the placement is
`pipeline`. A `+` at the end stands for the flags of `--flags`, which that gateway gets besides.

proxychains4 is a preloaded library that does the handshake inside connect() and then leaves the socket alone, so bytes
flow as they do for a program with SOCKS built in. It blocks during the handshake, which is why the connection row has a
client of ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.bench.topology import DIRECT_PREFIX, PREFIX, Topology
from tests.netns.daemon import Ringway
from tests.netns.peers import DANTE, EMBEDDED, MICROSOCKS, PORT, Peer, RunningPeer
from tests.peers import find

PROXIES: Final[dict[str, Peer]] = {"embedded": EMBEDDED, "dante": DANTE, "microsocks": MICROSOCKS}
DEFAULT: Final = (
    "direct", "direct-bbr", "ringway", "ringway-single", "socks-embedded", "ringway-embedded",
    "ringway-embedded-single", "socks-dante", "ringway-dante", "ringway-dante-single",
)  # fmt: skip


class NotMeasurable(Exception):
    """A measure that a subject cannot have here; the message says why."""


@dataclass(slots=True)
class Subject:
    """One way to the targets, ready to be used."""

    name: str
    prefix: str  #: such as 203.0.97; .10 to .17 are targets
    proxy: str = ""  #: ADDRESS:PORT that the client itself speaks SOCKS to
    has_udp: bool = True
    ringway: Ringway | None = None
    flags: Sequence[str] = ()  #: of the gateway, beyond those that its name stands for
    congestion: str = ""  #: congestion control that the senders ask for, "" for the namespace's own
    wrapper: Sequence[str] = field(default_factory=tuple)  #: what stands before a program that cannot speak SOCKS

    @property
    def target(self) -> str:
        return f"{self.prefix}.10"

    @property
    def socks_flags(self) -> list[str]:
        return ["--socks", self.proxy] if self.proxy else []


class Subjects:
    """Makes subjects by name, with the proxies that they share."""

    def __init__(self, topology: Topology, flags: Sequence[str] = ()) -> None:
        """`flags` are those of the subjects that end with `+`."""
        self._topology = topology
        self._flags = tuple(flags)
        self._proxies: dict[str, RunningPeer] = {}

    def make(self, name: str) -> Subject:
        """Start what the subject needs and return it; raises NotMeasurable, or ValueError for an unknown name."""
        kind, placement, proxy = parse(name)
        if kind == "direct":
            congestion = "bbr" if proxy else ""
            with self._topology.net.inside():
                available = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
            if congestion and congestion not in available:
                raise NotMeasurable(f"this kernel has no {congestion}")
            subject = Subject(name, PREFIX.format(DIRECT_PREFIX), congestion=congestion)
        elif kind == "socks":
            running = self._proxy(proxy)
            address = f"{running.host}:{PORT}"
            subject = Subject(
                name, PREFIX.format(DIRECT_PREFIX), address, running.peer.udp, wrapper=self._chains(running)
            )
        else:
            url, has_udp = "direct://", True
            if proxy:
                running = self._proxy(proxy)
                url, has_udp = running.url, running.peer.udp
            flags = self._flags if name.endswith("+") else ()
            ringway, prefix = self._topology.start_gateway("-p", url, "--placement", placement, *flags)
            subject = Subject(name, prefix, has_udp=has_udp, ringway=ringway, flags=flags)
        self._topology.echo_udp_on(subject.target)
        return subject

    def _proxy(self, name: str) -> RunningPeer:
        if name not in self._proxies:
            peer = PROXIES[name]
            for program in peer.programs:
                if find(program) is None:
                    raise NotMeasurable(f"{program} is not installed")
            host = f"10.77.0.{2 + list(PROXIES).index(name)}"
            self._proxies[name] = self._topology.proxy(RunningPeer(peer, self._topology.net, host))
        return self._proxies[name]

    def _chains(self, running: RunningPeer) -> Sequence[str]:
        chains = find("proxychains4")
        if chains is None:
            return ()
        configuration = self._topology.directory / f"proxychains-{running.peer.name}.conf"
        configuration.write_text(
            f"strict_chain\nquiet_mode\ntcp_connect_time_out 8000\n[ProxyList]\nsocks5 {running.host} {PORT}\n"
        )
        return (chains, "-q", "-f", str(configuration))


def parse(name: str) -> tuple[str, str, str]:
    """Take a subject's name apart: kind, placement, proxy ("" for none; "bbr" for direct-bbr)."""
    kind, *rest = name.removesuffix("+").split("-")
    placement = "pipeline"
    if kind == "ringway" and rest and rest[-1] == "single":
        placement = "single"
        rest = rest[:-1]
    proxy = rest[0] if rest else ""
    after = {"direct": ("", "bbr"), "socks": tuple(PROXIES), "ringway": ("", *PROXIES)}
    if proxy not in after.get(kind, ()) or len(rest) > 1 or (name.endswith("+") and kind != "ringway"):
        allowed = ", ".join([*DEFAULT, "socks-microsocks", "ringway-microsocks", "ringway-microsocks-single"])
        raise ValueError(f"no subject {name!r}; allowed are {allowed}")
    return kind, placement, proxy
