"""What `--forward`, `--via` and `--listen` may say: socks5+ws://user:password@host:port/path and their like."""

import re
from typing import Final

import msgspec

from gateway.proxyurl import CARRIED, WITHOUT_PROXY, ConfigError, ProxyUrl, parse_proxy

RAW: Final = "raw"
TLS: Final = "tls"
WS: Final = "ws"
WSS: Final = "wss"
HTTP: Final = "http"

#: scheme → carrier, port where the URL names none
CARRIERS: Final = {
    "socks5": (RAW, 1080),
    "socks5+tls": (TLS, 1080),
    "socks5+ws": (WS, 80),
    "socks5+wss": (WSS, 443),
    "socks5+http": (HTTP, 80),
}
ALLOWED: Final = ", ".join(f"{scheme}://" for scheme in CARRIERS)

AUTO: Final = "auto"
#: --udp-mode → ways to try, in this order; gost v1 has frames behind UDP ASSOCIATE
UDP_MODES: Final = {
    "udp": ("udp",),
    "gost": ("gost", "gost-v1"),
    "gost-v1": ("gost-v1",),
    "hev": ("hev",),
    "uot": ("uot",),
    "uot-v1": ("uot-v1",),
    AUTO: ("gost", "hev", "uot", "gost-v1"),
}
#: --socks-tls
SOCKS_TLS: Final = ("off", "gost", "gost-v1")

_URL: Final = re.compile(r"([A-Za-z0-9+.-]+)://([^/]*)(/.*)?")


class TunnelUrl(msgspec.Struct, frozen=True):
    """The other end of a tunnel: a SOCKS5 server, or (scheme "http") an HTTP proxy that is asked to CONNECT."""

    carrier: str
    proxy: ProxyUrl
    path: str = "/"

    def __str__(self) -> str:
        """Write the URL as it may be shown: without the password."""
        if self.proxy.scheme == "http":
            return f"https{str(self.proxy).removeprefix('http')}"
        scheme = next(scheme for scheme, (carrier, _) in CARRIERS.items() if carrier == self.carrier)
        return f"{scheme}{str(self.proxy).removeprefix('socks5')}{'' if self.path == '/' else self.path}"


def split_scheme(text: str) -> tuple[str, int, str, str]:
    """Return carrier, its port, authority and path; without a scheme it is the plain connection. Raises ConfigError."""
    match = _URL.fullmatch(text if "://" in text else f"socks5://{text}")
    scheme = match[1].lower().replace("socks5h", "socks5") if match else ""
    if not match or scheme not in CARRIERS:
        raise ConfigError(f"unknown scheme: allowed are {ALLOWED}")
    carrier, port = CARRIERS[scheme]
    return carrier, port, match[2], match[3] or "/"


def parse_tunnel(text: str) -> TunnelUrl:
    """Take the URL of a tunnel apart. Raises ConfigError."""
    carrier, port, authority, path = split_scheme(text.strip())
    if path != "/" and carrier not in (WS, WSS):
        raise ConfigError("a path has a meaning for ws and wss only")
    if not path.isascii() or re.search(r"[\x00-\x20\x7f]", path):
        raise ConfigError("the path holds characters that must be percent-encoded")
    if not authority:
        raise ConfigError("no host: write socks5://HOST:PORT")
    if ":" not in authority.rpartition("@")[2].rpartition("]")[2]:
        authority = f"{authority}:{port}"
    return TunnelUrl(carrier, parse_proxy(f"socks5://{authority}"), path)


def parse_via(text: str) -> ProxyUrl:
    """Take the URL of the proxy before a tunnel apart: HTTP CONNECT or SOCKS. Raises ConfigError."""
    via = parse_proxy(text)
    if via.scheme in (*WITHOUT_PROXY, *CARRIED):
        raise ConfigError("allowed are http://, socks5://, socks4:// and socks4a://")
    return via
