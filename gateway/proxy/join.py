"""Two streams joined: what comes from one goes to the other, both ways, until both have ended.

Two plain ones become a relay of sockets (relay.py), which moves bytes without looking at them; if one is carried inside
something else, a `Joined` stands on each side, and reads no more than the other side takes.
"""

from typing import TYPE_CHECKING, Final

from gateway.proxy.relay import relay
from gateway.proxy.stream import Layered, Owner, Stream

if TYPE_CHECKING:
    from gateway.proxy.server import Server

MAX_WAITING: Final = 65536  # bytes that may wait on one side before the other is not read any more


class Joined(Owner):
    """Owner of one of two streams: what it receives goes to the other."""

    __slots__ = ("_ended", "_mine", "_other", "_theirs")

    def __init__(self, mine: Layered, theirs: Layered) -> None:
        self._mine = mine
        self._theirs = theirs
        self._ended = False
        self._other: Joined | None = None

    def received(self, data: bytes) -> None:
        self._theirs.write(data)
        if self._theirs.backlog > MAX_WAITING:
            self._mine.hold()

    def drained(self) -> None:
        self._theirs.go_on()
        self._close_if_over()

    def ended(self) -> None:
        self._ended = True
        self._theirs.finish()
        self._close_if_over()

    def lost(self, number: int) -> None:
        self._theirs.abort()

    def _close_if_over(self) -> None:
        other = self._other
        if self._ended and other and other._ended and not (self._mine.backlog or self._theirs.backlog):
            self._mine.close()
            self._theirs.close()


def join(server: "Server", client: Layered, target: Layered, early: bytes, surplus: bytes = b"") -> None:
    """Join two streams; `early` has come from the client already, `surplus` from the target."""
    if surplus:
        client.write(surplus)
    if isinstance(client, Stream) and isinstance(target, Stream) and client.is_plain and target.is_plain:
        relay(server, client.sock, target.sock, early, client.interest)
        return
    left = Joined(client, target)
    right = Joined(target, client)
    left._other = right
    right._other = left
    client.owner = left
    target.owner = right
    if early:
        target.write(early)
    client.go_on()
    target.go_on()
    for mine in (left, right):
        if mine._mine.has_ended:
            mine.ended()
