"""Ask a proxy what it can do: reach it, log in, CONNECT, UDP in each way that it may have; runs on any system.

    proxy ─ login ─┬─ connect-ipv4
                   ├─ connect-ipv6
                   ├─ connect-name
                   └─ udp-associate ─┬─ udp-ipv4    a DNS query through an association,
                                     ├─ udp-ipv6    to a resolver of that family
                                     └─ pipelined   method, password and CONNECT in one go

What stands in one column is asked at the same time, and each row ends within `timeout`. What a kind of proxy does not
have (login and UDP of HTTP and SOCKS4) is not asked.

CONNECT by SOCKS5 is asked through PySocks, an independent client. Login and UDP ASSOCIATE are spoken here: PySocks
hides the method chosen, declares an address that strict servers refuse, and never looks at the answered one.
"""

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Literal, NamedTuple

import dpkt
import socks

from gateway.conversation import Address, Conversation, ProbeError, mark
from gateway.proxyurl import WITHOUT_PROXY, ProxyUrl
from workers.socks.client import SocksHandshake
from workers.socks.handshake import Handshake
from workers.socks.wire import (
    ADDRESS_TYPE_NOT_SUPPORTED,
    COMMAND_NOT_SUPPORTED,
    CONNECT,
    REPLY_TEXT,
    UDP_ASSOCIATE,
    Host,
    datagram_header_length,
    write_datagram_header,
)
from workers.upstream import handshakes

Result = Literal["works", "understood", "fails", "unknown"]
Seen = tuple[Result, str]
Row = tuple[str, Callable[[], Seen]]

_NOT_UNDERSTOOD: Final = (COMMAND_NOT_SUPPORTED, ADDRESS_TYPE_NOT_SUPPORTED)

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


def probe(
    proxy: ProxyUrl,
    *,
    targets: Sequence[Address] = (),
    resolvers: Sequence[str] = ("8.8.8.8",),
    udp_address: str = "auto",
    timeout: float = 5.0,
) -> list[Finding]:
    """Probe `proxy`; takes at most about four times `timeout` seconds, and raises nothing."""
    if proxy.scheme in WITHOUT_PROXY:
        return [Finding("proxy", "works", f"{proxy.scheme}:// asks no proxy", 0.0)]
    reached: list[Address] = []

    def reach() -> Seen:
        with _connect(proxy, timeout) as connection:
            reached.append(connection.getpeername()[:2])
        host, port = reached[0]
        return "works", f"TCP connection to {host} port {port}"

    findings = at_once([("proxy", reach)], timeout)
    if findings[0].result != "works":
        return findings
    # Later rows use the address that answered: a name may stand for one that does not.
    server = Server(proxy, reached[0], timeout)
    is_socks5 = proxy.scheme in ("socks5", "socks5h")
    if is_socks5:
        findings += at_once([("login", server.login)], timeout)
        if findings[1].result != "works":
            return findings
    rows: list[Row] = []
    for target in targets or DEFAULT_TARGETS:
        ask = server.connect_by_pysocks if is_socks5 else server.connect
        rows.append((f"connect-{_kind(target[0])}", partial(ask, target)))
    if not is_socks5:
        return findings + at_once(rows, timeout)
    rows.append(("udp-associate", partial(server.associate, udp_address)))
    findings += at_once(rows, timeout)
    has_udp = findings[-1].result == "works"
    rows = []
    for family in (4, 6) if has_udp else ():
        of_family = [one for one in resolvers if ipaddress.ip_address(one).version == family]
        resolver = of_family[0] if of_family else DEFAULT_RESOLVER6 if family == 6 else None
        if resolver:
            rows.append((f"udp-ipv{family}", partial(server.ask_dns, resolver, udp_address)))
    rows.append(("pipelined", partial(server.pipelined, (targets or DEFAULT_TARGETS)[0])))
    return findings + at_once(rows, timeout)


def _kind(host: str) -> str:
    try:
        return f"ipv{ipaddress.ip_address(host).version}"
    except ValueError:
        return "name"


def at_once(rows: Sequence[Row], timeout: float) -> list[Finding]:
    """Run the rows in threads of their own; one that is not done in time is given up (a resolver cannot be stopped)."""
    done: dict[int, Finding] = {}
    started = time.monotonic()

    def run(index: int, name: str, row: Callable[[], Seen]) -> None:
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


