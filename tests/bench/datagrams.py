"""The datagram programs at both ends of the benchmark beyond traffic.py: client sockets by the thousand, and GSO.

    gso-echo ADDRESS PORT                       sends back what came joined (UDP_GRO), joined (UDP_SEGMENT)
    gso ADDRESS PORT SIZE SECONDS               the same at the client: super-datagrams there and back
    flows ADDRESS PORT SECONDS CONCURRENCY      new client sockets: one question, one answer, and the next
    idle ADDRESS PORT COUNT                     client sockets that were answered once, held until input ends

Like traffic.py it runs as a file, in isolated Python, and prints one line of JSON.
"""

import json
import resource
import select
import socket
import struct
import sys
import time
from typing import Final

SO_RCVBUFFORCE: Final = 33  # asm-generic/socket.h; Python has no constants for these
SO_SNDBUFFORCE: Final = 32
UDP_SEGMENT: Final = 103  # linux/udp.h
UDP_GRO: Final = 104
MAX_SEGMENTS: Final = 40  #: of 1,400 octets: what fits a super-datagram
PATIENCE: Final = 2.0  #: seconds until a question that has no answer is lost
WINDOW: Final = 8  #: super-datagrams on their way; more would only test buffers


def _socket(address: str = "", port: int = 0) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
    made.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 8 << 20)
    if address:
        made.connect((address, port))
    return made


def _segment(size: int) -> "list[tuple[int, int, bytes]]":
    return [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", size))]


def serve_gso_echo(address: str, port: int) -> None:
    server = _socket()
    server.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    server.bind((address, port))
    print("ready", flush=True)
    buffer = bytearray(65536)
    view = memoryview(buffer)
    while True:
        count, ancillary, _, sender = server.recvmsg_into([buffer], 64)
        size = struct.unpack("=i", ancillary[0][2])[0] if ancillary else count
        server.sendmsg([view[:count]], _segment(size) if size < count else [], 0, sender)


def gso(address: str, port: int, size: int, seconds: float) -> "dict[str, float]":
    """Keep a few super-datagrams on their way, and count the octets that come back."""
    end = _socket(address, port)
    end.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    payload = bytes(size * MAX_SEGMENTS)
    ancillary = _segment(size)
    buffer = bytearray(65536)
    end.settimeout(PATIENCE)
    end.send(b"x" * size)
    end.recv(65536)
    end.setblocking(False)
    clock = time.perf_counter
    sent = received = lost = 0
    began_at = now = clock()
    while now < began_at + seconds:
        while sent - received - lost < WINDOW * len(payload):
            end.sendmsg([payload], ancillary)
            sent += len(payload)
        if not select.select([end], [], [], 0.1)[0]:
            lost = sent - received  # what has not come by now does not come
        try:
            while True:
                received += end.recv_into(buffer)
        except BlockingIOError:
            pass
        now = clock()
    spent = now - began_at
    return {"gbit_s": received * 8 / spent / 1e9, "loss": lost / sent, "count": received / size}


def _raise_limit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def flows(address: str, port: int, seconds: float, concurrency: int) -> "dict[str, float]":
    """Ask one question from each of many new sockets, `concurrency` at a time."""
    poll = select.epoll()
    waiting: dict[int, tuple[socket.socket, float]] = {}
    clock = time.perf_counter
    took: list[float] = []
    failed = 0

    def ask() -> None:
        end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        end.connect((address, port))
        end.setblocking(False)
        poll.register(end, select.EPOLLIN)
        waiting[end.fileno()] = (end, clock())
        end.send(b"question")

    began_at = clock()
    finish_at = began_at + seconds
    while clock() < finish_at:
        while len(waiting) < concurrency:
            ask()
        for fd, _ in poll.poll(0.1):
            end, asked_at = waiting.pop(fd)
            try:
                end.recv(100)
                took.append(clock() - asked_at)
            except OSError:
                failed += 1
            end.close()
        now = clock()
        for fd, (end, asked_at) in list(waiting.items()):
            if now - asked_at < PATIENCE:
                break  # the oldest come first
            failed += 1
            del waiting[fd]
            end.close()
    if not took:
        raise ConnectionError("no socket was answered")
    took.sort()
    return {
        "per_second": len(took) / (clock() - began_at),
        "p50_us": took[len(took) // 2] * 1e6,
        "p99_us": took[len(took) * 99 // 100] * 1e6,
        "failed": failed,
        "count": len(took),
    }


def idle(address: str, port: int, count: int) -> None:
    """Open client sockets, each answered once, say so, and hold them until standard input ends."""
    _raise_limit()
    held = []
    for _ in range(count):
        end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        end.settimeout(PATIENCE)
        end.connect((address, port))
        for attempt in range(3):
            end.send(b"x")
            try:
                end.recv(10)
                break
            except TimeoutError:
                if attempt == 2:
                    raise
        held.append(end)
    print(json.dumps({"open": len(held)}), flush=True)
    sys.stdin.read()


def main(arguments: "list[str]") -> None:
    what, address, port, *rest = arguments
    if what == "gso-echo":
        serve_gso_echo(address, int(port))
    elif what == "gso":
        print(json.dumps(gso(address, int(port), int(rest[0]), float(rest[1]))))
    elif what == "flows":
        print(json.dumps(flows(address, int(port), float(rest[0]), int(rest[1]))))
    elif what == "idle":
        idle(address, int(port), int(rest[0]))
    else:
        sys.exit(f"no such program: {what}")


if __name__ == "__main__":
    main(sys.argv[1:])
