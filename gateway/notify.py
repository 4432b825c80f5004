"""Tell the service manager how we are: sd_notify(3), without libsystemd."""

import os
import socket


def notify(state: str) -> bool:
    """Send `state` ("READY=1", "STATUS=…", "STOPPING=1") to NOTIFY_SOCKET; False where there is none or it is gone.

    The socket is a path, or an abstract name behind "@". Nothing is raised: a service manager that went away is no
    reason to stop carrying traffic.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return False
    if address[0] == "@":
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sender:
            sender.sendto(state.encode(), address)
    except OSError:
        return False
    return True
