"""Device: where frames come from and where they go, each with a 10-octet virtio_net_hdr in front, whatever is below.

    url            below                          header and offloads
    tun://NAME     /dev/net/tun, made or joined   the kernel's: nothing of ours stands on the path
    fd://N         an inherited TUN descriptor    the kernel's where it has them, else SoftwareOffload
    fd://N         an inherited AF_UNIX socket    SoftwareOffload: the socket carries bare IP packets

A device that was made here goes with the last descriptor on it, however its processes end. One that existed before
(`ip tuntap add`) is used as it is: neither configured nor removed.
"""

import array
import errno
import fcntl
import os
import select
import socket
import stat
import struct
from functools import partial
from typing import Final, Protocol

# What the device takes and gives without our help; the order of the bits is ours, not the kernel's.
CSUM: Final = 1
TSO4: Final = 2
TSO6: Final = 4
ECN: Final = 8
USO4: Final = 16
USO6: Final = 32
FEATURE_NAMES: Final = {CSUM: "csum", TSO4: "tso4", TSO6: "tso6", ECN: "ecn", USO4: "uso4", USO6: "uso6"}

VNET_HEADER: Final = 10  #: octets; struct virtio_net_hdr without num_buffers
CLONE_DEVICE: Final = "/dev/net/tun"
MAX_NAME: Final = 15  #: octets; IFNAMSIZ with its NUL is 16

# linux/if_tun.h
_TUNSETIFF: Final = 0x400454CA
_TUNGETIFF: Final = 0x800454D2
_TUNSETOFFLOAD: Final = 0x400454D0
_TUNSETVNETHDRSZ: Final = 0x400454D8
_TUNSETVNETLE: Final = 0x400454DC
_IFF_TUN: Final = 0x0001
_IFF_MULTI_QUEUE: Final = 0x0100
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_TUN_F: Final = {CSUM: 0x01, TSO4: 0x02, TSO6: 0x04, ECN: 0x08, USO4: 0x20, USO6: 0x40}

_SIOCGIFMTU: Final = 0x8921
_IFREQ: Final = struct.Struct("16sH22x")

# From all to none. The kernel takes USO4 and USO6 only together (6.2), and segmentation only with checksums.
_STEPS: Final = (
    CSUM | TSO4 | TSO6 | ECN | USO4 | USO6,
    CSUM | TSO4 | TSO6 | ECN,
    CSUM | TSO4 | TSO6,
    CSUM,
)

#: how long a full socket may hold up its writer before the packet is lost; a TUN never makes anybody wait
SOCKET_PATIENCE: Final = 10  # milliseconds


class DeviceError(Exception):
    """The device cannot be had; the text is one line and says what to do."""


class Device(Protocol):
    """What the reader and the writer need of a device; a test may bring any object that has it."""

    name: str
    mtu: int
    features: int  #: what the wire below takes; frames written may use everything, the rest is done in software

    def fileno(self) -> int:
        """Return the descriptor to wait on."""

    def readv(self, buffers: list[memoryview], /) -> int:
        """Read one frame, return its length. BlockingIOError when there is none, OSError when the device is gone."""

    def write(self, frame: memoryview, /) -> int:
        """Write one frame, header first. BlockingIOError when it is lost for want of room."""

    def writev(self, pieces: list[memoryview], /) -> int:
        """Write one frame that lies in pieces; the first holds the headers."""

    def close(self) -> None:
        """Close the descriptor."""


class TunDevice:
    """A TUN descriptor; read and write are the system calls themselves, no Python frame between."""

    def __init__(self, fd: int, name: str, mtu: int, features: int, *, made: bool) -> None:
        self.name = name
        self.mtu = mtu
        self.features = features
        self.made = made  #: by us, so ours to configure
        self.readv = partial(os.readv, fd)
        self.write = partial(os.write, fd)
        self.writev = partial(os.writev, fd)
        self._fd = fd

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._fd

    def close(self) -> None:
        """Close the descriptor; with the last one a device that was made here goes."""
        os.close(self._fd)