class Server:
    """A proxy that was reached at an address."""

    def __init__(self, proxy: ProxyUrl, address: Address, timeout: float, fwmark: int = 0, interface: str = "") -> None:
        """Each question may take `timeout` seconds; sockets get the mark and interface, but for PySocks'."""
        self.proxy = proxy
        self.address = address
        self.timeout = timeout
        self.family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._marks = fwmark, interface
        self._handshake = handshakes(proxy.scheme, proxy.username or None, proxy.password or None)

    def talk(self) -> Conversation:
        """Open a connection."""
        return Conversation(self.address, self.timeout, *self._marks)

    # -- login --

    def login(self) -> Seen:
        """Negotiate the method and, where asked, user and password."""
        with self.talk() as talk:
            return "works", self._log_in(talk)

    def _log_in(self, talk: Conversation) -> str:
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

    def connect(self, target: Address) -> Seen:
        """CONNECT to `target` by our own handshake, of whatever kind; any answer shows that it is understood."""
        return self._connect(target, self._handshake(CONNECT, _packed(target[0]), target[1]))

    def pipelined(self, target: Address) -> Seen:
        """The same by SOCKS5, with method, user and password, and request in one go: some servers hang then."""
        handshake = SocksHandshake(
            CONNECT,
            _packed(target[0]),
            target[1],
            self.proxy.username or None,
            self.proxy.password or None,
            pipelined=True,
        )
        _, seen = self._connect(target, handshake)
        return "works", f"in one go: {seen}"  # any answer shows it

    def _connect(self, target: Address, handshake: Handshake) -> Seen:
        what = f"CONNECT {shown(target)}"
        with self.talk() as talk:
            talk.ask(handshake, what)
        if not handshake.reply:
            return "works", f"{what}: connected"
        return _judged(handshake.reply), f"{what}: {REPLY_TEXT.get(handshake.reply, f'REP {handshake.reply:02x}')}"

    def connect_by_pysocks(self, target: Address) -> Seen:
        """CONNECT to `target` by PySocks; an answer with a reply code shows that the request is understood."""
        where = shown(target)
        client = socks.socksocket(self.family, socket.SOCK_STREAM)
        with client:
            client.settimeout(self.timeout)
            client.set_proxy(
                socks.SOCKS5,
                *self.address,
                rdns=True,
                username=self.proxy.username or None,
                password=self.proxy.password or None,
            )
            # PySocks' own timeout is for one read; a server that drips would keep it for hours.
            ended = threading.Event()
            watchdog = threading.Timer(self.timeout, _end, (client, ended))
            watchdog.start()
            try:
                client.connect(target)
            except socks.ProxyError as error:
                if ended.is_set():
                    raise ProbeError(f"CONNECT {where}: no answer in {self.timeout:g} s") from None
                return self._refusal(where, error)
            finally:
                watchdog.cancel()
            return "works", f"CONNECT {where}: connected"

    def _refusal(self, where: str, error: socks.ProxyError) -> Seen:
        # PySocks wraps what happened in "Socket error", the reply code as well: "0x05: Connection refused".
        inner = error.socket_err if error.socket_err is not None else error
        if isinstance(inner, TimeoutError):
            raise ProbeError(f"CONNECT {where}: no answer in {self.timeout:g} s")
        if not isinstance(inner, socks.ProxyError):
            raise ProbeError(f"CONNECT {where}: {getattr(inner, 'strerror', None) or inner}")
        code = _reply_code(inner.msg) if isinstance(inner, socks.SOCKS5Error) else None
        if code is None:
            raise ProbeError(f"CONNECT {where}: {inner.msg}")
        return _judged(code), f"CONNECT {where}: {reply_text(code)}"

    # -- UDP --

    def associate(self, udp_address: str) -> Seen:
        """UDP ASSOCIATE; says where the relay is told to be, and where datagrams would go."""
        with self.talk() as talk:
            told, used = self._associate(talk, udp_address)
        note = "" if told == used else f"; datagrams go to {shown(used)}"
        return "works", f"relay at {shown(told)}{note}"

    def _associate(self, talk: Conversation, udp_address: str) -> tuple[Address, Address]:
        told = self.command(talk, UDP_ASSOCIATE, "UDP ASSOCIATE")
        return told, (_relay(told[0], self.address[0], udp_address), told[1])

    def command(self, talk: Conversation, command: int, what: str) -> Address:
        """Log in and ask for a command that takes zeros; return BND. ProbeError: refused."""
        self._log_in(talk)
        # Zeros of the control connection's family: "from anywhere" (RFC 1928, section 7); dante refuses :: on IPv4.
        zeros = b"\x04" + bytes(18) if self.family == socket.AF_INET6 else b"\x01" + bytes(6)
        talk.send(b"\x05" + command.to_bytes() + b"\x00" + zeros)
        head = talk.receive(4, f"the answer to {what}")
        if head[0] != 5:
            raise ProbeError(f"answered {head.hex(' ')} to {what}")
        if head[1] != 0:
            raise ProbeError(f"{what}: {reply_text(head[1])}")
        return talk.receive_address(head[3])

    def ask_dns(self, resolver: str, udp_address: str) -> Seen:
        """Send one DNS query through an association of its own and wait for the answer."""
        query_id, query = dns_query()
        header = write_datagram_header(_packed(resolver), 53)
        with self.talk() as talk:
            _, relay = self._associate(talk, udp_address)
            family = socket.AF_INET6 if ":" in relay[0] else socket.AF_INET
            with socket.socket(family, socket.SOCK_DGRAM) as datagrams:
                mark(datagrams, *self._marks)
                datagrams.connect(relay)
                datagrams.send(header + query)
                datagrams.settimeout(talk.left())
                try:
                    answer = datagrams.recv(65535)
                except TimeoutError:
                    return "unknown", f"the relay took a query to {resolver}, no answer came"
                except ConnectionError:
                    raise ProbeError(f"nothing listens at {shown(relay)}, where the relay should be") from None
        return "works", dns_answer(answer, query_id, resolver)


def _judged(code: int) -> Result:
    return "fails" if code in _NOT_UNDERSTOOD or code not in REPLY_TEXT else "understood"


def reply_text(code: int) -> str:
    """Return a REP code and what it means."""
    return f"REP {code:02x}, {REPLY_TEXT.get(code, 'not a code of RFC 1928')}"


def shown(address: Address) -> str:
    """Return an address as people write it."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def dns_query() -> tuple[int, bytes]:
    """Return the id and the bytes of a query that every resolver can answer."""
    query = dpkt.dns.DNS(id=int.from_bytes(_QUESTION.encode()[:2], "big"), op=dpkt.dns.DNS_RD)
    query.qd = [dpkt.dns.DNS.Q(name=_QUESTION, type=dpkt.dns.DNS_A)]
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


def _packed(host: str) -> Host:
    try:
        return ipaddress.ip_address(host).packed
    except ValueError:
        return host


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
