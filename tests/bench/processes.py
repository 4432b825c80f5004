"""CPU time, memory and wakeups of a process tree, from /proc."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Usage:
    """What the processes of a tree had used at a moment."""

    at: float
    cpu: dict[int, float]  #: pid → seconds on a CPU
    switches: dict[int, int]  #: pid → context switches, each a wakeup or a preemption

    def cpu_since(self, earlier: "Usage") -> float:
        """Return CPU seconds between two moments, over all processes."""
        return sum(seconds - earlier.cpu.get(pid, 0.0) for pid, seconds in self.cpu.items())

    def wakeups_since(self, earlier: "Usage") -> dict[int, float]:
        """Return wakeups per second of each process between two moments."""
        span = self.at - earlier.at
        return {pid: (count - earlier.switches.get(pid, 0)) / span for pid, count in self.switches.items()}


def usage(processes: Iterable[psutil.Process]) -> Usage:
    """Read what every process, with all its threads, has used by now."""
    cpu: dict[int, float] = {}
    switches: dict[int, int] = {}
    for process in processes:
        try:
            for task in Path(f"/proc/{process.pid}/task").iterdir():
                # Nanoseconds on a CPU; the ticks of /proc/PID/stat would be too coarse for a second of work.
                seconds = int((task / "schedstat").read_text().split()[0]) / 1e9
                cpu[process.pid] = cpu.get(process.pid, 0.0) + seconds
                for line in (task / "status").read_text().splitlines():
                    if "ctxt_switches" in line:
                        switches[process.pid] = switches.get(process.pid, 0) + int(line.split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return Usage(time.monotonic(), cpu, switches)


def pss(processes: Iterable[psutil.Process]) -> int:
    """Return the proportional set size of the processes together, in bytes: a shared page counts once."""
    total = 0
    for process in processes:
        try:
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total
