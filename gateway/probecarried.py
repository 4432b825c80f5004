"""Ask a proxy inside TLS, WebSocket or HTTP what it can do: reach it, then all else through a carrier of our own."""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from gateway.caller import Seen
from gateway.carrier import Carrier, client_tls
from gateway.conversation import Address, connect
from gateway.probe import Finding, at_once, probe
from gateway.proxyurl import IN_TLS, ProxyUrl, parse_proxy
from workers.socks.wire import ProtocolError

if TYPE_CHECKING:
    from gateway.config import Config

_GENERAL_FAILURE: Final = "REP 01"


def probe_carried(config: "Config", *, targets: Sequence[Address], timeout: float) -> list[Finding]:
    """Probe a proxy inside something else: its connection and TLS, then through a carrier in a thread. ConfigError."""
    proxy = parse_proxy(config.proxy)
    carrier = Carrier(config)
    findings = at_once([("proxy", lambda: _reach(config, proxy, timeout))], timeout)
    if findings[0].result != "works":
        carrier.close()
        return findings
    server = carrier.server()
    serving = threading.Thread(target=server.serve_forever, name="carrier", daemon=True)
    serving.start()
    through = probe(carrier.proxy(), targets=targets, resolvers=config.tun_dns, udp_address="peer", timeout=timeout)
    server.stop()
    serving.join(timeout)
    # Rows about the carrier itself say nothing of the proxy, and its general failure is that of the way to the proxy.
    about_proxy = [row for row in through if row.name.startswith(("connect-", "udp-associate", "udp-ipv"))]
    return findings + [
        row._replace(result="fails") if row.result == "understood" and _GENERAL_FAILURE in row.seen else row
        for row in about_proxy
    ]


def _reach(config: "Config", proxy: ProxyUrl, timeout: float) -> Seen:
    with connect((proxy.host, proxy.port), timeout) as connection:
        where = f"{connection.getpeername()[0]} port {proxy.port}"
        if proxy.scheme not in IN_TLS:
            return "works", f"TCP connection to {where}"
        tls = client_tls(config).connect(proxy.host)
        connection.sendall(tls.start())
        while not tls.ready:
            data = connection.recv(65536)
            if not data:
                return "fails", f"TCP connection to {where}, closed during the TLS handshake"
            try:
                _, answer = tls.receive(data)
            except ProtocolError as error:
                return "fails", str(error)
            connection.sendall(answer)
        return "works", f"TLS connection to {where}"
