"""The benchmark's own clients and servers, for what iperf3 and wrk do not measure; run by path, standard library only.

Servers (until killed):      tcp-echo PORT · udp-echo ADDRESS PORT · hold PORT
Clients (print one JSON):    ping-pong tcp|udp ADDRESS PORT SECONDS · connections PREFIX PORT SECONDS CONCURRENCY
                             udp-rate ADDRESS PORT SIZE STEP_SECONDS
                             idle ADDRESS PORT COUNT (until standard input ends)
Either side of a link row:   bulk-send ADDRESS PORT STREAMS CONGESTION (until killed)
                             bulk-receive ADDRESS PORT STREAMS SECONDS (prints one JSON); ADDRESS `-` accepts instead
A client with `--socks HOST:PORT` at the end speaks SOCKS5 itself to that proxy; without, it connects.

They are plain Python on raw sockets, the same for every subject, so that their own cost, which the two cores carry too,
is the same for each. `connections` opens about as many as wrk does with `Connection: close` in front of nginx.
"""

import errno
import json
import select
import socket
import struct
import sys
import time
from threading import Thread

SO_RCVBUFFORCE, SO_SNDBUFFORCE = 33, 32
LOSS_ALLOWED = 0.01
BURST = 64  # datagrams at most between two looks at the clock and the answers

Proxy = "tuple[str, int] | None"


# -- servers --


def serve_tcp_echo(port: int) -> None:
    """Echo whatever comes, one thread for each connection (one is busy at a time)."""
    listener = _listen(port)
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        Thread(target=_echo, args=(connection,), daemon=True).start()


def _echo(connection: socket.socket) -> None:
    with connection:
        try:
            while data := connection.recv(4096):
                connection.sendall(data)
        except OSError:
            pass


def serve_udp_echo(address: str, port: int) -> None:
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
    server.bind((address, port))
    print("ready", flush=True)
    buffer = bytearray(65536)
    view = memoryview(buffer)
    receive, send = server.recvfrom_into, server.sendto
    while True:
        count, sender = receive(buffer)
        send(view[:count], sender)


def serve_hold(port: int) -> None:
    """Accept connections and keep them until the other side ends them."""
    listener = _listen(port)
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    held: dict[int, socket.socket] = {}
    while True:
        for fd, _ in poll.poll():
            if fd == listener.fileno():
                connection, _ = listener.accept()
                held[connection.fileno()] = connection
                poll.register(connection, select.EPOLLIN)
            else:
                held.pop(fd).close()


def _listen(port: int) -> socket.socket:
    _raise_limit()
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("0.0.0.0", port))
    listener.listen(16384)
    return listener


def _raise_limit() -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# -- clients --


def open_tcp(address: str, port: int, proxy: "tuple[str, int] | None") -> socket.socket:
    connection = socket.create_connection(proxy or (address, port), 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if proxy:
        for message, length in handshake(address, port):
            connection.sendall(message)
            answer = connection.recv(length, socket.MSG_WAITALL)
            if answer[:2] != b"\x05\x00":
                raise ConnectionError(f"the proxy answers {answer.hex()}")
    return connection


def handshake(address: str, port: int) -> "list[tuple[bytes, int]]":
    """Return what a SOCKS5 client says and how long each answer is (proxies here answer with an IPv4 address)."""
    request = b"\x05\x01\x00\x01" + socket.inet_aton(address) + struct.pack(">H", port)
    return [(b"\x05\x01\x00", 2), (request, 10)]


class Datagrams:
    """A connected UDP socket to the target, or to the proxy's relay with the header that it wants in front."""

    def __init__(self, address: str, port: int, proxy: "tuple[str, int] | None") -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        self.socket.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 8 << 20)
        self.header = b""
        if proxy is None:
            self.socket.connect((address, port))
            return
        self.control = socket.create_connection(proxy, 10)
        self.control.sendall(b"\x05\x01\x00")
        self.control.recv(2, socket.MSG_WAITALL)
        self.control.sendall(b"\x05\x03\x00\x01" + bytes(6))
        reply = self.control.recv(10, socket.MSG_WAITALL)
        if reply[:2] != b"\x05\x00":
            raise ConnectionError(f"the proxy has no UDP: {reply.hex()}")
        self.socket.connect((proxy[0], struct.unpack(">H", reply[8:])[0]))
        self.header = b"\0\0\0\x01" + socket.inet_aton(address) + struct.pack(">H", port)


def ping_pong(
    kind: str, address: str, port: int, seconds: float, proxy: "tuple[str, int] | None"
) -> "dict[str, float]":
    """One byte there and back, one at a time; the times are what a program sees."""
    if kind == "tcp":
        end = open_tcp(address, port, proxy)
        message = b"x"
    else:
        datagrams = Datagrams(address, port, proxy)
        end, message = datagrams.socket, datagrams.header + b"x"
    end.settimeout(2)
    took = []
    clock = time.perf_counter
    for _ in range(50):
        end.send(message)
        end.recv(64)
    finish_at = clock() + seconds
    lost = 0
    while clock() < finish_at:
        began_at = clock()
        end.send(message)
        try:
            end.recv(64)
        except TimeoutError:
            lost += 1
            continue
        took.append(clock() - began_at)
    return {**percentiles(took), "count": len(took), "lost": lost}


