"""The shape of shared memory: every offset, size and count that two processes must agree on stands here.

    RX mapping (one)             TX mapping (one per worker)               ring mapping (one)
    ┌────────┬────────┬──        ┌────────┬──   ──┬───────┬───────┬──      ┌────────────────────────────┐
    │ frame 0│ frame 1│ …        │ large 0│ …     │ small 0│ small 1│ …    │ worker 0: rx fill tx compl. │
    └────────┴────────┴──        └────────┴──   ──┴───────┴───────┴──      │ worker 1: …                 │
     FRAME_SIZE each              FRAME_SIZE each   SMALL_SIZE each        └────────────────────────────┘

A ring holds descriptors, one u64 each: where a piece of a packet stands in the mapping, how long it is, and whether
the packet goes on in the next descriptor. The model is AF_XDP's (`UMEM`, `struct xdp_desc`, `XDP_PKT_CONTD`).
"""

from typing import Final

VERSION: Final = 1  #: of this layout; status shows it

# A frame takes one read of the device: a virtio_net_hdr (10 octets), an IP packet (up to 65,535), and headroom.
FRAME_SIZE: Final = 68 * 1024  #: octets; whole pages, so that an untouched tail costs nothing
SMALL_SIZE: Final = 2048  #: octets; ACKs, control segments, small answers
HEADROOM: Final = (
    128  #: octets before the payload in a TX frame: virtio_net_hdr 10 + IPv6 40 + TCP 20 + options 40, rounded
)
LARGE_PAYLOAD: Final = FRAME_SIZE - HEADROOM
SMALL_PAYLOAD: Final = SMALL_SIZE - HEADROOM

RX_FRAMES: Final = 256  #: in the common pool of the reader
TX_LARGE: Final = 128  #: per worker
TX_SMALL: Final = 1024  #: per worker
TX_SMALL_BASE: Final = TX_LARGE * FRAME_SIZE  #: where the small frames of a TX mapping begin

# A ring is never full: it has a slot for every descriptor that its pools can have in flight.
# tx: each small frame once, and up to TX_GATHER slices of large frames behind the headers in a small one.
TX_GATHER: Final = 2
RX_SLOTS: Final = 256
TX_SLOTS: Final = 4096
assert RX_SLOTS >= RX_FRAMES
assert TX_SLOTS >= TX_LARGE + TX_SMALL * (1 + TX_GATHER)

RINGS: Final = ("rx", "fill", "tx", "completion")
RING_SLOTS: Final = {"rx": RX_SLOTS, "fill": RX_SLOTS, "tx": TX_SLOTS, "completion": TX_SLOTS}
CACHE_LINE: Final = 64  #: octets; the consumer's index has a line of its own in front of the slots

# Descriptor: address in bits 0–31, length in bits 32–51, "more" in bit 52.
ADDRESS_MASK: Final = (1 << 32) - 1
LENGTH_SHIFT: Final = 32
LENGTH_MASK: Final = (1 << 20) - 1
MORE: Final = 1 << 52  #: the packet goes on in the next descriptor

COUNTER_SLOTS: Final = 128  #: u64 words for each process that counts


def descriptor(address: int, length: int, more: bool = False) -> int:
    """Pack an address and a length (octets) into one descriptor; the hot path writes the same expression in line."""
    return address | length << LENGTH_SHIFT | (MORE if more else 0)


def ring_bytes(name: str) -> int:
    """Return the octets that a ring takes: its consumer's index, then its slots."""
    return CACHE_LINE + 8 * RING_SLOTS[name]
