"""Results of a benchmark: medians, minimum and maximum, ratios to `direct` in the same round; a table and JSON."""

import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from tests.bench.measures import MEASURES, Figures, Measure
from tests.netns.world import ROOT

RESULTS: Final = Path(__file__).with_name("results")
_EXTRA: Final = {
    "p50_us": "p50 {:.0f} µs", "p99_us": "p99 {:.0f} µs", "cpu_s_per_gbit": "{:.3f} CPU s/Gbit",
    "cpu_us_each": "{:.1f} CPU µs each", "failed": "{:.0f} failed", "lost": "{:.0f} lost",
    "cpu_percent": "{:.2f} % CPU", "wakeups_s": "{:.2f} wakeups/s", "pss_mb": "{:.1f} MB in all",
}  # fmt: skip


@dataclass(slots=True)
class Results:
    """Figures by measure, subject and round; a round that failed holds the reason instead."""

    cores: list[int]
    rounds: dict[str, dict[str, list[Figures | str]]] = field(default_factory=dict)

    def add(self, measure: Measure, subject: str, outcome: "Figures | str") -> None:
        self.rounds.setdefault(measure.name, {}).setdefault(subject, []).append(outcome)

    def values(self, measure: Measure, subject: str, figure: str = "") -> list[float]:
        outcomes = self.rounds.get(measure.name, {}).get(subject, [])
        return [
            o[figure or measure.figure] for o in outcomes if not isinstance(o, str) and (figure or measure.figure) in o
        ]

    def ratios(self, measure: Measure, subject: str, *, limited: bool = False) -> list[float]:
        """Return the ratio to `direct` round by round, or to the subject's own limit where that is less."""
        rows = self.rounds.get(measure.name, {})
        own = self.rounds.get(measure.limit, {}).get(subject, []) if limited else []
        bases = itertools.zip_longest(rows.get("direct", []), own, fillvalue="")
        return [
            one[measure.figure]
            / min(base[measure.figure], most[measure.figure] if isinstance(most, dict) else math.inf)
            for one, (base, most) in zip(rows.get(subject, []), bases, strict=False)
            if isinstance(one, dict) and isinstance(base, dict) and base[measure.figure]
        ]

    def show(self) -> None:
        """Print the table; narrow terminals get it whole, too."""
        table = Table(title="median (minimum – maximum) of the rounds", title_justify="left", box=None, pad_edge=False)
        for heading in ("measure", "subject"):
            table.add_column(heading, no_wrap=True)
        for heading in ("", "", "to direct", "floor"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("besides", overflow="fold")
        for measure in MEASURES:
            for position, subject in enumerate(self.rounds.get(measure.name, {})):
                table.add_row(measure.name if not position else "", *self._row(measure, subject))
        Console(width=None if os.isatty(1) else 150, highlight=False).print(table)

    def _row(self, measure: Measure, subject: str) -> list[str]:
        values = self.values(measure, subject)
        if not values:
            reason = next(o for o in self.rounds[measure.name][subject] if isinstance(o, str))
            return [subject, "–", "", "", "", reason]
        middle = statistics.median(values)
        spread = f"({_number(min(values))} – {_number(max(values))})" if len(values) > 1 else ""
        ratios = self.ratios(measure, subject)
        ratio = f"{statistics.median(ratios):.2f}" if ratios and subject != "direct" else ""
        floor = ""
        # The floors are for workers that connect themselves: in the other rows the proxy's speed is part of the figure.
        if measure.floor is not None and subject.removesuffix("+") in ("ringway", "ringway-single"):
            possible = self.ratios(measure, subject, limited=True)
            judged = middle if measure.absolute else (statistics.median(possible) if possible else None)
            if judged is not None:
                reached = judged <= measure.floor if measure.lower_is_better else judged >= measure.floor
                bound = f"{'≤' if measure.lower_is_better else '≥'} {measure.floor:g}"
                floor = f"{bound} {'✓' if reached else '✗'}"
        besides = []
        for figure, form in _EXTRA.items():
            more = self.values(measure, subject, figure)
            if (
                figure != measure.figure
                and more
                and (statistics.median(more) or figure in ("wakeups_s", "cpu_percent"))
            ):
                besides.append(form.format(statistics.median(more)))
        failures = [o for o in self.rounds[measure.name][subject] if isinstance(o, str)]
        besides += [f"{len(failures)} rounds failed: {failures[0]}"] if failures else []
        return [subject, f"{_number(middle)} {measure.unit}", spread, ratio, floor, ", ".join(besides)]

    def save(self, path: Path | None = None) -> Path:
        """Write everything, with the commit and the machine, and return where."""
        machine = describe_machine(self.cores)
        if path is None:
            RESULTS.mkdir(exist_ok=True)
            path = RESULTS / f"{time.strftime('%Y-%m-%d-%H%M')}-{machine['commit']}.json"
        path.write_text(json.dumps(machine | {"results": self.rounds}, indent=1) + "\n")
        return path


def describe_machine(cores: list[int]) -> dict[str, Any]:
    """Say what the figures were measured on."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return {
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
        "cpu": model,
        "cores_used": len(cores),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=10)
    return done.stdout.strip() or ("unknown" if arguments[0] == "rev-parse" else "")


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
