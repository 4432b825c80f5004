"""Rights: who the children become, which capability stays for fwmark, and that nothing comes back."""

import os
import pwd
import socket
from pathlib import Path

import pytest

from gateway import privileges
from gateway.loop import wait_readable
from gateway.privileges import (
    CAP_NET_ADMIN,
    CAP_NET_RAW,
    Identity,
    PrivilegeError,
    give_up,
    identity_for,
    kernel_version,
    needed_capabilities,
    permitted_capabilities,
    probe_upstream_rights,
)
from gateway.process import fork_child

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
BOTH = 1 << CAP_NET_RAW | 1 << CAP_NET_ADMIN
NOBODY = Identity("nobody", 65534, 65534)


@pytest.mark.parametrize(
    ("release", "version"),
    [("6.1.0-13-amd64", (6, 1)), ("5.17", (5, 17)), ("5.15.0", (5, 15)), ("6.6-rc1", (6, 6)), ("4.19+", (4, 19))],
)
def test_kernel_version(release, version):
    assert kernel_version(release) == version


@pytest.mark.parametrize(
    ("fwmark", "interface", "version", "permitted", "needed"),
    [
        (0, "", (6, 1), BOTH, set()),
        (1, "", (6, 1), BOTH, {CAP_NET_RAW}),
        (1, "", (5, 16), BOTH, {CAP_NET_ADMIN}),
        (1, "", (6, 1), 1 << CAP_NET_ADMIN, {CAP_NET_ADMIN}),
        (0, "eth0", (6, 1), BOTH, set()),
        (0, "eth0", (5, 6), BOTH, {CAP_NET_RAW}),
        (1, "eth0", (5, 6), BOTH, {CAP_NET_ADMIN, CAP_NET_RAW}),
    ],
)
def test_needed_capabilities(fwmark, interface, version, permitted, needed):
    assert needed_capabilities(fwmark, interface, version, permitted) == needed


def in_a_child(main):
    """Run `main` in a child that gives up nothing by itself, and return what it tells."""

    def tell(channel) -> None:
        channel.send({"told": main()})

    child = fork_child("test", tell, let_go=lambda: None, drop_rights=False)
    try:
        assert wait_readable(child.pidfd, 10.0)
        child.reap()
        return child.channel.receive().get("told", "failed")
    finally:
        child.close()


def state() -> dict:
    """Return the ids and capability sets of this process, as the kernel has them."""
    lines = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    kept = ("Uid", "Gid", "Groups", "CapEff", "CapPrm", "CapInh", "CapAmb", "NoNewPrivs")
    return {name: lines[name].strip() for name in kept}


@root_only
def test_root_becomes_nobody_for_ever():
    def main():
        give_up(NOBODY, frozenset())
        told = state()
        try:
            os.setuid(0)
        except PermissionError:
            return told
        return "became root again"

    assert in_a_child(main) == {
        "Uid": "65534\t65534\t65534\t65534",
        "Gid": "65534\t65534\t65534\t65534",
        "Groups": "",
        "CapEff": "0000000000000000",
        "CapPrm": "0000000000000000",
        "CapInh": "0000000000000000",
        "CapAmb": "0000000000000000",
        "NoNewPrivs": "1",
    }


@root_only
def test_one_capability_stays_for_fwmark():
    def main():
        give_up(NOBODY, frozenset({CAP_NET_RAW if kernel_version() >= (5, 17) else CAP_NET_ADMIN}))
        with socket.socket() as marked:
            marked.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 7)
            return [marked.getsockopt(socket.SOL_SOCKET, socket.SO_MARK), permitted_capabilities().bit_count()]

    assert in_a_child(main) == [7, 1]


@root_only
def test_without_it_marks_are_refused():
    def main():
        give_up(NOBODY, frozenset())
        try:
            probe_upstream_rights(7, "")
        except PrivilegeError as error:
            return str(error)
        return "allowed"

    told = in_a_child(main)
    assert told.startswith("no permission to set fwmark 0x7: run as root or with CAP_NET_ADMIN")
    assert "\n" not in told


@root_only
def test_binding_to_an_interface_needs_no_right():
    def main():
        give_up(NOBODY, frozenset(needed_capabilities(0, "lo", kernel_version(), permitted_capabilities())))
        probe_upstream_rights(0, "lo")
        return "bound"

    assert in_a_child(main) == "bound"


def test_who_is_not_root_stays_and_gains_nothing():
    def main():
        if os.geteuid() == 0:
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        assert identity_for("nobody") is None
        give_up(None, frozenset())
        told = state()
        return [told["CapEff"], told["NoNewPrivs"]]

    assert in_a_child(main) == ["0000000000000000", "1"]


def test_an_interface_that_does_not_exist():
    with pytest.raises(PrivilegeError, match=r"^interface nope0 does not exist; there are: .*lo"):
        probe_upstream_rights(0, "nope0")


def test_nothing_is_asked_for_nothing():
    probe_upstream_rights(0, "")


@root_only
def test_whom_the_children_become(monkeypatch, caplog):
    assert identity_for("root") is None
    assert identity_for("") is None
    nobody = pwd.getpwnam("nobody")
    assert identity_for("nobody") == Identity("nobody", nobody.pw_uid, nobody.pw_gid)
    assert identity_for("54321") == Identity("54321", 54321, 54321)
    with pytest.raises(PrivilegeError, match="user 'no-such-user' does not exist: make it"):
        identity_for("no-such-user")
    # A container that was started with few capabilities.
    monkeypatch.setattr(privileges, "permitted_capabilities", lambda: 1 << CAP_NET_ADMIN)
    assert identity_for("nobody") is None
    assert [record.getMessage() for record in caplog.records] == [
        "cannot become nobody without CAP_SETUID and CAP_SETGID: staying root, without capabilities"
    ]
    # In a user namespace that has only root, there is nobody to become.
    monkeypatch.setattr(privileges, "_is_mapped", lambda table, number: number == 0)
    assert identity_for("nobody") is None
