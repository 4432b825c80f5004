"""Real SOCKS servers in the namespace `net`, as their users start them.

| peer | UDP | what it is good for |
| --- | --- | --- |
| dante | yes | the strict one: declared addresses enforced, symmetric, ends with the control connection |
| shadowsocks | yes | ss-local → ss-server; association outlives TCP, one shared UDP port |
| v2ray | yes | advertises a wrong address for UDP (`"ip": "10.9.9.9"`) |
| asyncio-socks-server | yes | advertises 0.0.0.0 for UDP |
| microsocks | no | refuses pipelining and split messages; user and password |
| ssh | no | OpenSSH -D: ends the connection instead of answering with a code |
| embedded | yes | `ringway proxy` |
| v2ray-http, tinyproxy, privoxy, pproxy | no | HTTP CONNECT: each a head of its own; "Connection: close" (pproxy) |
| dante, v2ray and ssh by SOCKS4 | no | 4: IPv4 only; 4a (not dante): names, an IPv6 address among them |
"""

import json
import os
import pwd
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.certificates import LOCALHOST
from tests.netns.daemon import RINGWAY
from tests.netns.world import NET_GW4, NET_GW6, Namespace, eventually
from tests.peers import find, need, need_module

PORT: Final = 1080
USER, PASSWORD = "ring", "w@y:1/ü"
SIMPLE_PASSWORD: Final = "waypoint1"  # what tinyproxy's grammar takes


@dataclass(frozen=True, slots=True)
class Peer:
    """A kind of server: how its command lines come about, and what it can."""

    name: str
    programs: tuple[str, ...]  #: what must be installed
    prepare: Callable[
        [Path, str], list[list[str]]
    ]  #: writes files into the directory, returns commands for the address
    udp: bool = False
    ipv6: bool = True  #: reaches IPv6 targets by TCP
    udp_ipv6: bool = False
    authentication: bool = False  #: asks for USER and PASSWORD
    scheme: str = "socks5"
    module: tuple[str, str] = ("", "")  #: a Python module that must be installed, and its package


def require(peer: Peer, *programs: str) -> None:
    """Skip or fail the test, as tests/peers.py says, where a program is missing."""
    for program in (*peer.programs, *programs):
        need(program)
    if peer.module[0]:
        need_module(*peer.module)


class RunningPeer:
    """The processes of one peer, from start to stop."""

    def __init__(self, peer: Peer, namespace: Namespace, host: str = NET_GW4) -> None:
        self.peer = peer
        self.host = host
        self._namespace = namespace
        self._directory = tempfile.TemporaryDirectory(prefix=f"ringway-{peer.name}-")
        path = Path(self._directory.name)
        # Servers drop to a user of their own and read their files as that one.
        path.chmod(0o755)
        self._log = path / "log"
        self._commands = peer.prepare(path, host)
        self._processes: list[subprocess.Popen[bytes]] = []
        self.start()

    @property
    def url(self) -> str:
        from urllib.parse import quote

        password = SIMPLE_PASSWORD if self.peer is TINYPROXY else PASSWORD
        login = f"{quote(USER, safe='')}:{quote(password, safe='')}@" if self.peer.authentication else ""
        return f"{self.peer.scheme}://{login}{self.host}:{PORT}"

    def start(self) -> None:
        with open(self._log, "ab") as log:
            for command in self._commands:
                program = find(command[0]) or command[0]
                self._processes.append(self._namespace.popen([program, *command[1:]], stdout=log, stderr=log))
        try:
            eventually(self._listens, f"{self.peer.name} listens on {self.host}:{PORT}", 10.0)
        except BaseException:
            print(self._log.read_text(errors="replace"))
            self.close()
            raise

    def _listens(self) -> bool:
        for process in self._processes:
            if process.poll() is not None:
                pytest.fail(f"{self.peer.name} ended: {process.args!r}\n{self._log.read_text(errors='replace')}")
        with self._namespace.socket() as trial:
            return trial.connect_ex((self.host, PORT)) == 0

    def stop(self) -> None:
        """End the processes; `start` brings them back."""
        for process in self._processes:
            # Dante and ssh have children of their own: the whole group goes.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait(5)
        self._processes.clear()

    def close(self) -> None:
        self.stop()
        self._directory.cleanup()

    def __enter__(self) -> "RunningPeer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _dante(directory: Path, host: str) -> list[list[str]]:
    (directory / "danted.conf").write_text(
        f"""
logoutput: stderr
internal: {host} port = {PORT}
external: {host}
external: {NET_GW6}
clientmethod: none
socksmethod: none
user.privileged: root
user.unprivileged: nobody
client pass {{
  from: 0.0.0.0/0 to: 0.0.0.0/0
}}
socks pass {{
  from: 0.0.0.0/0 to: 0.0.0.0/0
  protocol: tcp udp
}}
socks pass {{
  from: 0.0.0.0/0 to: ::/0
  protocol: tcp udp
}}
"""
    )
    return [["danted", "-f", str(directory / "danted.conf"), "-N", "1"]]


