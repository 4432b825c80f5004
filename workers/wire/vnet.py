"""The virtio_net_hdr that stands in front of each frame (linux/virtio_net.h), 10 octets, little-endian.

| octets | field       | says                                                                     |
| ------ | ----------- | ------------------------------------------------------------------------ |
| 0      | flags       | NEEDS_CSUM: the checksum field holds the pseudo-header's sum only         |
| 1      | gso_type    | what the payload must be cut into, NONE for an ordinary packet           |
| 2–3    | hdr_len     | a hint; from the forward path it is wrong, so nobody reads it            |
| 4–5    | gso_size    | payload octets of each piece                                             |
| 6–7    | csum_start  | where the checksum begins, counted from the IP header                    |
| 8–9    | csum_offset | where its field stands, counted from csum_start                          |
"""

from struct import Struct
from typing import Final

HEADER: Final = Struct("<BBHHHH")  #: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
SIZE: Final = 10

NEEDS_CSUM: Final = 1
DATA_VALID: Final = 2
TRUSTED: Final = NEEDS_CSUM | DATA_VALID  #: without one of these the frame came from a wire: verify

GSO_NONE: Final = 0
GSO_TCPV4: Final = 1
GSO_TCPV6: Final = 4
GSO_UDP_L4: Final = 5
GSO_ECN: Final = 0x80
