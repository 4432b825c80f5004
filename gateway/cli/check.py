"""`ringway check`: is the configuration right, and what can the proxy do?"""

import json
import sys
from typing import Any, Final

import click

from gateway.cli.options import ConfiguredCommand, configuration, configuration_options
from gateway.config import Config, ConfigError, parse_proxy
from gateway.conversation import Address
from gateway.probe import Finding, best_mode, probe
from gateway.proxyurl import CARRIED, WITHOUT_PROXY
from workers.socks import modes

_MARKS: Final = {
    "works": "[green]works[/]",
    "understood": "[green]understood[/]",
    "unknown": "[yellow]cannot tell[/]",
    "fails": "[red]does not work[/]",
}
_REQUIRABLE: Final = {
    "ipv4": ("connect-ipv4",),
    "ipv6": ("connect-ipv6",),
    "name": ("connect-name",),
}


@click.command("check", cls=ConfiguredCommand)
@click.option(
    "--target",
    "targets",
    metavar="HOST:PORT",
    multiple=True,
    help="CONNECT there instead of to 1.1.1.1, its IPv6 address and its name; may be given again. It must be reached.",
)
@click.option(
    "--require",
    "required",
    type=click.Choice([*_REQUIRABLE, "udp"]),
    multiple=True,
    help="What must work beside TCP, for exit code 0; may be given again.",
)
@click.option("--timeout", default=5.0, metavar="SECONDS", type=click.FloatRange(0.1, 60), help="For each probe.  [5]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@configuration_options
def command(
    config_path: str | None,
    targets: tuple[str, ...],
    required: tuple[str, ...],
    timeout: float,
    as_json: bool,
    **values: Any,
) -> int:
    """Check the configuration, then probe the proxy.

    Takes the flags of `ringway run`. Without --target, any answer to a CONNECT shows that it is understood, so that a
    proxy in a closed network passes too.

    Exit codes: 0 what is needed works (log in, CONNECT of one kind, and what --require names), 1 it does not, 2
    configuration.
    """
    config = configuration(config_path, values)
    addresses = [_target(one) for one in targets]
    proxy = parse_proxy(config.proxy)
    if proxy.scheme in CARRIED:
        from gateway.probecarried import probe_carried

        findings = probe_carried(config, targets=addresses, timeout=timeout)
    else:
        findings = probe(
            proxy, targets=addresses, resolvers=config.tun_dns, udp_address=config.udp_address, timeout=timeout
        )
    missing = missing_of(findings, required, must_connect=bool(targets), direct=proxy.scheme in WITHOUT_PROXY)
    if as_json:
        _print_json(config, findings, missing)
    else:
        _print_table(str(proxy), findings, missing)
    return 1 if missing else 0


def missing_of(findings: list[Finding], required: tuple[str, ...], *, must_connect: bool, direct: bool) -> list[str]:
    """Return the names of what is needed and does not work."""
    good = {finding.name for finding in findings if finding.result in ("works", "understood")}
    missing = [finding.name for finding in findings if finding.name in ("proxy", "login") and finding.name not in good]
    if missing or direct:
        return missing
    connects = [finding for finding in findings if finding.name.startswith("connect-")]
    if must_connect:
        missing += [finding.name for finding in connects if finding.result != "works"]
    elif not any(finding.name in good for finding in connects):
        missing.append("connect")
    for what in required:
        if what == "udp":
            missing += ["udp"] if udp_mode_of(findings) == modes.NONE else []
        else:
            missing += [name for name in _REQUIRABLE[what] if name not in good and name not in missing]
    return missing


def udp_mode_of(findings: list[Finding]) -> str:
    """Return the mode that udp-mode auto comes to."""
    return best_mode({finding.name: finding.result for finding in findings})


def _target(text: str) -> Address:
    try:
        proxy = parse_proxy("socks5://" + text)  # the same grammar: HOST:PORT, IPv6 in brackets
    except ConfigError as error:
        raise ConfigError(f"--target {text}: {error}") from None
    if proxy.username or not text.endswith(f":{proxy.port}"):
        raise ConfigError(f"--target {text}: allowed is HOST:PORT")
    return proxy.host, proxy.port


def _print_json(config: Config, findings: list[Finding], missing: list[str]) -> None:
    answer = {
        "ok": not missing,
        "missing": missing,
        "proxy": str(parse_proxy(config.proxy)),
        "config": config.public(),
        "udp": udp_mode_of(findings),
        "checks": [finding._asdict() for finding in findings],
    }
    json.dump(answer, sys.stdout, indent=2, ensure_ascii=False)
    print()


def _print_table(proxy: str, findings: list[Finding], missing: list[str]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=f"configuration is right; proxy {escape(proxy)}", title_justify="left", box=None, pad_edge=False
    )
    for name in ("probe", "result"):
        table.add_column(name, no_wrap=True)
    table.add_column("what was seen", overflow="fold")
    table.add_column("ms", justify="right", no_wrap=True)
    for finding in findings:
        table.add_row(finding.name, _MARKS[finding.result], escape(finding.seen), f"{finding.milliseconds:.0f}")
    console = Console(soft_wrap=False)
    console.print(table)
    if any(finding.name.startswith("connect-") for finding in findings):
        console.print(f"With udp-mode auto, datagrams go {modes.WORDS[udp_mode_of(findings)]}.")
    if missing:
        console.print(f"[red]Needed, and does not work:[/] {', '.join(missing)}")
    else:
        console.print("What is needed works.")
