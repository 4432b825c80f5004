"""ControlServer: the Unix socket on which the running gateway answers questions; the client side is gateway/status.py.

A request and its answer are each a big-endian u32 length and a msgpack map of that length; a connection may ask more
than once. No client can hold anything up: nothing here blocks, requests and clients are bounded, silence is timed out.
"""

import contextlib
import errno
import logging
import os
import socket
import stat
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgpack

from gateway.loop import READ, WRITE, EventLoop
from gateway.proxyurl import ConfigError

log = logging.getLogger("ringway")

Answer = Callable[[Mapping[str, Any]], Mapping[str, Any]]

MAX_REQUEST: Final = 4096  #: octets
MAX_CLIENTS: Final = 16  #: at once; the next one is sent away
SILENCE: Final = 10.0  #: seconds without progress after which a client is sent away
MAX_PATH: Final = 107  #: octets; sun_path without its NUL
_LENGTH: Final = struct.Struct(">I")


class ControlError(ConfigError):
    """The control socket cannot be had; the text is one line with the fix."""


class AlreadyRunning(ControlError):
    """Another gateway answers on the path."""


class ControlServer:
    """Listens on a path, and answers requests by calling a function in the loop."""

    def __init__(self, loop: EventLoop, path: Path, answer: Answer) -> None:
        """Listen on `path`, readable by this user alone. Raises ControlError; `close` removes the path."""
        self.path = path
        self._loop = loop
        self._answer = answer
        self._clients: set[_Client] = set()
        self._socket, self._inode = _listen(path)
        loop.register(self._socket.fileno(), self._accept)

    def close(self) -> None:
        """Send everybody away and remove the path, unless another gateway has put its own there."""
        for client in list(self._clients):
            client.close()
        self._loop.unregister(self._socket.fileno())
        self._socket.close()
        with contextlib.suppress(OSError):
            if os.lstat(self.path).st_ino == self._inode:
                os.unlink(self.path)

    def close_in_child(self) -> None:
        """Close the descriptors in a forked process; the path stays."""
        self._socket.close()
        for client in self._clients:
            client.socket.close()

    def _accept(self) -> None:
        try:
            connection, _address = self._socket.accept()
        except OSError:
            return  # it went away again, or there are no descriptors: it will ask again
        if len(self._clients) >= MAX_CLIENTS:
            connection.close()
            return
        connection.setblocking(False)
        self._clients.add(_Client(self._loop, connection, self._answer, self._clients))


class _Client:
    """One connection: reads a request, writes its answer, reads the next."""

    def __init__(self, loop: EventLoop, connection: socket.socket, answer: Answer, clients: "set[_Client]") -> None:
        self.socket = connection
        self._loop = loop
        self._answer = answer
        self._clients = clients
        self._incoming = bytearray()
        self._outgoing = memoryview(b"")
        loop.register(connection.fileno(), self._read)
        self._timer = loop.call_later(SILENCE, self.close)

    def close(self) -> None:
        self._timer.cancel()
        self._loop.unregister(self.socket.fileno())
        self.socket.close()
        self._clients.discard(self)

    def _read(self) -> None:
        try:
            data = self.socket.recv(MAX_REQUEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._incoming += data
        self._next_request()

    def _next_request(self) -> None:
        if len(self._incoming) < _LENGTH.size:
            return
        (length,) = _LENGTH.unpack_from(self._incoming)
        if length > MAX_REQUEST:
            self.close()
            return
        end = _LENGTH.size + length
        if len(self._incoming) < end:
            return
        request = bytes(self._incoming[_LENGTH.size : end])
        del self._incoming[:end]
        body = msgpack.packb(self._answer_to(request))
        self._outgoing = memoryview(_LENGTH.pack(len(body)) + body)
        self._renew()
        self._loop.modify(self.socket.fileno(), self._write, WRITE)
        self._write()

    def _answer_to(self, request: bytes) -> Mapping[str, Any]:
        try:
            parsed = msgpack.unpackb(request)
        except (ValueError, msgpack.UnpackException):
            return {"error": "the request is not msgpack"}
        if not isinstance(parsed, dict):
            return {"error": "the request is not a map"}
        try:
            return self._answer(parsed)
        except Exception as error:
            # A question must never end the service; this one is a bug.
            log.exception("cannot answer on the control socket")
            return {"error": f"internal error: {type(error).__name__}"}

    def _write(self) -> None:
        try:
            sent = self.socket.send(self._outgoing)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self._outgoing = self._outgoing[sent:]
        self._renew()
        if not self._outgoing:
            self._loop.modify(self.socket.fileno(), self._read, READ)
            self._next_request()

    def _renew(self) -> None:
        self._timer.cancel()
        self._timer = self._loop.call_later(SILENCE, self.close)


def _listen(path: Path) -> tuple[socket.socket, int]:
    if len(os.fsencode(path)) > MAX_PATH:
        raise ControlError(f"the control socket's path has {len(os.fsencode(path))} octets, {MAX_PATH} are allowed")
    _make_directory(path.parent)
    _remove_stale(path)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # The mode of the inode is the socket's at the time of bind: there is no moment when others may connect.
        os.fchmod(server.fileno(), 0o600)
        server.bind(os.fspath(path))
        os.chmod(path, 0o600)
        inode = os.lstat(path).st_ino
        server.listen(MAX_CLIENTS)
    except OSError as error:
        server.close()
        raise ControlError(f"cannot make the control socket {path}: {error.strerror} (control)") from None
    return server, inode


def _make_directory(directory: Path) -> None:
    """Make the directory: everybody may look for root's gateways, nobody for those of a user."""
    try:
        os.mkdir(directory, 0o755 if os.geteuid() == 0 else 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise ControlError(f"cannot make the directory {directory} of the control socket: {error.strerror}") from None
    # In /tmp anybody could have made it first, to put a socket of his own there.
    owner = os.stat(directory).st_uid
    if os.geteuid() != 0 and owner not in (0, os.geteuid()):
        raise ControlError(
            f"the directory {directory} of the control socket belongs to uid {owner}: name another (control)"
        )


def _remove_stale(path: Path) -> None:
    """Remove the socket of a gateway that was killed; one that answers is another gateway."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ControlError(f"cannot look at the control socket {path}: {error.strerror}") from None
    if not stat.S_ISSOCK(mode):
        raise ControlError(f"{path} exists and is no socket: remove it, or name another (control)")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        result = probe.connect_ex(os.fspath(path))
    if result in (0, errno.EAGAIN):
        raise AlreadyRunning(f"already running: a gateway answers on {path}; stop it, or name another socket (control)")
    if result not in (errno.ECONNREFUSED, errno.ENOENT):
        raise ControlError(f"cannot ask who is on the control socket {path}: {os.strerror(result)}")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
