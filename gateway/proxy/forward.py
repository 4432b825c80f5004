"""Forwarder: the outbound that asks another server for everything, over a tunnel for each request.

    client ── SOCKS5 ──► Server ── Forwarder ──(carrier: plain, TLS, WebSocket, HTTP)──► the other server ──► targets

UDP goes inside the tunnel in a dialect (workers/socks/framing.py), or beside it as SOCKS datagrams where the mode is
`udp`. With `auto` each way is tried until the other server grants one; what it granted is asked for first from then on.
"""

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from gateway.proxy.datagrams import Out
from gateway.proxy.framed import FramedOut
from gateway.proxy.join import join
from gateway.proxy.opening import Opening
from gateway.proxy.outbound import Attempt
from gateway.proxy.relayed import RelayedOut
from gateway.proxy.stream import Layered, Owner
from gateway.proxy.tls import ClientTls
from gateway.proxy.tunnelurl import AUTO, HTTP, RAW, UDP_MODES, TunnelUrl
from gateway.proxyurl import ProxyUrl
from workers.socks.client import SocksHandshake
from workers.socks.framing import (
    GOST_UDP,
    HEV_UDP,
    UOT2_NAME,
    UOT_NAME,
    Framing,
    GostFraming,
    HevFraming,
    Uot2Framing,
    UotFraming,
)
from workers.socks.handshake import Handshake
from workers.socks.http import basic_credentials, http_handshake
from workers.socks.socks4 import socks4_handshake
from workers.socks.tlsmethod import TlsMethodHandshake
from workers.socks.wire import (
    BIND,
    COMMAND_NOT_SUPPORTED,
    CONNECT,
    SUCCEEDED,
    UDP_ASSOCIATE,
    Host,
    ProtocolError,
    parse_address,
    write_address,
)

if TYPE_CHECKING:
    from gateway.proxy.server import Server
    from gateway.proxy.session import Session

log = logging.getLogger(__name__)

RETRY_AFTER: Final = 30.0  # seconds until what was refused, or led nowhere, is tried again

_UNSPECIFIED: Final = bytes(4)

#: way → command, host, framing
_DIALECTS: Final[dict[str, tuple[int, Host, Callable[[], Framing]]]] = {
    "gost": (GOST_UDP, _UNSPECIFIED, GostFraming),
    "gost-v1": (UDP_ASSOCIATE, _UNSPECIFIED, GostFraming),
    "hev": (HEV_UDP, _UNSPECIFIED, HevFraming),
    "uot": (CONNECT, UOT2_NAME, Uot2Framing),
    "uot-v1": (CONNECT, UOT_NAME, UotFraming),
}
_NAMES: Final = {
    "udp": "UDP ASSOCIATE",
    "gost": "gost's UDP over TCP (F3)",
    "gost-v1": "gost v1's UDP over TCP (03)",
    "hev": "hev's UDP over TCP (05)",
    "uot": "UoT 2",
    "uot-v1": "UoT 1",
}


