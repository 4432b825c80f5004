"""What all handshakes with a proxy have in common, whatever they speak; each is bytes in, bytes out, without I/O.

    handshake = upstream.handshake(CONNECT, address, port)
    send(handshake.first_bytes)
    while not handshake.done:
        send(handshake.receive(bytes that came))

| class           | scheme                       | module          | can                                     |
| --------------- | ---------------------------- | --------------- | --------------------------------------- |
| SocksHandshake  | socks5, socks5h              | client.py       | every command, IPv4, IPv6, names        |
| Socks4Handshake | socks4, socks4a              | socks4.py       | CONNECT; 4: IPv4, 4a: names as well     |
| HttpHandshake   | http                         | http.py         | CONNECT                                 |
| Refused         | reject, and what others lack | here            | nothing: it is done before it begins    |

They answer in REP codes of SOCKS5 (wire.py), so that a refusal means the same to clients whoever said it.
"""

from typing import Final, Protocol

from workers.socks.wire import Host


class Handshake(Protocol):
    """One request to a proxy, and what came of it."""

    first_bytes: bytes  #: to be sent as soon as the connection stands
    requested: bool  #: the request itself has been handed out, so that a closed connection may be its answer
    done: bool  #: a reply has come
    reply: int  #: its REP code, 0 for a success
    bound: tuple[Host, int] | None  #: BND.ADDR and BND.PORT of a success, zeros where the protocol has none
    surplus: bytes  #: what came behind a success: the other side may speak first

    def receive(self, data: bytes) -> bytes:
        """Take bytes from the proxy, in any pieces; return what to send next, often nothing.

        Raises ProtocolError when the proxy speaks something else, or refuses the credentials; then it is over.
        """


class Refused:
    """A request that is refused without asking the proxy."""

    __slots__ = ("reply",)

    first_bytes: bytes = b""
    requested: bool = True
    done: bool = True
    bound: tuple[Host, int] | None = None
    surplus: bytes = b""

    def __init__(self, reply: int) -> None:
        self.reply = reply

    def receive(self, data: bytes) -> bytes:
        """Ignore it."""
        return b""


NOWHERE: Final[tuple[Host, int]] = (bytes(4), 0)  #: BND of protocols that do not tell one
