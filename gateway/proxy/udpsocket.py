"""UDP sockets as the server uses them: large receive buffers, and segmentation by the kernel where it has it."""

import errno
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable
from typing import Final

SOL_UDP: Final = 17
UDP_SEGMENT: Final = 103  # Linux ≥ 4.18; Python has no names for these
UDP_GRO: Final = 104  # Linux ≥ 5.0
SEGMENT_LENGTH: Final = struct.Struct("=H")
GRO_LENGTH: Final = struct.Struct("=i")
GRO_SPACE: Final = socket.CMSG_SPACE(4)

MAX_DATAGRAM: Final = 65535  # bytes, with room: 65507 over IPv4
MAX_READS: Final = 64  # a turn; then the others have theirs
MAX_SEGMENTS: Final = 64  # the kernel's UDP_MAX_SEGMENTS before 6.9
MAX_SEGMENTED: Final = 65000  # bytes in one call; with its headers it is one IP packet
MAX_SEGMENT: Final = 1452  # bytes; more would not fit MTU 1500 over IPv6, and UDP_SEGMENT does not fragment
RECEIVE_BUFFER: Final = 4 << 20  # bytes asked for; the kernel gives rmem_max if that is less, and a burst needs it


def segmentation(length: int) -> tuple[tuple[int, int, bytes]]:
    """Return the control message that has the kernel cut a send into datagrams of `length`."""
    return ((SOL_UDP, UDP_SEGMENT, SEGMENT_LENGTH.pack(length)),)


def cannot_segment(error: OSError) -> bool:
    """Say whether the kernel or the device refuses to segment, rather than to send."""
    return error.errno in (errno.EINVAL, errno.EIO, errno.EMSGSIZE, errno.EOPNOTSUPP)


def count_lost(counters: Counter[str], error: OSError, datagrams: int) -> None:
    """Count datagrams that the kernel did not take, by its reason."""
    counters[f"datagram-{errno.errorcode.get(error.errno or 0, 'lost')}"] += datagrams


def datagram_socket(family: int, open_socket: Callable[[int, int], socket.socket] = socket.socket) -> socket.socket:
    """Make a new socket of one family a non-blocking one for datagrams."""
    sock = open_socket(family, socket.SOCK_DGRAM)
    sock.setblocking(False)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        if sys.platform == "linux":
            try:
                sock.setsockopt(socket.SOL_SOCKET, 33, RECEIVE_BUFFER)  # SO_RCVBUFFORCE, for those who may
                return sock
            except PermissionError:
                pass
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    except OSError:
        pass
    return sock
