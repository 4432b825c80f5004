"""The probe against scripted servers and real ones, all on loopback: what it says of each, and that it ends in time."""

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dpkt
import pytest

from gateway.__main__ import main
from gateway.cli.check import missing_of
from gateway.probe import Finding, best_mode, probe
from gateway.proxy.tls import ServerTls
from gateway.proxyurl import ProxyUrl, parse_proxy
from tests.certificates import CA, LOCALHOST
from tests.peers import need
from tests.proxy_running import Running

TIMEOUT = 1.0
LOOPBACK = [("127.0.0.1", 9)]
Script = Callable[[socket.socket], None]


@contextlib.contextmanager
def server(script: Script, host: str = "127.0.0.1") -> Iterator[ProxyUrl]:
    """Run `script` on each connection in a thread of its own; yields the URL of the server."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    threads: list[threading.Thread] = []
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen()

    def one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(5)
            script(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threads.append(threading.Thread(target=one, args=(connection,)))
                threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield ProxyUrl("socks5", host, listener.getsockname()[1])
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        acceptor.join(5)
        listener.close()
        for thread in threads:
            thread.join(10)


def take(connection: socket.socket, count: int) -> bytes:
    data = connection.recv(count, socket.MSG_WAITALL)
    if len(data) < count:
        raise OSError("the client left")
    return data


def greeting(connection: socket.socket, method: int = 0) -> bytes:
    """Read the greeting, answer `method`; return the methods offered."""
    version, count = take(connection, 2)
    assert version == 5
    methods = take(connection, count)
    connection.sendall(bytes((5, method)))
    return methods


def request(connection: socket.socket) -> int:
    """Read a request; return its command."""
    head = take(connection, 4)
    take(connection, {1: 6, 4: 18, 3: 0}[head[3]] or take(connection, 1)[0] + 2)
    return head[1]


def answering(connect: bytes = b"\0", associate: bytes = b"\x07", address: bytes = b"\x01\0\0\0\0\0\0") -> Script:
    """Make a SOCKS server that answers commands with the given codes."""

    def script(connection: socket.socket) -> None:
        greeting(connection)
        code = associate if request(connection) == 3 else connect
        connection.sendall(b"\x05" + code + b"\0" + address)
        connection.recv(1)  # until the client has seen enough

    return script


def results(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.result for finding in findings}


DIALECTS = ("udp-gost", "udp-hev", "udp-uot", "udp-gost-v1")


def plain(findings: list[Finding]) -> dict[str, str]:
    """Return the results without those of UDP inside TCP."""
    return {finding.name: finding.result for finding in findings if finding.name not in DIALECTS}


def seen(findings: list[Finding], name: str) -> str:
    return next(finding.seen for finding in findings if finding.name == name)


def test_direct_asks_nobody() -> None:
    assert results(probe(ProxyUrl("direct"))) == {"proxy": "works"}


def test_nobody_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        findings = probe(ProxyUrl("socks5", "127.0.0.1", unused.getsockname()[1]), timeout=TIMEOUT)
    assert results(findings) == {"proxy": "fails"}
    assert "Connection refused" in findings[0].seen


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6])
def test_a_refusal_shows_that_connect_is_understood(code: int) -> None:
    with server(answering(connect=bytes((code,)))) as proxy:
        findings = probe(proxy, targets=LOOPBACK, timeout=TIMEOUT)
    assert results(findings)["connect-ipv4"] == "understood"
    assert f"REP {code:02x}" in seen(findings, "connect-ipv4")


@pytest.mark.parametrize("code", [7, 8, 0x5B])
def test_codes_that_say_no_to_the_command_itself(code: int) -> None:
    with server(answering(connect=bytes((code,)), associate=bytes((code,)))) as proxy:
        findings = probe(proxy, targets=[*LOOPBACK, ("::1", 9), ("name.invalid", 9)], timeout=TIMEOUT)
    assert list(plain(findings).values()) == ["works", "works", *["fails"] * 4, "works"]
    assert {name: results(findings)[name] for name in DIALECTS} == dict.fromkeys(DIALECTS, "fails")
    assert f"REP {code:02x}" in seen(findings, "udp-associate")


def silent(connection: socket.socket) -> None:
    connection.recv(1000)
    connection.recv(1)


def dripping(connection: socket.socket) -> None:
    """Answer right, one byte at a time, too slowly for anybody."""
    greeting(connection)
    connection.recv(100)
    for byte in b"\x05\x00\x00\x03\xff" + bytes(255):
        connection.sendall(bytes((byte,)))
        connection.settimeout(0.1)
        with contextlib.suppress(TimeoutError):
            if not connection.recv(1):
                return


def http(connection: socket.socket) -> None:
    connection.recv(1000)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def refusing_methods(connection: socket.socket) -> None:
    greeting(connection, 0xFF)


def unoffered_method(connection: socket.socket) -> None:
    greeting(connection, 2)


def closing(connection: socket.socket) -> None:
    greeting(connection)
    connection.recv(100)


@pytest.mark.parametrize(
    ("script", "row", "sentence"),
    [
        (silent, "login", "the method did not come in 1 s"),
        (http, "login", "not SOCKS5: answered 48 54 to the greeting (an HTTP server?)"),
        (refusing_methods, "login", "refused going without user and password (05 ff)"),
        (unoffered_method, "login", "chose method 02, which was not offered"),
        (closing, "connect-ipv4", "CONNECT 127.0.0.1:9: Connection closed unexpectedly"),
        (closing, "udp-associate", "the proxy closed the connection instead of the answer to UDP ASSOCIATE"),
        (dripping, "connect-ipv4", "no answer in 1 s"),
        (dripping, "udp-associate", "did not come in 1 s"),
    ],
)
def test_servers_that_are_none(script: Script, row: str, sentence: str) -> None:
    with server(script) as proxy:
        started = time.monotonic()
        findings = probe(proxy, targets=LOOPBACK, timeout=TIMEOUT)
        assert time.monotonic() - started < 4 * TIMEOUT
    assert results(findings)[row] == "fails"
    assert sentence in seen(findings, row)


@pytest.mark.parametrize(("status", "result"), [(0, "works"), (1, "fails")])
def test_user_and_password(status: int, result: str) -> None:
    got: list[bytes] = []

    def script(connection: socket.socket) -> None:
        assert greeting(connection, 2) in (b"\0\x02", b"\x02")  # one method alone where all goes at once
        length = take(connection, 2)[1]
        name = take(connection, length)
        got.append(name + b":" + take(connection, take(connection, 1)[0]))
        connection.sendall(bytes((1, status)))
        connection.recv(1)

    with server(script) as proxy:
        url = f"socks5://us%3Aer:p%C3%A4ss@{proxy.host}:{proxy.port}"
        findings = probe(parse_proxy(url), targets=LOOPBACK, timeout=TIMEOUT)
    assert findings[1].result == result
    assert got[0] == "us:er:päss".encode()


class Relay:
    """A UDP relay that answers DNS queries itself, as a resolver behind it would."""

    def __init__(self, host: str, answer: Callable[[bytes], bytes | None]) -> None:
        self.socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((host, 0))
        self.socket.settimeout(5)
        self.port = self.socket.getsockname()[1]
        self.answer = answer
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                datagram, client = self.socket.recvfrom(2000)
                if not datagram:
                    return
                answer = self.answer(datagram)
                if answer is not None:
                    self.socket.sendto(answer, client)

    def __enter__(self) -> "Relay":
        return self

    def __exit__(self, *exception: object) -> None:
        self.socket.sendto(b"", self.socket.getsockname())
        self.thread.join(6)
        self.socket.close()


def resolve(datagram: bytes) -> bytes:
    start = 10 if datagram[3] == 1 else 22
    message = dpkt.dns.DNS(datagram[start:])
    message.qr = dpkt.dns.DNS_R
    message.an = [dpkt.dns.DNS.RR(name=message.qd[0].name, type=dpkt.dns.DNS_A, cls=1, ttl=1, ip=b"\x01\x01\x01\x01")]
    return datagram[:start] + bytes(message)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("told", ["unspecified", "foreign", "name"])
def test_dns_through_a_relay_wherever_it_is_told_to_be(host: str, told: str) -> None:
    with Relay(host, resolve) as relay:
        port = relay.port.to_bytes(2, "big")
        address = {"unspecified": b"\x01\0\0\0\0", "foreign": b"\x01\x0a\x09\x09\x09", "name": b"\x03\x01x"}[
            told
        ] + port
        with server(answering(associate=b"\0", address=address), host) as proxy:
            findings = probe(proxy, targets=LOOPBACK, resolvers=["192.0.2.53"], timeout=TIMEOUT)
    assert plain(findings) | {"connect-ipv4": "works"} == dict.fromkeys(
        ("proxy", "login", "connect-ipv4", "udp-associate", "udp-ipv4", "udp-ipv6", "pipelined"), "works"
    )
    assert "datagrams go to" in seen(findings, "udp-associate")
    assert seen(findings, "udp-ipv4") == "DNS answer from 192.0.2.53: 1 records, code 0"


@pytest.mark.parametrize(
    ("answer", "result", "sentence"),
    [
        (lambda datagram: None, "unknown", "the relay took a query to 192.0.2.53, no answer came"),
        (lambda datagram: b"\0\0", "fails", "no SOCKS datagram"),
        (lambda datagram: b"\0\0\0\x07" + bytes(30), "fails", "no SOCKS datagram"),
        (lambda datagram: datagram[:10] + b"\xff", "fails", "no DNS message"),
        (lambda datagram: resolve(datagram)[:10] + b"zz" + resolve(datagram)[12:], "fails", "another question"),
    ],
)
def test_relays_that_answer_otherwise(answer: Callable[[bytes], bytes | None], result: str, sentence: str) -> None:
    with Relay("127.0.0.1", answer) as relay:
        address = b"\x01\x7f\0\0\x01" + relay.port.to_bytes(2, "big")
        with server(answering(associate=b"\0", address=address)) as proxy:
            findings = probe(proxy, targets=LOOPBACK, resolvers=["192.0.2.53"], timeout=TIMEOUT)
    assert results(findings)["udp-ipv4"] == result
    assert sentence in seen(findings, "udp-ipv4")


def test_nobody_at_the_relay() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
        gone.bind(("127.0.0.1", 0))
        address = b"\x01\x7f\0\0\x01" + gone.getsockname()[1].to_bytes(2, "big")
    with server(answering(associate=b"\0", address=address)) as proxy:
        findings = probe(proxy, targets=LOOPBACK, resolvers=["192.0.2.53"], timeout=TIMEOUT)
    assert "nothing listens at 127.0.0.1:" in seen(findings, "udp-ipv4")


# -- other kinds --


@pytest.mark.parametrize(
    ("answer", "result", "sentence"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", "works", "CONNECT 127.0.0.1:9: connected"),
        (b"HTTP/1.1 403 Filtered\r\n\r\n", "understood", "not allowed by ruleset"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "understood", "host unreachable"),
        (b"HTTP/1.1 405 No\r\n\r\n", "fails", "command not supported"),
        (b"HTTP/1.1 407 No\r\n\r\n", "fails", "the proxy wants a username and password (407)"),
        (b"\x05\xff", "fails", "no HTTP proxy (so far 05 ff)"),
        (b"", "fails", "closed the connection instead of the answer to CONNECT 127.0.0.1:9"),
    ],
)
def test_http(answer: bytes, result: str, sentence: str) -> None:
    def script(connection: socket.socket) -> None:
        asked = b""
        while not asked.endswith(b"\r\n\r\n"):
            asked += take(connection, 1)
        connection.sendall(answer)

    with server(script) as proxy:
        findings = probe(ProxyUrl("http", proxy.host, proxy.port), targets=LOOPBACK, timeout=TIMEOUT)
    assert plain(findings) == {"proxy": "works", "connect-ipv4": result}
    assert sentence in seen(findings, "connect-ipv4")


def test_socks4() -> None:
    def script(connection: socket.socket) -> None:
        assert take(connection, 11) == b"\x04\x01\0\x09\x7f\0\0\1me\0"
        connection.sendall(b"\0\x5b")

    with server(script) as proxy:
        url = ProxyUrl("socks4", proxy.host, proxy.port, "me")
        findings = probe(url, targets=[*LOOPBACK, ("::1", 9), ("a.example", 9)], timeout=TIMEOUT)
    assert results(findings) == {
        "proxy": "works",
        "connect-ipv4": "understood",
        "connect-ipv6": "understood",
        "connect-name": "fails",
    }


# -- UDP inside TCP --


@pytest.mark.parametrize(
    ("rows", "mode"),
    [
        ({"udp-associate": "works"}, "udp"),
        ({"udp-associate": "works", "udp-ipv4": "works", "udp-gost-v1": "works", "udp-gost": "works"}, "udp"),
        ({"udp-associate": "works", "udp-ipv4": "unknown", "udp-gost-v1": "works"}, "gost-v1"),
        ({"udp-associate": "fails", "udp-hev": "works", "udp-uot": "works"}, "hev"),
        ({"udp-uot": "works"}, "uot"),
        ({"udp-uot": "unknown"}, "none"),
    ],
)
def test_the_mode_that_auto_comes_to(rows: dict[str, str], mode: str) -> None:
    assert best_mode(rows) == mode


def granting(command: int, frames: Callable[[socket.socket], None]) -> Script:
    """Make a server that knows one command beside CONNECT."""

    def script(connection: socket.socket) -> None:
        greeting(connection)
        known = request(connection) == command
        connection.sendall(b"\x05" + (b"\0" if known else b"\x07") + b"\0\x01\0\0\0\0\0\0")
        if known:
            frames(connection)

    return script


def silent_tunnel(connection: socket.socket) -> None:
    connection.recv(1000)
    connection.recv(1000)


def answering_tunnel(connection: socket.socket) -> None:
    frame = connection.recv(1000)
    message = dpkt.dns.DNS(frame[10:])
    message.qr = dpkt.dns.DNS_R
    answer = bytes(message)
    connection.sendall(len(answer).to_bytes(2, "big") + frame[2:10] + answer[:5])
    connection.sendall(answer[5:])
    connection.recv(1)


def broken_tunnel(connection: socket.socket) -> None:
    connection.recv(1000)
    connection.sendall(b"\0\x05\x09\x09\x09")
    connection.recv(1)


@pytest.mark.parametrize("command", [5, 0xF3])
@pytest.mark.parametrize(
    ("frames", "result", "sentence"),
    [
        (silent_tunnel, "works", "was granted; a query to 192.0.2.53 got no answer"),
        (answering_tunnel, "works", "DNS answer from 192.0.2.53: 0 records, code 0"),
        (broken_tunnel, "fails", "was granted, but then: address type 0x09"),
    ],
)
def test_dialects(command: int, frames: Script, result: str, sentence: str) -> None:
    name = {5: "udp-hev", 0xF3: "udp-gost"}[command]
    with server(granting(command, frames)) as proxy:
        findings = probe(proxy, targets=LOOPBACK, resolvers=["192.0.2.53"], timeout=TIMEOUT)
    assert results(findings)[name] == result
    assert sentence in seen(findings, name)
    assert {results(findings)[other] for other in DIALECTS if other != name} == {"fails"}


def test_a_connect_that_is_granted_proves_no_uot() -> None:
    with server(granting(1, silent_tunnel)) as proxy:
        findings = probe(proxy, targets=LOOPBACK, resolvers=["192.0.2.53"], timeout=TIMEOUT)
    assert results(findings)["udp-uot"] == "unknown"


# -- what is needed --


def finding(name: str, result: str) -> Finding:
    return Finding(name, result, "", 0.0)  # type: ignore[arg-type]


def test_what_is_missing() -> None:
    base = [finding("proxy", "works"), finding("login", "works"), finding("connect-ipv6", "fails")]
    tcp = [*base, finding("connect-ipv4", "understood"), finding("udp-associate", "fails")]
    assert missing_of(tcp, (), must_connect=False, direct=False) == []
    assert missing_of(tcp, (), must_connect=True, direct=False) == ["connect-ipv6", "connect-ipv4"]
    assert missing_of(tcp, ("udp", "ipv6"), must_connect=False, direct=False) == ["udp", "connect-ipv6"]
    assert missing_of([*tcp, finding("udp-hev", "works")], ("udp",), must_connect=False, direct=False) == []
    assert missing_of(base, (), must_connect=False, direct=False) == ["connect"]
    assert missing_of([finding("proxy", "fails")], ("udp",), must_connect=False, direct=False) == ["proxy"]
    assert missing_of([finding("proxy", "works")], ("udp",), must_connect=False, direct=True) == []


def test_check_in_a_table_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    with server(answering(connect=b"\x05")) as proxy:
        where = f"{proxy.host}:{proxy.port}"
        arguments = ["check", "-proxy", where, "--timeout", "1", "--json"]
        assert main([*arguments, "--require", "udp"]) == 1
        answer = json.loads(capsys.readouterr().out)
        assert answer["missing"] == ["udp"] and answer["ok"] is False
        assert answer["proxy"] == f"socks5://{where}" and answer["config"]["mtu"] == 1500
        checked = [check["result"] for check in answer["checks"] if check["name"] not in DIALECTS]
        assert checked == ["works"] * 2 + ["understood"] * 3 + ["fails", "works"]
        assert answer["udp"] == "none"
        assert main(["check", "-proxy", where, "--timeout", "1"]) == 0
        text = capsys.readouterr().out
        assert "connect-name" in text and "REP 05" in text and "What is needed works." in text
        assert main(["check", "-proxy", where, "--timeout", "1", "--target", "127.0.0.1:9"]) == 1


# -- real servers --


@contextlib.contextmanager
def started(argv: list[str], port: int) -> Iterator[None]:
    """Run a server until the block ends; the block starts when it accepts connections."""
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        give_up_at = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None and time.monotonic() < give_up_at, f"{argv[0]} does not accept connections"
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port: int = unused.getsockname()[1]
        return port


@pytest.mark.peer
def test_microsocks() -> None:
    port = free_port()
    with started([need("microsocks"), "-i", "127.0.0.1", "-p", str(port), "-u", "user", "-P", "pass"], port):
        right = probe(ProxyUrl("socks5", "127.0.0.1", port, "user", "pass"), targets=[("127.0.0.1", port)], timeout=3)
        wrong = probe(ProxyUrl("socks5", "127.0.0.1", port, "user", "guess"), targets=LOOPBACK, timeout=3)
    assert plain(right) == {
        "proxy": "works",
        "login": "works",
        "connect-ipv4": "works",
        "udp-associate": "fails",
        "pipelined": "fails",
    }
    assert seen(right, "udp-associate") == "UDP ASSOCIATE: REP 07, command not supported"
    assert results(wrong) == {"proxy": "works", "login": "fails"}


@pytest.mark.peer
def test_dante(tmp_path: Path) -> None:
    danted, port = need("danted"), free_port()
    config = tmp_path / "danted.conf"
    config.write_text(
        f"logoutput: {tmp_path}/log\ninternal: 127.0.0.1 port = {port}\nexternal: lo\nclientmethod: none\n"
        "socksmethod: none\nclient pass {\n from: 127.0.0.0/8 to: 0.0.0.0/0\n}\n"
        "socks pass {\n from: 0.0.0.0/0 to: 0.0.0.0/0\n protocol: tcp udp\n}\n"
    )
    with started([danted, "-f", str(config), "-N", "1"], port), server(silent) as target:
        findings = probe(
            ProxyUrl("socks5", "127.0.0.1", port),
            targets=[(target.host, target.port)],
            resolvers=["127.0.0.1"],
            timeout=3,
        )
    assert results(findings)["connect-ipv4"] == results(findings)["udp-associate"] == "works"
    assert seen(findings, "udp-associate").startswith("relay at 127.0.0.1:")


# -- inside something else --


@pytest.mark.parametrize(
    ("carrier", "flags", "missing"),
    [
        ("ws", [], []),
        ("tls", ["--tls-ca", CA], []),
        ("tls", [], ["proxy"]),
        ("tls", ["--tls-ca", CA, "--tls-server-name", "other.test"], ["proxy"]),
    ],
)
def test_check_of_a_proxy_inside_something_else(
    carrier: str, flags: list[str], missing: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    tls = ServerTls(LOCALHOST) if carrier == "tls" else None
    with server(silent) as target, Running(carrier=carrier, tls=tls) as running:
        where = f"socks5+{carrier}://localhost:{running.server.address[1]}"
        arguments = ["check", "-p", where, "--target", f"127.0.0.1:{target.port}", "--timeout", "1", "--json", *flags]
        assert main(arguments) == bool(missing)
    answer = json.loads(capsys.readouterr().out)
    assert answer["missing"] == missing
    if not missing:
        assert {check["name"]: check["result"] for check in answer["checks"]}["connect-ipv4"] == "works"
        assert answer["udp"] == "udp"


def test_a_password_that_is_wrong_inside_something_else_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    with Running(carrier="ws", username="me", password="secret") as running:
        where = f"socks5+ws://me:guess@127.0.0.1:{running.server.address[1]}"
        assert main(["check", "-p", where, "--timeout", "1", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["missing"] == ["connect"]
