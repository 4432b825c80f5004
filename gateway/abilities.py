"""What the proxy can do that `auto` keys depend on: how it carries datagrams, whether it takes a pipelined handshake.

    AbilityProbe ─ fork ─► find_abilities ─ asks the proxy ─► {"udp": mode, "pipelined": bool}
         ▲                                                              │
         └──────── start, proxy back, UDP refused ◄──── workers ◄───────┘

A child asks, because that blocks; it is one question a connection, and only until one has been answered.
"""

import logging
import time
from collections.abc import Callable
from typing import Any, Final

from gateway.caller import Caller
from gateway.conversation import ProbeError
from gateway.loop import EventLoop, Timer
from gateway.process import Child, describe
from gateway.proxyurl import ProxyUrl
from ipc.channel import Channel, ChannelClosed, Message
from workers.socks import modes
from workers.socks.wire import UDP_ASSOCIATE

log = logging.getLogger("ringway")

PATIENCE: Final = 5.0  #: seconds for an answer, if the connect timeout is not less
PIPELINED_PATIENCE: Final = 2.0  #: the same for a handshake that some servers hang on
GIVE_UP: Final = 60.0  #: seconds after which the child is killed: far above what all questions may take
AT_MOST_EVERY: Final = 30.0  #: seconds between two probes because UDP was refused

#: what workers report of it
ABILITY_EVENTS: Final = ("udp-failed", "udp-found", "pipelining-failed")
DEFAULT_RESOLVER: Final = "8.8.8.8"  #: asked through a tunnel where tun-dns names none; any answer proves it

Fork = Callable[[str, Callable[[Channel], None]], Child]


class AbilityProbe:
    """Asks when told to, in a child, and reports what was found."""

    def __init__(
        self,
        loop: EventLoop,
        fork: Fork,
        find: Callable[[], dict[str, Any]],
        on_found: Callable[[str, bool], None],
    ) -> None:
        """`find` is find_abilities with its arguments, called in the child that `fork` makes.

        `on_found` gets the mode of UDP, and whether handshakes may be pipelined.
        """
        self._loop = loop
        self._fork = fork
        self._find = find
        self._on_found = on_found
        self._child: Child | None = None
        self._again = False
        self._started_at = -AT_MOST_EVERY
        self._timer: Timer | None = None
        self._udp = ""
        self._pipelined = False
        self._cannot_pipeline = False  # a worker has seen it fail

    def start(self) -> None:
        """Ask now, or once more when the answer that is on its way has come."""
        if self._child is not None:
            self._again = True
            return
        self._again = False
        self._started_at = time.monotonic()
        try:
            child = self._fork("probe", lambda channel: channel.send(self._find()))
        except OSError as error:
            log.warning("cannot ask the proxy what it can do: %s", describe(error))
            return
        self._child = child
        self._loop.register(child.pidfd, lambda: self._finish(child))
        self._timer = self._loop.call_later(GIVE_UP, child.kill)

    def learned(self, message: Message) -> None:
        """Take what a worker learned, one of ABILITY_EVENTS; it knows better than an older probe."""
        event = message["event"]
        if event == "udp-found":
            self._found(str(message["udp"]), self._pipelined)
        elif event == "pipelining-failed":
            # What takes a probe's handshake in one go may be one server of several.
            if not self._cannot_pipeline:
                log.warning("the proxy did not take a pipelined handshake; from now on it is asked step by step")
            self._cannot_pipeline = True
            self._found(self._udp, False)
        elif self._child is None and time.monotonic() - self._started_at >= AT_MOST_EVERY:
            self.start()

    def close(self) -> None:
        """End a probe that is under way."""
        if self._timer is not None:
            self._timer.cancel()
        if self._child is not None:
            child, self._child = self._child, None
            self._loop.unregister(child.pidfd)
            child.end()

    def close_in_child(self) -> None:
        """Close the descriptors of the probe in a forked process."""
        if self._child is not None:
            self._child.close()

    def _finish(self, child: Child) -> None:
        if child.reap() is None:
            return
        found: Message | None
        try:
            found = child.channel.receive()
        except (ChannelClosed, ValueError):
            found = None
        if self._timer is not None:
            self._timer.cancel()
        self._loop.unregister(child.pidfd)
        child.close()
        self._child = None
        if found and "udp" in found:
            self._found(str(found["udp"]), bool(found["pipelined"]))
        if self._again:
            self.start()

    def _found(self, udp: str, pipelined: bool) -> None:
        if udp and udp != self._udp:
            log.info("datagrams go to the proxy %s", modes.WORDS.get(udp, udp))
        self._udp = udp
        self._pipelined = pipelined and not self._cannot_pipeline
        self._on_found(self._udp, self._pipelined)


def find_abilities(
    proxy: ProxyUrl,
    addresses: list[tuple[str, int]],
    *,
    timeout: float,
    resolver: str,
    udp: bool,
    pipelined: bool,
    fwmark: int = 0,
    interface: str = "",
) -> dict[str, Any]:
    """Return {"udp": mode, "pipelined": bool} of the first address that answers; {} if none does.

    `udp` and `pipelined` say what is asked for; what is not, is "" and False.
    """
    for address in addresses:

        def caller(patience: float, address: tuple[str, int] = address) -> Caller:
            return Caller(proxy, address, min(patience, timeout), fwmark, interface)

        found = {"udp": "", "pipelined": False}
        try:
            granted = None
            if pipelined:
                granted = _asked_pipelined(caller(PIPELINED_PATIENCE))
                found["pipelined"] = granted is not None
            if udp:
                found["udp"] = _udp_mode(caller(PATIENCE), resolver, granted)
        except (OSError, ProbeError):
            continue
        return found
    return {}


def _asked_pipelined(caller: Caller) -> bool | None:
    """Ask for UDP ASSOCIATE with everything in one go (that asks nothing of the world); None: it does not work so."""
    if not caller.is_socks5:
        return None
    handshake = caller.handshake(UDP_ASSOCIATE, caller.zeros, 0, pipelined=True)
    try:
        with caller.talk() as talk:
            talk.ask(handshake, "a pipelined UDP ASSOCIATE")
    except (OSError, ProbeError):
        return None
    return handshake.reply == 0


def _udp_mode(caller: Caller, resolver: str, granted: bool | None) -> str:
    """Return how the proxy carries datagrams; OSError, ProbeError: it could not be asked at all."""
    if granted is None and caller.is_socks5:
        granted = _asked(caller)
    if granted:
        return modes.UDP
    for mode in modes.DIALECTS_OF.get(caller.proxy.scheme, ()):
        try:
            if mode != modes.GOST1 and caller.tunnel(mode, resolver)[0] == "works":
                return mode
        except (OSError, ProbeError):
            pass  # it has not got this one
    return modes.NONE


def _asked(caller: Caller) -> bool:
    """Ask for UDP ASSOCIATE step by step; some servers close instead of saying no."""
    handshake = caller.handshake(UDP_ASSOCIATE, caller.zeros, 0)
    with caller.talk() as talk:
        try:
            talk.ask(handshake, "UDP ASSOCIATE")
        except (OSError, ProbeError):
            if not handshake.requested:
                raise
    return handshake.reply == 0
