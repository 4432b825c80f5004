"""The demonstration behind `make run`: the main job on embedded defaults, shown and checked, harmless to the machine.

    outer world (this process's own namespaces)             inner namespace
    ┌───────────────────────────────────────────────┐      ┌──────────────────────────┐
    │ servers.py       ringway proxy     ringway run│      │ client.py                │
    │ 203.0.113.1  ◄── 127.0.0.1:PORT ◄── workers ◄─┼─ TUN ┤ default routes → tun0    │
    │ 2001:db8::1                                   │      │ 198.18.0.1, fd72:…::1    │
    └───────────────────────────────────────────────┘      └──────────────────────────┘

Not even the outer world is the machine's own network: its addresses, which stand for the Internet, are those that the
RFCs set apart for documentation (5737, 3849).
"""

from typing import Final

WORLD4: Final = "203.0.113.1"
WORLD6: Final = "2001:db8::1"
TCP_PORT: Final = 7000
UDP_PORT: Final = 7001
DIGEST_SIZE: Final = 32  # octets; SHA-256
