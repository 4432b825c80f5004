"""The client side of the control socket: find the running gateway, ask it, and work out rates from two answers.

A request and its answer are each a big-endian u32 length and a msgpack map of that length.
"""

import socket
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgpack

from gateway.config import control_directories

MAX_ANSWER: Final = 16 << 20  # bytes; far above thousands of counters
_LENGTH: Final = struct.Struct(">I")

# What counts as traffic, by direction, whatever process counts it: up is out of the device, down is into it.
_TRAFFIC: Final = {
    "bytes_up": ("bytes_from_device", "bytes_up"),
    "bytes_down": ("bytes_to_device", "bytes_down"),
    "frames_up": ("frames_from_device", "frames_up"),
    "frames_down": ("frames_to_device", "frames_down"),
}


class StatusError(Exception):
    """The gateway cannot be asked; the text is one sentence for the user."""


def running_instances() -> list[Path]:
    """Return the control sockets that somebody listens on, in the places where a gateway puts them."""
    return [
        path
        for directory in control_directories()
        for path in sorted(directory.glob("*.sock"))
        if path.is_socket() and _is_alive(path)
    ]


def ask(path: Path, request: Mapping[str, Any], timeout: float = 5.0) -> dict[str, Any]:
    """Send one request and return the answer; raises StatusError when there is none within `timeout` seconds."""
    ends_at = time.monotonic() + timeout
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            connection.connect(str(path))
            body = msgpack.packb(dict(request))
            connection.sendall(_LENGTH.pack(len(body)) + body)
            (length,) = _LENGTH.unpack(_receive(connection, _LENGTH.size, ends_at))
            if length > MAX_ANSWER:
                raise StatusError(f"{path}: the answer announces {length} bytes, allowed are {MAX_ANSWER}")
            answer = msgpack.unpackb(_receive(connection, length, ends_at), strict_map_key=False)
    except TimeoutError:
        raise StatusError(f"{path}: no answer in {timeout:g} s") from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise StatusError(f"{path}: no gateway listens there") from None
    except OSError as error:
        raise StatusError(f"{path}: {error.strerror or error}") from None
    except (ValueError, msgpack.UnpackException):
        raise StatusError(f"{path}: the answer is not msgpack") from None
    if not isinstance(answer, dict):
        raise StatusError(f"{path}: the answer is not a map")
    if isinstance(answer.get("error"), str):
        raise StatusError(f"{path}: {answer['error']}")
    return answer


def traffic(status: Mapping[str, Any]) -> dict[str, int]:
    """Sum the traffic over all processes: bytes and frames, up and down.

    Of the names for one thing the first that anybody counts is summed; where the device's own processes (reader,
    writer) count it they are believed, because the workers (worker/0, …) would count the same bytes again.
    """
    counters = status.get("counters") or {}
    sums: dict[str, int] = {}
    for what, names in _TRAFFIC.items():
        sums[what] = next((total for name in names if (total := _sum(counters, name))), 0)
    return sums


def _sum(counters: Mapping[str, Mapping[str, int]], name: str) -> int:
    device = [values[name] for owner, values in counters.items() if "/" not in owner and values.get(name)]
    return sum(device or (values.get(name, 0) for values in counters.values()))


def rates(before: Mapping[str, int], after: Mapping[str, int], seconds: float) -> dict[str, float]:
    """Return what each sum grew by in a second; one that went back (its process was replaced) counts from zero."""
    return {
        name: (value - before.get(name, 0) if value >= before.get(name, 0) else value) / max(seconds, 1e-6)
        for name, value in after.items()
    }


def counters_set(status: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """Yield (process, counter, value) for every counter that is not zero."""
    for owner, values in sorted((status.get("counters") or {}).items()):
        for name, value in sorted(values.items()):
            if value:
                yield owner, name, value


def _is_alive(path: Path) -> bool:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(1.0)
            connection.connect(str(path))
    except PermissionError:
        return True  # somebody else's: asking it says so
    except OSError:
        return False  # left behind by a gateway that was killed
    return True


def _receive(connection: socket.socket, count: int, ends_at: float) -> bytes:
    pieces: list[bytes] = []
    missing = count
    while missing:
        left = ends_at - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        piece = connection.recv(min(missing, 1 << 16))
        if not piece:
            raise OSError(0, "the gateway closed the connection before it had answered")
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)
