"""The configuration: one frozen record, put together from flags, environment, file and defaults, in that order.

    flag --mtu  >  RINGWAY_MTU  >  mtu = … in the TOML file  >  default in Config

Every error is one sentence that names where the value stands, its key, and what is allowed there.
"""

import difflib
import ipaddress
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from gateway.keys import BY_NAME, KEYS, Key
from gateway.proxyurl import IN_TLS, MAX_CREDENTIAL, WITHOUT_PROXY, ConfigError, ProxyUrl, parse_proxy
from workers.socks import modes

__all__ = ["Config", "ConfigError", "ProxyUrl", "control_directories", "control_path", "load", "parse_proxy"]

PASSWORD_VARIABLE: Final = "RINGWAY_PASSWORD"
CREDENTIAL: Final = "ringway-password"  # LoadCredential=ringway-password:… of systemd
_MAX_CONFIG: Final = 1 << 20  # bytes; a configuration has a few thousand


class Config(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """Everything that `ringway run` can be told; times in seconds, sizes in bytes. keys.py says what each means."""

    proxy: str = "socks5://127.0.0.1:1080"  #: with the password in it, wherever that came from
    password_file: str = ""
    tls_ca: str = ""
    tls_server_name: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    device: str = "tun://tun0"
    mtu: int = 1500
    tun_address: str = "198.18.0.1"
    tun_mask: str = "255.254.0.0"
    tun_gw: str = "198.18.0.2"
    tun_address6: str = "fd72:6e67:7761:7900::1/64"
    tun_gw6: str = "fd72:6e67:7761:7900::2"
    tun_dns: list[str] = msgspec.field(default_factory=lambda: ["8.8.8.8", "8.8.4.4"])
    workers: int = 0
    placement: Literal["pipeline", "single"] = "pipeline"
    fwmark: int = 0
    interface: str = ""
    connect_timeout: float = 10.0
    udp_timeout: float = 120.0  # RFC 4787, 4.3: not below two minutes
    dns_timeout: float = 10.0
    tcp_timeout: float = 7440.0  # RFC 5382, 5: two hours and four minutes
    tcp_half_closed_timeout: float = 7200.0
    tcp_keepalive: float = 7200.0  # RFC 9293, 3.8.4: not below two hours unless somebody says so
    tcp_keepalive_interval: float = 60.0  # the last one is not answered before tcp-timeout
    tcp_keepalive_count: int = 3
    tcp_receive_buffer: int = 4 << 20
    max_flows: int = 65536
    max_pending: int = 1024
    max_associations: int = 16384  # 20,000 in two workers, at some 3 KB each
    udp_mapping: Literal["endpoint-independent", "address-port"] = "endpoint-independent"  # RFC 4787, REQ-1
    udp_filtering: Literal["endpoint-independent", "address", "address-port"] = "endpoint-independent"  # REQ-8
    udp_warm: int = 1
    block_quic: bool = False
    udp_mode: Literal["auto", "udp", "gost", "hev", "uot"] = "auto"
    pipelined_handshake: Literal["auto", "yes", "no"] = "auto"
    warm_connections: int = 0
    tcp_fast_open: bool = False
    udp_address: str = "auto"
    early_accept: bool = False
    congestion: Literal["cubic", "newreno"] = "cubic"
    public_only: bool = False
    enable_dns_cache: bool = False
    dns_cache_size: int = 16 << 20
    offloads: bool = True
    loglevel: Literal["debug", "info", "warn", "error", "silent"] = "info"
    control: str = ""
    user: str = "nobody"
    busy_poll: int = 0

    def __repr__(self) -> str:
        """Keep the proxy's password out of tracebacks and logs."""
        return f"Config({self.public()!r})"

    def public(self) -> dict[str, Any]:
        """Return the keys as they may be shown: the proxy's URL without its password."""
        shown: dict[str, Any] = msgspec.to_builtins(self)
        shown["proxy"] = str(parse_proxy(self.proxy))
        return shown


def load(
    path: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> Config:
    """Put a configuration together; `env` is the process's by default, `flags` go by key name. Raises ConfigError."""
    env = os.environ if env is None else env
    flags = {} if flags is None else flags
    layers = [_from_flags(flags), _from_environment(env), _from_file(path) if path else {}]
    given: dict[str, Any] = {}
    for layer in reversed(layers):
        given.update(layer)
    _settle_addresses(given)
    _settle_password(given, layers, env)
    if (
        given.get("udp-mapping") == "address-port"
        and given.setdefault("udp-filtering", "address-port") != "address-port"
    ):
        raise ConfigError(
            f'udp-filtering "{given["udp-filtering"]}" is wider than udp-mapping "address-port", where only one '
            "destination knows the port: allowed with it is address-port"
        )
    if given.get("placement") == "single" and given.get("workers", 0) > 1:
        raise ConfigError(f'placement "single" has one worker, not {given["workers"]}: allowed are 0 and 1')
    _check_udp_mode(given)
    _check_tls(given)
    try:
        return msgspec.convert(given, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(_one_line(str(error))) from None


# -- the layers, each {key name: value as Config has it} --


def _from_flags(flags: Mapping[str, object]) -> dict[str, Any]:
    layer: dict[str, Any] = {}
    for name, raw in flags.items():
        key = BY_NAME.get(name.replace("_", "-"))
        if key is None:
            raise ConfigError(f"--{name}: {_unknown('flag', name)}")
        text = isinstance(raw, str)
        layer[key.name] = _read(key, raw, text, key.flag, "{where} {value}")
    return layer


def _from_environment(env: Mapping[str, str]) -> dict[str, Any]:
    layer: dict[str, Any] = {}
    for key in KEYS:
        raw = env.get(key.variable, "")
        # Containers pass variables on that nobody set, as empty ones.
        if raw:
            layer[key.name] = _read(key, raw, True, key.variable, "{where}={value}")
    return layer


def _from_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            raw = file.read(_MAX_CONFIG + 1)
    except OSError as error:
        raise ConfigError(f"{name}: cannot read the configuration: {error.strerror}") from None
    if len(raw) > _MAX_CONFIG:
        raise ConfigError(f"{name}: the configuration has more than {_MAX_CONFIG} bytes")
    try:
        document = tomllib.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not UTF-8 at byte {error.start}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{name}: not TOML: {_one_line(str(error))}") from None
    layer: dict[str, Any] = {}
    for word, value in document.items():
        key = BY_NAME.get(word)
        if key is None:
            raise ConfigError(f"{name}: {_unknown('key', word)}")
        layer[word] = _read(key, value, False, name, "{where}: {key} = {value}")
    for word in ("password-file", "tls-ca", "tls-cert", "tls-key"):
        if layer.get(word):
            # Beside the file that names it, wherever the daemon was started.
            layer[word] = str(Path(name).parent / layer[word])
    return layer


def _unknown(what: str, word: str) -> str:
    near = difflib.get_close_matches(word.replace("_", "-").lower(), BY_NAME, n=1, cutoff=0.0)
    return f"unknown {what} {_shown(word, False)}; the nearest known one is {near[0]}"


def _read(key: Key, raw: object, text: bool, where: str, pattern: str) -> Any:
    try:
        return key.read(raw, text)
    except ValueError as error:
        if key.secret:
            detail = str(error) or f"allowed is {key.allowed}"
            place = where if where in (key.flag, key.variable) else f"{where}: {key.name}"
            raise ConfigError(f"{place}: {detail}") from None
        place = pattern.format(where=where, key=key.name, value=_shown(raw, text))
        raise ConfigError(f"{place}: allowed is {key.allowed}") from None


def _shown(raw: object, text: bool) -> str:
    if isinstance(raw, bool):
        return "true" if raw else "false"
    shown = raw if text and isinstance(raw, str) and raw.isprintable() and raw else repr(raw)
    assert isinstance(shown, str)
    return shown if len(shown) <= 80 else shown[:77] + "…"


def _one_line(text: str) -> str:
    return " ".join(text.split())


# -- keys that depend on each other --


def _settle_addresses(given: dict[str, Any]) -> None:
    """Check that Ringway's own addresses lie in the device's networks; choose them where only the network was given."""
    defaults = {
        "tun-address": Config().tun_address,
        "tun-mask": Config().tun_mask,
        "tun-address6": Config().tun_address6,
    }
    merged = defaults | given
    networks: list[tuple[str, str, ipaddress.IPv4Interface | ipaddress.IPv6Interface]] = [
        ("tun-address", "tun-gw", ipaddress.IPv4Interface(f"{merged['tun-address']}/{merged['tun-mask']}"))
    ]
    if merged["tun-address6"]:
        networks.append(("tun-address6", "tun-gw6", ipaddress.IPv6Interface(merged["tun-address6"])))
    for address_key, own_key, interface in networks:
        network = interface.network
        if interface.ip.is_multicast or interface.ip.is_unspecified or interface.ip.is_loopback:
            raise ConfigError(f"{address_key} {interface.ip}: allowed is an address that a device can have")
        reserved = {network.network_address, network.broadcast_address} if interface.version == 4 else set()
        if interface.ip in reserved:
            raise ConfigError(f"{address_key} {interface.ip}: allowed is a host's address in {network}")
        if own_key not in given:
            if {address_key, "tun-mask"} & given.keys():
                given[own_key] = _neighbour(interface, reserved)
            continue
        own = ipaddress.ip_address(given[own_key])
        if own not in network or own in reserved or own == interface.ip:
            raise ConfigError(
                f"{own_key} {own}: allowed is an address in {network} other than {address_key} {interface.ip}"
            )


def _neighbour(
    interface: ipaddress.IPv4Interface | ipaddress.IPv6Interface,
    reserved: set[ipaddress.IPv4Address | ipaddress.IPv6Address] | set[Any],
) -> str:
    for distance in (1, -1):
        try:
            candidate = interface.ip + distance
        except ValueError:
            continue
        if candidate in interface.network and candidate not in reserved:
            return str(candidate)
    raise ConfigError(f"{interface.network} has no room for an address of Ringway's own beside {interface.ip}")


def _check_udp_mode(given: dict[str, Any]) -> None:
    """Refuse a mode of UDP that the kind of proxy cannot have."""
    mode = given.get("udp-mode", "auto")
    scheme = parse_proxy(given.get("proxy", Config().proxy)).scheme
    if mode == modes.AUTO or scheme.startswith("socks5") or scheme in WITHOUT_PROXY:
        return
    can = modes.DIALECTS_OF.get(scheme, ())
    if mode not in can:
        raise ConfigError(f"udp-mode {mode}: {scheme}:// cannot carry it, allowed is {' or '.join((modes.AUTO, *can))}")


def _check_tls(given: dict[str, Any]) -> None:
    """Refuse TLS keys without TLS: somebody believes what is not so."""
    keys = [name for name in ("tls-ca", "tls-server-name", "tls-cert", "tls-key") if given.get(name)]
    scheme = parse_proxy(given.get("proxy", Config().proxy)).scheme
    if keys and scheme not in IN_TLS:
        raise ConfigError(f"{keys[0]}: {scheme}:// is not TLS, allowed is {' or '.join(f'{one}://' for one in IN_TLS)}")
    if given.get("tls-key") and not given.get("tls-cert"):
        raise ConfigError("tls-key needs tls-cert, the certificate that it belongs to")


def _settle_password(given: dict[str, Any], layers: list[dict[str, Any]], env: Mapping[str, str]) -> None:
    """Put the password that counts into the proxy's URL: the highest layer that has one; within a layer, the URL's."""
    proxy = parse_proxy(given.get("proxy", Config().proxy))
    if proxy.scheme in WITHOUT_PROXY:
        return
    flags, environment, file = layers
    named_above = False  # the URL stands in a higher layer than the one looked at
    for layer in (flags, environment, file):
        if "proxy" in layer and not named_above and proxy.password:
            return
        # Without a user, a password from a layer below the URL's belongs to another proxy.
        if not (named_above and not proxy.username):
            found = _password_of(layer, env, environment=layer is environment, file=layer is file)
            if found:
                given["proxy"] = _with_password(proxy, *found).url()
                return
        named_above = named_above or "proxy" in layer


def _password_of(
    layer: dict[str, Any], env: Mapping[str, str], *, environment: bool, file: bool
) -> tuple[str, str] | None:
    """Return a layer's password outside of the URL, and where it stands."""
    if environment and env.get(PASSWORD_VARIABLE):
        return env[PASSWORD_VARIABLE], PASSWORD_VARIABLE
    if layer.get("password-file"):
        where = f"password-file {layer['password-file']}"
        return _first_line(layer["password-file"], where), where
    credentials = env.get("CREDENTIALS_DIRECTORY") if file else None
    if credentials and os.path.exists(os.path.join(credentials, CREDENTIAL)):
        where = f"credential {CREDENTIAL}"
        return _first_line(os.path.join(credentials, CREDENTIAL), where), where
    return None


def _with_password(proxy: ProxyUrl, password: str, where: str) -> ProxyUrl:
    if not proxy.username:
        raise ConfigError(f"{where} holds a password, but proxy names no user: write {proxy.scheme}://USER@HOST:PORT")
    if len(password.encode()) > MAX_CREDENTIAL:
        raise ConfigError(f"{where} holds a password of more than {MAX_CREDENTIAL} bytes")
    return parse_proxy(msgspec.structs.replace(proxy, password=password).url())


def _first_line(name: str, where: str) -> str:
    try:
        with open(name, encoding="utf-8") as file:
            line = file.readline(4096).rstrip("\r\n")
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: not UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{where}: cannot read it: {error.strerror}") from None
    if not line:
        raise ConfigError(f"{where}: its first line is empty, allowed is the password")
    return line


# -- where the control socket is --


def control_directories(env: Mapping[str, str] | None = None) -> list[Path]:
    """Return where control sockets may be, the place for a daemon of this user first."""
    env = os.environ if env is None else env
    system = Path("/run/ringway")
    uid = os.geteuid() if hasattr(os, "geteuid") else 0
    if uid == 0:
        return [system]
    runtime = env.get("XDG_RUNTIME_DIR")
    private = Path(runtime) / "ringway" if runtime else Path(f"/tmp/ringway-{uid}")
    return [private, system]


def control_path(config: Config, device_name: str, env: Mapping[str, str] | None = None) -> Path:
    """Return the control socket of a daemon on the device of that name; the directory may not exist yet."""
    return Path(config.control) if config.control else control_directories(env)[0] / f"{device_name}.sock"
