"""A small HTTP proxy for tests: CONNECT, and absolute-form requests, one for each connection, with a password."""

import base64
import socket
import threading
from urllib.parse import urlsplit

from tests.proxy_running import PATIENCE


class HttpProxy:
    """Runs in threads; `heads` are the requests that it has seen."""

    def __init__(self, username="via", password="me"):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.heads = []
        self._authorization = "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()
        self._sockets = [self.listener]
        self._threads = []

    def __enter__(self):
        self._start(self._accept)
        return self

    def __exit__(self, *_):
        for sock in list(self._sockets):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self._threads:
            thread.join(PATIENCE)
        for sock in self._sockets:
            sock.close()

    def _start(self, call, *arguments):
        thread = threading.Thread(target=self._until_they_go, args=(call, arguments), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _until_they_go(self, call, arguments):
        try:
            call(*arguments)
        except OSError:
            pass  # somebody has closed or reset a connection

    def _accept(self):
        while True:
            client, _ = self.listener.accept()
            self._sockets.append(client)
            self._start(self._serve, client)

    def _serve(self, client):
        data = b""
        while b"\r\n\r\n" not in data:
            piece = client.recv(4096)
            if not piece:
                return
            data += piece
        head, _, rest = data.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        self.heads.append(lines)
        method, target, version = lines[0].split()
        if f"proxy-authorization: {self._authorization}".lower() not in [line.lower() for line in lines]:
            try:
                client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                client.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # who has read the first line may be gone
            return
        if method == "CONNECT":
            host, _, port = target.rpartition(":")
            server = socket.create_connection((host.strip("[]"), int(port)))
            first = rest
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            url = urlsplit(target)
            server = socket.create_connection((url.hostname, url.port))
            fields = [line for line in lines[1:] if not line.lower().startswith("proxy-")]
            path = f"{url.path}?{url.query}" if url.query else url.path
            first = "\r\n".join([f"{method} {path} {version}", *fields, "Connection: close", "", ""]).encode() + rest
        self._sockets.append(server)
        server.sendall(first)
        self._start(self._pump, client, server)
        self._start(self._pump, server, client)

    def _pump(self, source, sink):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