def percentiles(took: "list[float]") -> "dict[str, float]":
    took = sorted(took)
    return {"p50_us": took[len(took) // 2] * 1e6, "p99_us": took[len(took) * 99 // 100] * 1e6}


def connections(
    prefix: str, port: int, seconds: float, concurrency: int, proxy: "tuple[str, int] | None"
) -> "dict[str, float]":
    """Open, ask nginx for eight bytes, see the end, close: `concurrency` at a time, for `seconds`.

    The request is HTTP/1.0, so the server closes first, as servers of short requests do, and TIME-WAIT is on its side.
    Eight target addresses in turn, so that ports do not run out.
    """
    request = b"GET / HTTP/1.0\r\n\r\n"
    targets = [(f"{prefix}.{host}", port) for host in range(10, 18)]
    say = [handshake(*target) if proxy else [] for target in targets]
    poll = select.epoll()
    clock = time.perf_counter
    open_: dict[int, list] = {}  # descriptor → [socket, began_at, steps still to say, bytes of the answer to come]
    took: list[float] = []
    failed = started = 0

    def start() -> None:
        nonlocal started, failed
        which = started % 8
        started += 1
        connection = socket.socket()
        connection.setblocking(False)
        began_at = clock()
        error = connection.connect_ex(proxy or targets[which])
        if error not in (0, errno.EINPROGRESS):
            connection.close()
            failed += 1
            return
        fd = connection.fileno()
        open_[fd] = [connection, began_at, [*say[which], (request, 0)], -1]
        # Edge-triggered and registered once: connected is one event, each answer another.
        poll.register(fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)

    begin_at = clock()
    finish_at = begin_at + seconds
    for _ in range(concurrency):
        start()
    while open_:
        for fd, events in poll.poll(2):
            entry = open_.get(fd)
            if entry is None:
                continue
            connection, began_at, steps, expected = entry
            done = False
            try:
                if expected < 0 and events & select.EPOLLOUT:
                    message, entry[3] = steps.pop(0)
                    connection.send(message)
                    continue
                if not events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                    continue
                data = connection.recv(4096)
                if steps:
                    if len(data) != expected or data[1]:
                        raise ConnectionError("refused, or an answer in pieces")
                    message, entry[3] = steps.pop(0)
                    connection.send(message)
                    continue
                if data:
                    took.append(clock() - began_at)
                    entry[1] = 0.0
                    done = not connection.recv(4096)
                else:
                    done = True
                    failed += bool(entry[1])
            except BlockingIOError:
                continue
            except OSError:
                done = True
                failed += bool(entry[1])
            if done:
                del open_[fd]
                connection.close()
                if clock() < finish_at:
                    start()
        if clock() > finish_at + 3:
            failed += len(open_)
            break
    spent = min(clock(), finish_at + 3) - begin_at
    if not took:
        raise ConnectionError(f"none of {started} connections worked")
    return {"per_second": len(took) / spent, **percentiles(took), "failed": failed, "count": len(took)}


def udp_rate(address: str, port: int, size: int, step: float, proxy: "tuple[str, int] | None") -> "dict[str, float]":
    """Find the highest fixed rate of datagrams that come back from an echo with at most 1 % lost.

    Plain datagrams, one system call each, paced to the clock in bursts of what came due since the last look; the same
    socket takes the answers. The rate doubles until a step loses more (twice in a row) or the client itself cannot go
    faster, then the interval is halved five times. The result is the rate of answers in the best step.
    """
    datagrams = Datagrams(address, port, proxy)
    payload = datagrams.header + bytes(size)
    end = datagrams.socket
    # The first datagram pays for the association.
    end.settimeout(5)
    end.send(payload)
    end.recv(65536)
    end.setblocking(False)
    best = best_loss = 0.0
    total = 0

    def good(rate: float) -> bool:
        nonlocal best, best_loss, total
        for _ in range(2):
            sent, received, sending, answering = _udp_step(end, payload, rate, step)
            total += sent
            loss = 1 - received / sent
            # Answers that come in long after the last question stood in a queue: that rate would not have lasted.
            if loss <= LOSS_ALLOWED and answering < sending * 1.05:
                if received / answering > best:
                    best, best_loss = received / answering, loss
                return sent / sending > rate * 0.9
        return False

    low, high = 0.0, 4000.0
    while good(high):
        low, high = high, high * 2
    for _ in range(5):
        middle = (low + high) / 2
        if good(middle):
            low = middle
        else:
            high = middle
    return {"per_second": best, "loss": best_loss, "count": total}


def _udp_step(end: socket.socket, payload: bytes, rate: float, seconds: float) -> "tuple[int, int, float, float]":
    """Send at a rate; return how many went and came, and for how long they went and came."""
    send, receive, clock = end.send, end.recv_into, time.perf_counter
    buffer = bytearray(65536)
    sent = received = 0
    began_at = now = clock()
    finish_at = began_at + seconds
    while now < finish_at:
        due = int((now - began_at) * rate) - sent
        if due > 0:
            for _ in range(min(due, BURST)):
                try:
                    send(payload)
                except (BlockingIOError, ConnectionRefusedError):
                    pass  # counted as sent, and then as lost
                sent += 1
        try:
            for _ in range(2 * BURST):
                receive(buffer)
                received += 1
        except (BlockingIOError, ConnectionRefusedError):
            pass
        now = clock()
        wait = began_at + (sent + 1) / rate - now
        if wait > 0:
            select.select([end], [], [], wait)
            now = clock()
    sending = now - began_at
    # Answers under way still count; quiet for 100 ms means that no more come.
    while select.select([end], [], [], 0.1)[0]:
        try:
            while True:
                receive(buffer)
                received += 1
        except (BlockingIOError, ConnectionRefusedError):
            pass
        now = clock()
    return max(sent, 1), min(received, sent), sending, now - began_at


def idle(address: str, port: int, count: int, proxy: "tuple[str, int] | None") -> None:
    """Open connections, say so, and hold them until standard input ends."""
    _raise_limit()
    held = []
    for _ in range(count):
        held.append(open_tcp(address, port, proxy))
    print(json.dumps({"open": len(held)}), flush=True)
    sys.stdin.read()


# -- either side of a link row --


def streams_of(address: str, port: int, count: int, congestion: str = "") -> "list[socket.socket]":
    """Open or, with the address `-`, accept that many connections."""
    if address == "-":
        listener = _listen(port)
        print("ready", flush=True)
        ends = [listener.accept()[0] for _ in range(count)]
    else:
        # With 5 % lost each way a SYN needs a second try now and then, but not ten.
        ends = [socket.create_connection((address, port), 20) for _ in range(count)]
    for end in ends:
        end.settimeout(None)
        if congestion:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
    return ends


def bulk_send(address: str, port: int, count: int, congestion: str) -> None:
    """Send on all streams, each from a thread of its own, until killed.

    The congestion control is set for each socket, as root may: a namespace's default can only be one that the machine
    allows everybody, which CUBIC is not where the machine's own default is another.
    """

    def send(end: socket.socket) -> None:
        block = bytes(128 << 10)
        try:
            while True:
                end.sendall(block)
        except OSError:
            pass  # the receiver has seen enough

    senders = [Thread(target=send, args=(end,)) for end in streams_of(address, port, count, congestion)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()


def bulk_receive(address: str, port: int, count: int, seconds: float) -> "dict[str, float]":
    """Count what arrives on all streams in `seconds`, from when the last of them has begun."""
    poll = select.epoll()
    ends = {end.fileno(): end for end in streams_of(address, port, count)}
    for fd in ends:
        poll.register(fd, select.EPOLLIN)
    buffer = bytearray(1 << 18)
    silent = set(ends)
    clock = time.monotonic
    give_up_at = clock() + 20
    received, finish_at = 0, 0.0
    while not finish_at or clock() < finish_at:
        for fd, _ in poll.poll(0.05):
            length = ends[fd].recv_into(buffer)
            if not length:
                raise ConnectionError("a stream ended early")
            silent.discard(fd)
            if finish_at:
                received += length
        if not finish_at and (not silent or clock() > give_up_at):
            if len(silent) == len(ends):
                raise ConnectionError("nothing arrives")
            finish_at = clock() + seconds
    return {"bytes_per_second": received / (clock() - finish_at + seconds)}


def main(arguments: "list[str]") -> None:
    proxy = None
    if "--socks" in arguments:
        at = arguments.index("--socks")
        host, _, port = arguments[at + 1].rpartition(":")
        proxy = (host, int(port))
        del arguments[at : at + 2]
    what, *rest = arguments
    if what == "tcp-echo":
        serve_tcp_echo(int(rest[0]))
    elif what == "udp-echo":
        serve_udp_echo(rest[0], int(rest[1]))
    elif what == "hold":
        serve_hold(int(rest[0]))
    elif what == "ping-pong":
        print(json.dumps(ping_pong(rest[0], rest[1], int(rest[2]), float(rest[3]), proxy)))
    elif what == "connections":
        print(json.dumps(connections(rest[0], int(rest[1]), float(rest[2]), int(rest[3]), proxy)))
    elif what == "udp-rate":
        print(json.dumps(udp_rate(rest[0], int(rest[1]), int(rest[2]), float(rest[3]), proxy)))
    elif what == "idle":
        idle(rest[0], int(rest[1]), int(rest[2]), proxy)
    elif what == "bulk-send":
        bulk_send(rest[0], int(rest[1]), int(rest[2]), rest[3])
    elif what == "bulk-receive":
        print(json.dumps(bulk_receive(rest[0], int(rest[1]), int(rest[2]), float(rest[3]))))
    else:
        sys.exit(f"no such program: {what}")


if __name__ == "__main__":
    main(sys.argv[1:])
