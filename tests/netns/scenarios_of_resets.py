"""Connections that do not end in order: more scenarios for tests/netns/test_tcp_differential.py."""

import socket
from select import POLLERR as ERR
from select import POLLHUP as HUP

from tests.netns.diary import TEXT, Scenario


class ResetByServer(Scenario):
    def client(self, end, steps):
        end.connect()
        end.send(TEXT)
        end.poll(ERR)
        end.receive_all()
        end.receive_all()
        end.send(b"x")

    def server(self, end, steps):
        end.receive(len(TEXT))
        end.reset()


class ResetByServerSeenByOption(Scenario):
    def client(self, end, steps):
        end.connect()
        end.send(b"x")
        end.poll(ERR)
        end.error()
        end.error()
        end.receive_all()

    def server(self, end, steps):
        end.receive(1)
        end.reset()


class ResetByServerBehindText(Scenario):
    """What arrived before the RST can be read; then comes the error, not the end."""

    def client(self, end, steps):
        end.connect()
        end.arrived(len(TEXT))
        steps.done("arrived")
        end.poll(ERR)
        end.receive_all()
        end.receive_all()

    def server(self, end, steps):
        end.send(TEXT)
        steps.wait("arrived")
        end.reset()


class ResetByServerAfterHalfClose(Scenario):
    """The client has sent its FIN and waits for the answer: it hears of the RST, not of an end."""

    def client(self, end, steps):
        end.connect()
        end.send(TEXT)
        end.shutdown(socket.SHUT_WR)
        end.receive_all()
        end.error()

    def server(self, end, steps):
        end.receive_all()
        end.reset()


class ResetByServerInMidTransfer(Scenario):
    def client(self, end, steps):
        end.connect()
        end.send_stream(64 << 20)
        end.send(b"x")

    def server(self, end, steps):
        end.receive(1 << 20)
        end.reset()


class ResetByClient(Scenario):
    def client(self, end, steps):
        end.connect()
        end.send(TEXT)
        end.receive(1)
        end.reset()

    def server(self, end, steps):
        end.receive(len(TEXT))
        end.send(b"y")
        end.poll(ERR)
        end.receive_all()
        end.send(b"x")


class ResetByClientInMidTransfer(Scenario):
    def client(self, end, steps):
        end.connect()
        end.receive(1 << 20)
        end.reset()

    def server(self, end, steps):
        end.send_stream(64 << 20)
        end.send(b"x")


class ResetByClientAfterServersHalfClose(Scenario):
    def client(self, end, steps):
        end.connect()
        end.receive_all()
        end.reset()

    def server(self, end, steps):
        end.send(TEXT)
        end.shutdown(socket.SHUT_WR)
        end.poll(ERR | HUP)
        end.receive_all()
        end.error()


class ServerClosesWithUnreadText(Scenario):
    """Closing without having read what came is a RST (RFC 2525, 2.17); what was said before still arrives."""

    def client(self, end, steps):
        end.connect()
        end.send(TEXT)
        end.arrived(3)
        steps.done("arrived")
        end.poll(ERR)
        end.receive_all()
        end.receive_all()

    def server(self, end, steps):
        end.send(b"no!")
        end.arrived(len(TEXT))
        steps.wait("arrived")
        end.close()


class ClientClosesWithUnreadText(Scenario):
    def client(self, end, steps):
        end.connect()
        end.arrived(len(TEXT))
        end.close()

    def server(self, end, steps):
        end.send(TEXT)
        end.poll(ERR)
        end.receive_all()
        end.send(b"x")