class SocketDevice:
    """A datagram or seqpacket socket of AF_UNIX that carries one IP packet a message; what is above adds the header."""

    def __init__(self, fd: int, name: str, mtu: int) -> None:
        self.name = name
        self.mtu = mtu
        self.features = 0
        self.made = False
        self._fd = fd
        with socket.socket(fileno=os.dup(fd)) as probe:
            self._ends = probe.type == socket.SOCK_SEQPACKET
        self._room = select.poll()
        self._room.register(fd, select.POLLOUT)

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._fd

    def readv(self, buffers: list[memoryview], /) -> int:
        """Read one packet. OSError when the peer closed a seqpacket socket; datagram sockets do not tell."""
        length = os.readv(self._fd, buffers)
        if not length and self._ends:
            raise OSError(errno.ENODEV, "the other end of the device socket is closed")
        return length

    def write(self, frame: memoryview, /) -> int:
        """Write one packet, as writev does."""
        return self.writev([frame])

    def writev(self, pieces: list[memoryview], /) -> int:
        """Write one packet; wait for room, at most SOCKET_PATIENCE: such queues are short (max_dgram_qlen is 10)."""
        try:
            return os.writev(self._fd, pieces)
        except BlockingIOError:
            self._room.poll(SOCKET_PATIENCE)
            return os.writev(self._fd, pieces)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


def open_device(url: str, *, mtu: int, offloads: bool = True) -> Device:
    """Open the device that `url` names (tun://NAME or fd://N), non-blocking.

    `mtu` is what a device gets that is made here, and what one is taken to have that cannot say. Without `offloads`
    the kernel is asked for none, and everything is done in software. Raises DeviceError.
    """
    scheme, separator, rest = url.partition("://")
    if scheme == "tun" and separator:
        return _open_tun(rest, mtu, offloads)
    if scheme == "fd" and separator:
        return _inherit(rest, mtu, offloads)
    raise DeviceError(f"the device {url!r} is neither tun://NAME nor fd://N")


def was_made(device: Device) -> bool:
    """Tell whether the device was made by open_device, so that its addresses are ours to set."""
    return bool(getattr(device, "made", False))


def feature_names(features: int) -> list[str]:
    """Return the offloads in words, for logs and for the status."""
    return [name for bit, name in FEATURE_NAMES.items() if features & bit]


def _open_tun(name: str, mtu: int, offloads: bool) -> Device:
    check_name(name)
    existed = _exists(name)
    fd = _open_clone()
    flags = _IFF_TUN | _IFF_NO_PI | (_IFF_VNET_HDR if offloads else 0)
    try:
        try:
            fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), flags))
        except OSError as error:
            if error.errno != errno.EINVAL or not existed:
                raise
            # A persistent device that was made with `multi_queue` takes only queues that say so.
            fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), flags | _IFF_MULTI_QUEUE))
    except OSError as error:
        os.close(fd)
        raise DeviceError(_why_not(name, error, existed)) from error
    features = _set_up(fd, offloads, vnet=offloads)
    mtu = _mtu_of(name, mtu) if existed else mtu
    return _offer(TunDevice(fd, name, mtu, features, made=not existed), offloads)


def _inherit(text: str, mtu: int, offloads: bool) -> Device:
    try:
        fd = int(text)
        mode = os.fstat(fd).st_mode
    except (ValueError, OverflowError):
        raise DeviceError(f"the device fd://{text} names no descriptor: a number is needed, as in fd://3") from None
    except OSError:
        raise DeviceError(
            f"descriptor {text} of the device fd://{text} is not open: pass it on to Ringway when starting it"
        ) from None
    if stat.S_ISSOCK(mode):
        return _inherit_socket(fd, mtu)
    request = bytearray(_IFREQ.size)
    try:
        fcntl.ioctl(fd, _TUNGETIFF, request)
    except OSError:
        raise DeviceError(
            f"descriptor {fd} of the device fd://{fd} is neither an attached TUN device nor a datagram socket"
        ) from None
    raw_name, flags = _IFREQ.unpack(request)
    name = raw_name.rstrip(b"\0").decode(errors="replace")
    if not flags & _IFF_TUN:
        raise DeviceError(f"device {name} of fd://{fd} is a TAP device: make it with IFF_TUN")
    vnet = bool(flags & _IFF_VNET_HDR)
    try:
        features = _set_up(fd, offloads, vnet=vnet)
    except OSError as error:
        reason = f"takes no vnet header of {VNET_HEADER} octets: {error.strerror}"
        raise DeviceError(f"device {name} of fd://{fd} {reason}") from error
    if _has_packet_information(fd, vnet):
        raise DeviceError(f"device {name} of fd://{fd} puts packet information before packets: open it with IFF_NO_PI")
    return _offer(TunDevice(fd, name, mtu, features, made=False), vnet)