class Forwarder:
    """The way through one other server."""

    def __init__(
        self,
        url: TunnelUrl,
        *,
        udp_mode: str = AUTO,
        socks_tls: str = "off",
        tls: ClientTls | None = None,
        via: ProxyUrl | None = None,
    ) -> None:
        """`udp_mode` is one of UDP_MODES, `socks_tls` of SOCKS_TLS; `via` is a proxy before the tunnel."""
        self.url = url
        self.via = via
        self._tls = tls
        self._socks_tls = socks_tls
        self._ways = UDP_MODES[udp_mode]
        if udp_mode == AUTO and url.carrier == RAW and socks_tls == "off" and not via:
            # Beside a plain tunnel UDP may pass by itself; beside any other it would be what the tunnel hides.
            self._ways = ("udp", *self._ways)
        if url.proxy.scheme == "http":
            # HTTP has UoT alone, and HTTP proxies grant a CONNECT to whatever name: only on request.
            self._ways = tuple(way for way in self._ways if way.startswith("uot") and udp_mode != AUTO)
        self._found: str | None = None  #: the way that was granted last; "" when none was
        self._none_before = 0.0  #: no way is asked for until then, after all were refused
        self._not_before: dict[str, float] = {}  #: the same of single ways
        self._is_down = False

    @property
    def tls(self) -> ClientTls:
        """Return how the other server's certificate is judged; unless told otherwise, as the system does."""
        self._tls = self._tls or ClientTls()
        return self._tls

    @property
    def authority(self) -> str:
        """Return host and port as HTTP has them."""
        proxy = self.url.proxy
        host = f"[{proxy.host}]" if ":" in proxy.host else proxy.host.encode("idna").decode()
        return f"{host}:{proxy.port}"

    # Outbound

    def connect(self, server: "Server", host: Host, port: int, session: "Session") -> Attempt | None:
        """Have the other server connect."""
        opening = Opening(server, self, CONNECT, host, port, _Connect(session))
        opening.start()
        return opening

    def bind(self, server: "Server", host: Host, port: int, session: "Session") -> Attempt | None:
        """Have the other server listen."""
        opening = Opening(server, self, BIND, host, port, _Bind(server, session))
        opening.start()
        return opening

    def associate(self, server: "Server", session: "Session") -> Attempt | None:
        """Find a way for datagrams: the one that was found before, else each in its turn."""
        if not self._ways:
            session.refuse(COMMAND_NOT_SUPPORTED, "no-udp")
            return None
        now = time.monotonic()
        ways = sorted(self._ways, key=lambda way: way != self._found)
        if len(ways) > 1:
            ways = [way for way in ways if self._not_before.get(way, 0.0) <= now]
        if not ways or self._none_before > now:
            session.refuse(COMMAND_NOT_SUPPORTED, "tunnel-no-udp")
            return None
        attempt = _Associate(server, self, session, ways)
        attempt.start()
        return attempt

    # For openings

    def handshake(self, command: int, host: Host, port: int) -> Handshake:
        """Return what is said to the other server."""
        proxy = self.url.proxy
        username = proxy.username or None
        if proxy.scheme == "http":
            credentials = basic_credentials(proxy.username, proxy.password) if username else ""
            return http_handshake(command, host, port, credentials)
        if self._socks_tls == "off":
            return SocksHandshake(command, host, port, username, proxy.password)
        return TlsMethodHandshake(command, host, port, username, proxy.password, self._socks_tls == "gost-v1")

    @property
    def via_handshake(self) -> Callable[[int, str, int], Handshake] | None:
        """Return what is said to the proxy before; the HTTP carrier says it in each request instead."""
        via = self.via
        if not via or self.url.carrier == HTTP:
            return None
        if via.scheme == "http":
            credentials = basic_credentials(via.username, via.password) if via.username else ""
            return lambda command, host, port: http_handshake(command, host, port, credentials)
        if via.scheme in ("socks4", "socks4a"):
            return lambda command, host, port: socks4_handshake(
                command, _packed(host), port, via.username, via.scheme == "socks4a"
            )
        return lambda command, host, port: SocksHandshake(
            command, _packed(host), port, via.username or None, via.password
        )

    def works(self) -> None:
        """Note that the other server has answered."""
        if self._is_down:
            self._is_down = False
            log.info("%s answers again", self.url)

    def fails(self, why: str) -> None:
        """Note that no tunnel could be made; the first time it is said."""
        if not self._is_down:
            self._is_down = True
            log.warning("no tunnel to %s: %s", self.url, why)

    def useless(self, way: str) -> None:
        """Note that a way was granted and led nowhere: another one is tried for a while."""
        self._not_before[way] = time.monotonic() + RETRY_AFTER
        if len(self._ways) > 1:
            self._found = None

    def found(self, way: str) -> None:
        """Note which way datagrams go, or "" for none; each change is said."""
        self._none_before = 0.0 if way else time.monotonic() + RETRY_AFTER
        if way != self._found:
            self._found = way
            if way:
                log.info("UDP goes through %s as %s", self.url, _NAMES[way])
            else:
                log.warning(
                    "%s carries no UDP, asked for as %s", self.url, ", ".join(map(_NAMES.__getitem__, self._ways))
                )


class _Connect:
    """Who has a tunnel made for a CONNECT."""

    __slots__ = ("_session",)

    def __init__(self, session: "Session") -> None:
        self._session = session

    def opened(self, stream: Layered, handshake: Handshake) -> None:
        self._session.connected(stream, write_address(*handshake.bound or (_UNSPECIFIED, 0)), handshake.surplus)

    def not_opened(self, reply: int, reason: str, refused: bool) -> None:
        self._session.refuse(reply, reason)


