"""Segment: the fields of one TCP segment, on its way in or out.

A worker has one object for each way and fills it again and again: nothing is allocated for a segment.
"""

from struct import Struct
from typing import Final

FIN: Final = 0x01
SYN: Final = 0x02
RST: Final = 0x04
PSH: Final = 0x08
ACK: Final = 0x10
URG: Final = 0x20

OPTION_END: Final = 0
OPTION_NOP: Final = 1
OPTION_MSS: Final = 2
OPTION_WINDOW_SCALE: Final = 3
OPTION_SACK_PERMITTED: Final = 4
OPTION_SACK: Final = 5
OPTION_TIMESTAMPS: Final = 8
MAX_WINDOW_SCALE: Final = 14  # RFC 7323, 2.3

_U16 = Struct(">H")
_TIMESTAMPS = Struct(">II")
_SACK_BLOCK = Struct(">II")
_SACK_LENGTHS: Final = frozenset({10, 18, 26, 34})  # one to four blocks


class Segment:
    """One segment; the names are RFC 9293's (`seg.seq` is SEG.SEQ)."""

    __slots__ = (
        "ack",
        "flags",
        "len",
        "mss",
        "sack",
        "sack_permitted",
        "seq",
        "text_at",
        "ts_ecr",
        "ts_present",
        "ts_val",
        "window_scale",
        "wnd",
    )

    def __init__(self) -> None:
        self.seq = 0  #: SEG.SEQ
        self.ack = 0  #: SEG.ACK, valid with the flag ACK
        self.flags = 0  #: the flags above
        self.wnd = 0  #: SEG.WND as it stands in the header, not scaled
        self.len = 0  #: octets of text; SYN and FIN are not counted here
        self.text_at = 0  #: where the text begins in the memory that came with the segment
        self.ts_present = False
        self.ts_val = 0
        self.ts_ecr = 0
        self.mss = 0  #: of a SYN; 0 = the option is absent
        self.window_scale = -1  #: of a SYN; -1 = the option is absent
        self.sack_permitted = False  #: of a SYN
        self.sack: tuple[tuple[int, int], ...] = ()  #: (left edge, right edge) of each block (RFC 2018, 3)

    def parse_options(self, options: bytes) -> None:
        """Read the options that matter (RFC 9293, 3.1; RFC 7323; RFC 2018); at a malformed one the reading ends."""
        self.ts_present = False
        self.mss = 0
        self.window_scale = -1
        self.sack_permitted = False
        self.sack = ()
        at, end = 0, len(options)
        while at < end:
            kind = options[at]
            if kind == OPTION_END:
                return
            if kind == OPTION_NOP:
                at += 1
                continue
            if at + 1 >= end:
                return
            length = options[at + 1]
            if length < 2 or at + length > end:
                return
            if kind == OPTION_TIMESTAMPS and length == 10:
                self.ts_present = True
                self.ts_val, self.ts_ecr = _TIMESTAMPS.unpack_from(options, at + 2)
            elif kind == OPTION_SACK and length in _SACK_LENGTHS:
                self.sack = tuple(_SACK_BLOCK.iter_unpack(options[at + 2 : at + length]))
            elif kind == OPTION_MSS and length == 4:
                self.mss = _U16.unpack_from(options, at + 2)[0]
            elif kind == OPTION_WINDOW_SCALE and length == 3:
                self.window_scale = min(options[at + 2], MAX_WINDOW_SCALE)
            elif kind == OPTION_SACK_PERMITTED and length == 2:
                self.sack_permitted = True
            at += length

    def __repr__(self) -> str:
        names = ((SYN, "S"), (FIN, "F"), (RST, "R"), (PSH, "P"), (ACK, "."))
        flags = "".join(letter for bit, letter in names if self.flags & bit)
        return f"<{flags} {self.seq}:{self.seq + self.len} ack {self.ack} win {self.wnd}>"
