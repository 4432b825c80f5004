"""HTTP/3 by aioquic, as a program: `python -m tests.netns.http3`, then `serve ADDRESS PORT DIRECTORY` or
`get ADDRESS PORT OCTETS`.

The server answers /N with N octets, and makes its certificate anew; the client does not look at it, prints how many
octets came and their digest.
"""

import asyncio
import datetime
import hashlib
import sys
from pathlib import Path
from typing import Any

from aioquic.asyncio import QuicConnectionProtocol, connect, serve
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, H3Event, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ProtocolNegotiated, QuicEvent
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Http3(QuicConnectionProtocol):
    """One connection, of either side."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.http: H3Connection | None = None
        self.digest = hashlib.sha256()
        self.octets = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, ProtocolNegotiated):
            self.http = H3Connection(self._quic)
        if self.http is not None:
            for each in self.http.handle_event(event):
                self.http_event_received(each)

    def http_event_received(self, event: H3Event) -> None:
        assert self.http is not None
        if isinstance(event, HeadersReceived) and not self._quic.configuration.is_client:
            size = int(dict(event.headers)[b":path"][1:])
            self.http.send_headers(event.stream_id, [(b":status", b"200")])
            self.http.send_data(event.stream_id, bytes(size), end_stream=True)
            self.transmit()
        elif isinstance(event, DataReceived) and self._quic.configuration.is_client:
            self.octets += len(event.data)
            self.digest.update(event.data)
            if event.stream_ended and not self.done.done():
                self.done.set_result(None)


def make_certificate(directory: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "target.example")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    certificate, private = directory / "certificate.pem", directory / "key.pem"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate, private


async def run_server(address: str, port: int, directory: Path) -> None:
    configuration = QuicConfiguration(is_client=False, alpn_protocols=H3_ALPN)
    configuration.load_cert_chain(*make_certificate(directory))
    await serve(address, port, configuration=configuration, create_protocol=Http3)
    print("ready", flush=True)
    await asyncio.Future()


async def get(address: str, port: int, octets: int) -> None:
    configuration = QuicConfiguration(is_client=True, alpn_protocols=H3_ALPN, server_name="target.example")
    configuration.verify_mode = 0
    async with connect(address, port, configuration=configuration, create_protocol=Http3) as protocol:
        assert isinstance(protocol, Http3)
        assert protocol.http is not None
        stream = protocol._quic.get_next_available_stream_id()
        headers = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"target.example")]
        protocol.http.send_headers(stream, [*headers, (b":path", b"/%d" % octets)], end_stream=True)
        protocol.transmit()
        await asyncio.wait_for(protocol.done, 60)
        print(protocol.octets, protocol.digest.hexdigest(), flush=True)


if __name__ == "__main__":
    what, host, number, last = sys.argv[1:]
    if what == "serve":
        asyncio.run(run_server(host, int(number), Path(last)))
    else:
        asyncio.run(get(host, int(number), int(last)))
