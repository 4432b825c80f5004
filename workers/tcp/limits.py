"""Numbers of the TCP implementation, each with its origin."""

from typing import Final

DELAYED_ACK: Final = 0.04  # seconds; Linux TCP_DELACK_MIN
QUICK_ACKS: Final = 16  # ACKs that do not wait: at first, and after loss or a pause; Linux TCP_MAX_QUICKACKS
MAX_RETRIES: Final = 10  # with RTO 0.2 s that is 200 s; RFC 9293, 3.8.3: R2 at least 100 s
MAX_SYN_RETRIES: Final = 5  # Linux tcp_synack_retries
CHALLENGE_INTERVAL: Final = 0.5  # seconds between two on one connection; Linux tcp_invalid_ratelimit
CHALLENGES: Final = 1000  # a second in one worker; Linux tcp_challenge_ack_limit, when it had one
PAWS_IDLE: Final = 24 * 86400.0  # seconds; RFC 7323, 5.5: after that TS.Recent says nothing any more
DEFAULT_MSS: Final = 536  # RFC 9293, 3.7.1, without the option
MAX_PACKET: Final = 65535 - 40 - 60  #: text that one packet can carry behind the longest headers
FIRST_BUFFER: Final = 128 << 10  #: octets that may wait for the proxy at first: idle flows promise little
RECEIVE_BUFFER: Final = 4 << 20  #: octets to which that grows, by default
GROWN_FLOWS: Final = 64  #: flows of a worker that may have grown to the whole of it, or more of them to a part
FIRST_FLIGHT: Final = 256 << 10  #: octets in flight of one flow without drawing on what the worker has for all
SEND_BUFFER: Final = 4 << 20  #: octets in flight of one flow at the most
MAX_RTT: Final = 120_000  # milliseconds; an echoed timestamp older than that is not ours
