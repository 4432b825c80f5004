"""Ask a SOCKS5 proxy what it can do: reach it, log in, CONNECT, UDP ASSOCIATE; runs on any system.

    proxy ─ login ─┬─ connect-ipv4
                   ├─ connect-ipv6
                   ├─ connect-name
                   └─ udp-associate ─┬─ udp-ipv4    a DNS query through an association,
                                     └─ udp-ipv6    to a resolver of that family

What stands in one column is asked at the same time, and each row ends within `timeout`.

CONNECT is asked through PySocks, an independent client. Login and UDP ASSOCIATE are spoken here: PySocks hides the
method chosen, declares an address that strict servers refuse, and never looks at the answered one.
"""

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple

import dpkt
import socks

from gateway.proxyurl import ProxyUrl

Result = Literal["works", "understood", "fails", "unknown"]
Address = tuple[str, int]

REPLIES: Final = {  # RFC 1928, section 6
    1: "general failure",
    2: "not allowed by the ruleset",
    3: "network unreachable",
    4: "host unreachable",
    5: "connection refused",
    6: "TTL expired",
    7: "command not supported",
    8: "address type not supported",
}
_NOT_UNDERSTOOD: Final = (7, 8)

# Asked when nobody names a target: well known, and an answer of any kind shows that the proxy takes the request.
DEFAULT_TARGETS: Final[tuple[Address, ...]] = (
    ("1.1.1.1", 443),
    ("2606:4700:4700::1111", 443),
    ("one.one.one.one", 443),
)
DEFAULT_RESOLVER6: Final = "2001:4860:4860::8888"
_QUESTION: Final = "one.one.one.one"


class Finding(NamedTuple):
    """What one probe saw."""

    name: str
    result: Result  #: understood: the proxy took the request, the target did not answer; unknown: cannot be told
    seen: str  #: precisely what was seen
    milliseconds: float


class ProbeError(Exception):
    """A step of the probe that failed; its text says what was seen."""


def probe(
    proxy: ProxyUrl,
    *,
    targets: Sequence[Address] = (),
    resolvers: Sequence[str] = ("8.8.8.8",),
    udp_address: str = "auto",
    timeout: float = 5.0,
) -> list[Finding]:
    """Probe `proxy`; takes at most about four times `timeout` seconds, and raises nothing."""
    if proxy.scheme == "direct":
        return [Finding("proxy", "works", "direct:// asks no proxy", 0.0)]
    reached: list[Address] = []

    def reach() -> tuple[Result, str]:
        connection = _connect(proxy, timeout)
        with connection:
            reached.append(connection.getpeername()[:2])
        host, port = reached[0]
        return "works", f"TCP connection to {host} port {port}"

    findings = _at_once([("proxy", reach)], timeout)
    if findings[0].result != "works":
        return findings
    # Later rows use the address that answered: a name may stand for one that does not.
    server = _Server(proxy, *reached[0], timeout)
    findings += _at_once([("login", server.login)], timeout)
    if findings[1].result != "works":
        return findings
    rows: list[tuple[str, Callable[[], tuple[Result, str]]]] = []
    for target in targets or DEFAULT_TARGETS:
        rows.append((f"connect-{_kind(target[0])}", lambda target=target: server.connect(target)))  # type: ignore[misc]
    rows.append(("udp-associate", lambda: server.associate(udp_address)))
    findings += _at_once(rows, timeout)
    if findings[-1].result != "works":
        return findings
    rows = []
    for family in (4, 6):
        of_family = [one for one in resolvers if ipaddress.ip_address(one).version == family]
        resolver = of_family[0] if of_family else DEFAULT_RESOLVER6 if family == 6 else None
        if resolver:
            rows.append(
                (f"udp-ipv{family}", lambda resolver=resolver: server.ask_dns(resolver, udp_address))  # type: ignore[misc]
            )
    return findings + _at_once(rows, timeout)


def _kind(host: str) -> str:
    try:
        return f"ipv{ipaddress.ip_address(host).version}"
    except ValueError:
        return "name"