class _Bind(Owner):
    """Who has a tunnel made for a BIND: passes the first reply on, waits for the second, and joins."""

    __slots__ = ("_early", "_held", "_server", "_session", "_stream", "client")

    _stream: Layered
    client: Layered

    def __init__(self, server: "Server", session: "Session") -> None:
        self._server = server
        self._session = session
        self._held = b""

    def opened(self, stream: Layered | None = None, handshake: Handshake | None = None) -> None:
        if not stream or not handshake:
            return
        self._stream = stream
        self.client, self._early = self._session.take()
        self.client.owner = _BindClient(self)
        stream.owner = self
        self.client.write(b"\x05\x00\x00" + write_address(*handshake.bound or (_UNSPECIFIED, 0)))
        self._server.expect(self, self._server.bind_timeout)
        if handshake.surplus:
            self.received(handshake.surplus)

    def not_opened(self, reply: int, reason: str, refused: bool) -> None:
        self._session.refuse(reply, reason)

    def received(self, data: bytes) -> None:
        """Take the second reply: who has connected, or a refusal."""
        self._held += data
        try:
            address = parse_address(self._held, 3) if len(self._held) > 3 else None
        except ProtocolError:
            self.expire()
            return
        if not address:
            return
        end = address[2]
        self._server.settle(self)
        self.client.write(self._held[:end])
        if self._held[1] != SUCCEEDED:
            self.expire()
            return
        self._server.counters["bound"] += 1
        join(self._server, self.client, self._stream, self._early, self._held[end:])

    def early(self, data: bytes) -> None:
        """Keep what the client sends before."""
        self._early += data
        self.client.hold()

    def ended(self) -> None:
        self.expire()

    def lost(self, number: int) -> None:
        self.expire()

    def expire(self) -> None:
        """End both."""
        self._server.settle(self)
        self._stream.close()
        self.client.close()


class _BindClient(Owner):
    """Owner of the client of a BIND until somebody has connected."""

    __slots__ = ("_bind",)

    def __init__(self, bind: _Bind) -> None:
        self._bind = bind

    def received(self, data: bytes) -> None:
        self._bind.early(data)

    def ended(self) -> None:
        self._bind.expire()

    def lost(self, number: int) -> None:
        self._bind.expire()


class _Associate:
    """Who has tunnels made until one of them carries datagrams."""

    __slots__ = ("_forwarder", "_opening", "_server", "_session", "_way", "_ways")

    def __init__(self, server: "Server", forwarder: Forwarder, session: "Session", ways: list[str]) -> None:
        self._server = server
        self._forwarder = forwarder
        self._session = session
        self._ways = ways  #: still to be tried
        self._way = ""
        self._opening: Opening | None = None

    def start(self) -> None:
        """Try the next way."""
        self._way = self._ways.pop(0)
        command, host, _ = _DIALECTS.get(self._way, (UDP_ASSOCIATE, _UNSPECIFIED, GostFraming))
        nameless = self._way == "gost-v1"
        self._opening = Opening(self._server, self._forwarder, command, host, 0, self, nameless=nameless)
        self._opening.start()

    def cancel(self) -> None:
        """Stop."""
        if self._opening:
            self._opening.cancel()

    def opened(self, stream: Layered, handshake: Handshake) -> None:
        server = self._server
        out: Out
        if self._way == "udp":
            try:
                out = RelayedOut(server, stream, handshake.bound or (_UNSPECIFIED, 0))
            except OSError:
                stream.close()
                self.not_opened(COMMAND_NOT_SUPPORTED, "tunnel-no-relay", True)
                return
        else:
            gost1 = self._way == "gost-v1"
            framing = GostFraming(by_message=stream.keeps_messages) if gost1 else _DIALECTS[self._way][2]()
            way = self._way
            forwarder = self._forwarder
            out = FramedOut(server, stream, framing, handshake.surplus, lambda: forwarder.useless(way), joins=not gost1)
        self._forwarder.found(self._way)
        self._session.associated(out)

    def not_opened(self, reply: int, reason: str, refused: bool) -> None:
        if refused and self._ways:
            self.start()
            return
        if refused:
            self._forwarder.found("")
            reply = COMMAND_NOT_SUPPORTED
        self._session.refuse(reply, reason)


def _packed(host: str) -> Host:
    """Return an address as the wire has it; a name stays one."""
    import ipaddress

    try:
        return ipaddress.ip_address(host).packed
    except ValueError:
        return host
