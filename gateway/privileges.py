"""What the children may do: another uid, no way to gain anything, and at most the one capability that fwmark needs.

    as root                       uid and gid of `user`, no groups, no capabilities but the kept ones
    as root of a user namespace   the same where `user` exists there; else the uid stays, the capabilities go
    as anybody else               the uid stays, capabilities (of a unit, of the file) go

The order matters: keep capabilities over the change of uid, change it, set the capabilities to the kept ones, forbid
new ones, and only then ask to die with the parent, because the kernel forgets that at a change of uid.
"""

import ctypes
import errno
import logging
import os
import pwd
import re
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gateway.proxyurl import ConfigError

log = logging.getLogger("ringway")

# linux/capability.h
CAP_SETGID: Final = 6
CAP_SETUID: Final = 7
CAP_NET_ADMIN: Final = 12
CAP_NET_RAW: Final = 13
_VERSION_3: Final = 0x20080522

# linux/prctl.h
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_KEEPCAPS: Final = 8
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4

_libc = ctypes.CDLL(None, use_errno=True)


class PrivilegeError(ConfigError):
    """A right that the configuration needs is not there, or cannot be given up; the text is one line with the fix."""


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapData(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the children shall be."""

    name: str
    uid: int
    gid: int


def identity_for(user: str) -> Identity | None:
    """Look up whom the children shall become; None when the uid stays as it is. PrivilegeError for an unknown user."""
    if os.geteuid() != 0 or user in ("", "root"):
        return None
    identity = _look_up(user)
    if not (_is_mapped("uid_map", identity.uid) and _is_mapped("gid_map", identity.gid)):
        return None
    if ~permitted_capabilities() & (1 << CAP_SETUID | 1 << CAP_SETGID):
        log.warning("cannot become %s without CAP_SETUID and CAP_SETGID: staying root, without capabilities", user)
        return None
    return identity


def _look_up(user: str) -> Identity:
    try:
        entry = pwd.getpwuid(int(user)) if user.isascii() and user.isdigit() else pwd.getpwnam(user)
    except KeyError:
        if user.isascii() and user.isdigit():
            return Identity(user, int(user), int(user))
        if user == "nobody":
            # Images without a user database have no name for it; the kernel's overflowuid is the same everywhere.
            return Identity(user, 65534, 65534)
        raise PrivilegeError(
            f"user {user!r} does not exist: make it (useradd -r {user}), or name another (user)"
        ) from None
    return Identity(user, entry.pw_uid, entry.pw_gid)


def _is_mapped(table: str, number: int) -> bool:
    """Tell whether a uid or gid exists in the user namespace of this process."""
    try:
        lines = Path("/proc/self", table).read_text().splitlines()
    except OSError:
        return True
    return any(int(first) <= number < int(first) + int(count) for first, _outside, count in map(str.split, lines))


def kernel_version(release: str | None = None) -> tuple[int, int]:
    """Return major and minor of the running kernel (or of `release`, as uname has it)."""
    found = re.match(r"(\d+)\.(\d+)", release or os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def needed_capabilities(fwmark: int, interface: str, version: tuple[int, int], permitted: int) -> frozenset[int]:
    """Return what a worker must keep for its upstream sockets; `permitted` is a bit set of what there is."""
    needed = set()
    if fwmark:
        # Linux 5.17 lets CAP_NET_RAW set marks; it is the smaller one.
        raw = version >= (5, 17) and permitted & 1 << CAP_NET_RAW
        needed.add(CAP_NET_RAW if raw else CAP_NET_ADMIN)
    if interface and version < (5, 7):
        needed.add(CAP_NET_RAW)
    return frozenset(needed)


def permitted_capabilities() -> int:
    """Return the permitted capabilities of this process as a bit set."""
    header = _CapHeader(_VERSION_3, 0)
    data = (_CapData * 2)()
    _check(_libc.capget(ctypes.byref(header), data), "capget")
    return int(data[0].permitted) | int(data[1].permitted) << 32


def probe_upstream_rights(fwmark: int, interface: str) -> None:
    """Try on a socket what the workers will do on theirs. Raises PrivilegeError with the fix."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        if fwmark:
            try:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, fwmark)
            except PermissionError:
                raise PrivilegeError(
                    f"no permission to set fwmark {fwmark:#x}: run as root or with CAP_NET_ADMIN "
                    "(AmbientCapabilities=CAP_NET_ADMIN in a systemd unit), or leave fwmark out"
                ) from None
        if interface:
            try:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b"\0")
            except PermissionError:
                raise PrivilegeError(
                    f"no permission to bind to interface {interface}: run as root or with CAP_NET_RAW, "
                    "or use a kernel from 5.7 on"
                ) from None
            except OSError as error:
                if error.errno != errno.ENODEV:
                    raise
                there = ", ".join(name for _index, name in socket.if_nameindex()) or "none"
                raise PrivilegeError(f"interface {interface} does not exist; there are: {there}") from None


def give_up(identity: Identity | None, keep: frozenset[int]) -> None:
    """Become `identity` (None: stay) with no capabilities but `keep`, for ever. Raises OSError."""
    if identity is not None:
        if keep:
            _check(_libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0), "prctl(PR_SET_KEEPCAPS)")
        os.setgroups([])
        os.setresgid(identity.gid, identity.gid, identity.gid)
        os.setresuid(identity.uid, identity.uid, identity.uid)
    _set_capabilities(keep)
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies; `parent` is the pid that forked it."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        # It died before the kernel was told.
        os._exit(0)


def _set_capabilities(keep: frozenset[int]) -> None:
    # A unit's AmbientCapabilities; the result does not matter, kernels without them have none.
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    bits = sum(1 << capability for capability in keep) & permitted_capabilities()
    header = _CapHeader(_VERSION_3, 0)
    data = (_CapData * 2)(
        _CapData(bits & 0xFFFFFFFF, bits & 0xFFFFFFFF, 0),
        _CapData(bits >> 32, bits >> 32, 0),
    )
    _check(_libc.capset(ctypes.byref(header), data), "capset")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
