"""How many workers to run: as many as there are CPUs that affinity and the cgroup's quota allow."""

import math
from pathlib import Path

import psutil


def usable_cpus(root: Path = Path("/")) -> int:
    """Return the CPUs that this process may keep busy, at least 1; `root` is where /proc and /sys are."""
    cpus = len(psutil.Process().cpu_affinity() or ()) or psutil.cpu_count() or 1
    quota = cgroup_quota(root)
    if quota is not None:
        # Half a CPU more than a whole number is worth a worker of its own; less is not.
        cpus = min(cpus, max(1, math.floor(quota + 0.5)))
    return cpus


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """Return the CPUs that the cgroup of this process may use on average, or None when nothing limits it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _number, controllers, path = line.split(":", 2)
        if not controllers:
            quotas += _quotas_v2(root / "sys/fs/cgroup", path)
        elif "cpu" in controllers.split(","):
            for mount in ("cpu,cpuacct", "cpu"):
                quotas += _quotas_v1(root / "sys/fs/cgroup" / mount, path)
    return min(quotas, default=None)


def _levels(mount: Path, path: str) -> list[Path]:
    """Return the cgroup's directory and those above it; in a container the mount itself may be the cgroup."""
    levels = [mount]
    for part in Path(path).parts[1:]:
        if part == "..":
            break
        levels.append(levels[-1] / part)
    return levels


def _quotas_v2(mount: Path, path: str) -> list[float]:
    quotas = []
    for level in _levels(mount, path):
        try:
            limit, period = (level / "cpu.max").read_text().split()
            if limit != "max":
                quotas.append(int(limit) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return quotas


def _quotas_v1(mount: Path, path: str) -> list[float]:
    quotas = []
    for level in _levels(mount, path):
        try:
            limit = int((level / "cpu.cfs_quota_us").read_text())
            if limit > 0:
                quotas.append(limit / int((level / "cpu.cfs_period_us").read_text()))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return quotas
