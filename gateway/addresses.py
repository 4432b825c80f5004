"""Addresses: gives a device that was made here its MTU, addresses and routes, in the current network namespace.

Nothing here is undone: addresses and routes go with the device, and the device with its last descriptor. Devices that
existed before are not touched.
"""

import errno
import ipaddress
from pathlib import Path
from typing import Any, Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from gateway.device import DeviceError

#: packets; the kernel's 500 are gone in 2 ms of small datagrams, less than a reader may have to wait for a CPU (two
#: cores, echo of 64 octets at ≤ 1 % loss: 54,000 → 97,000 a second in the mean of a few runs)
QUEUE_LENGTH: Final = 4000
MIN_MTU6: Final = 1280  #: octets; RFC 8200, 5
_IFA_F_NODAD: Final = 0x02  # linux/if_addr.h; on our side of a TUN nobody has the address twice
_ADDR_GEN_NONE: Final = "1"  # IN6_ADDR_GEN_MODE_NONE
#: what adding an IPv6 address answers where IPv6 is switched off, by sysctl or on the kernel's command line
_NO_IPV6: Final = {errno.EACCES, errno.EPERM, errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.EINVAL, errno.ENOTSUP}


def configure(name: str, *, mtu: int, address: str, mask: str, address6: str = "") -> bool:
    """Set the MTU and the addresses of device `name` and switch it on; tell whether it has IPv6.

    `address6` is written with its prefix length, "" for none; where the machine has no IPv6 the device has IPv4 alone.
    Raises DeviceError.
    """
    prefix = ipaddress.IPv4Network((0, mask)).prefixlen
    # With a link-local address the kernel would send router solicitations and listener reports into the device.
    _try_sysctl(f"net/ipv6/conf/{name}/addr_gen_mode", _ADDR_GEN_NONE)
    try:
        with IPRoute() as netlink:
            index = _index(netlink, name)
            netlink.link("set", index=index, mtu=mtu, txqlen=QUEUE_LENGTH)
            netlink.addr("add", index=index, address=address, prefixlen=prefix)
            ipv6 = bool(address6) and mtu >= MIN_MTU6 and _add6(netlink, index, ipaddress.IPv6Interface(address6))
            netlink.link("set", index=index, state="up")
    except NetlinkError as error:
        raise DeviceError(_why_not(name, error)) from error
    return ipv6


def lead_all_into(name: str, *, ipv6: bool) -> None:
    """Make the device the only way out: the default routes of both families, and lo switched on. Raises DeviceError."""
    try:
        with IPRoute() as netlink:
            netlink.link("set", index=_index(netlink, "lo"), state="up")
            index = _index(netlink, name)
            netlink.route("add", dst="0.0.0.0/0", oif=index)
            if ipv6:
                netlink.route("add", dst="::/0", oif=index)
    except NetlinkError as error:
        raise DeviceError(_why_not(name, error)) from error


def add_to_loopback(address: str, address6: str) -> bool:
    """Switch lo on and give it an address of each family; tell whether it has IPv6. Raises DeviceError."""
    try:
        with IPRoute() as netlink:
            index = _index(netlink, "lo")
            netlink.link("set", index=index, state="up")
            netlink.addr("add", index=index, address=address, prefixlen=32)
            return _add6(netlink, index, ipaddress.IPv6Interface(address6))
    except NetlinkError as error:
        raise DeviceError(_why_not("lo", error)) from error


def _add6(netlink: Any, index: int, address: ipaddress.IPv6Interface) -> bool:
    try:
        netlink.addr(
            "add",
            index=index,
            address=str(address.ip),
            prefixlen=address.network.prefixlen,
            flags=_IFA_F_NODAD,
        )
    except NetlinkError as error:
        if error.code in _NO_IPV6:
            return False
        raise
    return True


def _index(netlink: Any, name: str) -> int:
    found = netlink.link_lookup(ifname=name)
    if not found:
        raise DeviceError(f"the device {name} is gone")
    return int(found[0])


def _why_not(name: str, error: Any) -> str:
    if error.code == errno.EPERM:
        return f"no permission to configure the device {name}: run as root or with CAP_NET_ADMIN"
    if error.code == errno.EEXIST:
        return (
            f"an address of the device {name} is on another one already: choose others (--tun-address, --tun-address6)"
        )
    return f"cannot configure the device {name}: {error.args[-1]}"


def _try_sysctl(key: str, value: str) -> None:
    try:
        Path("/proc/sys", key).write_text(value)
    except OSError:
        pass  # read-only in many containers; and without IPv6 there is no such key