def _inherit_socket(fd: int, mtu: int) -> Device:
    with socket.socket(fileno=os.dup(fd)) as probe:
        fits = probe.family == socket.AF_UNIX and probe.type in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)
    if not fits:
        raise DeviceError(f"the socket fd://{fd} is not of AF_UNIX with SOCK_DGRAM or SOCK_SEQPACKET")
    os.set_blocking(fd, False)
    return _offer(SocketDevice(fd, f"fd{fd}", mtu), False)


def _has_packet_information(fd: int, vnet: bool) -> bool:
    """Find out whether the descriptor was opened without IFF_NO_PI.

    TUNGETIFF cannot say: IFF_NOFILTER, which it always sets, is the same bit. But a packet of zeros is no IP packet and
    refused (EINVAL), while behind packet information it is one of an unknown protocol, taken or refused for being down.
    """
    try:
        os.write(fd, bytes((VNET_HEADER if vnet else 0) + 5))
    except OSError as error:
        return error.errno != errno.EINVAL
    return True


def _offer(below: TunDevice | SocketDevice, vnet: bool) -> Device:
    """Put SoftwareOffload before a device that lacks anything."""
    everything = _STEPS[0]
    if vnet and below.features == everything:
        return below
    from gateway.offload import SoftwareOffload

    return SoftwareOffload(below, header=vnet)


def _set_up(fd: int, offloads: bool, *, vnet: bool) -> int:
    """Make the descriptor non-blocking, settle its header, and return the offloads that the kernel agreed to."""
    os.set_blocking(fd, False)
    if not vnet:
        return 0
    fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("=i", VNET_HEADER))
    # Legacy headers have the byte order of the machine; ours are little-endian everywhere.
    fcntl.ioctl(fd, _TUNSETVNETLE, struct.pack("=i", 1))
    for features in _STEPS if offloads else ():
        try:
            fcntl.ioctl(fd, _TUNSETOFFLOAD, sum(_TUN_F[bit] for bit in FEATURE_NAMES if features & bit))
        except OSError:
            continue
        return features
    fcntl.ioctl(fd, _TUNSETOFFLOAD, 0)
    return 0


def _open_clone() -> int:
    try:
        return os.open(CLONE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        fix = "load the module (modprobe tun), or give the container the device (--device /dev/net/tun)"
        raise DeviceError(f"there is no {CLONE_DEVICE}: {fix}") from None
    except PermissionError as error:
        fix = "run as root, or let everybody open it (chmod 0666 /dev/net/tun)"
        raise DeviceError(f"no permission to open {CLONE_DEVICE}: {fix}") from error
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.ENXIO):
            raise DeviceError(f"the kernel has no TUN driver behind {CLONE_DEVICE}: modprobe tun") from error
        raise DeviceError(f"cannot open {CLONE_DEVICE}: {error.strerror}") from error


def _why_not(name: str, error: OSError, existed: bool) -> str:
    if error.errno == errno.EBUSY:
        return f"device {name} is in use by another program: stop it, or choose another name (-d tun://NAME)"
    if error.errno == errno.EPERM:
        fix = f"run as root or with CAP_NET_ADMIN, or have it made first (ip tuntap add {name} mode tun user $USER)"
        return f"no permission to make the device {name}: {fix}"
    if error.errno == errno.EINVAL and existed:
        return f"{name} exists and is no TUN device: choose another name (-d tun://NAME)"
    return f"cannot make the device {name}: {error.strerror}"


def check_name(name: str) -> None:
    """Raise DeviceError when the kernel would not take the name for a device."""
    octets = len(name.encode())
    if octets > MAX_NAME:
        raise DeviceError(f"the device name {name!r} has {octets} octets, {MAX_NAME} are allowed")
    # What dev_valid_name() refuses, and %, which would make the kernel choose a number.
    if not name or name in (".", "..") or any(c in "/:%" or c.isspace() or not c.isprintable() for c in name):
        raise DeviceError(
            f"the device name {name!r} is not valid: 1 to {MAX_NAME} octets without / : % and white space"
        )


def _exists(name: str) -> bool:
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def _mtu_of(name: str, default: int) -> int:
    request = array.array("B", name.encode().ljust(40, b"\0"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        try:
            fcntl.ioctl(control, _SIOCGIFMTU, request)
        except OSError:
            return default
    return int(struct.unpack_from("=i", request, 16)[0])
