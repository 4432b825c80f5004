"""Segments that a stranger forges for one connection, such as the RFCs say must not hurt.

This one knows where in its streams the connection is; stranger.py tries what the guesses of one are worth who does not.
"""

from __future__ import annotations

from tests.simulation.gateway import Gateway
from tests.simulation.world import FORGED, MASK, Packet
from workers.tcp.segment import ACK, FIN, RST, SYN
from workers.tcp.states import SYN_RECEIVED

FORGING_SECONDS = 60.0  #: so long strangers are about


def forge(gateway: Gateway) -> None:
    """Let a segment arrive that a stranger made, one that the RFCs say must not hurt; and again later."""
    conn = gateway.conn
    world = gateway.world
    dice = world.dice
    if gateway.ended or world.now - world.start > FORGING_SECONDS:
        return
    world.at(world.now + dice.random(), forge, gateway)
    if conn is None or conn.state <= SYN_RECEIVED:
        return
    rcv, snd = conn.rcv, conn.snd
    wnd = rcv.wnd
    outside = (rcv.nxt + wnd + 1 + dice.randrange((1 << 31) - wnd)) & MASK
    inside = (rcv.nxt + dice.randrange(1, max(wnd, 2))) & MASK
    acceptable = (snd.una + dice.randrange(((snd.nxt - snd.una) & MASK) + 1)) & MASK
    too_new = (snd.nxt + 1 + dice.randrange(1 << 31)) & MASK
    too_old = (snd.una - snd.max_wnd - 1 - dice.randrange(1 << 20)) & MASK
    ts = ((conn.ts_recent + dice.randrange(5)) & MASK, 0) if conn.timestamps else None
    stale = ((conn.ts_recent - 1 - dice.randrange(1 << 30)) & MASK, 0) if conn.timestamps else None
    length = dice.choice((0, 1, 1460, 60_000))
    forged = [
        Packet(RST, outside, 0, 0, ts=ts),
        Packet(RST | ACK, inside, acceptable, 0, ts=ts),  # the challenge: RFC 5961, 3.2
        Packet(SYN, dice.choice((inside, outside)), 0, 60_000, ts=ts, mss=1),
        Packet(SYN | ACK, inside, acceptable, 0, ts=ts),
        Packet(ACK | FIN, outside, acceptable, 0, 0, length, ts),
        Packet(ACK | FIN, inside, too_new, 0, 0, length, ts),
        Packet(ACK, inside, too_old, 0, 0, length, ts),
        Packet(FIN, inside, 0, 0, 0, length, ts),  # without ACK
    ]
    if conn.timestamps:
        forged.append(Packet(ACK | FIN, rcv.nxt, acceptable, 0, 0, length, stale))
        forged.append(Packet(ACK | FIN, rcv.nxt, acceptable, 0, 0, length, None))
    packet = dice.choice(forged)
    if world.tell is not None:
        world.tell(f"{world.now - world.start:12.6f} forged {gateway.link.describe(packet)}")
    before = gateway.received, gateway.remote_closed
    gateway.arrives(packet, FORGED)
    assert before == (gateway.received, gateway.remote_closed), "a stranger's text was taken"
