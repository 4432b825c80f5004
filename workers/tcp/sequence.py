"""Sequence numbers: arithmetic modulo 2**32 (RFC 9293, 3.4).

Compare distances, not orders: `(b - a) & MASK` is how far b stands after a; below HALF it is at or after a.
"""

from typing import Final

MASK: Final = 0xFFFFFFFF
HALF: Final = 0x80000000
