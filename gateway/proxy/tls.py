"""TLS as a layer of a stream, without I/O, and the contexts for both ends."""

import ssl
from typing import Final

from workers.socks.wire import ProtocolError

READ_SIZE: Final = 65536


class TlsError(Exception):
    """Say in one sentence why a certificate or key cannot be used."""


class Tls:
    """One end of a TLS connection."""

    __slots__ = ("_incoming", "_object", "_outgoing", "_peer", "ended", "farewell", "keeps_messages", "ready")

    def __init__(self, context: ssl.SSLContext, *, server_side: bool, server_name: str | None = None) -> None:
        """`server_name` is whom a client wants to talk to: a name or an address in the certificate."""
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_name
        )
        self._peer = "a client" if server_side else "the server"
        self.ready = False
        self.ended = False
        self.keeps_messages = False
        self.farewell = b""

    def start(self) -> bytes:
        """Return the ClientHello; a server waits."""
        self._handshake()
        return self._outgoing.read()

    def receive(self, data: bytes) -> tuple[list[bytes], bytes]:
        """Take records; return what was in them, and what the handshake or an alert wants to be sent."""
        self._incoming.write(data)
        pieces: list[bytes] = []
        try:
            if not self.ready:
                self._object.do_handshake()
                self.ready = True
            while piece := self._object.read(READ_SIZE):
                pieces.append(piece)
            self.ended = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.ended = True
        except ssl.SSLError as error:
            self.farewell = self._outgoing.read()
            raise self._failure(error) from None
        return pieces, self._outgoing.read()

    def send(self, data: bytes) -> bytes:
        """Return records with `data` in them."""
        view = memoryview(data)
        while view:
            view = view[self._object.write(view) :]
        return self._outgoing.read()

    def finish(self) -> bytes:
        """Return the close_notify alert."""
        try:
            self._object.unwrap()
        except ssl.SSLError:
            pass  # the other side's is still to come
        return self._outgoing.read()

    def _handshake(self) -> None:
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            pass

    def _failure(self, error: ssl.SSLError) -> ProtocolError:
        if isinstance(error, ssl.SSLCertVerificationError):
            return ProtocolError("tls-certificate", f"TLS: the certificate is refused: {error.verify_message}")
        reason = (error.reason or str(error)).lower().replace("_", " ")
        return ProtocolError("tls-failed", f"TLS with {self._peer} failed: {reason}")


class ServerTls:
    """What TLS is answered with."""

    __slots__ = ("_context",)

    def __init__(self, certificate: str, key: str | None = None, client_ca: str | None = None) -> None:
        """Take PEM files; with `client_ca`, clients must have a certificate of it. Raises TlsError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _load(context, certificate, key)
        if client_ca:
            context.verify_mode = ssl.CERT_REQUIRED
            _load_ca(context, client_ca)
        self._context = context

    def serve(self) -> Tls:
        """Return the layer for one client."""
        return Tls(self._context, server_side=True)


class ClientTls:
    """How a server's certificate is judged, and what is shown to it."""

    __slots__ = ("_context", "_server_name")

    def __init__(
        self,
        *,
        ca: str | None = None,
        server_name: str | None = None,
        certificate: str | None = None,
        key: str | None = None,
        insecure: bool = False,
    ) -> None:
        """Trust `ca` (PEM), or what the system trusts. `insecure` takes any certificate. Raises TlsError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif ca:
            _load_ca(context, ca)
        else:
            context.load_default_certs()
        if certificate:
            _load(context, certificate, key)
        self._context = context
        self._server_name = server_name

    def connect(self, host: str) -> Tls:
        """Return the layer for a connection to `host`."""
        return Tls(self._context, server_side=False, server_name=self._server_name or host)


def _load(context: ssl.SSLContext, certificate: str, key: str | None) -> None:
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        raise TlsError(f"certificate {certificate}{f' and key {key}' if key else ''}: {_reason(error)}") from None


def _load_ca(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(path)
    except (OSError, ValueError) as error:
        raise TlsError(f"CA certificates {path}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "it holds no PEM").replace("_", " ").lower().replace("pem", "PEM")
    return (isinstance(error, OSError) and error.strerror) or str(error)
