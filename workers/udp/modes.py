"""The ways in which datagrams reach a proxy: names of the key udp-mode, and of what a probe finds."""

from typing import Final

AUTO: Final = "auto"  #: the first of the others that the proxy has, in this order
UDP: Final = "udp"  #: UDP ASSOCIATE, RFC 1928
GOST: Final = "gost"  #: gost 2 and 3: command F3
GOST1: Final = "gost-v1"  #: gost 1: command 03, whose answer looks like that of RFC 1928
HEV: Final = "hev"  #: hev-socks5: command 05
UOT: Final = "uot"  #: sing-box: CONNECT to a name
NONE: Final = "none"  #: none: DNS over TCP, port unreachable for the rest
