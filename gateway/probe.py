"""Ask a proxy what it can do: reach it, log in, CONNECT, UDP in each way that it may have; runs on any system.

    proxy ─ login ─┬─ connect-ipv4         ┬─ udp-ipv4      a DNS query through an association,
                   ├─ connect-ipv6         ├─ udp-ipv6      to a resolver of that family
                   ├─ connect-name         ├─ udp-gost …    the same through each dialect of UDP inside TCP
                   └─ udp-associate        └─ pipelined     method, password and CONNECT in one go

What stands in one column is asked at the same time, and each row ends within `timeout`. What a kind of proxy does not
have (login and most of UDP with HTTP and SOCKS4) is not asked.

CONNECT by SOCKS5 is asked through PySocks, an independent client. Login is spoken here: PySocks hides the
method chosen.
"""

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple

import socks

from gateway.caller import DNS_PORT, Caller, Result, Seen, dns_answer, dns_query, packed
from gateway.conversation import Address, Conversation, ProbeError, mark
from gateway.proxyurl import WITHOUT_PROXY, ProxyUrl
from workers.socks import modes
from workers.socks.handshake import Handshake
from workers.socks.wire import (
    ADDRESS_TYPE_NOT_SUPPORTED,
    COMMAND_NOT_SUPPORTED,
    CONNECT,
    REPLY_TEXT,
    UDP_ASSOCIATE,
    write_datagram_header,
)

Row = tuple[str, Callable[[], Seen]]

_NOT_UNDERSTOOD: Final = (COMMAND_NOT_SUPPORTED, ADDRESS_TYPE_NOT_SUPPORTED)

# Asked when nobody names a target: well known, and an answer of any kind shows that the proxy takes the request.
DEFAULT_TARGETS: Final[tuple[Address, ...]] = (
    ("1.1.1.1", 443),
    ("2606:4700:4700::1111", 443),
    ("one.one.one.one", 443),
)
DEFAULT_RESOLVER6: Final = "2001:4860:4860::8888"


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
    if is_socks5:
        rows.append(("udp-associate", partial(server.associate, udp_address)))
    findings += at_once(rows, timeout)
    resolver4 = next((one for one in resolvers if ":" not in one), "")
    resolver6 = next((one for one in resolvers if ":" in one), DEFAULT_RESOLVER6)
    rows = []
    if is_socks5 and findings[-1].result == "works":
        if resolver4:
            rows.append(("udp-ipv4", partial(server.ask_dns, resolver4, udp_address)))
        rows.append(("udp-ipv6", partial(server.ask_dns, resolver6, udp_address)))
    rows += [
        (f"udp-{mode}", partial(server.tunnel, mode, resolver4 or resolver6))
        for mode in modes.DIALECTS_OF.get(proxy.scheme, ())
    ]
    if is_socks5:
        rows.append(("pipelined", partial(server.pipelined, (targets or DEFAULT_TARGETS)[0])))
    return findings + at_once(rows, timeout)


def best_mode(results: Mapping[str, str]) -> str:
    """Return the mode that udp-mode auto comes to, from the results of the rows by name."""
    if results.get("udp-associate") == "works":
        # gost 1 grants it as well; its datagrams come back inside TCP, and only there.
        relays = "works" in (results.get("udp-ipv4"), results.get("udp-ipv6"))
        return modes.GOST1 if not relays and results.get(f"udp-{modes.GOST1}") == "works" else modes.UDP
    return next((mode for mode in modes.DIALECTS if results.get(f"udp-{mode}") == "works"), modes.NONE)


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


class Server(Caller):
    """A proxy that was reached at an address; each method is a row."""

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
        return self._connect(target, self.handshake(CONNECT, packed(target[0]), target[1]))

    def pipelined(self, target: Address) -> Seen:
        """The same by SOCKS5, with method, user and password, and request in one go: some servers hang then."""
        handshake = self.handshake(CONNECT, packed(target[0]), target[1], pipelined=True)
        _, seen = self._connect(target, handshake)
        return "works", f"in one go: {seen}"  # any answer shows it

    def _connect(self, target: Address, handshake: Handshake) -> Seen:
        what = f"CONNECT {shown(target)}"
        with self.talk() as talk:
            talk.ask(handshake, what)
        if not handshake.reply:
            return "works", f"{what}: connected"
        return _judged(handshake.reply), f"{what}: {self.reply_text(handshake.reply)}"

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
        return _judged(code), f"CONNECT {where}: {self.reply_text(code)}"

    # -- UDP --

    def associate(self, udp_address: str) -> Seen:
        """UDP ASSOCIATE; says where the relay is told to be, and where datagrams would go."""
        with self.talk() as talk:
            told, used = self._associate(talk, udp_address)
        note = "" if told == used else f"; datagrams go to {shown(used)}"
        return "works", f"relay at {shown(told)}{note}"

    def _associate(self, talk: Conversation, udp_address: str) -> tuple[Address, Address]:
        handshake = self.handshake(UDP_ASSOCIATE, self.zeros, 0)
        self.granted(talk, handshake, "UDP ASSOCIATE")
        assert handshake.bound is not None
        host, port = handshake.bound
        told = host if isinstance(host, str) else str(ipaddress.ip_address(host))
        return (told, port), (_relay(told, self.address[0], udp_address), port)

    def ask_dns(self, resolver: str, udp_address: str) -> Seen:
        """Send one DNS query through an association of its own and wait for the answer."""
        query_id, query = dns_query()
        header = write_datagram_header(packed(resolver), DNS_PORT)
        with self.talk() as talk:
            _, relay = self._associate(talk, udp_address)
            family = socket.AF_INET6 if ":" in relay[0] else socket.AF_INET
            with socket.socket(family, socket.SOCK_DGRAM) as datagrams:
                mark(datagrams, *self.marks)
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


def shown(address: Address) -> str:
    """Return an address as people write it."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


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
