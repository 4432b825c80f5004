"""`ringway proxy`: the embedded SOCKS5 server in the foreground, until TERM or INT."""

import ipaddress
import logging
import os
import signal
from pathlib import Path

import click

log = logging.getLogger(__name__)

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


def parse_listen(text: str) -> tuple[str, int]:
    """Take ADDR:PORT apart; ADDR alone means port 1080, :PORT means 127.0.0.1, IPv6 stands in brackets."""
    wrong = BadUsage(f"--listen {text}: allowed are ADDR:PORT and [ADDR6]:PORT, with a numeric address or localhost")
    if text.startswith("["):
        host, bracket, tail = text[1:].partition("]")
        if not bracket or (tail and not tail.startswith(":")):
            raise wrong
        port = tail.removeprefix(":") or "1080"
    elif text.count(":") > 1:
        host, port = text, "1080"
    else:
        host, _, port = text.partition(":")
        port = port or "1080"
    host = host or "127.0.0.1"
    if host != "localhost":
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise wrong from None
    if not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise BadUsage(f"--listen {text}: port {port} is not in 0…65535 (0 picks a free one)")
    return host, int(port)


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


@click.command("proxy", cls=_OneLineErrors)
@click.option("-l", "--listen", default="127.0.0.1:1080", show_default=True, metavar="ADDR:PORT",
              envvar="RINGWAY_PROXY_LISTEN", help="Where to listen; port 0 picks a free one.")  # fmt: skip
@click.option("-u", "--user", metavar="NAME", envvar="RINGWAY_PROXY_USER",
              help="Demand this user name, and the password of --password-file or RINGWAY_PROXY_PASSWORD.")  # fmt: skip
@click.option("--password-file", metavar="FILE", envvar="RINGWAY_PROXY_PASSWORD_FILE",
              help="File whose first line is the password.")  # fmt: skip
@click.option("--loglevel", type=click.Choice(["debug", "info", "warn", "error", "silent"]), default="info",
              show_default=True, envvar="RINGWAY_LOGLEVEL", help="How much to say on standard error.")  # fmt: skip
def proxy(listen: str, user: str | None, password_file: str | None, loglevel: str) -> int:
    """Run the embedded SOCKS5 proxy in the foreground.

    CONNECT, BIND and UDP ASSOCIATE, over IPv4 and IPv6, to addresses and names, with or without user and password; UDP
    inside TCP as well, for clients that ask for it as gost (F3, or frames behind UDP ASSOCIATE), hev (05) or sing-box
    (UoT 1 and 2) do. Only this machine can use it unless --listen says otherwise. Prints `listening on ADDR:PORT` when
    ready.

    Exit codes: 0 stopped as asked, 1 failed while running, 2 usage or configuration.
    """
    from gateway.cli.run import raise_descriptor_limit, start_logging
    from gateway.proxy import ListenError, Server

    host, port = parse_listen(listen)
    username, password = _credentials(user, password_file, os.environ.get("RINGWAY_PROXY_PASSWORD"))
    start_logging(loglevel)
    raise_descriptor_limit()
    try:
        server = Server((host, port), username=username, password=password)
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
