"""`ringway proxy`: the embedded SOCKS5 server in the foreground, until TERM or INT; alone, or one end of a tunnel."""

import ipaddress
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gateway.proxy.tunnelurl import (
    ALLOWED,
    AUTO,
    HTTP,
    SOCKS_TLS,
    TLS,
    UDP_MODES,
    WSS,
    parse_tunnel,
    parse_via,
    split_scheme,
)
from gateway.proxyurl import ConfigError

if TYPE_CHECKING:
    from gateway.proxy.forward import Forwarder
    from gateway.proxy.tls import ServerTls

log = logging.getLogger(__name__)

Command = TypeVar("Command", bound=Callable[..., Any])

MAX_FIELD = 255


class BadUsage(click.ClickException):
    """Say in one line what is wrong with the command line."""

    exit_code = 2


class _OneLineErrors(click.Command):
    """A command whose errors have no usage lines in front of them, wherever it is called from."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise BadUsage(error.format_message()) from None


def parse_listen(text: str) -> tuple[str, str, int]:
    """Return carrier, address and port of [SCHEME://]ADDR:PORT.

    ADDR alone means the port of the scheme, :PORT means 127.0.0.1, IPv6 stands in brackets.
    """
    wrong = BadUsage(
        f"--listen {text}: allowed are ADDR:PORT and [ADDR6]:PORT, with a numeric address or localhost, "
        f"behind nothing or one of {ALLOWED}"
    )
    try:
        carrier, default, authority, path = split_scheme(text)
    except ConfigError:
        raise wrong from None
    if path != "/":
        raise BadUsage(f"--listen {text}: any path is answered, so none can be said")
    if authority.startswith("["):
        host, bracket, tail = authority[1:].partition("]")
        if not bracket or (tail and not tail.startswith(":")):
            raise wrong
        port = tail.removeprefix(":")
    elif authority.count(":") > 1:
        host, port = authority, ""
    else:
        host, _, port = authority.partition(":")
    host = host or "127.0.0.1"
    port = port or str(default)
    if host != "localhost":
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise wrong from None
    if not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise BadUsage(f"--listen {text}: port {port} is not in 0…65535 (0 picks a free one)")
    return carrier, host, int(port)


def _credentials(user: str | None, password_file: str | None, password: str | None) -> tuple[str | None, str]:
    """Return username and password; the file beats the environment."""
    if password_file:
        try:
            text = Path(password_file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise BadUsage(f"--password-file {password_file}: {reason}") from None
        password = text.split("\n", 1)[0].removesuffix("\r")
    if user is None:
        if password:
            raise BadUsage("a password was given without --user (or RINGWAY_PROXY_USER)")
        return None, ""
    if not password:
        raise BadUsage("--user needs a password: --password-file FILE or RINGWAY_PROXY_PASSWORD")
    for what, value in (("user", user), ("password", password)):
        if not 1 <= len(value.encode()) <= MAX_FIELD:
            raise BadUsage(f"the {what} has {len(value.encode())} bytes; allowed are 1 to {MAX_FIELD}")
    return user, password


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach the address."""
    return host == "localhost" or ipaddress.ip_address(host.partition("%")[0]).is_loopback


def _server_tls(carrier: str, certificate: str | None, key: str | None, ca: str | None) -> "ServerTls | None":
    """Return what clients' TLS is answered with."""
    from gateway.proxy.tls import ServerTls, TlsError

    if not certificate:
        if carrier in (TLS, WSS):
            raise BadUsage("--listen with tls or wss needs --listen-cert FILE (and --listen-key, if the key is apart)")
        if key or ca:
            raise BadUsage("--listen-key and --listen-ca need --listen-cert FILE")
        return None
    try:
        return ServerTls(certificate, key, ca)
    except TlsError as error:
        raise BadUsage(f"--listen-cert: {error}") from None


def _forwarder(
    forward: str | None, via: str | None, udp_mode: str | None, socks_tls: str | None, **tls: Any
) -> "Forwarder | None":
    """Return the way through another server, if there is one."""
    from gateway.proxy.forward import Forwarder
    from gateway.proxy.tls import ClientTls, TlsError

    needless = [f"--{name.replace('_', '-')}" for name, value in tls.items() if value]
    if not forward:
        needless += [
            f"--{name}" for name, value in (("via", via), ("udp-mode", udp_mode), ("socks-tls", socks_tls)) if value
        ]
        if needless:
            raise BadUsage(f"{needless[0]} means nothing without --forward URL")
        return None
    try:
        url = parse_tunnel(forward)
    except ConfigError as error:
        raise BadUsage(f"--forward: {error}") from None
    client_tls = None
    if url.carrier in (TLS, WSS) or socks_tls not in (None, "off"):
        if tls["tls_key"] and not tls["tls_cert"]:
            raise BadUsage("--tls-key needs --tls-cert FILE")
        try:
            client_tls = ClientTls(
                ca=tls["tls_ca"],
                server_name=tls["tls_server_name"],
                certificate=tls["tls_cert"],
                key=tls["tls_key"],
                insecure=tls["tls_insecure"],
            )
        except TlsError as error:
            raise BadUsage(f"--forward: {error}") from None
    elif needless:
        raise BadUsage(f"{needless[0]} means nothing: {url} is not TLS, and --socks-tls is off")
    try:
        proxy = parse_via(via) if via else None
    except ConfigError as error:
        raise BadUsage(f"--via: {error}") from None
    if proxy and url.carrier == HTTP and proxy.scheme != "http":
        raise BadUsage(f"--via {proxy}: the HTTP carrier goes through an HTTP proxy only")
    return Forwarder(url, udp_mode=udp_mode or AUTO, socks_tls=socks_tls or "off", tls=client_tls, via=proxy)


def _option(name: str, help: str, **attributes: Any) -> Callable[[Command], Command]:
    """Return an option with its environment variable."""
    variable = name.lstrip("-").replace("-", "_").upper()
    return click.option(name, envvar=f"RINGWAY_PROXY_{variable}", help=help, **attributes)


@click.command("proxy", cls=_OneLineErrors)
@click.option("-l", "--listen", default="127.0.0.1:1080", show_default=True, metavar="[SCHEME://]ADDR:PORT",
              envvar="RINGWAY_PROXY_LISTEN",
              help=f"Where to listen, and what carries SOCKS5: {ALLOWED}. Port 0 picks a free one.")  # fmt: skip
@click.option("-u", "--user", metavar="NAME", envvar="RINGWAY_PROXY_USER",
              help="Demand this user name, and the password of --password-file or RINGWAY_PROXY_PASSWORD.")  # fmt: skip
@click.option("--password-file", metavar="FILE", envvar="RINGWAY_PROXY_PASSWORD_FILE",
              help="File whose first line is the password.")  # fmt: skip
@_option("--listen-cert", "Certificate chain (PEM) for clients that come by TLS, by gost's methods 80, 82 and 8A too.",
         metavar="FILE")  # fmt: skip
@_option("--listen-key", "Its key, if that is not in the same file.", metavar="FILE")
@_option("--listen-ca", "Demand a certificate of this CA (PEM) from clients.", metavar="FILE")
@_option("--forward", f"Send everything through this server: {ALLOWED} with user:password@host:port.", metavar="URL")
@_option("--udp-mode", "How UDP goes there: by UDP ASSOCIATE beside the tunnel, or in the tunnel as gost, hev or "
         "sing-box (uot) do.  [default: auto, the first that is granted]", type=click.Choice([*UDP_MODES]))  # fmt: skip
@_option("--socks-tls", "Ask for TLS within SOCKS5 as gost does: v2 and v3 (gost) or v1 (gost-v1). Its ciphers "
         "(aes-256-cfb …) are not spoken.", type=click.Choice(SOCKS_TLS))  # fmt: skip
@_option("--tls-ca", "Trust this CA (PEM) and no other.", metavar="FILE")
@_option("--tls-server-name", "Name that the server's certificate must have, and SNI, if it is not the URL's host.",
         metavar="NAME")  # fmt: skip
@_option("--tls-cert", "Certificate (PEM) to show to the server.", metavar="FILE")
@_option("--tls-key", "Its key, if that is not in the same file.", metavar="FILE")
@_option("--tls-insecure", "Take any certificate: gost's own is self-signed.", is_flag=True)
@_option("--via", "Proxy before the server of --forward: http://, socks5://, socks4:// or socks4a://.", metavar="URL")
@click.option("--loglevel", type=click.Choice(["debug", "info", "warn", "error", "silent"]), default="info",
              show_default=True, envvar="RINGWAY_LOGLEVEL", help="How much to say on standard error.")  # fmt: skip
def proxy(
    listen: str,
    user: str | None,
    password_file: str | None,
    listen_cert: str | None,
    listen_key: str | None,
    listen_ca: str | None,
    loglevel: str,
    **forwarding: Any,
) -> int:
    """Run the embedded SOCKS5 proxy in the foreground.

    CONNECT, BIND and UDP ASSOCIATE, over IPv4 and IPv6, to addresses and names, with or without user and password; UDP
    inside TCP as well, for clients that ask for it as gost (F3, or frames behind UDP ASSOCIATE), hev (05) or sing-box
    (UoT 1 and 2) do. With --forward all of it goes through a second server, UDP included: two Ringways carry UDP across
    a path that lets only TCP through. Only this machine can use it unless --listen says otherwise. Prints
    `listening on ADDR:PORT` when ready.

    Exit codes: 0 stopped as asked, 1 failed while running, 2 usage or configuration.
    """
    from gateway.cli.run import raise_descriptor_limit, start_logging
    from gateway.proxy import ListenError, Server

    carrier, host, port = parse_listen(listen)
    username, password = _credentials(user, password_file, os.environ.get("RINGWAY_PROXY_PASSWORD"))
    tls = _server_tls(carrier, listen_cert, listen_key, listen_ca)
    forwarder = _forwarder(**forwarding)
    start_logging(loglevel)
    raise_descriptor_limit()
    try:
        server = Server(
            (host, port), username=username, password=password, carrier=carrier, tls=tls, outbound=forwarder
        )
    except ListenError as error:
        raise BadUsage(str(error)) from None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    if username is None and not is_loopback(host):
        log.warning("%s is not a loopback address and no password is set: anybody who reaches it can use it", listen)
    address, port = server.address
    click.echo(f"listening on [{address}]:{port}" if ":" in address else f"listening on {address}:{port}")
    server.serve_forever()
    log.debug("stopped; %s", ", ".join(f"{name} {count}" for name, count in sorted(server.counters.items())))
    return 0


command = proxy  # as gateway.cli looks for it
