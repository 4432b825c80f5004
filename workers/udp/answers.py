"""Answers: datagrams from the upstream sockets, which become packets to the device.

When many wait, they are received back to back into one large frame, as long as they have one source and one length (a
shorter one may be last), and leave as one super-frame (USO):

    frame + START                 tail - 10                        (SOCKS header of 10 octets, IPv4)
    ├ SOCKS header ┬ payload 1 ───┬──────────┐
                                  ├ SOCKS hd ┴ payload 2 ───┬──────────┐
                                                            ├ SOCKS hd ┴ …

The SOCKS header of answer 2 is received over the end of payload 1, which has been saved and is put back.

A socket whose answers come in trains is asked to join them (UDP_GRO): then one system call brings up to 64. It costs
0.45 µs more for an answer that comes alone, so it is given up where nothing is ever joined.
"""

from __future__ import annotations

import socket
from struct import Struct
from typing import TYPE_CHECKING, Final

from ipc.layout import FRAME_SIZE
from workers import counts
from workers.udp.packets import START, Packets
from workers.wire.udp import MAX_PACKET, DatagramHeaders

if TYPE_CHECKING:
    from workers.udp.association import Association
    from workers.worker import Worker

MAX_SEGMENTS: Final = 64  #: of one super-frame: UDP_MAX_SEGMENTS, linux/udp.h before 6.9
FAIR_SHARE: Final = 64  #: answers of one socket in one event; the others are not kept waiting by it
LONGEST_QUIET: Final = 8  #: a second look that finds nothing costs 0.7 µs, so at most every eighth event has one
MSG_TRUNC: Final = socket.MSG_TRUNC  # the real length is returned, also of what did not fit
MAX_JOINED: Final = MAX_PACKET - 48  #: octets of payload in one super-frame

GRO_TRAIN: Final = 16  #: answers in one event that make a train
GRO_TRAINS: Final = 8  #: trains after which joining is tried
GRO_PATIENCE: Final = 256  #: answers in a row that came alone, after which it is given up
GRO_PAUSE: Final = 60.0  #: seconds until it is tried again, on whatever socket
GRO_ANCILLARY: Final = socket.CMSG_SPACE(4)  #: octets; an int with the length of each answer
_INT: Final = Struct("=i")


