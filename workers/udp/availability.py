"""Availability: whether and how the proxy carries datagrams, remembered so that not each client socket costs a
handshake."""

from collections.abc import Callable
from math import inf
from typing import Final

from workers.icmp import ADMIN, HOST, NET, PORT
from workers.socks import modes
from workers.socks.framing import GostFraming
from workers.socks.wire import COMMAND_NOT_SUPPORTED, HOST_UNREACHABLE, NETWORK_UNREACHABLE, NOT_ALLOWED

NO_UDP_TIMEOUT: Final = 60.0  #: seconds for which a proxy without UDP is not asked again
REFUSED_TIMEOUT: Final = 5.0  #: the same after another refusal
DOWN_TIMEOUT: Final = 1.0  #: the same after it could not be reached

DOWN: Final = -1  #: in place of an ICMP code: the proxy could not be reached

_REFUSALS: Final = {NOT_ALLOWED: ADMIN, NETWORK_UNREACHABLE: NET, HOST_UNREACHABLE: HOST}


class Availability:
    """What was learned last; a code is one of workers.icmp, or DOWN."""

    __slots__ = ("_associates", "_code", "_is_auto", "_probe_timeout", "_report", "_until", "mode")

    def __init__(
        self, probe_timeout: float, mode: str, found: str, associates: bool, report: Callable[[str], None]
    ) -> None:
        """`probe_timeout`: seconds that an attempt to associate takes at most. `mode` is the key udp-mode, `found` what
        a probe has found for it. `associates`: the proxy is of a kind that can be asked for UDP ASSOCIATE. `report` is
        called with what was learned for auto: a mode, or "" when it was asked in vain and somebody may probe again.
        """
        self._probe_timeout = probe_timeout
        self._associates = associates
        self._report = report
        self._is_auto = mode == modes.AUTO
        self._until = 0.0  # until then nobody asks; 0: the proxy has UDP, or nothing is known
        self._code = DOWN
        self.mode = mode  #: how to ask: one of modes, not AUTO or NONE
        if self._is_auto:
            self.use(found)

    def use(self, found: str) -> None:
        """Take what a probe has found: a mode, or "" for nothing yet. A mode that a person chose stays."""
        if not self._is_auto:
            return
        self.mode = modes.UDP if found in ("", modes.NONE) else found
        self._until = 0.0
        if self.mode == modes.UDP and not self._associates:
            self._until = inf
            self._code = PORT

    def is_gost1(self, data: bytes) -> bool:
        """Look whether bytes on the control connection of an association are frames: gost 1 grants that, too."""
        if not self._is_auto or not GostFraming().receive(data):
            return False
        if self.mode != modes.GOST1:
            self.use(modes.GOST1)
            self._report(modes.GOST1)
        return True

    def other_gost(self, mode: str) -> bool:
        """Note that gost's server is not of this version; False: there is no other one to be tried."""
        if self.mode == modes.GOST == mode and not self._is_auto:
            self.mode = modes.GOST1
            return True
        if mode == modes.GOST1 and not self._is_auto:
            self.mode = modes.GOST
        return mode == modes.GOST and self.mode == modes.GOST1

    def refused(self, now: float) -> int | None:
        """Return what to tell a new client socket, or None if it may ask the proxy."""
        if not self._until:
            return None
        if now < self._until:
            return self._code
        # This one asks again; the others wait for what it learns.
        self._until = now + self._probe_timeout
        return None

    def has_udp(self) -> None:
        """Note that the proxy gave an association."""
        self._until = 0.0

    def no_udp(self, now: float) -> int:
        """Note that the proxy has no UDP; return what to tell the clients for a while."""
        return self._refuse(PORT, now + NO_UDP_TIMEOUT)

    def is_down(self, now: float) -> int:
        """Note that the proxy could not be reached; return what to tell the clients for a moment."""
        return self._refuse(DOWN, now + DOWN_TIMEOUT)

    def refusal(self, reply: int, now: float) -> int:
        """Note a REP code other than 0; return what to tell the clients for a while."""
        if reply == COMMAND_NOT_SUPPORTED:
            return self.no_udp(now)
        return self._refuse(_REFUSALS.get(reply, PORT), now + REFUSED_TIMEOUT)

    def _refuse(self, code: int, until: float) -> int:
        self._until = until
        self._code = code
        if self._is_auto and code != DOWN:
            self._report("")
        return code
