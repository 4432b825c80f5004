"""A runner for scripted segment tests (tests/segments/*.pkt), in packetdrill's syntax as far as they need it.

    // comment                                    --option=value: see OPTIONS; stands before the first event
    +0.1 < S 0:0(0) win 65535 <mss 1460,nop>      0.1 s after the event before, this segment arrives
    0.3  > S. 0:0(0) ack 1 <...>                  at 0.3 s this one is sent; <...>: whatever its options are
    +0   connect(3, ..., ...) = 0                 the active side: a script begins with this or with a SYN
    +0   accept(3, ..., ...) = 4                  the handshake is complete
    +0   write(4, ..., 1000) = 1000               the relay has 1000 octets to send
    +0   read(4, ..., 1000) = 1000                the proxy takes 1000 octets (with --proxy=slow; else it takes all)
    +0   shutdown(4, SHUT_WR) = 0                 the relay closes; abort(4) = 0: it aborts
    +0   %{ assert state == "ESTABLISHED" }%      Python, on the names that `_names` gives

Sequence numbers are relative to the initial ones, which are near the wrap, as the timestamps are. Segments that arrive
at the same time with nothing between them are one batch. Whatever is sent and not demanded fails the script.
"""

import re
from math import inf
from pathlib import Path

from workers import counts
from workers.tcp import events
from workers.tcp.connection import Connection
from workers.tcp.cubic import CONTROLS
from workers.tcp.events import AT_ONCE, DELAYED, TEXT
from workers.tcp.policy import Policy
from workers.tcp.segment import ACK, FIN, PSH, RST, SYN, URG, Segment
from workers.tcp.states import NAMES

MASK = 0xFFFFFFFF
ISS = 2**32 - 1000
IRS = 2**32 - 700
START = 4294966.00001  #: the clock when a script begins: its milliseconds wrap after 1.296 s
THEIR_TS = 2**32 - 100  #: the client's timestamp that the script calls 0
TOLERANCE = 0.0005  #: seconds

FLAGS = {"S": SYN, "F": FIN, "R": RST, "P": PSH, ".": ACK, "U": URG}
OPTIONS = {"mss": "1460", "proxy": "fast", "congestion": "cubic"}

_EVENT = re.compile(r"(?P<time>\+?\d*\.?\d+)\s+(?P<what>.*)")
_SEGMENT = re.compile(
    r"(?P<way>[<>]) (?P<flags>[SFRPU.]+) (?P<seq>-?\d+):(?P<end>-?\d+)\((?P<len>\d+)\)"
    r"(?: ack (?P<ack>-?\d+))?(?: win (?P<win>\d+))?(?: <(?P<options>[^>]*)>)?"
)
_CALL = re.compile(r"(?P<name>\w+)\((?P<arguments>.*)\) = (?P<result>-?\d+)")
_EVENT_NAMES = {
    name: bit for name, bit in vars(events).items() if isinstance(bit, int) and name not in (
        "NOT_DUE", "DELAYED", "AT_END_OF_BATCH", "AT_ONCE")
}  # fmt: skip


def text_of(start: int, length: int) -> bytes:
    """Return the client's octets from a position of its stream on; a pattern that repeats after 251 octets."""
    return bytes((start + i) % 251 for i in range(length))


def options_bytes(words: str) -> bytes:
    """Pack TCP options as packetdrill writes them, padded to whole words."""
    packed = b""
    for word in filter(None, (word.strip() for word in words.split(","))):
        kind, *numbers = word.split()
        if kind == "mss":
            packed += b"\x02\x04" + int(numbers[0]).to_bytes(2, "big")
        elif kind == "wscale":
            packed += b"\x03\x03" + bytes([int(numbers[0])])
        elif kind == "sackOK":
            packed += b"\x04\x02"
        elif kind == "sack":  # sack 1:11 21:31
            packed += bytes((5, 2 + 8 * len(numbers)))
            packed += b"".join(int(edge).to_bytes(4, "big") for block in numbers for edge in block.split(":"))
        elif kind == "TS":  # TS val 1 ecr 2
            packed += b"\x08\x0a" + int(numbers[1]).to_bytes(4, "big") + int(numbers[3]).to_bytes(4, "big")
        elif kind == "nop":
            packed += b"\x01"
        elif kind == "eol":
            packed += b"\x00"
        else:
            raise ValueError(f"no TCP option is called {word!r}")
    return packed + bytes(-len(packed) % 4)


