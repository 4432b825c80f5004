"""What the control socket tells: the processes with their CPU time and memory, the counters, and the flows in all."""

import os
import time
from typing import TYPE_CHECKING, Any

import psutil

from gateway import __version__
from gateway.device import feature_names

if TYPE_CHECKING:
    from gateway.device import Device
    from gateway.process import Process
    from ipc.counters import Counters

#: the gauges of the workers that are flows
_FLOWS = {"tcp": "tcp_flows", "udp": "udp_associations"}


def status(
    *,
    device: "Device",
    proxy: str,
    udp: dict[str, str],
    pipelined: bool,
    placement: str,
    started_at: float,
    processes: "list[Process]",
    counters: "Counters",
) -> dict[str, Any]:
    """Return the answer to `status`; `proxy` is shown as it is, without its password, `started_at` is monotonic.

    `udp` holds the "mode" of the configuration, and what was "found" for auto; `pipelined`: handshakes go in one go.
    """
    words = counters.snapshot()
    return {
        "version": __version__,
        "uptime": time.monotonic() - started_at,
        "device": {"name": device.name, "mtu": device.mtu, "features": feature_names(device.features)},
        "proxy": proxy,
        "udp": udp,
        "pipelined": pipelined,
        "placement": placement,
        "processes": [
            {"role": "supervisor", "shard": None, "state": "running", "restarts": 0} | process_figures(os.getpid()),
            *(
                {
                    "role": process.role.name,
                    "shard": process.shard if process.role.per_shard else None,
                    "state": process.state,
                    "restarts": process.restarts,
                }
                | process_figures(process.child.pid if process.child else 0)
                for process in processes
            ),
        ],
        "counters": words,
        "flows": {kind: sum(block.get(gauge, 0) for block in words.values()) for kind, gauge in _FLOWS.items()},
    }


def process_figures(pid: int) -> dict[str, Any]:
    """Return pid, cpu_seconds (user and system) and pss (octets) of a process; 0 for what cannot be had."""
    figures: dict[str, Any] = {"pid": pid, "cpu_seconds": 0.0, "pss": 0}
    if not pid:
        return figures
    try:
        process = psutil.Process(pid)
        times = process.cpu_times()
        figures["cpu_seconds"] = times.user + times.system
        # Not RSS: shared memory would be counted once a process.
        figures["pss"] = process.memory_full_info().pss
    except psutil.Error:
        pass  # it ended just now, or may not be looked into
    return figures