def _at_once(rows: Sequence[tuple[str, Callable[[], tuple[Result, str]]]], timeout: float) -> list[Finding]:
    """Run the rows in threads of their own; one that is not done in time is given up (a resolver cannot be stopped)."""
    done: dict[int, Finding] = {}
    started = time.monotonic()

    def run(index: int, name: str, row: Callable[[], tuple[Result, str]]) -> None:
        try:
            result, seen = row()
        except ProbeError as error:
            result, seen = "fails", str(error)
        except TimeoutError:
            result, seen = "fails", f"no answer in {timeout:g} s"
        except OSError as error:
            result, seen = "fails", error.strerror or str(error)
        done[index] = Finding(name, result, seen, round((time.monotonic() - started) * 1000, 1))

    threads = [
        threading.Thread(target=run, args=(index, name, row), name=f"probe {name}", daemon=True)
        for index, (name, row) in enumerate(rows)
    ]
    for thread in threads:
        thread.start()
    # Sockets get `timeout` for the whole row; the little more lets them say what they saw.
    for thread in threads:
        thread.join(max(0.0, started + timeout * 1.1 + 0.2 - time.monotonic()))
    late = round((time.monotonic() - started) * 1000, 1)
    return [
        done.get(index, Finding(name, "fails", f"no answer in {timeout:g} s", late))
        for index, (name, _) in enumerate(rows)
    ]


def _connect(proxy: ProxyUrl, timeout: float) -> socket.socket:
    try:
        return socket.create_connection((proxy.host, proxy.port), timeout)
    except socket.gaierror as error:
        raise ProbeError(f"{proxy.host} does not resolve: {error.strerror}") from None
    except TimeoutError:
        raise ProbeError(f"no TCP connection to {proxy.host} port {proxy.port} in {timeout:g} s") from None
    except OSError as error:
        raise ProbeError(f"no TCP connection to {proxy.host} port {proxy.port}: {error.strerror}") from None