def _shadowsocks(directory: Path, host: str) -> list[list[str]]:
    common = {"password": "barfoo", "method": "aes-128-gcm", "timeout": 60, "server_port": 8388, "mode": "tcp_and_udp"}
    (directory / "server.json").write_text(json.dumps(common | {"server": [host]}))
    (directory / "local.json").write_text(
        json.dumps(common | {"server": host, "local_address": host, "local_port": PORT})
    )
    return [
        ["ss-server", "-c", str(directory / "server.json"), "-6"],
        ["ss-local", "-c", str(directory / "local.json")],
    ]


def _v2ray(directory: Path, host: str) -> list[list[str]]:
    inbound = {
        "listen": host,
        "port": PORT,
        "protocol": "socks",
        "settings": {"auth": "noauth", "udp": True, "ip": "10.9.9.9"},
    }
    (directory / "config.json").write_text(
        json.dumps({"log": {"loglevel": "warning"}, "inbounds": [inbound], "outbounds": [{"protocol": "freedom"}]})
    )
    return [["v2ray", "-config", str(directory / "config.json")]]


def _v2ray_http(directory: Path, host: str) -> list[list[str]]:
    inbound = {"listen": host, "port": PORT, "protocol": "http", "settings": {}}
    (directory / "config.json").write_text(
        json.dumps({"log": {"loglevel": "warning"}, "inbounds": [inbound], "outbounds": [{"protocol": "freedom"}]})
    )
    return [["v2ray", "-config", str(directory / "config.json")]]


def _v2ray_https(directory: Path, host: str) -> list[list[str]]:
    certificate = {"certificateFile": str(directory / "cert.pem"), "keyFile": str(directory / "cert.pem")}
    # Read as whoever v2ray runs as.
    (directory / "cert.pem").write_bytes(Path(LOCALHOST).read_bytes())
    stream = {"network": "tcp", "security": "tls", "tlsSettings": {"certificates": [certificate]}}
    inbound = {"listen": host, "port": PORT, "protocol": "http", "settings": {}, "streamSettings": stream}
    (directory / "config.json").write_text(
        json.dumps({"log": {"loglevel": "warning"}, "inbounds": [inbound], "outbounds": [{"protocol": "freedom"}]})
    )
    return [["v2ray", "-config", str(directory / "config.json")]]


def _carried(carrier: str) -> Callable[[Path, str], list[list[str]]]:
    """Make the command of our own proxy inside something else."""

    def prepare(directory: Path, host: str) -> list[list[str]]:
        tls = ["--listen-cert", LOCALHOST] if carrier in ("tls", "wss") else []
        return [[*RINGWAY, "proxy", "--listen", f"socks5+{carrier}://{host}:{PORT}", *tls]]

    return prepare


def _tinyproxy(directory: Path, host: str) -> list[list[str]]:
    (directory / "tinyproxy.conf").write_text(
        f"Port {PORT}\nListen {host}\nTimeout 600\nMaxClients 100\nBasicAuth {USER} {SIMPLE_PASSWORD}\n"
    )
    return [["tinyproxy", "-d", "-c", str(directory / "tinyproxy.conf")]]


def _privoxy(directory: Path, host: str) -> list[list[str]]:
    (directory / "config").write_text(
        f"confdir {directory}\nlogdir {directory}\nlisten-address {host}:{PORT}\ntoggle 0\n"
    )
    return [["privoxy", "--no-daemon", str(directory / "config")]]


def _pproxy(directory: Path, host: str) -> list[list[str]]:
    return [[sys.executable, "-m", "pproxy", "-l", f"http://{host}:{PORT}"]]


def _asyncio(directory: Path, host: str) -> list[list[str]]:
    return [[str(Path(sys.executable).with_name("asyncio_socks_server")), "-H", host, "-P", str(PORT)]]


def _microsocks(directory: Path, host: str) -> list[list[str]]:
    return [["microsocks", "-i", host, "-p", str(PORT)]]


