"""The configuration keys one by one: how each is written, what it may hold, and the sentence that helps with it.

A key is the same thing in four places: `udp-timeout` in the file, `RINGWAY_UDP_TIMEOUT` in the environment,
`--udp-timeout` on the command line, `Config.udp_timeout` in the program. This table is where they meet; the defaults
stand in `gateway.config.Config`.

A reader gets the raw value and whether it is text (environment, command line) or typed (TOML), and raises ValueError:
empty when the value is simply outside of what is allowed, with a sentence where more can be said.
"""

import ipaddress
import math
import re
from collections.abc import Callable
from typing import Final, NamedTuple

from gateway.proxyurl import parse_proxy

Reader = Callable[[object, bool], object]


class Key(NamedTuple):
    """One configuration key."""

    name: str  #: as the TOML file has it
    help: str  #: for --help
    allowed: str  #: ends the sentence "allowed is …"
    read: Reader  #: raw value, is it text? → the value for Config
    metavar: str  #: for --help
    flags: tuple[str, ...] = ()  #: further flags that mean the same key
    boolean: bool = False  #: the flag alone means true
    secret: bool = False  #: the value is never repeated in a message

    @property
    def field(self) -> str:
        """The attribute of Config."""
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        """The environment variable."""
        return "RINGWAY_" + self.field.upper()

    @property
    def flag(self) -> str:
        """The flag that is named first."""
        return "--" + self.name


def seconds(raw: object, text: bool = True) -> float:
    """Read a duration: a number of seconds, or Go's way of writing one ("90s", "1h30m", "500ms")."""
    if isinstance(raw, bool) or not isinstance(raw, (int, float, str)):
        raise ValueError
    if isinstance(raw, str):
        raw = raw.strip()
        if _NUMBER.fullmatch(raw):
            value = float(raw)
        elif _DURATION.fullmatch(raw):
            value = sum(float(number) * _UNITS[unit] for number, unit in _DURATION_PART.findall(raw))
        else:
            raise ValueError
    else:
        value = float(raw)
    if not (math.isfinite(value) and 0 < value <= _LONGEST):
        raise ValueError
    return value


_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_NUMBER: Final = re.compile(r"[0-9]+(\.[0-9]+)?")
_DURATION_PART: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)")
_DURATION: Final = re.compile(r"([0-9]+(\.[0-9]+)?(ms|s|m|h))+")
_LONGEST: Final = 30 * 86400.0  # a month: longer is a typing error


def _text(raw: object, text: bool) -> str:
    if not isinstance(raw, str) or "\0" in raw or "\n" in raw:
        raise ValueError
    return raw


def _integer(low: int, high: int) -> Reader:
    def read(raw: object, text: bool) -> int:
        if text and isinstance(raw, str):
            if not raw.isascii():
                raise ValueError
            try:
                raw = int(raw, 0)  # marks are written 0x22b
            except ValueError:
                raise ValueError from None
        if isinstance(raw, bool) or not isinstance(raw, int) or not low <= raw <= high:
            raise ValueError
        return raw

    return read


_SIZE: Final = re.compile(r"([0-9]{1,19})([kmg]?)(i?b)?", re.IGNORECASE)


def _size(low: int, high: int) -> Reader:
    """Read a number of bytes, or one with a unit ("256k", "4MiB"); units are powers of 1,024, as tun2socks has them."""
    within = _integer(low, high)

    def read(raw: object, text: bool) -> object:
        if isinstance(raw, str):
            match = _SIZE.fullmatch(raw.strip())
            if match is None:
                raise ValueError
            raw = int(match[1]) << " kmg".index(match[2].lower() or " ") * 10
        return within(raw, text)

    return read


# Go's strconv.ParseBool, and what shells and ini files write.
_TRUE: Final = frozenset(("1", "t", "true", "yes", "on"))
_FALSE: Final = frozenset(("0", "f", "false", "no", "off"))