class Script:
    """One run of a script against one Connection."""

    def __init__(self, path: Path) -> None:
        self._lines = path.read_text().splitlines()
        self._options = dict(OPTIONS)
        self.now = START
        self.conn: Connection | None = None
        self.events = 0
        self.delivered = b""  #: text that came in order
        self._sent: list[tuple[float, dict[str, int | str]]] = []
        self._out = Segment()
        self._in_batch = False
        self._delayed_at = inf
        self._heard_at = START
        self._taken = 0  # octets that the proxy has taken

    def run(self) -> None:
        """Run the script; AssertionError names the line that failed."""
        line = ""
        number = 0
        try:
            for line in self._lines:
                number += 1
                event = line.partition("//")[0].strip()
                if event.startswith("--"):
                    name, _, value = event[2:].partition("=")
                    assert name in OPTIONS, f"no option is called {name}"
                    self._options[name] = value
                elif event:
                    self._line(event)
            self._end_of_batch()
            self._nothing_sent()
            assert self.delivered == text_of(0, len(self.delivered)), "the text is not what the client sent"
        except (AssertionError, ValueError) as error:
            raise AssertionError(f"line {number}: {line.strip()}\n  {error}") from error

    def _line(self, line: str) -> None:
        match = _EVENT.fullmatch(line)
        assert match, "this line cannot be read"
        when, what = match["time"], match["what"]
        at = self.now + float(when) if when.startswith("+") else START + float(when)
        segment = _SEGMENT.fullmatch(what)
        if not (self._in_batch and at <= self.now and segment and segment["way"] == "<"):
            self._end_of_batch()
        if segment and segment["way"] == ">":
            self._pass_time(at)
            self._demand(segment, at)
            return
        self._pass_time(at)
        self.now = max(self.now, at)
        if segment:
            self._nothing_sent_unless_batch()
            self._arrive(segment)
        elif what.startswith("%{"):
            self._nothing_sent()
            self._assert(what[2:].removesuffix("}%").strip())
        else:
            self._nothing_sent()
            call = _CALL.fullmatch(what)
            assert call, "this event cannot be read"
            if call["name"] == "connect":
                assert self.conn is None, "there is a connection already"
                self.conn = Connection.connect(ISS, int(self._options["mss"]))
                self._output()
                return
            self._call(call["name"], [word.strip() for word in call["arguments"].split(",")], int(call["result"]))

    # ── time ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _pass_time(self, until: float) -> None:
        """Run the timers that are due up to a moment; each that sends must be demanded."""
        conn = self.conn
        while conn is not None:
            at = min(conn.deadline, self._delayed_at)
            if at > until + TOLERANCE:
                break
            self.now = max(self.now, at)
            if self._delayed_at <= self.now:
                self._delayed_at = inf
                if conn.ack_due == DELAYED:
                    due_at = conn.rcv.ack_at
                    if due_at > self.now:
                        self._delayed_at = due_at
                    else:
                        conn.delayed_ack_timeout()
                        self._end_of_batch(force=True)
            else:
                conn.timeout(self.now)
                self.events |= conn.take_events()
                self._output()
        self.now = max(self.now, until)

    # ── in ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _arrive(self, match: re.Match[str]) -> None:
        seg = Segment()
        seg.flags = sum(FLAGS[letter] for letter in match["flags"])
        relative, length = int(match["seq"]), int(match["len"])
        assert int(match["end"]) - relative == length
        seg.seq = (IRS + relative) & MASK
        if match["ack"]:
            seg.ack = (ISS + int(match["ack"])) & MASK
        seg.wnd = int(match["win"] or 65535)
        seg.len = length
        words = re.sub(
            r"TS val (\d+) ecr (\d+)",
            lambda ts: f"TS val {(THEIR_TS + int(ts[1])) & MASK} ecr {self._our_ts(int(ts[2]))}",
            match["options"] or "",
        )
        words = re.sub(r"(\d+):(\d+)", lambda m: f"{(ISS + int(m[1])) & MASK}:{(ISS + int(m[2])) & MASK}", words)
        seg.parse_options(options_bytes(words))
        memory = bytes(7) + text_of(relative - 1 + bool(seg.flags & SYN), length)
        seg.text_at = 7
        if self.conn is None:
            assert seg.flags == SYN, "a script begins with a SYN"
            control = CONTROLS[self._options["congestion"]]
            self.conn = Connection(seg, ISS, int(self._options["mss"]), Policy(congestion=control))
            self._output()
            return
        conn = self.conn
        self._heard_at = self.now
        conn.segment_arrives(seg, memory, self.now)
        joined = conn.take_reassembled() if conn.rcv.pieces is not None else []
        arrived = conn.take_events()
        self.events |= arrived
        fresh = len(self.delivered)
        if arrived & TEXT:
            self.delivered += memory[seg.text_at : seg.text_at + seg.len] + b"".join(joined)
        assert self.delivered[fresh:] == text_of(fresh, len(self.delivered) - fresh), "other text came out than went in"
        if self._options["proxy"] == "slow":
            conn.rcv.pending = len(self.delivered) - self._taken
        self._output()
        self._in_batch = True
        if conn.ack_due == DELAYED and self._delayed_at == inf:
            self._delayed_at = conn.rcv.ack_at

    def _our_ts(self, milliseconds: int) -> int:
        return (int(START * 1000) + milliseconds) & MASK if milliseconds else 0

    # ── out ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _output(self) -> None:
        conn = self.conn
        assert conn is not None
        while conn.segment_to_send(self._out, self.now):
            self._record()

    def _end_of_batch(self, force: bool = False) -> None:
        if self.conn is not None and (self._in_batch or force):
            self._in_batch = False
            assert self.conn.ack_due != AT_ONCE, "an ACK that is due at once waits"
            if self.conn.ack_to_send(self._out, self.now):
                self._record()

    def _record(self) -> None:
        out = self._out
        relative = (out.seq - ISS) & MASK
        letters = "".join(letter for letter in "SFRP." if out.flags & FLAGS[letter])
        words = []
        if out.flags & SYN:
            words.append(f"mss {out.mss}")
            if out.window_scale >= 0:
                words.append(f"wscale {out.window_scale}")
            if out.sack_permitted:
                words.append("sackOK")
        if out.ts_present:
            echo = (out.ts_ecr - THEIR_TS) & MASK if out.flags & ACK else out.ts_ecr
            words.append(f"TS val {(out.ts_val - int(START * 1000)) & MASK} ecr {echo}")
        if out.sack:
            edges = [f"{(left - IRS) & MASK}:{(right - IRS) & MASK}" for left, right in out.sack]
            words.append("sack " + " ".join(edges))
        relative -= 2**32 if relative >= 2**31 else 0
        ack = (out.ack - IRS) & MASK if out.flags & ACK else -1
        sent = {
            "flags": letters,
            "seq": relative,
            "len": out.len,
            "ack": ack,
            "win": out.wnd,
            "options": ",".join(words),
        }
        self._sent.append((self.now, sent))

    def _demand(self, match: re.Match[str], at: float) -> None:
        assert self._sent, "nothing was sent"
        sent_at, sent = self._sent.pop(0)
        wanted = {"flags": match["flags"], "seq": int(match["seq"]), "len": int(match["len"])}
        if match["ack"]:
            wanted["ack"] = int(match["ack"])
        if match["win"]:
            wanted["win"] = int(match["win"])
        if (match["options"] or "") != "...":
            wanted["options"] = match["options"] or ""
        got = {name: sent[name] for name in wanted}
        assert got == wanted, f"sent was {sent} at {sent_at - START:.3f}"
        assert abs(sent_at - at) <= TOLERANCE, f"it was sent at {sent_at - START:.3f}, not at {at - START:.3f}"

    def _nothing_sent(self) -> None:
        assert not self._sent, f"not demanded: {self._sent}"

    def _nothing_sent_unless_batch(self) -> None:
        if not self._in_batch:
            self._nothing_sent()

    # ── calls ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _call(self, name: str, arguments: list[str], result: int) -> None:
        conn = self.conn
        assert conn is not None
        if name == "accept":
            assert self.events & events.OPENED, "the handshake is not complete"
            return
        if name == "write":
            assert int(arguments[2]) == result
            conn.send(result)
        elif name == "read":
            self._taken += result
            conn.rcv.pending = len(self.delivered) - self._taken
            assert conn.rcv.pending >= 0
            conn.taken_by_proxy()
        elif name in ("shutdown", "close"):
            conn.close()
        elif name == "want_room":
            conn.want_room(self.now)
        elif name == "keepalive":  # as a sweep does now and then; keepalive(4, 100): after 100 s of silence
            conn.policy.keepalive = float(arguments[1])
            conn.keepalive(self._heard_at, self.now)
        elif name == "abort":
            conn.abort()
        else:
            raise ValueError(f"no call is named {name}")
        self.events |= conn.take_events()
        self._output()

    def _assert(self, code: str) -> None:
        conn = self.conn
        assert conn is not None
        names = {
            "state": NAMES[conn.state],
            "events": {name for name, bit in _EVENT_NAMES.items() if self.events & bit},
            "delivered": len(self.delivered),
            "cwnd": conn.congestion.cwnd,
            "ssthresh": conn.congestion.ssthresh,
            "rto": conn.rtt.rto,
            "room": conn.room(self.now),
            "smss": conn.smss,
            "counted": dict(zip(counts.NAMES, conn.policy.count, strict=True)),
            "pipe": conn.recovery.pipe if conn.disorder and conn.recovery else (conn.snd.nxt - conn.snd.una) & MASK,
            "idle": conn.deadline == inf,
            "inf": inf,
            "conn": conn,
        }
        expression = code.removeprefix("assert").strip()
        assert eval(expression, {}, names), f"the names are {names}"
