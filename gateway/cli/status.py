"""`ringway status`: what the running gateway does."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gateway.config import ConfigError
from gateway.status import StatusError, ask, counters_set, rates, running_instances, traffic
from workers.socks import modes

if TYPE_CHECKING:
    from rich.table import Table


@click.command("status")
@click.option("--control", metavar="PATH", help="Control socket of the gateway; the only one that runs by default.")
@click.option(
    "--interval",
    default=0.7,
    metavar="SECONDS",
    type=click.FloatRange(0.05, 60),
    help="Time over which throughput is measured.  [0.7]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(control: str | None, interval: float, as_json: bool) -> int:
    """Show processes, flows, throughput and every counter that is not zero.

    Exit codes: 0 shown, 1 no gateway runs or it does not answer, 2 usage.
    """
    try:
        path = Path(control) if control else _only_instance()
        before = ask(path, {"command": "status"})
        started = time.monotonic()
        time.sleep(interval)
        status = ask(path, {"command": "status"})
        speed = rates(traffic(before), traffic(status), time.monotonic() - started)
    except StatusError as error:
        print("ringway:", error, file=sys.stderr)
        return 1
    if as_json:
        json.dump(status | {"traffic": traffic(status), "rates": speed}, sys.stdout, indent=2, ensure_ascii=False)
        print()
    else:
        _print_tables(path, status, speed)
    return 0


def _only_instance() -> Path:
    instances = running_instances()
    if not instances:
        raise StatusError("no gateway runs here (none that this user's `ringway run` or root's has started)")
    if len(instances) > 1:
        raise ConfigError(f"several gateways run; name one by --control: {', '.join(map(str, instances))}")
    return instances[0]


def _print_tables(path: Path, status: dict[str, Any], speed: dict[str, float]) -> None:
    from rich.console import Console
    from rich.markup import escape

    device = status.get("device") or {}
    flows = status.get("flows") or {}
    total = traffic(status)
    console = Console()
    where = f"{device.get('name', '?')} mtu {device.get('mtu', '?')}  →  {status.get('proxy', '?')}"
    how = f"{status.get('placement', '?')}, {path}"
    console.print(
        f"[bold]ringway {escape(str(status.get('version', '?')))}[/]  up {_age(status.get('uptime') or 0)}  "
        f"{escape(where)}  ({escape(how)})",
        soft_wrap=True,
    )

    udp = status.get("udp") or {}
    mode = str(udp.get("found") or udp.get("mode") or "?")
    if mode in modes.WORDS:
        pipelined = "; handshakes in one go" if status.get("pipelined") else ""
        console.print(f"datagrams go to the proxy {modes.WORDS[mode]}{pipelined}", soft_wrap=True)

    processes = _table("process", "shard", "pid", "state", "restarts", "CPU s", "PSS")
    for one in status.get("processes") or []:
        shard = one.get("shard")
        processes.add_row(
            escape(str(one.get("role", "?"))),
            "" if shard is None else str(shard),
            str(one.get("pid") or ""),
            escape(str(one.get("state", ""))),
            str(one.get("restarts") or 0),
            f"{one.get('cpu_seconds') or 0:.1f}",
            _bytes(one["pss"]) if one.get("pss") else "",
        )
    console.print(processes)

    moving = _table("", "now", "frames/s", "in all", "frames")
    for direction in ("up", "down"):
        moving.add_row(
            direction,
            f"{_bits(speed[f'bytes_{direction}'] * 8)}/s",
            f"{speed[f'frames_{direction}']:,.0f}",
            _bytes(total[f"bytes_{direction}"]),
            f"{total[f'frames_{direction}']:,}",
        )
    console.print(moving)
    console.print("flows  " + "  ".join(f"{escape(str(kind))} {count:,}" for kind, count in sorted(flows.items())))

    counters = _table("counter of", "name", "value")
    for owner, name, value in counters_set(status):
        counters.add_row(escape(owner), escape(name), f"{value:,}")
    if counters.row_count:
        console.print(counters)


def _table(*columns: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        left = index == 0 or column in ("state", "name")
        table.add_column(column, justify="left" if left else "right", no_wrap=True, header_style="dim")
    return table


def _age(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes}m"
    return f"{minutes}m {rest}s" if minutes else f"{rest}s"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _bits(count: float) -> str:
    for unit in ("bit", "kbit", "Mbit"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bit" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} Gbit"