def _boolean(raw: object, text: bool) -> bool:
    if isinstance(raw, bool):
        return raw
    if text and isinstance(raw, str):
        if raw.lower() in _TRUE:
            return True
        if raw.lower() in _FALSE:
            return False
    raise ValueError


def _proxy(raw: object, text: bool) -> str:
    url = _text(raw, text)
    parse_proxy(url)
    return url


_INTERFACE_NAME: Final = re.compile(r"[^\s/:%\x00-\x1f]+")
_MAX_INTERFACE_NAME: Final = 15  # bytes; IFNAMSIZ with its closing zero is 16


def _is_interface_name(name: str) -> bool:
    return (
        _INTERFACE_NAME.fullmatch(name) is not None
        and name not in (".", "..")
        and len(name.encode(errors="replace")) <= _MAX_INTERFACE_NAME
    )


def _device(raw: object, text: bool) -> str:
    url = _text(raw, text)
    driver, separator, name = url.partition("://")
    if not separator:
        driver, name = "tun", url  # as gotun2socks and tun2socks have it: -tun-device tun0
    if driver == "fd" and name.isascii() and name.isdigit() and len(name) < 7:
        return f"fd://{int(name)}"
    if driver == "tun" and _is_interface_name(name):
        return f"tun://{name}"
    raise ValueError


def _interface(raw: object, text: bool) -> str:
    name = _text(raw, text)
    if name and not _is_interface_name(name):
        raise ValueError
    return name


def _address4(raw: object, text: bool) -> str:
    return str(ipaddress.IPv4Address(_plain(raw)))


def _address6(raw: object, text: bool) -> str:
    return str(ipaddress.IPv6Address(_plain(raw)))


def _plain(raw: object) -> str:
    if not isinstance(raw, str):
        raise ValueError
    return raw.strip()


def _interface6(raw: object, text: bool) -> str:
    value = _plain(raw)
    if value in ("", "none"):
        return ""
    interface = ipaddress.IPv6Interface(value)
    return f"{interface.ip}/{interface.network.prefixlen}"


def _mask(raw: object, text: bool) -> str:
    value = _plain(raw).removeprefix("/")
    network = ipaddress.IPv4Network(f"0.0.0.0/{value}")
    if "." in value and str(network.netmask) != value:
        raise ValueError  # ipaddress takes 0.0.0.255 as a host mask
    if not 1 <= network.prefixlen <= 30:
        raise ValueError
    return str(network.netmask)


def _addresses(raw: object, text: bool) -> list[str]:
    if isinstance(raw, str):
        raw = [part for part in raw.split(",") if part.strip()]
    if not isinstance(raw, (list, tuple)):
        raise ValueError
    return [str(ipaddress.ip_address(_plain(one))) for one in raw]


def _udp_address(raw: object, text: bool) -> str:
    value = _plain(raw)
    if value in ("auto", "peer", "as-told"):
        return value
    address = ipaddress.ip_address(value)
    if address.is_unspecified or address.is_multicast:
        raise ValueError
    return str(address)


_MAX_SOCKET_PATH: Final = 107  # bytes; sun_path of unix(7) with its closing zero is 108


def _socket_path(raw: object, text: bool) -> str:
    path = _text(raw, text)
    if len(path.encode(errors="surrogateescape")) > _MAX_SOCKET_PATH:
        raise ValueError
    return path


def _user(raw: object, text: bool) -> str:
    name = _text(raw, text)
    if not name or ":" in name or name != name.strip():
        raise ValueError
    return name


def _whole(low: int, high: int) -> tuple[str, Reader]:
    return f"a whole number from {low} to {high}", _integer(low, high)


_DURATION_ALLOWED: Final = 'a time above 0 and up to 30 days, in seconds (90) or as "90s", "2m", "1h30m"'
_BOOLEAN_ALLOWED: Final = "true or false"


