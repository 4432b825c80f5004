"""CUBIC (RFC 9438): after a loss the window grows along a cubic curve, flat around the size at which the loss happened.

cwnd │            ╭─ then further, faster and faster
     │ W_max ─────╯
     │      ╭─╯     K seconds after the loss
     │     ╱
     └─────┴──────────► t
"""

from typing import Final

from workers.tcp.congestion import NewReno

C: Final = 0.4  # segments / s³; RFC 9438, 5.1
BETA: Final = 0.7  # RFC 9438, 4.6
ALPHA: Final = 3 * (1 - BETA) / (1 + BETA)  # segments a round trip, as fair as Reno; RFC 9438, 4.3


class Cubic(NewReno):
    """The congestion window of one connection, in octets; the curve's numbers are in octets too."""

    __slots__ = ("_k", "_w_est", "_w_max", "_w_prior")

    def __init__(self, smss: int) -> None:
        super().__init__(smss)
        self._w_max = 0.0  #: W_max: the window before the last loss, or less by fast convergence
        self._w_prior = 0.0  #: cwnd_prior: the window before the last loss; from there on Reno's pace is 1
        self._w_est = 0.0  #: W_est: what Reno would have
        self._k = 0.0  #: K, seconds from the beginning of the curve to W_max

    def avoid(self, octets: int, srtt: float, now: float) -> None:
        """Grow towards the curve one round trip ahead (RFC 9438, 4.2–4.5)."""
        cwnd = self.cwnd
        began_at = self.began_at
        if began_at < 0:
            began_at = self._begin(now)
        self._w_est = w_est = self._w_est + (ALPHA if self._w_est < self._w_prior else 1.0) * self.smss * octets / cwnd
        t = now - began_at + srtt - self._k
        target = C * self.smss * t * t * t + self._w_max
        if target < w_est:
            target = w_est  # the Reno-friendly region: W_est is the window itself
            octets = cwnd
        elif target > 1.5 * cwnd:
            target = 1.5 * cwnd
        if target > cwnd:
            self.cwnd = int(cwnd + (target - cwnd) * octets / cwnd)

    def _begin(self, now: float) -> float:
        """Begin the curve at the window of now."""
        self.began_at = now
        self._w_est = float(self.cwnd)
        if self.cwnd < self._w_max:
            self._k = ((self._w_max - self.cwnd) / (C * self.smss)) ** (1 / 3)
        else:
            self._k = 0.0
            self._w_max = float(self.cwnd)
        return now

    def reduce(self, window: int) -> None:
        """Set ssthresh (4.6), and W_max with fast convergence (4.7)."""
        self._w_prior = float(window)
        self._w_max = window * (1 + BETA) / 2 if window < self._w_max else float(window)
        self.ssthresh = max(int(window * BETA), 2 * self.smss)
        self.began_at = -1.0

    def state(self) -> tuple[float, ...]:
        """Return what a loss changes."""
        return self.cwnd, self.ssthresh, self._w_max, self._w_prior, self._w_est, self._k, self.began_at

    def undo(self) -> None:
        """Take the last lost() back (RFC 9438, 4.9)."""
        if self._before:
            self._w_max, self._w_prior, self._w_est, self._k, self.began_at = self._before[2:]
        super().undo()


CONTROLS: Final[dict[str, type[NewReno]]] = {"cubic": Cubic, "newreno": NewReno}  #: by the key `congestion`
