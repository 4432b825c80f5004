"""What `--proxy` may say, taken apart: `socks5://user:pass@host:port`, `socks5h://…`, `direct://`.

A message never repeats the whole URL, because the URL may hold a password.
"""

import ipaddress
import re
from typing import Final
from urllib.parse import quote, unquote_to_bytes

import msgspec

SCHEMES: Final = ("socks5", "socks5h", "direct")
DEFAULT_PORT: Final = 1080  # RFC 1928, section 3

# What the programs that people come from understand, so that the answer can be "not yet" instead of "what?".
_KNOWN_ELSEWHERE: Final = frozenset(
    (
        "socks",
        "socks4",
        "socks4a",
        "http",
        "https",
        "ss",
        "ssh",
        "relay",
        "reject",
        "trojan",
        "vmess",
        "vless",
        "tls",
        "ws",
        "wss",
    )
)
_ALLOWED: Final = "allowed are socks5://, socks5h:// and direct://"
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_HOST_NAME: Final = re.compile(
    r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*\.?"
)
MAX_CREDENTIAL: Final = 255  # bytes; RFC 1929, one length octet


class ConfigError(ValueError):
    """A configuration that cannot be used; its text is one sentence for the user."""


class ProxyUrl(msgspec.Struct, frozen=True):
    """One proxy: `host` without brackets; `username` and `password` decoded, "" where the URL has none."""

    scheme: str
    host: str = ""
    port: int = 0
    username: str = ""
    password: str = ""

    def __str__(self) -> str:
        """Write the URL as it may be shown: without the password."""
        return self._text(with_password=False)

    def __repr__(self) -> str:
        """Keep the password out of tracebacks and logs."""
        return f"ProxyUrl({str(self)!r})"

    def url(self) -> str:
        """Write the whole URL, password included, so that `parse_proxy(p.url()) == p`."""
        return self._text(with_password=True)

    def _text(self, *, with_password: bool) -> str:
        if self.scheme == "direct":
            return "direct://"
        who = quote(self.username, safe="")
        if self.password and with_password:
            who += ":" + quote(self.password, safe="")
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{who}{'@' if who else ''}{host}:{self.port}"


def parse_proxy(url: str) -> ProxyUrl:
    """Take a proxy URL apart; the scheme defaults to socks5, the port to 1080. Raises ConfigError."""
    text = url.strip()
    match = _SCHEME.match(text)
    scheme = match[1].lower() if match else "socks5"
    rest = text[match.end() :] if match else text
    if scheme not in SCHEMES:
        if scheme in _KNOWN_ELSEWHERE:
            raise ConfigError(f"{scheme}:// is not supported yet: {_ALLOWED}")
        raise ConfigError(f"unknown scheme {scheme}://: {_ALLOWED}")
    rest = rest.removesuffix("/")
    if scheme == "direct":
        if rest:
            raise ConfigError("direct:// takes no address: write direct:// alone")
        return ProxyUrl("direct")
    credentials, at, address = rest.rpartition("@")
    username, password = _credentials(credentials) if at else ("", "")
    host, port = _address(address)
    return ProxyUrl(scheme, host, port, username, password)


def _credentials(text: str) -> tuple[str, str]:
    username, _, password = text.partition(":")
    decoded = []
    for what, encoded in (("user name", username), ("password", password)):
        if re.search(r"%(?![0-9A-Fa-f]{2})", encoded):
            raise ConfigError(f"the {what} holds a % that starts no percent-encoding: write %25")
        raw = unquote_to_bytes(encoded)
        if len(raw) > MAX_CREDENTIAL:
            raise ConfigError(f"the {what} has {len(raw)} bytes: allowed are at most {MAX_CREDENTIAL}")
        try:
            decoded.append(raw.decode())
        except UnicodeDecodeError:
            raise ConfigError(f"the {what} is not UTF-8 after percent-decoding") from None
    if not username:
        raise ConfigError("no user name stands before the @: write socks5://USER:PASSWORD@HOST:PORT")
    return decoded[0], decoded[1]


def _address(text: str) -> tuple[str, int]:
    if text.startswith("["):
        host, bracket, tail = text[1:].partition("]")
        if not bracket or not _is_ipv6(host) or (tail and not tail.startswith(":")):
            raise ConfigError("brackets hold an IPv6 address, closed before the port: write [2001:db8::1]:1080")
        port = tail[1:]
    elif text.count(":") > 1:
        raise ConfigError("an IPv6 address stands in brackets: write [2001:db8::1]:1080")
    else:
        host, colon, port = text.partition(":")
        tail = colon
        if not host:
            # Go's programs write ":1080" for this machine.
            if not colon:
                raise ConfigError("no host: write socks5://HOST:PORT")
            host = "127.0.0.1"
        elif not _is_host(host):
            raise ConfigError(f"{host!r} is neither an address nor a host name: write HOST:PORT")
    if tail and not port:
        raise ConfigError("no port follows the colon: write HOST:PORT or HOST alone for port 1080")
    if not port:
        return host, DEFAULT_PORT
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise ConfigError(f"port {port!r}: allowed is a number from 1 to 65535")
    return host, int(port)


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _is_host(text: str) -> bool:
    if re.fullmatch(r"[0-9.]+", text):
        try:
            ipaddress.IPv4Address(text)
        except ValueError:
            return False
        return True
    try:
        name = text.encode("idna").decode()
    except UnicodeError:
        return False
    return len(name) <= 253 and _HOST_NAME.fullmatch(name) is not None
