"""What a connection tells its relay, and when an ACK is due."""

from typing import Final

# Events, bits of what take_events() returns.
OPENED: Final = 1  #: the handshake is complete
TEXT: Final = 2  #: text in order: seg.text_at, seg.len; then take_reassembled(), if any
ACKED: Final = 4  #: SND.UNA has moved: what stands before it is no longer needed
REMOTE_CLOSED: Final = 8  #: the peer's FIN is in order: after the text there is no more
RESET: Final = 16  #: the peer's RST
GAVE_UP: Final = 32  #: too many retransmissions
ENDED: Final = 64  #: the state is CLOSED or TIME_WAIT: the relay has nothing more to do
UNACCEPTABLE_ACK: Final = 128  #: in SYN_RECEIVED: answer with <SEQ=SEG.ACK><CTL=RST>, the connection goes on
RETRANSMITTED: Final = 256  #: the segment just filled is one that was sent before
TIMED_OUT: Final = 512  #: the retransmission timer has fired
PROBED: Final = 1024  #: the end of a flight is probed before that (RFC 8985)
RECOVERING: Final = 2048  #: a loss was found without a timeout
SPURIOUS: Final = 4096  #: what looked like a loss was none, and was undone

# When an ACK is due.
NOT_DUE: Final = 0
DELAYED: Final = 1  #: within DELAYED_ACK seconds, or with data before that
AT_END_OF_BATCH: Final = 2  #: with all frames of this batch: one pure ACK for each flow
AT_ONCE: Final = 3  #: duplicates, out of order, window probes, FIN: each its own
