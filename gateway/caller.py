"""Caller: asks a proxy one question a connection, blocking, and says what was seen; datagrams inside TCP among them."""

import socket
from typing import Final, Literal

import dpkt

from gateway.conversation import Address, Conversation, ProbeError, Silence
from gateway.proxyurl import ProxyUrl
from workers.socks import modes
from workers.socks.handshake import Handshake
from workers.socks.wire import REPLY_TEXT, Host, datagram_header_length, write_datagram_header
from workers.upstream import handshakes

Result = Literal["works", "understood", "fails", "unknown"]
Seen = tuple[Result, str]

DNS_PORT: Final = 53
QUESTION: Final = "one.one.one.one"
#: modes whose command nobody else has: that it is granted says all
_PROVEN_BY_REPLY: Final = (modes.GOST, modes.HEV)


class Caller:
    """A proxy at one of its addresses."""

    def __init__(self, proxy: ProxyUrl, address: Address, timeout: float, fwmark: int = 0, interface: str = "") -> None:
        """Each question may take `timeout` seconds; sockets get the mark and interface."""
        self.proxy = proxy
        self.address = address
        self.timeout = timeout
        self.family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        #: zeros of the control connection's family: "from anywhere" (RFC 1928, 7); dante refuses :: on IPv4
        self.zeros = bytes(16 if self.family == socket.AF_INET6 else 4)
        self.is_socks5 = proxy.scheme in ("socks5", "socks5h")
        self.marks = fwmark, interface

    def talk(self) -> Conversation:
        """Open a connection."""
        return Conversation(self.address, self.timeout, *self.marks)

    def handshake(self, command: int, host: Host, port: int, pipelined: bool = False) -> Handshake:
        """Make a handshake as the workers do; `pipelined`: SOCKS5, all in one go."""
        proxy = self.proxy
        return handshakes(proxy.scheme, proxy.username or None, proxy.password or None, pipelined)(command, host, port)

    def granted(self, talk: Conversation, handshake: Handshake, what: str) -> None:
        """Go through a handshake. ProbeError: it breaks, or the proxy says no."""
        talk.ask(handshake, what)
        if handshake.reply:
            raise ProbeError(f"{what}: {self.reply_text(handshake.reply)}")

    def reply_text(self, code: int) -> str:
        """Say what a REP code means."""
        text = REPLY_TEXT.get(code, "not a code of RFC 1928")
        return f"REP {code:02x}, {text}" if self.is_socks5 else text

    def tunnel(self, mode: str, resolver: str) -> Seen:
        """Ask for a dialect of UDP inside TCP, and send a DNS query through it. ProbeError: the proxy has none."""
        command, name, framing = modes.REQUESTS[mode]
        what = f"CONNECT {name}" if name else f"command {command:02x}"
        handshake = self.handshake(command, name or self.zeros, 0)
        query_id, query = dns_query()
        frames = framing()
        with self.talk() as talk:
            self.granted(talk, handshake, what)
            talk.send(frames.frame(write_datagram_header(packed(resolver), DNS_PORT), query))
            came = handshake.surplus
            while True:
                answers = frames.receive(came)
                if answers:
                    return "works", f"{what}: {dns_answer(answers[0], query_id, resolver)}"
                if frames.error is not None:
                    raise ProbeError(f"{what} was granted, but then: {frames.error}")
                try:
                    came = talk.some("an answer through the tunnel")
                except Silence:
                    if mode in _PROVEN_BY_REPLY:
                        return "works", f"{what} was granted; a query to {resolver} got no answer"
                    return "unknown", f"{what} was granted, as others do too; a query to {resolver} got no answer"


def packed(host: str) -> Host:
    """Return an address packed, a name as it is."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            return socket.inet_pton(family, host)
        except OSError:
            pass
    return host


def dns_query() -> tuple[int, bytes]:
    """Return the id and the bytes of a query that every resolver can answer."""
    query = dpkt.dns.DNS(id=int.from_bytes(QUESTION.encode()[:2], "big"), op=dpkt.dns.DNS_RD)
    query.qd = [dpkt.dns.DNS.Q(name=QUESTION, type=dpkt.dns.DNS_A)]
    return query.id, bytes(query)


def dns_answer(datagram: bytes, query_id: int, resolver: str) -> str:
    """Say what a SOCKS datagram answers to the query. ProbeError: it does not."""
    length = datagram_header_length(datagram)
    if not length or len(datagram) <= length:
        raise ProbeError(f"the relay answered {len(datagram)} bytes that are no SOCKS datagram")
    try:
        message = dpkt.dns.DNS(datagram[length:])
    except (dpkt.UnpackError, IndexError, UnicodeError):
        raise ProbeError("the answer through the relay is no DNS message") from None
    if message.id != query_id or message.qr != dpkt.dns.DNS_R:
        raise ProbeError("the answer through the relay belongs to another question")
    return f"DNS answer from {resolver}: {len(message.an)} records, code {message.rcode}"
