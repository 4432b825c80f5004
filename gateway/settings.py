"""From the configuration to what the workers are told: addresses packed, the proxy's URL taken apart, units settled."""

import ipaddress
from typing import TYPE_CHECKING, Final

from gateway.proxyurl import WITHOUT_PROXY, ProxyUrl, parse_proxy
from workers.settings import Settings

if TYPE_CHECKING:
    from gateway.config import Config

MIN_MTU_IPV6: Final = 1280  # octets; RFC 8200, section 5


def settings_from(config: "Config", mtu: int, addresses: list[tuple[str, int]]) -> Settings:
    """Make the workers' settings; `mtu` is the device's, `addresses` are the proxy's as far as they are known."""
    proxy = parse_proxy(config.proxy)
    device4 = ipaddress.IPv4Interface(f"{config.tun_address}/{config.tun_mask}").network
    networks = [(device4.network_address.packed, device4.prefixlen)]
    own_address6 = b""
    if has_ipv6(config, mtu):
        device6 = ipaddress.IPv6Interface(config.tun_address6).network
        networks.append((device6.network_address.packed, device6.prefixlen))
        own_address6 = ipaddress.IPv6Address(config.tun_gw6).packed
    return Settings(
        scheme=proxy.scheme,
        proxy_name=proxy_name(proxy),
        proxy_addresses=addresses,
        username=proxy.username or None,
        password=proxy.password if proxy.username else None,
        fwmark=config.fwmark,
        interface=config.interface,
        mtu=mtu,
        own_address4=ipaddress.IPv4Address(config.tun_gw).packed,
        own_address6=own_address6,
        device_networks=tuple(networks),
        connect_timeout=config.connect_timeout,
        udp_timeout=config.udp_timeout,
        dns_timeout=config.dns_timeout,
        tcp_timeout=config.tcp_timeout,
        tcp_half_closed_timeout=config.tcp_half_closed_timeout,
        tcp_keepalive=config.tcp_keepalive,
        tcp_keepalive_interval=config.tcp_keepalive_interval,
        tcp_keepalive_count=config.tcp_keepalive_count,
        tcp_receive_buffer=config.tcp_receive_buffer,
        max_flows=config.max_flows,
        max_pending=config.max_pending,
        max_associations=config.max_associations,
        udp_mapping=config.udp_mapping,
        udp_filtering=config.udp_filtering,
        udp_warm=config.udp_warm,
        block_quic=config.block_quic,
        udp_mode=config.udp_mode,
        pipelined=config.pipelined_handshake == "yes",
        warm_connections=config.warm_connections,
        tcp_fast_open=config.tcp_fast_open,
        udp_address=config.udp_address,
        early_accept=config.early_accept,
        congestion=config.congestion,
        public_only=config.public_only,
        busy_poll=config.busy_poll / 1e6,
    )


def has_ipv6(config: "Config", mtu: int) -> bool:
    """Tell whether the device carries IPv6: it has an address, and an MTU that IPv6 allows."""
    return bool(config.tun_address6) and mtu >= MIN_MTU_IPV6


def proxy_name(proxy: ProxyUrl) -> str:
    """Return host:port for logs; "" for direct://."""
    if proxy.scheme in WITHOUT_PROXY:
        return ""
    host = f"[{proxy.host}]" if ":" in proxy.host else proxy.host
    return f"{host}:{proxy.port}"
