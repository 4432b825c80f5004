"""What the workers are told, from the configuration."""

import ipaddress

import pytest

from gateway.config import Config
from gateway.proxyurl import parse_proxy
from gateway.settings import proxy_name, settings_from


def test_the_defaults():
    settings = settings_from(Config(), 1500, [("127.0.0.1", 1080)])
    assert settings.scheme == "socks5"
    assert settings.proxy_name == "127.0.0.1:1080"
    assert settings.proxy_addresses == [("127.0.0.1", 1080)]
    assert (settings.username, settings.password) == (None, None)
    assert settings.own_address4 == ipaddress.ip_address("198.18.0.2").packed
    assert settings.own_address6 == ipaddress.ip_address("fd72:6e67:7761:7900::2").packed
    assert settings.device_networks == (
        (ipaddress.ip_address("198.18.0.0").packed, 15),
        (ipaddress.ip_address("fd72:6e67:7761:7900::").packed, 64),
    )
    assert settings.busy_poll == 0.0


def test_everything_that_is_handed_on():
    config = Config(
        proxy="socks5://me:se%20cret@[2001:db8::1]:9050",
        fwmark=7,
        interface="eth0",
        connect_timeout=3,
        udp_timeout=4,
        dns_timeout=5,
        tcp_timeout=6,
        tcp_half_closed_timeout=8,
        tcp_keepalive=20,
        tcp_keepalive_interval=21,
        tcp_keepalive_count=22,
        tcp_receive_buffer=70_000,
        max_flows=9,
        max_pending=10,
        max_associations=11,
        udp_address="peer",
        early_accept=True,
        congestion="newreno",
        public_only=True,
        busy_poll=50,
    )
    settings = settings_from(config, 9000, [])
    assert settings.proxy_name == "[2001:db8::1]:9050"
    assert (settings.username, settings.password) == ("me", "se cret")
    assert (settings.fwmark, settings.interface, settings.mtu) == (7, "eth0", 9000)
    timeouts = ("connect_timeout", "udp_timeout", "dns_timeout", "tcp_timeout", "tcp_half_closed_timeout")
    assert [getattr(settings, name) for name in timeouts] == [3, 4, 5, 6, 8]
    assert settings.tcp_receive_buffer == 70_000
    assert (settings.tcp_keepalive, settings.tcp_keepalive_interval, settings.tcp_keepalive_count) == (20, 21, 22)
    assert settings.congestion == "newreno"
    assert (settings.max_flows, settings.max_pending, settings.max_associations) == (9, 10, 11)
    assert (settings.udp_address, settings.public_only, settings.early_accept) == ("peer", True, True)
    assert settings.busy_poll == pytest.approx(50e-6)


@pytest.mark.parametrize(("mtu", "address6"), [(1279, "fd00::1/64"), (1500, "")])
def test_without_ipv6(mtu, address6):
    settings = settings_from(Config(tun_address6=address6, mtu=mtu), mtu, [])
    assert settings.own_address6 == b""
    assert len(settings.device_networks) == 1


def test_direct_has_no_proxy():
    settings = settings_from(Config(proxy="direct://"), 1500, [])
    assert (settings.scheme, settings.proxy_name) == ("direct", "")


def test_names_of_proxies():
    assert proxy_name(parse_proxy("socks5://proxy.example")) == "proxy.example:1080"
