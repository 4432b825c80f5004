"""TUN devices that a test opens itself, to hand the descriptor to `ringway run -d fd://N`."""

import fcntl
import os
import struct
from typing import Final

from tests.netns.world import Namespace

IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUNSETIFF: Final = 0x400454CA
TUNSETOFFLOAD: Final = 0x400454D0
TUNSETVNETHDRSZ: Final = 0x400454D8
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN = 1, 2, 4, 8
TUN_F_USO4, TUN_F_USO6 = 32, 64
ALL_OFFLOADS: Final = (
    TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN | TUN_F_USO4 | TUN_F_USO6,
    TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN,  # before Linux 6.2
)


def open_tun(
    namespace: Namespace,
    name: str = "tun0",
    *,
    mtu: int = 1500,
    vnet_header: bool = True,
    offloads: tuple[int, ...] = ALL_OFFLOADS,
    address4: str = "198.18.0.1/15",
    address6: str = "fd72:6e67:7761:7900::1/64",
) -> int:
    """Make a TUN device in a namespace, with addresses and up; return its descriptor, which the caller closes.

    `offloads` are tried in turn until the kernel takes one; none: no offload at all.
    """
    with namespace.inside():
        # The device belongs to the namespace in which the descriptor was opened, wherever it travels.
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        flags = IFF_TUN | IFF_NO_PI | (IFF_VNET_HDR if vnet_header else 0)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        if vnet_header:
            fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", 10))
            for offload in offloads:
                try:
                    fcntl.ioctl(fd, TUNSETOFFLOAD, offload)
                    break
                except OSError:
                    continue
        namespace.ip(
            f"link set {name} mtu {mtu}",
            f"addr add {address4} dev {name}",
            *([f"addr add {address6} dev {name} nodad"] if address6 and mtu >= 1280 else []),
            f"link set {name} up",
        )
    except BaseException:
        os.close(fd)
        raise
    return fd
