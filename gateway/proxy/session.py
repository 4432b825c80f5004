"""Session: a client from its first byte until its request is granted or refused; nothing here outlives that.

    _greeting → (TLS) → (_password) → _request ──CONNECT──────► outbound.connect → reply → join.py
                                               ──BIND─────────► outbound.bind
                                               ──UDP ASSOCIATE► outbound.associate → reply → udp.py
                                               ──F3, 05, UoT──► outbound.associate → reply → framed.py
                                               ──refused──────► reply, then _linger until the client has read it

The state *is* a method; each returns early while bytes are missing, and goes on to the next with what is left: clients
may send all at once (RFC 1928 does not forbid it), or byte by byte. Bytes behind the request belong to the flow.
"""

import hmac
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from gateway.proxy.datagrams import Out
from gateway.proxy.framed import FramedClient
from gateway.proxy.join import join
from gateway.proxy.reply import refusal, reply_for, write_reply
from gateway.proxy.stream import Layered, Owner
from gateway.proxy.udp import UdpClient
from workers.socks.framing import (
    GOST_UDP,
    HEV_UDP,
    UOT2_NAME,
    UOT_NAME,
    Framing,
    GostFraming,
    HevFraming,
    Uot2ServerFraming,
    UotFraming,
)
from workers.socks.wire import (
    ADDRESS_TYPE_NOT_SUPPORTED,
    BIND,
    COMMAND_NOT_SUPPORTED,
    CONNECT,
    GOST1_TLS_PASSWORD,
    GOST_CIPHERS,
    GOST_TLS,
    GOST_TLS_PASSWORD,
    NO_ACCEPTABLE_METHOD,
    NO_AUTHENTICATION,
    NOT_ALLOWED,
    SUCCEEDED,
    UDP_ASSOCIATE,
    USERNAME_PASSWORD,
    VERSION,
    ProtocolError,
    parse_address,
)

if TYPE_CHECKING:
    from gateway.proxy.outbound import Attempt
    from gateway.proxy.server import Server

LINGER_TIMEOUT: Final = 2.0  # seconds for a refused client to read why

_UOT: Final[dict[str, Callable[[], Framing]]] = {UOT_NAME: UotFraming, UOT2_NAME: Uot2ServerFraming}


