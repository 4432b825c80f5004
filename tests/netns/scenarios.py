"""How connections begin, end in order, and carry much or little: scenarios for tests/netns/test_tcp_differential.py."""

import errno
import socket
import time
from select import POLLERR as ERR
from select import POLLHUP as HUP
from select import POLLIN as IN
from select import POLLOUT as OUT
from select import POLLRDHUP as RDHUP
from typing import Final

from tests.netns.diary import TEXT, Scenario
from tests.netns.world import eventually

_TCP_FASTOPEN_CONNECT: Final = 30  # linux/tcp.h


# ── opening ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Refused(Scenario):
    """Nobody listens."""

    def client(self, end, steps):
        end.connect()
        end.error()
        end.poll(HUP)


class RefusedNonBlocking(Scenario):
    """The error of a connect in the background: by poll and SO_ERROR, once."""

    def client(self, end, steps):
        end.socket.setblocking(False)
        assert end.socket.connect_ex(end.address) == errno.EINPROGRESS
        end.poll(ERR)
        end.error()
        end.error()
        end.send(b"x")


class RefusedThenAgain(Scenario):
    """A socket that was refused may try again."""

    def client(self, end, steps):
        end.connect()
        end.connect()


class HostUnreachable(Scenario):
    """An ICMP error answers the SYN."""

    # Without a look at SO_ERROR: whether the error stays there too depends on whether it came while connect() still
    # held the socket, which it does where the router answers in the same breath.
    target = "unreachable"

    def client(self, end, steps):
        end.connect()


class NoRoute(Scenario):
    target = "no-route"

    def client(self, end, steps):
        end.connect()


class Silent(Scenario):
    """No answer at all: no SYN-ACK before the target has sent one."""

    target = "silent"

    def client(self, end, steps):
        end.connect(0.7)
        end.poll(0)


class AcceptedNonBlocking(Scenario):
    def client(self, end, steps):
        end.socket.setblocking(False)
        assert end.socket.connect_ex(end.address) == errno.EINPROGRESS
        end.poll(OUT)
        end.error()
        end.diary.append(f"peer: {end.socket.getpeername()[1] == end.address[1]}")
        end.close()

    def server(self, end, steps):
        end.receive_all()
        end.poll(IN)


class ConnectAndClose(Scenario):
    def client(self, end, steps):
        end.connect()
        end.close()

    def server(self, end, steps):
        end.poll(IN)
        end.receive_all()
        end.send(b"nobody hears this")


class ConnectAndReset(Scenario):
    def client(self, end, steps):
        end.connect()
        steps.wait("accepted")
        end.reset()

    def server(self, end, steps):
        steps.done("accepted")
        end.poll(ERR)
        end.receive_all()


class NeverAccepted(Scenario):
    """The listener goes with the connection still in its queue."""

    accepts = False

    def client(self, end, steps):
        end.connect()
        steps.done("connected")
        end.poll(ERR)
        end.receive_all()

    def server(self, end, steps):
        steps.wait("connected")
        end.close()


class TextInSyn(Scenario):
    """TCP Fast Open without a cookie: the text in the SYN is not taken, and comes again."""

    def client(self, end, steps):
        end.option(socket.IPPROTO_TCP, _TCP_FASTOPEN_CONNECT, 1)
        end.connect()
        end.send(TEXT)
        end.receive(len(TEXT))
        end.close()

    def server(self, end, steps):
        end.receive(len(TEXT))
        end.send(TEXT)
        end.receive_all()