class _Server:
    """A proxy that was reached at `host`, `port`."""

    def __init__(self, proxy: ProxyUrl, host: str, port: int, timeout: float) -> None:
        self.proxy = proxy
        self.host = host
        self.port = port
        self.timeout = timeout
        self.family = socket.AF_INET6 if ":" in host else socket.AF_INET

    # -- login --

    def login(self) -> tuple[Result, str]:
        """Negotiate the method and, where asked, user and password."""
        with _Conversation(self.host, self.port, self.timeout) as talk:
            return "works", self._log_in(talk)

    def _log_in(self, talk: "_Conversation") -> str:
        username, password = self.proxy.username.encode(), self.proxy.password.encode()
        # 02 only with credentials at hand: 3proxy picks it whenever it is offered.
        talk.send(b"\x05\x02\x00\x02" if username else b"\x05\x01\x00")
        answer = talk.receive(2, "the method")
        if answer[0] != 5:
            more = " (an HTTP server?)" if answer == b"HT" else ""
            raise ProbeError(f"not SOCKS5: answered {answer.hex(' ')} to the greeting{more}")
        if answer[1] == 0xFF:
            wants = "no authentication and user/password" if username else "going without user and password"
            raise ProbeError(f"refused {wants} (05 ff)")
        if answer[1] == 0:
            return "no authentication asked" + ("; user and password went unused" if username else "")
        if answer[1] != 2 or not username:
            raise ProbeError(f"chose method {answer[1]:02x}, which was not offered")
        talk.send(bytes((1, len(username))) + username + bytes((len(password),)) + password)
        status = talk.receive(2, "the answer to user and password")
        if status[1] != 0:
            raise ProbeError(f"refused user and password ({status.hex(' ')})")
        return "user and password accepted"

    # -- CONNECT --

    def connect(self, target: Address) -> tuple[Result, str]:
        """CONNECT to `target` by PySocks; an answer with a reply code shows that the request is understood."""
        host, port = target
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        client = socks.socksocket(self.family, socket.SOCK_STREAM)
        with client:
            client.settimeout(self.timeout)
            client.set_proxy(
                socks.SOCKS5,
                self.host,
                self.port,
                rdns=True,
                username=self.proxy.username or None,
                password=self.proxy.password or None,
            )
            # PySocks' own timeout is for one read; a server that drips would keep it for hours.
            ended = threading.Event()
            watchdog = threading.Timer(self.timeout, _end, (client, ended))
            watchdog.start()
            try:
                client.connect((host, port))
            except socks.ProxyError as error:
                if ended.is_set():
                    raise ProbeError(f"CONNECT {where}: no answer in {self.timeout:g} s") from None
                return self._refusal(where, error)
            finally:
                watchdog.cancel()
            return "works", f"CONNECT {where}: connected"

    def _refusal(self, where: str, error: socks.ProxyError) -> tuple[Result, str]:
        # PySocks wraps what happened in "Socket error", the reply code as well: "0x05: Connection refused".
        inner = error.socket_err if error.socket_err is not None else error
        if isinstance(inner, TimeoutError):
            raise ProbeError(f"CONNECT {where}: no answer in {self.timeout:g} s")
        if not isinstance(inner, socks.ProxyError):
            raise ProbeError(f"CONNECT {where}: {getattr(inner, 'strerror', None) or inner}")
        code = _reply_code(inner.msg) if isinstance(inner, socks.SOCKS5Error) else None
        if code is None:
            raise ProbeError(f"CONNECT {where}: {inner.msg}")
        seen = f"CONNECT {where}: REP {code:02x}, {REPLIES.get(code, 'not a code of RFC 1928')}"
        return "fails" if code in _NOT_UNDERSTOOD or code not in REPLIES else "understood", seen

    # -- UDP --

    def associate(self, udp_address: str) -> tuple[Result, str]:
        """UDP ASSOCIATE; says where the relay is told to be, and where datagrams would go."""
        with _Conversation(self.host, self.port, self.timeout) as talk:
            told, used = self._associate(talk, udp_address)
        note = "" if told == used else f"; datagrams go to {_shown(used)}"
        return "works", f"relay at {_shown(told)}{note}"

    def _associate(self, talk: "_Conversation", udp_address: str) -> tuple[Address, Address]:
        self._log_in(talk)
        # Zeros of the control connection's family: "from anywhere" (RFC 1928, section 7); dante refuses :: on IPv4.
        zeros = b"\x04" + bytes(18) if self.family == socket.AF_INET6 else b"\x01" + bytes(6)
        talk.send(b"\x05\x03\x00" + zeros)
        head = talk.receive(4, "the answer to UDP ASSOCIATE")
        if head[0] != 5:
            raise ProbeError(f"answered {head.hex(' ')} to UDP ASSOCIATE")
        if head[1] != 0:
            raise ProbeError(f"UDP ASSOCIATE: REP {head[1]:02x}, {REPLIES.get(head[1], 'not a code of RFC 1928')}")
        told = talk.receive_address(head[3])
        return told, (_relay(told[0], self.host, udp_address), told[1])

    def ask_dns(self, resolver: str, udp_address: str) -> tuple[Result, str]:
        """Send one DNS query through an association of its own and wait for the answer."""
        query = dpkt.dns.DNS(id=int.from_bytes(_QUESTION.encode()[:2], "big"), op=dpkt.dns.DNS_RD)
        query.qd = [dpkt.dns.DNS.Q(name=_QUESTION, type=dpkt.dns.DNS_A)]
        packed = ipaddress.ip_address(resolver).packed
        header = b"\0\0\0" + (b"\x01" if len(packed) == 4 else b"\x04") + packed + (53).to_bytes(2, "big")
        with _Conversation(self.host, self.port, self.timeout) as talk:
            _, relay = self._associate(talk, udp_address)
            family = socket.AF_INET6 if ":" in relay[0] else socket.AF_INET
            with socket.socket(family, socket.SOCK_DGRAM) as datagrams:
                datagrams.connect(relay)
                datagrams.send(header + bytes(query))
                datagrams.settimeout(talk.left())
                try:
                    answer = datagrams.recv(65535)
                except TimeoutError:
                    return "unknown", f"the relay took a query to {resolver}, no answer came"
                except ConnectionError:
                    raise ProbeError(f"nothing listens at {_shown(relay)}, where the relay should be") from None
        return "works", _dns_answer(answer, query.id, resolver)


