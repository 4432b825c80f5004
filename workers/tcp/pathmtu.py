"""Path MTU of one connection: what an ICMP error says that a router on the way to the peer sent (RFC 1191, RFC 8201).

Anybody can forge one, so it is believed only if it quotes a segment in flight (RFC 5927, 4.1), and segments only become
smaller by it, down to a floor that its caller knows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.tcp.sequence import MASK
from workers.tcp.states import SYN_RECEIVED

if TYPE_CHECKING:
    from workers.tcp.connection import Connection

TIMESTAMPS_OPTION = 12  # octets, padded


def is_in_flight(conn: Connection, seq: int) -> bool:
    """Say whether a quoted sequence number has been sent and is not acknowledged."""
    snd = conn.snd
    return (seq - snd.una) & MASK < (snd.nxt - snd.una) & MASK


def lower(conn: Connection, mss: int) -> bool:
    """Put no more than `mss` octets of options and text into a packet; True: that is less than it was.

    What is in flight is sent again, cut anew. It was not lost to congestion, so the congestion window stays (RFC 1191,
    6.5), as Linux does in tcp_simple_retransmit.
    """
    smss = mss - TIMESTAMPS_OPTION if conn.timestamps else mss
    if smss >= conn.smss:
        return False
    conn.smss = conn.congestion.smss = smss
    snd = conn.snd
    if conn.state != SYN_RECEIVED and snd.una != snd.nxt:
        conn.needs_recovery().send_all_again(conn)
    return True
