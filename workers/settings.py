"""Settings: what the workers need to know of the configuration, ready for use (addresses packed, URL parsed)."""

from dataclasses import dataclass, field
from typing import Final

# Mapping and filtering of UDP, RFC 4787, 4.1 and 5.
ENDPOINT_INDEPENDENT: Final = "endpoint-independent"
ADDRESS: Final = "address"
ADDRESS_PORT: Final = "address-port"


@dataclass(frozen=True, slots=True)
class Settings:
    """One for the whole process tree, made by the gateway before it forks the workers."""

    scheme: str  #: of the upstream: one of workers.socks.handshake, "direct" or "reject"
    proxy_name: str = ""  #: host:port as a person wrote it, for logs
    proxy_addresses: list[tuple[str, int]] = field(default_factory=list)  #: resolved (numeric host, port), best first
    username: str | None = None
    password: str | None = None
    fwmark: int = 0
    interface: str = ""
    mtu: int = 1500
    own_address4: bytes = b""  #: the address that Ringway answers from, packed; b"" = none
    own_address6: bytes = b""
    device_networks: tuple[tuple[bytes, int], ...] = ()  #: (packed network, prefix length) of the device itself
    connect_timeout: float = 10.0  #: seconds
    udp_timeout: float = 120.0
    dns_timeout: float = 10.0
    tcp_timeout: float = 7440.0
    tcp_half_closed_timeout: float = 7200.0
    tcp_keepalive: float = 7200.0  #: seconds of silence; 0 = never
    tcp_keepalive_interval: float = 60.0
    tcp_keepalive_count: int = 3
    tcp_receive_buffer: int = 4 << 20  #: octets
    max_flows: int = 65536  #: TCP flows of one worker
    max_pending: int = 1024  #: TCP flows of one worker whose proxy connection is not there yet
    max_associations: int = 16384  #: UDP associations of one worker
    udp_mapping: str = ENDPOINT_INDEPENDENT  #: what shares a mapping: all of a client socket, or one destination's
    udp_filtering: str = ENDPOINT_INDEPENDENT  #: who may answer: anybody, ADDRESS or ADDRESS_PORT that was sent to
    udp_warm: int = 0  #: associations that stand ready in one worker
    block_quic: bool = False
    udp_mode: str = "auto"  #: how datagrams reach the proxy: one of workers.udp.modes
    udp_found: str = ""  #: what a probe has found for auto; "" is nothing yet
    pipelined: bool = False  #: the proxy takes method, password and request in one go
    tcp_fast_open: bool = False
    warm_connections: int = 0  #: of one worker, to the proxy, ready for flows
    udp_address: str = "auto"  #: where datagrams go after UDP ASSOCIATE: auto, peer, as-told, or an address
    early_accept: bool = False
    congestion: str = "cubic"  #: congestion control towards clients: cubic or newreno
    public_only: bool = False
    busy_poll: float = 0.0  #: seconds
