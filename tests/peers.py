"""Programs of other people that tests talk to: found, or the test is skipped with the reason.

    danted = need("danted")        # the path; the package that has it stands in the reason for the skip

With RINGWAY_REQUIRE_PEERS=1 (.ci/run) a missing peer fails the test.
"""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Final

import pytest

REQUIRE: Final = "RINGWAY_REQUIRE_PEERS"

# Program → Debian package, where the two differ.
_PACKAGES: Final = {
    "danted": "dante-server",
    "dig": "bind9-dnsutils",
    "ip": "iproute2",
    "nft": "nftables",
    "nginx": "nginx-light",
    "ping": "iputils-ping",
    "ps": "procps",
    "ss-local": "shadowsocks-libev",
    "ss-server": "shadowsocks-libev",
    "ssh": "openssh-client",
    "sshd": "openssh-server",
    "supervisorctl": "supervisor",
    "supervisord": "supervisor",
    "systemd-analyze": "systemd",
    "tinyproxy": "tinyproxy-bin",
}


def required() -> bool:
    """Tell whether a missing peer is a failure."""
    return os.environ.get(REQUIRE, "") not in ("", "0")


def find(program: str) -> str | None:
    """Return the path of a program, sbin included, or None."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"))
    return shutil.which(program, path=path)


def need(program: str) -> str:
    """Return the path of a program; skip the test, or fail it where peers are required, when it is not installed."""
    found = find(program)
    if found is None:
        _missing(f"{program} is not installed (apt-get install {_PACKAGES.get(program, program)})")
    assert found is not None
    return found


def need_module(name: str, package: str) -> None:
    """Skip or fail the test when a Python module of the test extra is not installed."""
    if importlib.util.find_spec(name) is None:
        _missing(f"{name} is not installed (pip install {package})")


def why_no_namespaces() -> str:
    """Return why network namespaces with a TUN device cannot be had here; "" when they can."""
    if os.geteuid() != 0:
        return "needs root"
    if not Path("/dev/net/tun").exists():
        return "needs /dev/net/tun"
    if find("ip") is None:
        return "ip is not installed (apt-get install iproute2)"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"cannot open /dev/net/tun: {error.strerror}"
    return ""


def _missing(reason: str) -> None:
    if required():
        pytest.fail(f"{REQUIRE} is set, and {reason}", pytrace=False)
    pytest.skip(reason)
