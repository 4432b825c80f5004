"""What `--proxy` may say, taken apart: `socks5://user:pass@host:port`, `http://…`, `direct://` and their like.

A message never repeats the whole URL, because the URL may hold a password.
"""

import ipaddress
import re
from typing import Final
from urllib.parse import quote, unquote_to_bytes

import msgspec

#: scheme → port where the URL names none: RFC 1928, 3, and RFC 9110, 4.2.1
SCHEMES: Final = {
    "socks5": 1080,
    "socks5h": 1080,
    "socks4": 1080,
    "socks4a": 1080,
    "http": 80,
    "https": 443,
    "socks5+tls": 1080,
    "socks5+ws": 80,
    "socks5+wss": 443,
    "socks5+http": 80,
}
#: inside TLS, WebSocket or HTTP: a process of its own speaks to the proxy (carrier.py)
CARRIED: Final = ("https", "socks5+tls", "socks5+ws", "socks5+wss", "socks5+http")
#: of them, those in TLS
IN_TLS: Final = ("https", "socks5+tls", "socks5+wss")
_WITH_PATH: Final = ("socks5+ws", "socks5+wss")
#: nobody is asked: each target itself, or nothing
WITHOUT_PROXY: Final = ("direct", "reject")

# What the programs that people come from understand, so that the answer can be "not yet" instead of "what?".
_KNOWN_ELSEWHERE: Final = frozenset(("socks", "ss", "ssh", "relay", "trojan", "vmess", "vless", "tls", "ws", "wss"))
_ALLOWED: Final = f"allowed are {', '.join(f'{scheme}://' for scheme in SCHEMES)}, direct:// and reject://"
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
    path: str = ""  #: of a WebSocket, "" for /

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
        if self.scheme in WITHOUT_PROXY:
            return f"{self.scheme}://"
        who = quote(self.username, safe="")
        if self.password and with_password:
            who += ":" + quote(self.password, safe="")
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{who}{'@' if who else ''}{host}:{self.port}{self.path}"


def parse_proxy(url: str) -> ProxyUrl:
    """Take a proxy URL apart; the scheme defaults to socks5, the port to its scheme's. Raises ConfigError."""
    text = url.strip()
    match = _SCHEME.match(text)
    scheme = match[1].lower() if match else "socks5"
    rest = text[match.end() :] if match else text
    rest = rest.removesuffix("/")
    if scheme in WITHOUT_PROXY:
        if rest:
            raise ConfigError(f"{scheme}:// takes no address: write {scheme}:// alone")
        return ProxyUrl(scheme)
    if scheme not in SCHEMES:
        if scheme in _KNOWN_ELSEWHERE:
            raise ConfigError(f"{scheme}:// is not supported yet: {_ALLOWED}")
        raise ConfigError(f"unknown scheme {scheme}://: {_ALLOWED}")
    path = ""
    if scheme in _WITH_PATH:
        rest, slash, path = rest.partition("/")
        path = slash + path
        if not path.isascii() or re.search(r"[\x00-\x20\x7f]", path):
            raise ConfigError("the path holds characters that must be percent-encoded")
    credentials, at, address = rest.rpartition("@")
    username, password = _credentials(credentials) if at else ("", "")
    host, port = _address(address)
    proxy = ProxyUrl(scheme, host, port or SCHEMES[scheme], username, password, path)
    _check_credentials(proxy)
    return proxy


def _check_credentials(proxy: ProxyUrl) -> None:
    """Refuse what the protocol of the scheme cannot say."""
    if proxy.scheme in ("socks4", "socks4a"):
        if proxy.password:
            raise ConfigError(f"{proxy.scheme} has a user id but no password: write {proxy.scheme}://USER@HOST:PORT")
        if "\0" in proxy.username:
            raise ConfigError("the user id holds a zero byte, which ends it in SOCKS4")
    if proxy.scheme in ("http", "https") and ":" in proxy.username:
        raise ConfigError("the user name holds a colon, which ends it in HTTP (RFC 7617)")


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
    """Return host and port, 0 where it names none."""
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
        raise ConfigError("no port follows the colon: write HOST:PORT, or HOST alone for the usual port")
    if not port:
        return host, 0
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
