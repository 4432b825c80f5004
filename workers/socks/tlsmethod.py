"""gost's TLS methods inside SOCKS5, the client's side, without I/O and without the TLS.

client                            server
05 n methods               ──►
                           ◄──    05 80      TLS from here on, then the request
                           ◄──    05 82      TLS, then RFC 1929, then the request      (gost v2, v3)
                           ◄──    05 8A      the same, with an empty user name         (gost v1)
"""

from workers.socks.client import SocksHandshake
from workers.socks.wire import GOST1_TLS_PASSWORD, GOST_TLS, GOST_TLS_PASSWORD, VERSION, Host


class TlsMethodHandshake(SocksHandshake):
    """A handshake that stops at the server's choice of method: with `wants_tls`, TLS comes next.

    After that `first_bytes`, another time, are what goes out first inside.
    """

    __slots__ = ("wants_tls",)

    def __init__(
        self,
        command: int,
        address: Host,
        port: int,
        username: str | None = None,
        password: str | None = None,
        gost1: bool = False,
    ) -> None:
        """Offer TLS only, so that nothing is said in clear. With `gost1` a password goes without its user name."""
        super().__init__(command, address, port, "" if gost1 and username is not None else username, password)
        methods: tuple[int, ...]
        if not self._credentials:
            methods = (GOST_TLS,)
        elif gost1:
            methods = (GOST1_TLS_PASSWORD,)
        else:
            # gost v2 is asked for 80 and answers 82; v3 wants 82 to be asked for. v1 would take 82 for AES.
            methods = (GOST_TLS, GOST_TLS_PASSWORD)
        self.first_bytes = bytes((VERSION, len(methods), *methods))
        self._state = TlsMethodHandshake._tls_method  # type: ignore[assignment]
        self.wants_tls = False

    def _tls_method(self, data: bytes) -> bytes:
        if len(data) < 2 or data[0] != VERSION or data[1] not in self.first_bytes[2:]:
            return self._method(data)
        self._held = b""
        self.wants_tls = True
        if data[1] == GOST_TLS:
            self.first_bytes = self._ask(b"")
        else:
            self._state = SocksHandshake._password
            self.first_bytes = self._credentials
        return b""
