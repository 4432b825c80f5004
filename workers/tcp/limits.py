"""Numbers of the TCP implementation, each with its origin."""

from typing import Final

DELAYED_ACK: Final = 0.04  # seconds; Linux TCP_DELACK_MIN
MAX_RETRIES: Final = 10  # with RTO 0.2 s that is 200 s; RFC 9293, 3.8.3: R2 at least 100 s
MAX_SYN_RETRIES: Final = 5  # Linux tcp_synack_retries
DEFAULT_MSS: Final = 536  # RFC 9293, 3.7.1, without the option
MAX_PACKET: Final = 65535 - 40 - 60  #: text that one packet can carry behind the longest headers
RECEIVE_BUFFER: Final = 1 << 20  #: octets that may wait for the proxy
RECEIVE_SCALE: Final = 7  #: the shift that we announce: windows up to 8 MB in steps of 128
SEND_BUFFER: Final = 4 << 20  #: octets in flight at the most
MAX_RTT: Final = 120_000  # milliseconds; an echoed timestamp older than that is not ours
