"""Associations: those of one worker by client socket, bounded, and a few that stand ready for the next one.

    warm ── take ──► table ── idle, lost, evicted ──► gone
      ▲                │ (udp-mapping address-port: one for each flow)
      └── fill ◄───────┘ UDP ASSOCIATE costs three round trips, which the next client socket does not wait for

Nothing is kept warm before a first client socket has shown that there is UDP at all, and that the proxy has it. What
stands ready costs the worker and the proxy one connection and one socket each, and, if nobody takes it, one handshake
per udp-timeout.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final

from workers import counts
from workers.socks import modes
from workers.udp.association import READY, Association, Receiver, Undelivered
from workers.udp.tunnel import Tunnel

if TYPE_CHECKING:
    from workers.udp.datagrams import Udp

EVICTION_LOOKS: Final = 16  #: associations looked at to find one that was not used lately
WARM_RETRY: Final = 5.0  #: seconds after the loss of a warm association before another one is made


class Associations:
    """The table, the least recently used first (nearly), and the warm ones."""

    def __init__(self, udp: Udp) -> None:
        settings = udp.worker.settings
        self._udp = udp
        self._count = udp.worker.count
        self._most = settings.max_associations
        self._direct = udp.worker.upstream.direct
        self._warm_size = 0 if self._direct else settings.udp_warm
        self._warm: dict[Association, str] = {}  # and by which mode each was asked for
        self._retry_armed = False
        self.table: dict[bytes, Association] = {}

    def open(
        self,
        key: bytes,
        client: bytes,
        now: float,
        receiver: Receiver | None = None,
        undelivered: Undelivered | None = None,
    ) -> Association:
        """Put a new association into the table; OSError when it cannot even begin (nothing is left then).

        `receiver` and `undelivered` take its answers, and what waited for a proxy that then said no.
        """
        if len(self.table) >= self._most:
            self._evict(now)
        association = self._take_warm()
        if association is not None:
            association.adopt(key, client, now, receiver, undelivered)
        else:
            association = self._kind()(self._udp, key, client, now, receiver, undelivered)
            try:
                if self._direct:
                    association.open_direct(now)
                else:
                    association.associate()
            except OSError:
                association.close()
                raise
        self.table[key] = association
        self._count[counts.UDP_ASSOCIATIONS] = len(self.table)
        return association

    def remove(self, association: Association, now: float) -> None:
        """Forget an association that ends."""
        if self.table.get(association.key) is association:
            del self.table[association.key]
            self._count[counts.UDP_ASSOCIATIONS] = len(self.table)
        elif association in self._warm:
            del self._warm[association]
            self._arm(now + WARM_RETRY)

    def _evict(self, now: float) -> None:
        """End the association that was not used for the longest time, of the first few in the table.

        A flood of client sockets so ends what is idle, and itself: what is used again before the flood has filled the
        table once, stays. Refusing the new ones would lock out everybody for as long as the flood's live.
        """
        looked_at = list(islice(self.table.items(), EVICTION_LOOKS))
        victim = min((association for _, association in looked_at), key=lambda association: association.active_at)
        for key, association in looked_at:
            if association is not victim and association.active_at > association.queued_at:
                association.queued_at = association.active_at
                self.table[key] = self.table.pop(key)
        self._udp.remove(victim, now)
        victim.close()
        self._count[counts.UDP_EVICTED] += 1

    # ── warm ones ───────────────────────────────────────────────────────────────────────────────────────────────

    def fill(self, now: float) -> None:
        """Begin as many associations as are to stand ready."""
        while len(self._warm) < self._warm_size:
            association = self._kind()(self._udp, b"", b"", now)
            association.only_dns = False  # so that it is renewed once per udp-timeout
            try:
                association.associate()
            except OSError:
                association.close()
                return
            self._warm[association] = self._udp.availability.mode

    def _kind(self) -> type[Association]:
        """Return what the proxy is known to have."""
        return Association if self._direct or self._udp.availability.mode == modes.UDP else Tunnel

    def _take_warm(self) -> Association | None:
        for association, mode in list(self._warm.items()):
            if mode != self._udp.availability.mode:  # a probe has found another way since
                del self._warm[association]
                association.close()
                self._arm(0.0)
            elif association.state == READY:
                del self._warm[association]
                self._count[counts.UDP_WARM_TAKEN] += 1
                # Another one takes its place after this one's first datagram has left.
                self._arm(0.0)
                return association
        return None

    def _arm(self, when: float) -> None:
        if not self._retry_armed:
            self._retry_armed = True
            self._udp.worker.timers.call_at(when, self._fill_again)

    def _fill_again(self, now: float) -> None:
        """Make what is missing, unless the proxy just said that it cannot be asked."""
        self._retry_armed = False
        if len(self._warm) >= self._warm_size:
            return
        if self._udp.availability.refused(now) is None:
            self.fill(now)
        else:
            self._arm(now + WARM_RETRY)

    def stop(self) -> None:
        """Close all; clients notice nothing, as with any router."""
        self._warm_size = 0
        for association in self._warm:
            association.close()
        self._warm.clear()
        for association in list(self.table.values()):
            association.close()
        self.table.clear()
        self._count[counts.UDP_ASSOCIATIONS] = 0
