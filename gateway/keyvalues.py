"""How the value of a configuration key is read: from text (environment, command line) or typed (TOML).

A reader gets the raw value and whether it is text, and raises ValueError: empty when the value is simply outside of
what is allowed, with a sentence where more can be said.
"""

import ipaddress
import math
import re
from collections.abc import Callable
from typing import Final

from gateway.proxyurl import parse_proxy

Reader = Callable[[object, bool], object]


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


def seconds_or_never(raw: object, text: bool = True) -> float:
    """Read a duration that may be 0 as well."""
    if raw in ("0", "0.0") or (raw == 0 and not isinstance(raw, bool)):
        return 0.0
    return seconds(raw, text)


_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_NUMBER: Final = re.compile(r"[0-9]+(\.[0-9]+)?")
_DURATION_PART: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)")
_DURATION: Final = re.compile(r"([0-9]+(\.[0-9]+)?(ms|s|m|h))+")
_LONGEST: Final = 30 * 86400.0  # a month: longer is a typing error


def read_text(raw: object, text: bool) -> str:
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


def read_size(low: int, high: int) -> Reader:
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


def read_boolean(raw: object, text: bool) -> bool:
    if isinstance(raw, bool):
        return raw
    if text and isinstance(raw, str):
        if raw.lower() in _TRUE:
            return True
        if raw.lower() in _FALSE:
            return False
    raise ValueError


def read_proxy(raw: object, text: bool) -> str:
    url = read_text(raw, text)
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


def read_device(raw: object, text: bool) -> str:
    url = read_text(raw, text)
    driver, separator, name = url.partition("://")
    if not separator:
        driver, name = "tun", url  # as gotun2socks and tun2socks have it: -tun-device tun0
    if driver == "fd" and name.isascii() and name.isdigit() and len(name) < 7:
        return f"fd://{int(name)}"
    if driver == "tun" and _is_interface_name(name):
        return f"tun://{name}"
    raise ValueError


def read_interface(raw: object, text: bool) -> str:
    name = read_text(raw, text)
    if name and not _is_interface_name(name):
        raise ValueError
    return name


def read_address4(raw: object, text: bool) -> str:
    return str(ipaddress.IPv4Address(_plain(raw)))


def read_address6(raw: object, text: bool) -> str:
    return str(ipaddress.IPv6Address(_plain(raw)))


def _plain(raw: object) -> str:
    if not isinstance(raw, str):
        raise ValueError
    return raw.strip()


def read_interface6(raw: object, text: bool) -> str:
    value = _plain(raw)
    if value in ("", "none"):
        return ""
    interface = ipaddress.IPv6Interface(value)
    return f"{interface.ip}/{interface.network.prefixlen}"


def read_mask(raw: object, text: bool) -> str:
    value = _plain(raw).removeprefix("/")
    network = ipaddress.IPv4Network(f"0.0.0.0/{value}")
    if "." in value and str(network.netmask) != value:
        raise ValueError  # ipaddress takes 0.0.0.255 as a host mask
    if not 1 <= network.prefixlen <= 30:
        raise ValueError
    return str(network.netmask)


def read_addresses(raw: object, text: bool) -> list[str]:
    if isinstance(raw, str):
        raw = [part for part in raw.split(",") if part.strip()]
    if not isinstance(raw, (list, tuple)):
        raise ValueError
    return [str(ipaddress.ip_address(_plain(one))) for one in raw]


def read_udp_address(raw: object, text: bool) -> str:
    value = _plain(raw)
    if value in ("auto", "peer", "as-told"):
        return value
    address = ipaddress.ip_address(value)
    if address.is_unspecified or address.is_multicast:
        raise ValueError
    return str(address)


MAX_SOCKET_PATH: Final = 107  # bytes; sun_path of unix(7) with its closing zero is 108


def read_socket_path(raw: object, text: bool) -> str:
    path = read_text(raw, text)
    if len(path.encode(errors="surrogateescape")) > MAX_SOCKET_PATH:
        raise ValueError
    return path


def read_user(raw: object, text: bool) -> str:
    name = read_text(raw, text)
    if not name or ":" in name or name != name.strip():
        raise ValueError
    return name


def whole(low: int, high: int) -> tuple[str, Reader]:
    return f"a whole number from {low} to {high}", _integer(low, high)


DURATION_ALLOWED: Final = 'a time above 0 and up to 30 days, in seconds (90) or as "90s", "2m", "1h30m"'
BOOLEAN_ALLOWED: Final = "true or false"


def names(*names: str) -> tuple[str, Reader]:
    """Return the two fields of a key that holds one of some names: what is allowed, and its reader."""

    def read(raw: object, text: bool) -> str:
        if not isinstance(raw, str) or raw.lower() not in names:
            raise ValueError
        return raw.lower()

    return f"{', '.join(names[:-1])} or {names[-1]}", read
