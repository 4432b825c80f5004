"""UDP over TCP with sing-box, a program of somebody else's: as client of ours and as server.

No distribution has it, so a machine without it skips: `go install github.com/sagernet/sing-box/cmd/sing-box@v1.11.15`
builds it in two minutes where there is Go.
"""

import json
import socket
import subprocess
from contextlib import contextmanager

import pytest

from gateway.proxy.forward import Forwarder
from gateway.proxy.tunnelurl import parse_tunnel
from tests.netns.world import eventually
from tests.peers import find
from tests.proxy_running import PATIENCE, Running, ask
from tests.test_proxy_udp import Associated, Echo, datagrams, header
from workers.socks.wire import UDP_ASSOCIATE

pytestmark = pytest.mark.peer

SIZES = (1, 100, 1400, 9000)


@pytest.fixture(scope="module")
def sing_box():
    found = find("sing-box")
    if not found:
        pytest.skip("sing-box is not at hand: go install github.com/sagernet/sing-box/cmd/sing-box@v1.11.15")
    return found


@contextmanager
def running(sing_box, tmp_path, outbound):
    """Run sing-box with a SOCKS inbound; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = {
        "log": {"level": "error"},
        "inbounds": [{"type": "socks", "listen": "127.0.0.1", "listen_port": port}],
        "outbounds": [outbound],
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with subprocess.Popen([sing_box, "run", "-c", str(path)]) as process:
        try:

            def listens() -> bool:
                assert process.poll() is None
                with socket.socket() as trial:
                    trial.settimeout(PATIENCE)
                    return trial.connect_ex(("127.0.0.1", port)) == 0

            eventually(listens, "sing-box listens", 4 * PATIENCE)
            yield port
        finally:
            process.terminate()


@pytest.mark.parametrize("mode", ["uot", "uot-v1"])
def test_sing_box_as_the_server(sing_box, tmp_path, mode):
    with running(sing_box, tmp_path, {"type": "direct"}) as port:
        forwarder = Forwarder(parse_tunnel(f"socks5://127.0.0.1:{port}"), udp_mode=mode)
        for host in ("127.0.0.1", "::1"):
            with Running(outbound=forwarder) as proxy, Echo(host) as echo, Associated(proxy) as client:
                for size in (*SIZES, 0, 16000):
                    client.send(bytes(size), echo.address)
                    payload, (_, source) = client.receive()
                    assert (len(payload), source) == (size, echo.address[1])


@pytest.mark.parametrize("version", [1, 2])
def test_sing_box_as_the_client(sing_box, tmp_path, version):
    with Running() as proxy, Echo() as echo:
        outbound = {
            "type": "socks",
            "server": "127.0.0.1",
            "server_port": proxy.server.address[1],
            "udp_over_tcp": {"enabled": True, "version": version},
        }
        with (
            running(sing_box, tmp_path, outbound) as port,
            socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as control,
            datagrams() as client,
        ):
            _, relay = ask(control, UDP_ASSOCIATE, bytes(4), 0).bound
            client.connect(("127.0.0.1", relay))
            for size in (*SIZES, 0):
                client.send(header(echo.address) + bytes(size))
                assert client.recv(65535) == header(echo.address) + bytes(size)
            assert proxy.server.counters["associated"] == 1
