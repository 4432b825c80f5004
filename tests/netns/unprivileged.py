"""Runs commands as nobody where everybody may open /dev/net/tun, which is how desktop distributions have it.

The node on this machine stays as it is: a copy with another mode is mounted over it, in a mount namespace that goes
with the command. The checkout and its environment are mounted where nobody can read them, wherever they lie.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from tests.netns.world import ROOT
from tests.peers import need

NOBODY: Final = 65534

_SCRIPT: Final = """
set -e
rm -f "$PLACE/tun"
mknod -m "$TUN_MODE" "$PLACE/tun" c 10 200
mount --bind "$PLACE/tun" /dev/net/tun
mount --bind "$ROOT" "$PLACE/root"
mount --bind "$PREFIX" "$PLACE/prefix"
cd "$PLACE/root"
exec setpriv --reuid=65534 --regid=65534 --clear-groups --bounding-set=-all "$@"
"""


class Unprivileged:
    """How to run our modules as nobody."""

    def __init__(self, place: Path, tun_mode: str) -> None:
        python = Path(sys.executable)
        if python.is_relative_to(sys.prefix):
            python = place / "prefix" / python.relative_to(sys.prefix)
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RINGWAY_")},
            "PLACE": str(place),
            "ROOT": str(ROOT),
            "PREFIX": sys.prefix,
            "TUN_MODE": tun_mode,
            "HOME": "/",
            "PYTHONPATH": str(place / "root"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.env.pop("XDG_RUNTIME_DIR", None)
        self._before = ["unshare", "--mount", "sh", "-c", _SCRIPT, "sh"]
        self.python = str(python)

    def command(self, *arguments: str) -> list[str]:
        """Return the command line that runs a program as nobody."""
        return [*self._before, *arguments]

    def module(self, name: str, *arguments: str) -> list[str]:
        """Return the command line that runs a module as nobody."""
        return self.command(self.python, "-m", name, *arguments)


@contextmanager
def unprivileged(tun_mode: str = "0666") -> Iterator[Unprivileged]:
    """Prepare the places; skip where a program is missing."""
    need("setpriv")
    need("unshare")
    with TemporaryDirectory(prefix="ringway-nobody-") as directory:
        place = Path(directory)
        place.chmod(0o755)
        (place / "root").mkdir()
        (place / "prefix").mkdir()
        yield Unprivileged(place, tun_mode)