def _microsocks_password(directory: Path, host: str) -> list[list[str]]:
    return [["microsocks", "-i", host, "-p", str(PORT), "-u", USER, "-P", PASSWORD]]


def _ssh(directory: Path, host: str) -> list[list[str]]:
    for name in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)],
            check=True,
            timeout=10,
            stdin=subprocess.DEVNULL,
        )
    # sshd refuses keys in a directory that others may write, and wants this one for its privilege separation.
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    (directory / "authorized").write_bytes((directory / "user.pub").read_bytes())
    (directory / "sshd_config").write_text(
        f"""
Port 2222
ListenAddress {host}
HostKey {directory}/host
AuthorizedKeysFile {directory}/authorized
StrictModes no
UsePAM no
PermitRootLogin yes
MaxStartups 1000
PidFile none
"""
    )
    options = [f"{key}={value}" for key, value in {
        "StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null", "ExitOnForwardFailure": "yes",
        "ConnectionAttempts": "50", "BatchMode": "yes", "LogLevel": "ERROR",
    }.items()]  # fmt: skip
    return [
        [find("sshd") or "sshd", "-D", "-e", "-f", str(directory / "sshd_config")],
        ["ssh", "-F", "none", "-N", "-D", f"{host}:{PORT}", "-i", str(directory / "user"), "-p", "2222"]
        + [word for option in options for word in ("-o", option)]
        + [f"{pwd.getpwuid(os.getuid()).pw_name}@{host}"],
    ]


def _embedded(directory: Path, host: str) -> list[list[str]]:
    return [[*RINGWAY, "proxy", "--listen", f"{host}:{PORT}"]]


EMBEDDED: Final = Peer("embedded", (), _embedded, udp=True, udp_ipv6=True)
DANTE: Final = Peer("dante", ("danted",), _dante, udp=True)
SHADOWSOCKS: Final = Peer("shadowsocks", ("ss-local", "ss-server"), _shadowsocks, udp=True, udp_ipv6=True)
V2RAY: Final = Peer("v2ray", ("v2ray",), _v2ray, udp=True, udp_ipv6=True)
ASYNCIO: Final = Peer(
    "asyncio-socks-server",
    (),
    _asyncio,
    udp=True,
    ipv6=False,
    module=("asyncio_socks_server", "asyncio-socks-server"),
)
MICROSOCKS: Final = Peer("microsocks", ("microsocks",), _microsocks)
MICROSOCKS_PASSWORD: Final = Peer("microsocks-password", ("microsocks",), _microsocks_password, authentication=True)
SSH: Final = Peer("ssh", ("ssh", "sshd", "ssh-keygen"), _ssh)
REAL: Final[Sequence[Peer]] = (DANTE, SHADOWSOCKS, V2RAY, ASYNCIO, MICROSOCKS, MICROSOCKS_PASSWORD, SSH)

DANTE_4: Final = Peer("dante-socks4", ("danted",), _dante, ipv6=False, scheme="socks4")
V2RAY_4A: Final = Peer("v2ray-socks4a", ("v2ray",), _v2ray, ipv6=False, scheme="socks4a")
SSH_4: Final = Peer("ssh-socks4", ("ssh", "sshd", "ssh-keygen"), _ssh, ipv6=False, scheme="socks4")
SSH_4A: Final = Peer("ssh-socks4a", ("ssh", "sshd", "ssh-keygen"), _ssh, scheme="socks4a")
V2RAY_HTTP: Final = Peer("v2ray-http", ("v2ray",), _v2ray_http, scheme="http")
TINYPROXY: Final = Peer("tinyproxy", ("tinyproxy",), _tinyproxy, scheme="http", authentication=True)
PRIVOXY: Final = Peer("privoxy", ("privoxy",), _privoxy, scheme="http")
PPROXY: Final = Peer("pproxy", (), _pproxy, scheme="http", ipv6=False, module=("pproxy", "pproxy"))
#: those that are no SOCKS5 servers
#: through the carrier, with tls-ca and tls-server-name where there is TLS
CARRIED_KINDS: Final[Sequence[Peer]] = (
    *(Peer(f"embedded-{carrier}", (), _carried(carrier), udp=True, scheme=f"socks5+{carrier}")
      for carrier in ("tls", "ws", "wss", "http")),
    Peer("v2ray-https", ("v2ray",), _v2ray_https, scheme="https"),
)  # fmt: skip
OTHER_KINDS: Final[Sequence[Peer]] = (DANTE_4, V2RAY_4A, SSH_4, SSH_4A, V2RAY_HTTP, TINYPROXY, PRIVOXY, PPROXY)