def _names(*names: str) -> tuple[str, Reader]:
    """Return the two fields of a key that holds one of some names: what is allowed, and its reader."""

    def read(raw: object, text: bool) -> str:
        if not isinstance(raw, str) or raw.lower() not in names:
            raise ValueError
        return raw.lower()

    return f"{', '.join(names[:-1])} or {names[-1]}", read


def _duration(name: str, help_: str) -> Key:
    return Key(name, help_, _DURATION_ALLOWED, seconds, "TIME")


KEYS: Final[tuple[Key, ...]] = (
    Key(
        "proxy",
        "Where traffic leaves: socks5://user:pass@host:port (percent-encoded), socks4://user@…, socks4a://…, http://… "
        "(CONNECT), direct:// (no proxy) or reject:// (nowhere).",
        "socks5://[USER[:PASSWORD]@]HOST[:PORT], socks5h://…, socks4://[USER@]…, socks4a://…, http://…, direct:// or "
        "reject://",
        _proxy,
        "URL",
        ("-p", "--local-socks-addr"),
        secret=True,
    ),
    Key(
        "password-file",
        "File whose first line is the proxy's password; RINGWAY_PASSWORD and the systemd credential "
        "ringway-password hold one too.",
        "the path of a file",
        _text,
        "FILE",
    ),
    Key(
        "device",
        "Device to read packets from: tun://NAME (made, and removed at the end) or fd://N (inherited).",
        "tun://NAME with a name of 1 to 15 bytes, or fd://N",
        _device,
        "URL",
        ("-d", "--tun-device"),
    ),
    Key("mtu", "MTU of the device; below 1280 it carries IPv4 only.", *_whole(576, 65535), "BYTES"),
    Key("tun-address", "The kernel's IPv4 address on the device.", "an IPv4 address", _address4, "ADDRESS"),
    Key(
        "tun-mask",
        "Netmask of tun-address.",
        "a netmask from 128.0.0.0 to 255.255.255.252 or its length in bits",
        _mask,
        "MASK",
    ),
    Key(
        "tun-gw",
        "IPv4 address that Ringway itself answers from; without one given, the address next to tun-address.",
        "an IPv4 address",
        _address4,
        "ADDRESS",
    ),
    Key(
        "tun-address6",
        "The kernel's IPv6 address on the device, with its prefix length; none for no IPv6.",
        "an IPv6 address with prefix length, or none",
        _interface6,
        "ADDRESS/N",
    ),
    Key(
        "tun-gw6",
        "IPv6 address that Ringway itself answers from; without one given, the address next to tun-address6.",
        "an IPv6 address",
        _address6,
        "ADDRESS",
    ),
    Key(
        "tun-dns",
        "Resolvers that the device brings, separated by commas.",
        "IP addresses, separated by commas (in the file, a list)",
        _addresses,
        "ADDRESSES",
    ),
    Key("workers", "Worker processes; 0 is one for each CPU that may be used.", *_whole(0, 256), "N"),
    Key(
        "placement",
        "pipeline: reader, workers and writer are processes; single: all of them in one, for one or two cores.",
        *_names("pipeline", "single"),
        "NAME",
    ),
    Key("fwmark", "Mark of the sockets towards the proxy; 0 is none.", *_whole(0, 0xFFFF_FFFF), "MARK"),
    Key(
        "interface",
        "Network interface that the sockets towards the proxy are bound to.",
        "the name of an interface",
        _interface,
        "NAME",
    ),
    _duration("connect-timeout", "How long a connection to the proxy, with its handshake, may take."),
    _duration("udp-timeout", "How long a UDP association lives without datagrams."),
    _duration("dns-timeout", "How long a DNS query waits for its answer."),
    _duration("tcp-timeout", "How long a TCP connection lives without traffic (RFC 5382)."),
    _duration("tcp-half-closed-timeout", "How long a half-closed TCP connection lives without traffic."),
    Key(
        "tcp-receive-buffer",
        "Bytes of one TCP connection that may wait for the proxy; its window starts small and grows up to that.",
        'a size from 64k to 1g, in bytes (4194304) or as "512k", "4m"',
        _size(64 << 10, 1 << 30),
        "BYTES",
        ("--tcp-rcvbuf",),
    ),
    Key("max-flows", "Flows in one worker; more are refused.", *_whole(1, 1 << 20), "N"),
    Key("max-pending", "Connections to the proxy being made at once in one worker.", *_whole(1, 1 << 16), "N"),
    Key("max-associations", "UDP associations in one worker.", *_whole(1, 1 << 16), "N"),
    Key(
        "udp-mapping",
        "What shares a public port: endpoint-independent: all that a client socket sends, as games and calls need; "
        "address-port: what it sends to one destination, spread over all workers (RFC 4787).",
        *_names("endpoint-independent", "address-port"),
        "KIND",
    ),
    Key(
        "udp-filtering",
        "Who may answer a client socket: endpoint-independent: anybody; address: hosts that it sent to; address-port: "
        "ports that it sent to (with udp-mapping address-port always).",
        *_names("endpoint-independent", "address", "address-port"),
        "KIND",
    ),
    Key(
        "udp-warm",
        "UDP associations that stand ready in each worker, so that a new client does not wait for the proxy; each "
        "costs it an idle connection, and one handshake per udp-timeout.",
        *_whole(0, 64),
        "N",
    ),
    Key(
        "block-quic",
        "Answer UDP to port 443 with port unreachable, so that browsers use TCP.",
        _BOOLEAN_ALLOWED,
        _boolean,
        "BOOL",
        boolean=True,
    ),
    Key(
        "udp-mode",
        "How datagrams reach the proxy: udp (UDP ASSOCIATE), inside TCP as gost, hev or uot (sing-box) do it, or auto: "
        "the first of these that it has, else DNS over TCP and port unreachable.",
        *_names("auto", "udp", "gost", "hev", "uot"),
        "MODE",
    ),
    Key(
        "udp-address",
        "Where datagrams go after UDP ASSOCIATE: auto, peer (the proxy), as-told (by it), or an address.",
        "auto, peer, as-told or an IP address",
        _udp_address,
        "WHERE",
    ),
    Key(
        "early-accept",
        "Answer a client's SYN before the proxy has connected; then every port looks open, and a refusal is a reset.",
        _BOOLEAN_ALLOWED,
        _boolean,
        "BOOL",
        boolean=True,
    ),
    Key(
        "congestion",
        "Congestion control towards clients: cubic (RFC 9438) or newreno (RFC 5681).",
        *_names("cubic", "newreno"),
        "NAME",
    ),
    Key(
        "public-only",
        "Refuse destinations that are not on the public Internet.",
        _BOOLEAN_ALLOWED,
        _boolean,
        "BOOL",
        boolean=True,
    ),
    Key(
        "enable-dns-cache",
        "Accepted for gotun2socks' sake; answers are not cached yet.",
        _BOOLEAN_ALLOWED,
        _boolean,
        "BOOL",
        boolean=True,
    ),
    Key(
        "offloads",
        "Let the kernel hand over and take super-segments and unfinished checksums (=false: packet by packet).",
        _BOOLEAN_ALLOWED,
        _boolean,
        "BOOL",
        boolean=True,
    ),
    Key(
        "loglevel",
        "What is logged to standard error.",
        *_names("debug", "info", "warn", "error", "silent"),
        "LEVEL",
    ),
    Key(
        "control",
        "Control socket; by default DEVICE.sock in /run/ringway as root, else in a private directory.",
        f"the path of a socket, at most {_MAX_SOCKET_PATH} bytes",
        _socket_path,
        "PATH",
    ),
    Key(
        "user", "User that the processes around the workers become when started as root.", "a user name", _user, "NAME"
    ),
    Key("busy-poll", "Microseconds that a process looks again before it sleeps.", *_whole(0, 1_000_000), "US"),
)

BY_NAME: Final = {key.name: key for key in KEYS}