def _end(client: socket.socket, ended: threading.Event) -> None:
    ended.set()
    try:
        client.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # not connected, or done meanwhile


def _reply_code(message: str) -> int | None:
    try:
        return int(message[:4], 16)
    except ValueError:
        return None


def _relay(told: str, peer: str, udp_address: str) -> str:
    """Choose where datagrams go: many servers tell 0.0.0.0, or an address of a network that we are not in."""
    if udp_address == "peer":
        return peer
    if udp_address not in ("auto", "as-told"):
        return udp_address
    try:
        address, other = ipaddress.ip_address(told), ipaddress.ip_address(peer)
    except ValueError:
        return peer
    if address.is_unspecified or address.version != other.version:
        return peer
    return told if udp_address == "as-told" or address.is_global else peer


def _dns_answer(datagram: bytes, query_id: int, resolver: str) -> str:
    lengths = {1: 10, 4: 22, 3: 7 + (datagram[4] if len(datagram) > 4 else 0)}
    if len(datagram) < 5 or datagram[3] not in lengths or len(datagram) <= lengths[datagram[3]]:
        raise ProbeError(f"the relay answered {len(datagram)} bytes that are no SOCKS datagram")
    try:
        message = dpkt.dns.DNS(datagram[lengths[datagram[3]] :])
    except (dpkt.UnpackError, IndexError, UnicodeError):
        raise ProbeError("the answer through the relay is no DNS message") from None
    if message.id != query_id or message.qr != dpkt.dns.DNS_R:
        raise ProbeError("the answer through the relay belongs to another question")
    return f"DNS answer from {resolver}: {len(message.an)} records, code {message.rcode}"


def _shown(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Conversation:
    """A TCP connection to the proxy that ends at one moment, however slowly the other side drips."""

    def __init__(self, host: str, port: int, timeout: float) -> None:
        self.timeout = timeout
        self.ends_at = time.monotonic() + timeout
        self.socket = socket.create_connection((host, port), timeout)

    def __enter__(self) -> "_Conversation":
        return self

    def __exit__(self, *exception: object) -> None:
        self.socket.close()

    def left(self) -> float:
        """Return the seconds that are left; TimeoutError when there are none."""
        left = self.ends_at - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def send(self, data: bytes) -> None:
        """Send all of it."""
        self.socket.settimeout(self.left())
        self.socket.sendall(data)

    def receive(self, count: int, what: str) -> bytes:
        """Read exactly `count` bytes of `what`."""
        data = b""
        while len(data) < count:
            try:
                self.socket.settimeout(self.left())
                more = self.socket.recv(count - len(data))
            except TimeoutError:
                raise ProbeError(f"{what} did not come in {self.timeout:g} s{_so_far(data)}") from None
            if not more:
                raise ProbeError(f"the proxy closed the connection instead of {what}{_so_far(data)}")
            data += more
        return data

    def receive_address(self, kind: int) -> Address:
        """Read the rest of a SOCKS address of type `kind`."""
        if kind == 3:
            host = self.receive(self.receive(1, "an address")[0], "an address").decode("ascii", "replace")
        elif kind in (1, 4):
            host = str(ipaddress.ip_address(self.receive(4 if kind == 1 else 16, "an address")))
        else:
            raise ProbeError(f"answered an address of type {kind:02x}")
        return host, int.from_bytes(self.receive(2, "a port"), "big")


def _so_far(data: bytes) -> str:
    return f" (so far {data.hex(' ')})" if data else ""
