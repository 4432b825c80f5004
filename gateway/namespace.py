"""Namespaces: puts the calling process where its only way out is a TUN device.

    enter()               user (not as root), network and mount namespace; nothing of it is visible outside
    make_tun(config)      the device with its addresses, the default routes into it, lo, and sysctls for ping
    own_resolver(…)       a resolv.conf of its own, and nobody who answers past it (resolved, nscd, avahi)

All of it must be called by a process with one thread, which then becomes the command. The namespaces go with the last
process in them.
"""

import contextlib
import ctypes
import errno
import os
import tempfile
from pathlib import Path
from typing import Final

from gateway.config import Config
from gateway.device import Device, open_device

# linux/sched.h
_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000

# linux/mount.h
_MS_NOSUID: Final = 0x2
_MS_NODEV: Final = 0x4
_MS_NOEXEC: Final = 0x8
_MS_BIND: Final = 0x1000
_MS_REC: Final = 0x4000
_MS_SLAVE: Final = 1 << 19

RESOLV_CONF: Final = "/etc/resolv.conf"
#: where those listen who answer for names past resolv.conf: systemd-resolved (varlink), nscd and its kin, avahi
MASKED: Final = (
    "/run/systemd/resolve",
    "/run/nscd",
    "/var/run/nscd",
    "/var/db/nscd",
    "/run/unscd",
    "/run/avahi-daemon",
)
_MAX_NAMESERVERS: Final = 3  # MAXNS of glibc

_libc = ctypes.CDLL(None, use_errno=True)


class NamespaceError(Exception):
    """The kernel does not let us; the text is one line with the fix."""


def enter() -> None:
    """Move this process into new namespaces, with all rights over them and no others. Raises NamespaceError.

    Root gets no user namespace: programs that change their user (apt becomes _apt) need all the ids that there are.
    Root that lacks the right, as in a container, gets one like anybody else.
    """
    uid, gid = os.geteuid(), os.getegid()
    with_user = uid != 0
    try:
        if not with_user:
            try:
                _unshare(_CLONE_NEWNET | _CLONE_NEWNS)
            except PermissionError:
                with_user = True
        if with_user:
            _unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWNS)
            # Each id is itself in there, and nobody else exists; without "deny" the kernel takes no gid_map from us.
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/uid_map", f"{uid} {uid} 1")
            _write("/proc/self/gid_map", f"{gid} {gid} 1")
        # What is mounted here stays here, what is mounted (and unmounted) outside still comes in.
        _mount(None, "/", None, _MS_REC | _MS_SLAVE)
    except OSError as error:
        raise NamespaceError(_why_not(error)) from error


def make_tun(config: Config) -> Device:
    """Make the TUN device and lead all traffic into it. Raises DeviceError."""
    name = config.device.removeprefix("tun://")
    device = open_device(f"tun://{name}", mtu=config.mtu)
    from gateway.addresses import configure, lead_all_into

    ipv6 = configure(
        name, mtu=config.mtu, address=config.tun_address, mask=config.tun_mask, address6=config.tun_address6
    )
    lead_all_into(name, ipv6=ipv6)
    allow_ping()
    return device


def allow_ping() -> None:
    """Let every group of this namespace ping without rights, as most distributions do outside."""
    gid = os.getegid()
    for groups in ("0 2147483647", f"{gid} {gid}"):  # with one gid mapped, the kernel takes no other
        with contextlib.suppress(OSError):
            _write("/proc/sys/net/ipv4/ping_group_range", groups)
            return


def own_resolver(servers: list[str]) -> bool:
    """Give this mount namespace a resolv.conf with these servers, and hide who would answer past it.

    False where there is no resolv.conf to put ours over, and names cannot be looked up.
    """
    for directory in MASKED:
        if os.path.isdir(directory):
            _mount("ringway", os.path.realpath(directory), "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "mode=755")
    text = "# of ringway exec\n" + "".join(f"nameserver {server}\n" for server in servers[:_MAX_NAMESERVERS])
    target = os.path.realpath(RESOLV_CONF)
    if any(target.startswith(os.path.realpath(directory) + "/") for directory in MASKED):
        # A link to resolved's file: its directory is an empty one of ours by now.
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            _write(target, text)
            return True
    if not os.path.exists(target):
        return False
    handle, path = tempfile.mkstemp(prefix="ringway-resolv-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o644)
        _mount(path, target, None, _MS_BIND)
    finally:
        os.unlink(path)  # the mount keeps the file, and it goes with the namespace
    return True


def _unshare(flags: int) -> None:
    if _libc.unshare(flags) != 0:
        _raise("unshare")


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if word is None else os.fsencode(word) for word in (source, target, kind, options)]
    if _libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]) != 0:
        _raise(f"mount {target}")


def _raise(what: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), what)


def _write(path: str, text: str) -> None:
    # In one write(2): of the files in /proc the kernel takes no second one.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _why_not(error: OSError) -> str:
    """Say which of its switches the kernel has thrown, and how to throw it back."""
    if _switch("user/max_user_namespaces") == "0":
        return "user namespaces are switched off: sysctl -w user.max_user_namespaces=10000 as root, or run as root"
    if _switch("kernel/unprivileged_userns_clone") == "0":
        return (
            "only root may make user namespaces: sysctl -w kernel.unprivileged_userns_clone=1 as root, or run as root"
        )
    if error.errno == errno.ENOSPC:
        return "there are too many namespaces: raise user.max_user_namespaces and user.max_net_namespaces (sysctl)"
    if _switch("kernel/apparmor_restrict_unprivileged_userns") == "1":
        fix = "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 as root"
        return f"AppArmor forbids unprivileged user namespaces: {fix}, or run as root"
    if error.errno == errno.EINVAL:
        return f"this kernel cannot make the namespaces ({error.strerror}): it needs CONFIG_USER_NS and CONFIG_NET_NS"
    if error.errno in (errno.EPERM, errno.EACCES):
        return "no permission to make namespaces: run as root, or in a container with --cap-add SYS_ADMIN"
    return f"cannot make the namespaces: {error.filename}: {error.strerror}"


def _switch(key: str) -> str:
    try:
        return Path("/proc/sys", key).read_text().strip()
    except OSError:
        return ""
