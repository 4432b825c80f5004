"""The ways in which datagrams reach a proxy: names of the key udp-mode, and of what a probe finds."""

from typing import Final

from workers.socks.framing import GOST_UDP, HEV_UDP, UOT2_NAME, Framing, GostFraming, HevFraming, Uot2Framing
from workers.socks.wire import CONNECT, UDP_ASSOCIATE

AUTO: Final = "auto"  #: the first of the others that the proxy has, in this order
UDP: Final = "udp"  #: UDP ASSOCIATE, RFC 1928
GOST: Final = "gost"  #: gost 2 and 3: command F3
GOST1: Final = "gost-v1"  #: gost 1: command 03, whose answer looks like that of RFC 1928
HEV: Final = "hev"  #: hev-socks5: command 05
UOT: Final = "uot"  #: sing-box: CONNECT to a name
NONE: Final = "none"  #: none: DNS over TCP, port unreachable for the rest

#: those that travel inside TCP, in the order in which they are tried
DIALECTS: Final = (GOST, HEV, UOT, GOST1)
#: how they are asked for: command, name to CONNECT to ("": zeros), frames
REQUESTS: Final[dict[str, tuple[int, str, type[Framing]]]] = {
    GOST: (GOST_UDP, "", GostFraming),
    HEV: (HEV_UDP, "", HevFraming),
    UOT: (CONNECT, UOT2_NAME, Uot2Framing),
    GOST1: (UDP_ASSOCIATE, "", GostFraming),
}
#: scheme of a proxy → those of them that it may have: what knows no command but CONNECT, and names, has one
DIALECTS_OF: Final = {"socks5": DIALECTS, "socks5h": DIALECTS, "socks4a": (UOT,), "http": (UOT,), "https": (UOT,)}

#: for people
WORDS: Final = {
    UDP: "by UDP ASSOCIATE",
    GOST: "inside TCP as gost does it (command F3)",
    GOST1: "inside TCP as gost 1 did it (command 03)",
    HEV: "inside TCP as hev-socks5 does it (command 05)",
    UOT: "inside TCP as sing-box does it (UoT 2)",
    NONE: "not at all: DNS goes over TCP, the rest is refused",
}
