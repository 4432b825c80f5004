"""What a shared gateway's tests get: the world, the gateway in it, the targets behind it."""

from dataclasses import dataclass

from tests.netns.daemon import Ringway
from tests.netns.traffic import Target, UdpTarget
from tests.netns.world import World


@dataclass(slots=True)
class Stage:
    """A world with a gateway running in it and targets behind it."""

    world: World
    ringway: Ringway
    target: Target
    udp4: UdpTarget
    udp6: UdpTarget
    proxied: bool
    placement: str

    def udp(self, version: int) -> UdpTarget:
        return self.udp6 if version == 6 else self.udp4
