"""A bad link between two namespaces: a TUN device in each, and one process that carries frames between them.

┌ a ──────────────┐        link_process.py          ┌ b ──────────────┐
│ TUN 10.9.0.1/24 ├── loses, delays, reorders, … ───┤ TUN 10.9.0.2/24 │
│     fd00:9::1   │                                 │     fd00:9::2   │
└─────────────────┘                                 └─────────────────┘
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from tests.netns.tun import TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, open_tun
from tests.netns.world import Namespace

A4, B4 = "10.9.0.1", "10.9.0.2"
A6, B6 = "fd00:9::1", "fd00:9::2"
NAME: Final = "link0"
_TCP_OFFLOADS: Final = (TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN,)
_PROGRAM: Final = str(Path(__file__).with_name("link_process.py"))


class Link:
    """The link while it stands; `a_to_b` and `b_to_a` are the keywords of link_process.Direction.

    Without `offloads` each frame is one packet, with its checksum.
    """

    def __init__(
        self, a: Namespace, b: Namespace, a_to_b: dict[str, float], b_to_a: dict[str, float], *,
        seed: int = 1, offloads: bool = True, mtu: int = 1500,
    ) -> None:  # fmt: skip
        self._fds: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        try:
            for namespace, address4, address6 in ((a, A4, A6), (b, B4, B6)):
                self._fds.append(
                    open_tun(
                        namespace, NAME, mtu=mtu, offloads=_TCP_OFFLOADS if offloads else (),
                        address4=f"{address4}/24", address6=f"{address6}/64",
                    )
                )  # fmt: skip
                # The only losses shall be those asked for, however late the process comes to read.
                namespace.ip(f"link set {NAME} txqueuelen 10000")
            self._process = a.popen(
                [
                    sys.executable, "-I", "-S", _PROGRAM, *map(str, self._fds), str(seed),
                    json.dumps(a_to_b), json.dumps(b_to_a),
                ],
                stdout=subprocess.PIPE, pass_fds=self._fds,
            )  # fmt: skip
            assert self._process.stdout is not None
            if self._process.stdout.readline() != b"ready\n":
                raise RuntimeError("the link's process ended at once")
        except BaseException:
            self.close()
            raise

    def counts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what it counted so far on the way from a to b and on the way back."""
        assert self._process is not None
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGUSR1)
        there, back = json.loads(self._process.stdout.readline())
        return there, back

    def pause(self) -> None:
        """Carry nothing and lose everything until `go_on`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGUSR2)

    go_on = pause

    def close(self) -> None:
        """Take the link away, devices and all."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._process = None
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> "Link":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