class Answers(Packets):
    """The way down of one worker's UDP."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self._into = [memoryview(self._scratch)]
        self._gro_again_at = 0.0  # it was of no use before, so nobody tries it until then

    # ── through a proxy ─────────────────────────────────────────────────────────────────────────────────────────

    def from_relay(self, association: Association, mask: int, now: float) -> None:
        """Take answers that the proxy's relay sent, each behind a SOCKS header."""
        if association.busy:
            self._many_from_relay(association, now)
            return
        scratch = self._scratch
        try:
            received = association.receive(scratch, 0, MSG_TRUNC)
        except OSError as error:
            self._failed(association, error)
            return
        behind = association.socks_header
        headers = association.sources.get(scratch[:behind])
        if headers is None:
            found = self.new_source(association, scratch[: min(received, 300)])
            if found is None:
                return
            headers, behind = found
        size = received - behind
        association.active_at = now
        self.send_one(headers, behind, size)
        if association.quiet:
            association.quiet -= 1
        else:
            self._many_from_relay(association, now)

    def _many_from_relay(self, association: Association, now: float) -> None:
        """Take all answers that wait, as few packets as possible."""
        try:
            frame = self._port.large.take()
        except IndexError:
            association.busy = False  # small frames may be left
            return
        tx = self._tx
        view = self._tx_view
        behind = association.socks_header
        start = frame + START
        frame_end = frame + FRAME_SIZE
        # The run: answers of one source and size, whose payloads stand from `first` to `tail`.
        headers: DatagramHeaders | None = None
        key: object = None
        first = tail = size = segments = 0
        answers = 0
        at = start
        saved = b""
        while answers < FAIR_SHARE:
            try:
                received = association.receive(view[at:frame_end], 0, MSG_TRUNC)
            except BlockingIOError:
                break
            except OSError as error:
                self._failed(association, error)
                break
            answers += 1
            payload = received - behind
            socks = tx[at : at + behind]
            if socks == key and 0 < payload <= size and segments < MAX_SEGMENTS:
                total = tail - first + payload
                if total <= MAX_PACKET - 48 and at + received <= frame_end:
                    tx[at:tail] = saved
                    tail += payload
                    segments += 1
                    if payload == size and frame_end - tail > self._mtu:
                        at = tail - behind
                        saved = tx[at:tail]
                        continue
                    frame = self.send_run(headers, frame, first, tail, size, segments)
                    headers = key = None
                    if frame < 0:
                        break
                    at = start = frame + START
                    frame_end = frame + FRAME_SIZE
                    saved = b""
                    continue
            # It begins a run of its own: what has come is moved to the frame's beginning, after the old run has left.
            if headers is not None:
                came = tx[at : min(at + received, frame_end)]
                tx[at:tail] = saved
                frame = self.send_run(headers, frame, first, tail, size, segments)
                headers = key = None
                if frame < 0:
                    self._count[counts.NO_FRAMES] += 1
                    break
                at = start = frame + START
                frame_end = frame + FRAME_SIZE
                tx[at : at + len(came)] = came
            saved = b""
            begin = at + behind
            headers = association.sources.get(socks)
            if headers is None:
                found = self.new_source(association, tx[at : at + min(received, 300)])
                if found is None:
                    continue
                headers, length = found
                begin = at + length
                payload = received - length
            if not 0 <= payload <= headers.max_payload:
                fits = payload > 0 and self._fits(headers, payload, begin + payload <= frame_end)
                if payload < 0:
                    self._count[counts.UDP_DROPPED_BAD_HEADER] += 1
                elif fits:
                    frame = self.send_fragments(headers, frame, begin, begin + payload)
                    if frame < 0:
                        break
                    at = start = frame + START
                    frame_end = frame + FRAME_SIZE
                headers = None
                continue
            key = headers.key
            first, size, segments = begin, payload, 1
            tail = begin + payload
            at = tail - behind
            saved = tx[at:tail]
        else:
            answers += 1  # there are more: stay busy
        if frame >= 0:
            if headers is not None:
                if saved:
                    tx[at:tail] = saved
                frame = self.send_run(headers, frame, first, tail, size, segments)
            if frame >= 0:
                self._port.large.give(frame)
        self._note(association, answers, now)

    # ── direct:// ───────────────────────────────────────────────────────────────────────────────────────────────

    def from_anyone(self, association: Association, mask: int, now: float) -> None:
        """Take answers from wherever they come: the socket is not connected (full cone)."""
        if association.busy:
            self._many_from_anyone(association, now)
            return
        try:
            size, source = association.receive_from(self._scratch, 0, MSG_TRUNC)
        except OSError as error:
            self._failed(association, error)
            return
        headers = association.sources.get(source) or self.new_direct_source(association, source)
        if headers is None:
            return
        association.active_at = now
        self.send_one(headers, 0, size)
        if association.quiet:
            association.quiet -= 1
        else:
            self._many_from_anyone(association, now)

    def _many_from_anyone(self, association: Association, now: float) -> None:
        """Take all answers that wait, as few packets as possible; without SOCKS headers nothing is in the way."""
        try:
            frame = self._port.large.take()
        except IndexError:
            association.busy = False
            return
        tx = self._tx
        view = self._tx_view
        first = tail = at = frame + START
        frame_end = frame + FRAME_SIZE
        headers: DatagramHeaders | None = None
        key: object = None
        size = segments = answers = 0
        while answers < FAIR_SHARE:
            try:
                received, source = association.receive_from(view[at:frame_end], 0, MSG_TRUNC)
            except BlockingIOError:
                break
            except OSError as error:
                self._failed(association, error)
                break
            answers += 1
            if source == key and 0 < received <= size and segments < MAX_SEGMENTS:
                total = tail - first + received
                if total <= MAX_PACKET - 48 and at + received <= frame_end:
                    at = tail = at + received
                    segments += 1
                    if received == size and frame_end - tail > self._mtu:
                        continue
                    frame = self.send_run(headers, frame, first, tail, size, segments)
                    headers = key = None
                    if frame < 0:
                        break
                    first = tail = at = frame + START
                    frame_end = frame + FRAME_SIZE
                    continue
            if headers is not None:
                came = tx[at : min(at + received, frame_end)]
                frame = self.send_run(headers, frame, first, tail, size, segments)
                headers = key = None
                if frame < 0:
                    self._count[counts.NO_FRAMES] += 1
                    break
                at = frame + START
                frame_end = frame + FRAME_SIZE
                tx[at : at + len(came)] = came
            headers = association.sources.get(source) or self.new_direct_source(association, source)
            if headers is None:
                key = None
                continue
            if received > headers.max_payload:
                if self._fits(headers, received, at + received <= frame_end):
                    frame = self.send_fragments(headers, frame, at, at + received)
                    if frame < 0:
                        break
                    at = frame + START
                    frame_end = frame + FRAME_SIZE
                headers = key = None
                continue
            key = source
            first, size, segments = at, received, 1
            at = tail = first + received
        else:
            answers += 1
        if frame >= 0:
            if headers is not None:
                frame = self.send_run(headers, frame, first, tail, size, segments)
            if frame >= 0:
                self._port.large.give(frame)
        self._note(association, answers, now)

    # ── UDP_GRO ─────────────────────────────────────────────────────────────────────────────────────────────────

    def coalesced(self, association: Association, mask: int, now: float) -> None:
        """Take answers of a socket whose kernel joins those of one length, as they came from a network card or GSO.

        What is joined leaves as one super-frame; the SOCKS headers in between are left out while it is copied.
        """
        answers = 0
        while answers < FAIR_SHARE:
            try:
                received, ancillary, _, source = association.receive_message(self._into, GRO_ANCILLARY)
            except BlockingIOError:
                break
            except OSError as error:
                self._failed(association, error)
                break
            size = _INT.unpack(ancillary[0][2])[0] if ancillary else received
            if size >= received:
                answers += 1
                association.alone += 1
                self._send_cut(association, source, 0, received)
                continue
            association.alone = 0
            answers += -(-received // size)
            if not self._send_joined(association, source, received, size):
                for begin in range(0, received, size):
                    self._send_cut(association, source, begin, min(begin + size, received))
        if answers:
            association.active_at = now
        if association.alone >= GRO_PATIENCE:
            self._gro_again_at = now + GRO_PAUSE
            association.coalesce(False, self.from_relay if association.is_connected else self.from_anyone)

    def _send_joined(self, association: Association, source: tuple[str, int], received: int, size: int) -> bool:
        """Send answers of `size` octets, the last one perhaps shorter, as one super-frame; False: they are no such."""
        scratch = self._scratch
        behind = association.socks_header if association.is_connected else 0
        key = scratch[:behind] if association.is_connected else source
        headers = association.sources.get(key)
        number = -(-received // size)
        payload = size - behind
        total = received - number * behind
        if headers is None or not 0 < payload <= headers.max_payload or number > MAX_SEGMENTS or total > MAX_JOINED:
            return False
        # All have one source: each octet of their headers is the same in all of them.
        for at in range(behind):
            if scratch[at:received:size] != scratch[at : at + 1] * number:
                return False
        try:
            frame = self._port.large.take()
        except IndexError:
            self._count[counts.NO_FRAMES] += 1
            return True
        first = frame + START
        if behind:
            came = self._into[0]
            joined = b"".join([came[at + behind : min(at + size, received)] for at in range(0, received, size)])
        else:
            joined = scratch[:received]
        self._tx[first : first + total] = joined
        frame = self.send_run(headers, frame, first, first + total, payload, number)
        if frame >= 0:
            self._port.large.give(frame)
        return True

    def _send_cut(self, association: Association, source: tuple[str, int], begin: int, end: int) -> None:
        """Send one answer out of the scratch memory."""
        headers: DatagramHeaders | None
        if not association.is_connected:
            headers = association.sources.get(source) or self.new_direct_source(association, source)
            behind = 0
        else:
            behind = association.socks_header
            headers = association.sources.get(self._scratch[begin : begin + behind])
            if headers is None:
                found = self.new_source(association, self._scratch[begin : min(end, begin + 300)])
                headers, behind = found or (None, 0)
        if headers is not None:
            self.send_one(headers, begin + behind, end - begin - behind)

    # ── for all ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _note(self, association: Association, answers: int, now: float) -> None:
        """Decide whether the next event deserves a second look."""
        if answers:
            association.active_at = now
        if answers > 1 or (answers and not association.busy):
            association.busy = True
            association.quiet = 0
            association.quiet_next = 1
            if answers >= GRO_TRAIN:
                association.trains += 1
                if association.trains >= GRO_TRAINS and association.may_coalesce and now >= self._gro_again_at:
                    association.coalesce(True, self.coalesced)
        else:
            association.busy = False
            association.quiet = association.quiet_next
            association.quiet_next = min(2 * association.quiet_next, LONGEST_QUIET)

    def _failed(self, association: Association, error: OSError) -> None:
        """Take an error that the socket reports; anything but "nothing there" is about a datagram that we sent."""
        if not isinstance(error, BlockingIOError):
            self._count[counts.UDP_DROPPED_SOCKET] += 1