class Session(Owner):
    """One client that has been accepted and has not got what it wants yet."""

    __slots__ = ("_answer", "_attempt", "_framing", "_inbox", "_is_connect", "_method", "_server", "_state", "client")

    client: Layered

    def __init__(self, server: "Server") -> None:
        self._server = server
        self._inbox = b""  #: what has come and is not understood yet
        self._state: Callable[[Session], None] = Session._greeting
        self._method = NO_AUTHENTICATION
        self._attempt: Attempt | None = None  #: what is being done about the request
        self._framing: Framing | None = None  #: what datagrams are to be put into; None for UDP ASSOCIATE
        self._answer = b""  #: the reply that grants datagrams in a framing
        self._is_connect = False

    def attend(self, client: Layered) -> None:
        """Own the client's stream from now on."""
        self.client = client
        self._server.expect(self, self._server.handshake_timeout)

    def received(self, data: bytes) -> None:
        self._inbox += data  # every state takes what is complete, or holds the stream
        self._state(self)

    def ended(self) -> None:
        # A client that waits for its target may have said all that it has to say.
        if self._state is not Session._wait or not self._is_connect:
            self._give_up("handshake-unfinished")

    def lost(self, number: int) -> None:
        self._give_up("client-reset" if self._state is Session._wait else "handshake-unfinished")

    def expire(self) -> None:
        """Give up."""
        self._give_up("handshake-timeout" if self._state is not Session._linger else "refused-unread")

    def _greeting(self) -> None:
        inbox = self._inbox
        if inbox[0] != VERSION:
            self._give_up("socks-version")
            return
        if len(inbox) < 2 or len(inbox) < 2 + inbox[1]:
            return
        end = 2 + inbox[1]
        method = self._choose(inbox[2:end])
        self._inbox = inbox[end:]
        if method == NO_ACCEPTABLE_METHOD:
            self._refuse("method-refused", bytes((VERSION, NO_ACCEPTABLE_METHOD)))
            return
        self._method = method
        self._state = Session._request if method in (NO_AUTHENTICATION, GOST_TLS) else Session._password
        self.client.write(bytes((VERSION, method)))
        if method not in (NO_AUTHENTICATION, USERNAME_PASSWORD) and self._server.tls:
            surplus = self._inbox
            self._inbox = b""
            self.client.push(self._server.tls.serve(), surplus)
        elif self._inbox:
            self._state(self)

    def _choose(self, offered: bytes) -> int:
        """Choose a method; those of gost are TLS from then on, if there is a certificate."""
        tls = self._server.tls is not None
        if self._server.credentials:
            # gost v2 offers 00, 02 and 80, and takes 82, which it did not offer, for "TLS, then the password".
            if tls and GOST_TLS in offered and (GOST_TLS_PASSWORD in offered or USERNAME_PASSWORD in offered):
                return GOST_TLS_PASSWORD
            if tls and GOST1_TLS_PASSWORD in offered:
                return GOST1_TLS_PASSWORD
            if USERNAME_PASSWORD in offered:
                return USERNAME_PASSWORD
        elif tls and GOST_TLS in offered:
            return GOST_TLS
        elif NO_AUTHENTICATION in offered:
            return NO_AUTHENTICATION
        if len(offered) == 1 and offered[0] in GOST_CIPHERS:
            sentence = (
                f"a client wants gost's cipher {GOST_CIPHERS[offered[0]]} (method {offered[0]:#x}): "
                "of gost's own methods only those with TLS are spoken here, 80, 82 and 8a"
            )
            self._server.complain(ProtocolError("method-cipher", sentence))
        return NO_ACCEPTABLE_METHOD

    def _password(self) -> None:
        inbox = self._inbox
        if inbox[0] != 1:
            self._refuse("password-version", b"\x01\xff")
            return
        if len(inbox) < 2 or len(inbox) < 3 + inbox[1]:
            return
        username_end = 2 + inbox[1]
        end = username_end + 1 + inbox[username_end]
        if len(inbox) < end:
            return
        self._inbox = inbox[end:]
        username, password = self._server.credentials or (b"", b"")
        if self._method == GOST1_TLS_PASSWORD:
            username = b""  # gost v1 has a password only
        # Both are always compared, and in constant time, so that the time tells nothing.
        right = hmac.compare_digest(inbox[2:username_end], username)
        right &= hmac.compare_digest(inbox[username_end + 1 : end], password)
        if not right:
            self._refuse("password-refused", b"\x01\x01")
            return
        self._state = Session._request
        self.client.write(b"\x01\x00")
        if self._inbox:
            self._state(self)

    def _request(self) -> None:
        inbox = self._inbox
        if inbox[0] != VERSION:
            self._give_up("socks-version")
            return
        try:
            address = parse_address(inbox, 3)
        except ProtocolError as error:
            self.refuse(ADDRESS_TYPE_NOT_SUPPORTED, error.reason)
            return
        if address is None:
            return
        host, port, end = address
        asked = inbox[3:end]
        self._inbox = inbox[end:]
        self._state = Session._wait
        self._server.settle(self)  # from here on the outbound has timeouts of its own
        outbound = self._server.outbound
        command = inbox[1]
        if command == CONNECT:
            uot = _UOT.get(host) if isinstance(host, str) else None
            if uot:
                self._associate(uot(), write_reply(SUCCEEDED, ("0.0.0.0", 0)))
            else:
                self._is_connect = True
                self._attempt = outbound.connect(self._server, host, port, self)
        elif command == UDP_ASSOCIATE:
            self._associate(None, b"")
        elif command == BIND:
            self._attempt = outbound.bind(self._server, host, port, self)
        elif command == HEV_UDP:
            self._associate(HevFraming(), bytes((VERSION, SUCCEEDED, 0)) + asked)  # hev echoes the address
        elif command == GOST_UDP and port:
            self.refuse(NOT_ALLOWED, "remote-forward-refused")  # a UDP port of this machine, for anybody
        elif command == GOST_UDP:
            self._associate(GostFraming(), b"")
        else:
            self.refuse(COMMAND_NOT_SUPPORTED, "command-not-supported")

    def _wait(self) -> None:
        """Read no further while the request is being dealt with."""
        self.client.hold()

    # What the outbound answers: one of these, perhaps before the call that asked for it returns

    def connected(self, target: Layered, bound: bytes, surplus: bytes = b"") -> None:
        """Grant a CONNECT; `bound` is the address for the reply."""
        self._attempt = None
        if self._state is not Session._wait:
            target.close()
            return
        self._done()
        self._server.counters["connected"] += 1
        self.client.write(bytes((VERSION, SUCCEEDED, 0)) + bound)
        join(self._server, self.client, target, self._inbox, surplus)

    def associated(self, out: Out) -> None:
        """Grant datagrams, which go out through `out`."""
        self._attempt = None
        if self._state is not Session._wait:
            out.close()
            return
        try:
            if self._framing:
                client: FramedClient | UdpClient = FramedClient(
                    self._server, self.client, self._framing, out, joins=True
                )
                answer = self._answer or write_reply(SUCCEEDED, self.client.local)
            else:
                client = UdpClient(self._server, self.client, out)
                answer = client.reply
        except OSError as error:
            out.close()
            self.refuse(reply_for(error.errno), "socket-refused")
            return
        self._done()
        self._server.counters["associated"] += 1
        self.client.write(answer)
        client.begin(self._inbox)

    def take(self) -> tuple[Layered, bytes]:
        """Give the client and what it has sent already away, to whom grants the request in several steps."""
        self._attempt = None
        self._done()
        return self.client, self._inbox

    def refuse(self, reply: int, reason: str) -> None:
        """Answer the request with a REP code other than success."""
        self._attempt = None
        if self._state not in (Session._linger, Session._over):
            self._refuse(reason, refusal(reply))

    # Ends

    def _associate(self, framing: Framing | None, answer: bytes) -> None:
        self._framing = framing
        self._answer = answer
        self._attempt = self._server.outbound.associate(self._server, self)

    def _refuse(self, reason: str, answer: bytes) -> None:
        self._server.counters[reason] += 1
        # Closing with bytes unread would send RST, which may overtake the answer: send FIN, and wait for the client's.
        self._inbox = b""
        self._state = Session._linger
        self._server.expect(self, LINGER_TIMEOUT)
        self.client.write(answer)
        self.client.finish()
        self.client.go_on()

    def _linger(self) -> None:
        self._inbox = b""

    def _over(self) -> None:
        self._inbox = b""

    def _done(self) -> None:
        self._state = Session._over
        self._server.settle(self)

    def _give_up(self, reason: str) -> None:
        if self._state is Session._over:
            return
        if self._state is not Session._linger:
            self._server.counters[reason] += 1
        self._done()
        if self._attempt:
            self._attempt.cancel()
            self._attempt = None
        self.client.close()