class SameSourcePortAgain(Scenario):
    """The server closes first; then a new connection comes from the same port, while the old one is in TIME-WAIT."""

    connections = 2

    def client(self, end, steps):
        end.option(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        end.socket.bind(("", 0))
        end.connect()
        end.receive_all()
        port = end.socket.getsockname()[1]
        end.close()
        end.renew()
        end.option(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        end.socket.bind(("", port))
        # Until the last ACK has come the client's own kernel keeps the old one.
        eventually(lambda: end.socket.connect_ex(end.address) != errno.EADDRNOTAVAIL, "the old connection goes")
        end.diary.append(f"peer: {end.socket.getpeername()[1] == end.address[1]}")
        end.receive_all()
        end.close()

    def server(self, end, steps):
        end.send(TEXT)
        end.close()


# ── ordinary ends ───────────────────────────────────────────────────────────────────────────────────────────────────


class HalfCloseByClient(Scenario):
    def client(self, end, steps):
        end.connect()
        end.send(TEXT)
        end.shutdown(socket.SHUT_WR)
        end.receive_all()
        end.poll(IN | HUP)
        end.error()

    def server(self, end, steps):
        end.receive_all()
        end.poll(IN | RDHUP)
        for _ in range(20):
            end.send(TEXT)
        end.close()


class HalfCloseByServer(Scenario):
    def client(self, end, steps):
        end.connect()
        end.receive_all()
        end.poll(IN | RDHUP)
        for _ in range(20):
            end.send(TEXT)
        end.close()

    def server(self, end, steps):
        end.send(b"bye")
        end.shutdown(socket.SHUT_WR)
        end.receive_all()
        end.poll(IN | HUP)


class BothHalvesInTurn(Scenario):
    def client(self, end, steps):
        end.connect()
        end.send(TEXT)
        end.shutdown(socket.SHUT_WR)
        end.poll(IN | RDHUP)
        end.receive_all()
        end.poll(HUP)
        end.shutdown(socket.SHUT_RDWR)

    def server(self, end, steps):
        end.receive_all()
        end.send(TEXT)
        end.shutdown(socket.SHUT_WR)
        end.poll(HUP)
        end.error()


class SimultaneousClose(Scenario):
    def client(self, end, steps):
        end.connect()
        steps.done("connected")
        steps.wait("ready")
        end.send(TEXT)
        end.shutdown(socket.SHUT_WR)
        end.receive_all()
        end.poll(HUP)

    def server(self, end, steps):
        steps.wait("connected")
        steps.done("ready")
        end.send(TEXT)
        end.shutdown(socket.SHUT_WR)
        end.receive_all()
        end.poll(HUP)


class ShutdownOfReading(Scenario):
    """SHUT_RD says nothing to the other side."""

    def client(self, end, steps):
        end.connect()
        end.shutdown(socket.SHUT_RD)
        end.receive_all()
        end.send(TEXT)
        end.shutdown(socket.SHUT_WR)
        steps.wait("answered")
        end.close()

    def server(self, end, steps):
        end.receive_all()
        end.send(b"unheard")
        steps.done("answered")
        end.close()


class ShutdownOfBoth(Scenario):
    def client(self, end, steps):
        end.connect()
        end.send(TEXT)
        end.shutdown(socket.SHUT_RDWR)
        end.receive_all()
        end.send(b"x")
        steps.wait("seen")

    def server(self, end, steps):
        end.receive_all()
        end.poll(IN | RDHUP)
        steps.done("seen")


class ServerSpeaksFirst(Scenario):
    def client(self, end, steps):
        end.connect()
        end.receive(5)
        end.send(b"QUIT\r\n")
        end.receive_all()

    def server(self, end, steps):
        end.send(b"220 \n")
        end.receive(6)
        end.send(b"221 \n")
        end.close()


class ServerSpeaksAndCloses(Scenario):
    """The client's word to a server that is gone is answered with RST."""

    def client(self, end, steps):
        end.connect()
        end.receive_all()
        end.poll(RDHUP)
        steps.wait("closed")
        end.send(b"hello?")
        end.poll(ERR)
        end.error()
        end.receive_all()
        end.send(b"hello?")

    def server(self, end, steps):
        end.send(TEXT)
        end.close()
        steps.done("closed")


# ── much, little, slowly ────────────────────────────────────────────────────────────────────────────────────────────


class ManySmallWrites(Scenario):
    def client(self, end, steps):
        end.connect()
        end.option(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for size in range(2000):
            end.socket.sendall(TEXT[: 1 + size % 90])
        end.shutdown(socket.SHUT_WR)
        end.receive_all()

    def server(self, end, steps):
        end.option(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.receive_all()
        for size in range(2000):
            end.socket.sendall(TEXT[: 1 + size % 70])
        end.close()


class OneHugeWrite(Scenario):
    def client(self, end, steps):
        end.connect()
        end.send(TEXT * 3000)
        end.shutdown(socket.SHUT_WR)
        end.receive_all()

    def server(self, end, steps):
        end.receive_all()
        end.send(TEXT * 3000)
        end.close()


class SlowClient(Scenario):
    """The client's window is shut for a second, and everything is there afterwards."""

    def client(self, end, steps):
        end.option(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        end.connect()
        time.sleep(1)  # the time during which nothing is read
        end.receive_all()

    def server(self, end, steps):
        end.send_stream(3 << 20)
        end.close()


class SlowServer(Scenario):
    def client(self, end, steps):
        end.connect()
        end.send_stream(12 << 20)
        end.shutdown(socket.SHUT_WR)
        end.receive_all()

    def server(self, end, steps):
        # Not less: over the loopback device between proxy and server, whose MSS is 64 KiB, that crawls.
        end.option(socket.SOL_SOCKET, socket.SO_RCVBUF, 200_000)
        time.sleep(1)  # the time during which nothing is read
        end.receive_all()
        end.send(b"done")
        end.close()


class Keepalive(Scenario):
    """The probes of an idle client are answered."""

    def client(self, end, steps):
        for name, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 1)):
            end.option(socket.IPPROTO_TCP, name, value)
        end.option(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        end.connect()
        time.sleep(2.3)  # without an answer the connection would have ended after two seconds
        end.poll(OUT)
        end.send(b"still here")
        end.receive_all()

    def server(self, end, steps):
        end.receive(10)
        end.close()
