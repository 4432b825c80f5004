"""Carrier: the process that speaks TLS, WebSocket or HTTP to the proxy; the workers speak plain SOCKS5 to it.

    worker ── SOCKS5 on loopback, with a password of this start ──► carrier ── TLS, WebSocket, HTTP ──► proxy

It is `ringway proxy --forward` (gateway/proxy) as one more row of the table of processes. Its listening socket is the
supervisor's, so that it outlives the carrier: while that is replaced, new connections wait in the socket's queue.
"""

import secrets
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from gateway.conversation import mark
from gateway.process import Role, Setup
from gateway.proxy.forward import Forwarder
from gateway.proxy.poll import READ
from gateway.proxy.server import ListenError, Server, listen_at
from gateway.proxy.tls import ClientTls, TlsError
from gateway.proxy.tunnelurl import TLS, TunnelUrl, parse_tunnel
from gateway.proxyurl import IN_TLS, ConfigError, ProxyUrl, parse_proxy
from ipc.channel import Channel
from workers.settings import Settings

if TYPE_CHECKING:
    from gateway.config import Config

BLOCK: Final = "carrier"  #: its counters
COUNTERS: Final = ("carrier_connections", "carrier_refused", "carrier_internal_errors")
_WORDS: Final = {"clients": 0, "internal-error": 2}  # the server's own names of them; others are reasons to refuse
_REFUSED: Final = 1
LOOPBACK: Final = ("127.0.0.1", 0)


class Carrier:
    """What the supervisor makes before the first fork, and what becomes of it in the carrier's process."""

    def __init__(self, config: "Config") -> None:
        """Listen on loopback, and read certificates. ConfigError: one of them cannot be used."""
        self._forwarder = forwarder_for(config)
        self.counters = COUNTERS
        self._marks = config.fwmark, config.interface
        self.username = secrets.token_hex(16)
        self.password = secrets.token_hex(16)
        try:
            self._listener = listen_at(LOOPBACK)
        except ListenError as error:
            raise ConfigError(f"the carrier {error}") from None
        self.address: tuple[str, int] = self._listener.getsockname()[:2]

    @property
    def role(self) -> Role:
        """The row in the table of processes."""
        return Role(BLOCK, self._main, block=BLOCK, keeps_upstream_rights=True)

    def settings(self, settings: Settings, pipelined: bool) -> Settings:
        """Return the workers' settings: they talk to the carrier alone, which is on this machine."""
        return replace(
            settings,
            scheme="socks5",
            proxy_addresses=[self.address],
            username=self.username,
            password=self.password,
            fwmark=0,
            interface="",
            udp_mode="udp",
            udp_address="peer",
            pipelined=pipelined,
        )

    def proxy(self) -> ProxyUrl:
        """Return what the carrier itself is to others on this machine."""
        return ProxyUrl("socks5", *self.address, self.username, self.password)

    def server(self, block: memoryview | None = None) -> Server:
        """Return the server on the listening socket; it counts into `block`."""
        return Server(
            listener=self._listener,
            username=self.username,
            password=self.password,
            outbound=self._forwarder,
            open_socket=self._open_socket(),
            counters=_Published(block) if block is not None else None,
        )

    def _main(self, setup: Setup, _shard: int, channel: Channel) -> None:
        """Serve until the supervisor says stop, or is gone."""
        server = self.server(setup.shared.counters.block(BLOCK))

        def told(_: int) -> None:
            message = channel.order()
            if message is not None and message["do"] == "stop":
                server.stop()

        server.poller.add(channel.fileno(), READ, told)
        channel.send({"event": "ready"})
        server.serve_forever()

    def _open_socket(self) -> Callable[[int, int], socket.socket]:
        fwmark, interface = self._marks

        def open_socket(family: int, kind: int) -> socket.socket:
            opened = socket.socket(family, kind)
            try:
                mark(opened, fwmark, interface)
            except OSError:
                opened.close()
                raise
            return opened

        return open_socket if fwmark or interface else socket.socket

    def close(self) -> None:
        """Close the listening socket; in a forked process that is not the carrier as well."""
        self._listener.close()

    close_in_child = close


def forwarder_for(config: "Config") -> Forwarder:
    """Return the way to a proxy inside something else. ConfigError: a certificate or key cannot be used."""
    proxy = parse_proxy(config.proxy)
    try:
        tls = client_tls(config) if proxy.scheme in IN_TLS else None
    except TlsError as error:
        raise ConfigError(str(error)) from None
    if proxy.scheme == "https":
        url = TunnelUrl(TLS, ProxyUrl("http", proxy.host, proxy.port, proxy.username, proxy.password))
    else:
        url = parse_tunnel(proxy.url())
    return Forwarder(url, udp_mode=config.udp_mode, tls=tls)


def client_tls(config: "Config") -> ClientTls:
    """Return how the proxy's certificate is judged, and what is shown to it. Raises TlsError."""
    return ClientTls(
        ca=config.tls_ca or None,
        server_name=config.tls_server_name or None,
        certificate=config.tls_cert or None,
        key=config.tls_key or None,
    )


class _Published(Counter[str]):
    """The server's counters, with their sums in shared memory."""

    def __init__(self, block: memoryview) -> None:
        super().__init__()
        self._block = block

    def __setitem__(self, name: str, value: int) -> None:
        self._block[_WORDS.get(name, _REFUSED)] += value - self[name]
        super().__setitem__(name, value)
