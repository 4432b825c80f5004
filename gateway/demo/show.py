"""What the demonstration shows: a table that lives while traffic moves, or plain lines where nobody watches."""

import sys
import time
from typing import Any, Final

from rich.console import Console
from rich.live import Live
from rich.table import Table

_PLAIN_EVERY: Final = 1.0  #: seconds between the lines of a step that goes on


class Board:
    """The steps, each with what it moved, and one line of figures from the gateway."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._steps: dict[str, dict[str, Any]] = {}
        self._figures = ""
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._printed_at = 0.0

    def __enter__(self) -> "Board":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line above the table."""
        self._console.print(text.rstrip(), highlight=False, markup=False, soft_wrap=True)

    def step(self, progress: dict[str, Any]) -> None:
        """Take a line of the client's."""
        self._steps[progress["step"]] = progress
        if self._live is not None:
            self._refresh()
        elif "ok" in progress or time.monotonic() - self._printed_at >= _PLAIN_EVERY:
            self._printed_at = time.monotonic()
            state = {True: "ok", False: "FAILED", None: "…"}[progress.get("ok")]
            text = progress.get("text", self._figures)
            self.say(f"  {progress['step']:<22} {amount(progress):>12} {speed(progress):>14}  {state:<6} {text}")

    def figures(self, status: dict[str, Any]) -> None:
        """Take an answer of the gateway's control socket."""
        flows = status.get("flows", {})
        processes = status.get("processes", [])
        cpu = sum(process.get("cpu_seconds") or 0 for process in processes)
        memory = sum(process.get("pss") or 0 for process in processes)
        self._figures = (
            f"gateway: {len(processes)} processes, {flows.get('tcp', 0)} TCP and {flows.get('udp', 0)} UDP flows, "
            f"{cpu:.1f} s CPU, {memory / 1e6:.0f} MB"
        )
        if self._live is not None:
            self._refresh()

    def _refresh(self) -> None:
        assert self._live is not None
        table = Table(box=None, padding=(0, 2, 0, 0), caption=self._figures, caption_justify="left")
        table.add_column("traffic through the gateway")
        table.add_column("moved", justify="right")
        table.add_column("speed", justify="right")
        table.add_column("checked")
        for name, progress in self._steps.items():
            colour = {True: "green", False: "bold red", None: "yellow"}[progress.get("ok")]
            text = progress.get("text", "…")
            table.add_row(name, amount(progress), speed(progress), f"[{colour}]{text}[/]")
        self._live.update(table, refresh=True)


def is_counted(progress: dict[str, Any]) -> bool:
    """Tell whether a step counts things, not octets."""
    return not progress["step"].startswith(("TCP up", "TCP down"))


def amount(progress: dict[str, Any]) -> str:
    """Write what a step has moved."""
    if is_counted(progress):
        return f"{progress['moved']:,}"
    return f"{progress['moved'] / 1e6:,.1f} MB"


def speed(progress: dict[str, Any]) -> str:
    """Write how fast it went."""
    seconds = max(progress["seconds"], 1e-6)
    if is_counted(progress):
        return f"{progress['moved'] / seconds:,.0f}/s"
    return f"{progress['moved'] * 8 / seconds / 1e6:,.0f} Mbit/s"


def summary(steps: list[dict[str, Any]]) -> str:
    """Write in one sentence what the steps have moved."""
    seconds = sum(step["seconds"] for step in steps)
    octets = sum(step["moved"] for step in steps if not is_counted(step))

    def count(word: str) -> int:
        return sum(step["moved"] for step in steps if word in step["step"])

    families = sorted({step["step"].rpartition(", ")[2] for step in steps})
    return (
        f"Moved {octets / 1e6:,.0f} MB over TCP, {count('connections'):,} short connections, "
        f"{count('UDP'):,} datagrams and {count('ping'):,} pings in {seconds:.1f} s over {' and '.join(families)}."
    )


def console() -> Console:
    """Return standard output as rich sees it."""
    return Console(file=sys.stdout)
