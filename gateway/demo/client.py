"""The traffic of the demonstration: a program in the inner namespace that knows nothing of Ringway.

    python -m gateway.demo.client DESCRIPTION       DESCRIPTION is JSON: addresses, and how long each step takes

It prints one JSON object a line: {"step", "moved", …} while a step goes on, and with "ok" and "text" when it has ended.
"""

import hashlib
import json
import os
import random
import socket
import struct
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from gateway.demo import DIGEST_SIZE, TCP_PORT, UDP_PORT
from gateway.demo.servers import BLOCK, numbered_blocks
from workers.wire.checksum import checksum

_PATIENCE: Final = 10.0  #: seconds for one answer
_REPORT_EVERY: Final = 0.2  #: seconds
_AT_ONCE: Final = 8  #: short connections at a time
_WINDOW: Final = 32  #: datagrams under way
_MAX_LOSS: Final = 0.02  #: of the datagrams; UDP may lose some on a busy machine, but not many

Report = Callable[[int], None]


class CheckFailed(Exception):
    """What came back is not what was sent."""


def up(address: str, seconds: float, report: Report) -> str:
    """Send for some seconds; the server says what it got."""
    with _connect(address) as connection:
        connection.sendall(b"up\n")
        sent, count, blocks = hashlib.sha256(), 0, numbered_blocks()
        end_at = time.monotonic() + seconds
        while time.monotonic() < end_at:
            block = blocks.next()
            connection.sendall(block)
            sent.update(block)
            count += len(block)
            report(count)
        connection.shutdown(socket.SHUT_WR)
        answer = _receive(connection, 8 + DIGEST_SIZE)
    if answer != count.to_bytes(8, "big") + sent.digest():
        raise CheckFailed(f"sent {count} octets, the server got {int.from_bytes(answer[:8], 'big')} or others")
    return "SHA-256 equal at both ends"


def down(address: str, seconds: float, report: Report) -> str:
    """Receive for some seconds; the digest comes last."""
    with _connect(address) as connection:
        connection.sendall(f"down {seconds}\n".encode())
        received, count, tail = hashlib.sha256(), 0, b""
        buffer = memoryview(bytearray(BLOCK))
        while length := connection.recv_into(buffer):
            # The last octets may be the digest: they wait until more follow.
            if length >= DIGEST_SIZE:
                received.update(tail)
                received.update(buffer[: length - DIGEST_SIZE])
                tail = bytes(buffer[length - DIGEST_SIZE : length])
            else:
                tail += buffer[:length]
                received.update(tail[:-DIGEST_SIZE])
                tail = tail[-DIGEST_SIZE:]
            count += length
            report(max(count - DIGEST_SIZE, 0))
    if tail != received.digest():
        raise CheckFailed(f"the SHA-256 of the {count - DIGEST_SIZE} octets that came is not the server's")
    return "SHA-256 equal at both ends"


def connections(address: str, number: int, report: Report) -> str:
    """Open short connections, each with a question, its echo and a proper end."""
    done = 0

    def one(_: int) -> None:
        question = os.urandom(random.randint(1, 2000))
        with _connect(address) as connection:
            connection.sendall(b"echo\n" + question)
            connection.shutdown(socket.SHUT_WR)
            answer = _receive(connection, len(question) + 1)
        if answer != question:
            raise CheckFailed(f"an echo of {len(question)} octets came back as {len(answer)} or others")

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(one, range(number)):
            done += 1
            report(done)
    return "each echo equal"


def datagrams(address: str, number: int, report: Report) -> str:
    """Have datagrams echoed, some under way at a time; each carries its number."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as endpoint:
        endpoint.connect((address, UDP_PORT))
        filling = os.urandom(1400)
        waiting: dict[int, bytes] = {}
        sent = echoed = lost = 0
        while sent < number or waiting:
            while sent < number and len(waiting) < _WINDOW:
                waiting[sent] = sent.to_bytes(4, "big") + filling[: random.randint(0, len(filling) - 4)]
                endpoint.send(waiting[sent])
                sent += 1
            # The first one waits until its association with the proxy is made.
            endpoint.settimeout(1.0 if echoed else _PATIENCE)
            try:
                answer = endpoint.recv(65536)
            except TimeoutError:
                lost += len(waiting)
                waiting.clear()
                if lost > number * _MAX_LOSS:
                    raise CheckFailed(f"{lost} of {sent} datagrams were lost") from None
                continue
            if waiting.pop(int.from_bytes(answer[:4], "big"), answer) != answer:
                raise CheckFailed(f"an echo of {len(answer)} octets is not what was sent")
            echoed += 1
            report(echoed)
    return f"each echo equal, {lost or 'none'} lost"


def pings(address: str, number: int, report: Report) -> str:
    """Ping the gateway itself through an ICMP socket, which needs no rights."""
    ipv6 = ":" in address
    protocol = socket.IPPROTO_ICMPV6 if ipv6 else socket.IPPROTO_ICMP
    times = []
    with socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, socket.SOCK_DGRAM, protocol) as endpoint:
        endpoint.settimeout(_PATIENCE)
        endpoint.connect((address, 0))
        for sequence in range(number):
            # The kernel fills in identifier and, for IPv6, checksum.
            request = bytearray(struct.pack("!BBHHH", 128 if ipv6 else 8, 0, 0, 0, sequence) + os.urandom(56))
            struct.pack_into("!H", request, 2, 0 if ipv6 else checksum(bytes(request)))
            started = time.monotonic()
            endpoint.send(request)
            answer = endpoint.recv(2048)
            times.append(time.monotonic() - started)
            if answer[0] != (129 if ipv6 else 0) or answer[6:] != request[6:]:
                raise CheckFailed(f"the answer to ping {sequence} is another one")
            report(sequence + 1)
    return f"median {sorted(times)[len(times) // 2] * 1000:.2f} ms, each payload equal"


KINDS: Final[dict[str, Callable[[str, Any, Report], str]]] = {
    "ping": pings,
    "TCP up": up,
    "TCP down": down,
    "TCP connections": connections,
    "UDP echo": datagrams,
}


def _connect(address: str) -> socket.socket:
    connection = socket.create_connection((address, TCP_PORT), timeout=_PATIENCE)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _receive(connection: socket.socket, most: int) -> bytes:
    """Receive to the end of the stream, but not more than `most` octets."""
    data = b""
    while len(data) < most and (piece := connection.recv(most - len(data))):
        data += piece
    return data


class Progress:
    """What a step has moved so far, told now and then."""

    def __init__(self, step: str) -> None:
        self._step = step
        self._started_at = self._told_at = time.monotonic()
        self._moved = 0
        self.tell()

    def __call__(self, moved: int) -> None:
        """Note what was moved."""
        self._moved = moved
        if time.monotonic() - self._told_at >= _REPORT_EVERY:
            self.tell()

    def tell(self, **fields: object) -> None:
        """Print where the step is."""
        self._told_at = time.monotonic()
        line = {"step": self._step, "moved": self._moved, "seconds": self._told_at - self._started_at}
        print(json.dumps(line | fields), flush=True)


def main() -> int:
    """Take the steps one after the other; 0 when every one was right."""
    good = True
    for step in json.loads(sys.argv[1]):
        progress = Progress(f"{step['kind']}, {step['family']}")
        try:
            text, ok = KINDS[step["kind"]](step["address"], step["amount"], progress), True
        except (OSError, CheckFailed) as error:
            text, ok = str(error), False
        good = good and ok
        progress.tell(ok=ok, text=text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
