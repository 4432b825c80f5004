"""What a worker counts: every reason to drop, refuse or give up has its own word in shared memory."""

from typing import Final

from workers.tcp.events import PROBED, RECOVERING, SPURIOUS, TIMED_OUT

_names: list[str] = []


def _counter(name: str) -> int:
    _names.append(name)
    return len(_names) - 1


# Frames
FRAMES_FROM_DEVICE: Final = _counter("frames_from_device")
BYTES_FROM_DEVICE: Final = _counter("bytes_from_device")
FRAMES_TO_DEVICE: Final = _counter("frames_to_device")
BYTES_TO_DEVICE: Final = _counter("bytes_to_device")
MALFORMED: Final = _counter("malformed")  #: lengths that contradict each other, or too short for their headers
BAD_CHECKSUM: Final = _counter("bad_checksum")
UNKNOWN_PROTOCOL: Final = _counter("unknown_protocol")  #: neither TCP, UDP nor ICMP
NOT_PUBLIC: Final = _counter("not_public")  #: destinations that public-only refused
NO_FRAMES: Final = _counter("no_frames")  #: packets not sent for want of a TX frame
INTERNAL_ERRORS: Final = _counter("internal_errors")  #: flows ended by an exception of our own, each is a bug

# TCP
TCP_FLOWS: Final = _counter("tcp_flows")  #: gauge: flows in the table
TCP_PENDING: Final = _counter("tcp_pending")  #: gauge: of them, those whose proxy connection is not there yet
TCP_TIME_WAIT: Final = _counter("tcp_time_wait")  #: gauge
TCP_OPENED: Final = _counter("tcp_opened")
TCP_REFUSED: Final = _counter("tcp_refused")  #: the proxy or the target said no
TCP_CONNECT_TIMEOUTS: Final = _counter("tcp_connect_timeouts")
TCP_SYN_DROPPED_PENDING: Final = _counter("tcp_syn_dropped_pending")  #: too many pending connects
TCP_SYN_DROPPED_FLOWS: Final = _counter("tcp_syn_dropped_flows")  #: too many flows
TCP_SYN_DROPPED_DESCRIPTORS: Final = _counter("tcp_syn_dropped_descriptors")  #: no file descriptor left
TCP_RESET_BY_CLIENT: Final = _counter("tcp_reset_by_client")
TCP_RESET_BY_PROXY: Final = _counter("tcp_reset_by_proxy")
TCP_UNKNOWN_FLOW: Final = _counter("tcp_unknown_flow")  #: segments of no flow, answered with RST
TCP_IDLE_TIMEOUTS: Final = _counter("tcp_idle_timeouts")
TCP_RETRANSMIT_TIMEOUTS: Final = _counter("tcp_retransmit_timeouts")  #: flows given up, the client is gone
TCP_RETRANSMITTED: Final = _counter("tcp_retransmitted")  #: segments sent again
TCP_PATH_MTU: Final = _counter("tcp_path_mtu")  #: flows whose segments an ICMP error made smaller
TCP_CHALLENGES: Final = _counter("tcp_challenges")  #: ACKs for RST, SYN and ACKs that may be forged (RFC 5961)
TCP_CHALLENGES_LIMITED: Final = _counter("tcp_challenges_limited")  #: the same, not answered: there were too many
TCP_DROPPED_OUTSIDE: Final = _counter("tcp_dropped_outside")  #: segments outside of the window: came before, or forged
TCP_DROPPED_OLD: Final = _counter("tcp_dropped_old")  #: segments with an old timestamp (PAWS)
TCP_DROPPED_NO_TIMESTAMP: Final = _counter("tcp_dropped_no_timestamp")  #: segments without the option agreed on
TCP_DROPPED_NO_ACK: Final = _counter("tcp_dropped_no_ack")  #: segments with neither ACK, RST nor SYN
TCP_DROPPED_BAD_ACK: Final = _counter("tcp_dropped_bad_ack")  #: segments that acknowledge what was never sent
TCP_DROPPED_AFTER_FIN: Final = _counter("tcp_dropped_after_fin")  #: segments with text behind the client's FIN
TCP_DROPPED_REASSEMBLY: Final = _counter("tcp_dropped_reassembly")  #: segments out of order beyond what one flow keeps
TCP_RECOVERIES: Final = _counter("tcp_recoveries")  #: times that a loss was found without a timeout
TCP_PROBES: Final = _counter("tcp_probes")  #: tail loss probes (RFC 8985)
TCP_TIMEOUTS: Final = _counter("tcp_timeouts")  #: times that the retransmission timer fired
TCP_SPURIOUS: Final = _counter("tcp_spurious")  #: recoveries and timeouts that were undone: nothing was lost
TCP_TIME_WAIT_OVERFLOW: Final = _counter("tcp_time_wait_overflow")

TCP_WARM: Final = _counter("tcp_warm")  #: gauge: connections to the proxy that wait for a flow
TCP_WARM_USED: Final = _counter("tcp_warm_used")  #: flows that began on one

# The proxy
PROXY_UNREACHABLE: Final = _counter("proxy_unreachable")  #: connections to the proxy that failed
PROXY_PROTOCOL_ERRORS: Final = _counter("proxy_protocol_errors")  #: answers that are not SOCKS
PROXY_AUTH_FAILED: Final = _counter("proxy_auth_failed")

# UDP
UDP_ASSOCIATIONS: Final = _counter("udp_associations")  #: gauge
UDP_OPENED: Final = _counter("udp_opened")
UDP_WARM_TAKEN: Final = _counter("udp_warm_taken")  #: associations that stood ready for a new client
UDP_DATAGRAMS_UP: Final = _counter("udp_datagrams_up")
UDP_DATAGRAMS_DOWN: Final = _counter("udp_datagrams_down")
UDP_IDLE_TIMEOUTS: Final = _counter("udp_idle_timeouts")
UDP_DROPPED_WAITING: Final = _counter("udp_dropped_waiting")  #: too many datagrams while the association is set up
UDP_EVICTED: Final = _counter("udp_evicted")  #: associations that went for newer ones, the least recently used first
UDP_DROPPED_DESCRIPTORS: Final = _counter("udp_dropped_descriptors")  #: no file descriptor left
UDP_DROPPED_SOCKET: Final = _counter("udp_dropped_socket")  #: the socket took no more
UDP_DROPPED_TUNNEL: Final = _counter("udp_dropped_tunnel")  #: the connection that carries datagrams took no more
UDP_DROPPED_REFUSED: Final = _counter("udp_dropped_refused")  #: the proxy has no UDP, or refused the association
UDP_DROPPED_EMPTY: Final = _counter("udp_dropped_empty")
UDP_DROPPED_BAD_HEADER: Final = _counter(
    "udp_dropped_bad_header"
)  #: answers without a valid SOCKS header, or with FRAG
UDP_DROPPED_UNMAPPABLE: Final = _counter("udp_dropped_unmappable")  #: answers from a name, or of the other IP version
UDP_DROPPED_PROXY_DOWN: Final = _counter("udp_dropped_proxy_down")  #: the proxy is unreachable
UDP_DROPPED_FILTERED: Final = _counter("udp_dropped_filtered")  #: answers that udp-filtering refused
UDP_DROPPED_QUIC: Final = _counter("udp_dropped_quic")  #: datagrams that block-quic refused
UDP_DROPPED_MULTICAST: Final = _counter("udp_dropped_multicast")  #: no proxy takes multicast or broadcast
UDP_DROPPED_TOO_BIG: Final = _counter("udp_dropped_too_big")
UDP_GSO_REFUSED: Final = _counter("udp_gso_refused")  #: sockets whose path takes no UDP_SEGMENT

# DNS
DNS_QUERIES: Final = _counter("dns_queries")  #: that share an association
DNS_UNANSWERED: Final = _counter("dns_unanswered")  #: of them, those given up
DNS_UNASKED: Final = _counter("dns_unasked")  #: answers that nobody waits for: late, doubled or forged
DNS_OVER_TCP_QUERIES: Final = _counter("dns_over_tcp_queries")
DNS_OVER_TCP_FAILED: Final = _counter("dns_over_tcp_failed")

# DNS from the cache
DNS_CACHE_HITS: Final = _counter("dns_cache_hits")
DNS_CACHE_MISSES: Final = _counter("dns_cache_misses")
DNS_CACHE_RENEWED: Final = _counter("dns_cache_renewed")  #: asked for again near their end, because they are in use

# ICMP
ICMP_ECHO_REPLIES: Final = _counter("icmp_echo_replies")
ICMP_ERRORS_SENT: Final = _counter("icmp_errors_sent")
ICMP_ERRORS_LIMITED: Final = _counter("icmp_errors_limited")
ICMP_SOFT_ERRORS: Final = _counter("icmp_soft_errors")  #: about segments in flight; they change nothing (RFC 5461)
ICMP_STALE: Final = _counter("icmp_stale")  #: errors about segments that are not in flight, or of no flow (RFC 5927)
ICMP_IGNORED: Final = _counter("icmp_ignored")  #: neither a ping of ours nor an error about TCP of ours

NAMES: Final = tuple(_names)  #: of the words, in order

#: what counts the events of a TCP connection that need nothing else
TCP_EVENTS: Final = (
    (RECOVERING, TCP_RECOVERIES),
    (PROBED, TCP_PROBES),
    (TIMED_OUT, TCP_TIMEOUTS),
    (SPURIOUS, TCP_SPURIOUS),
)
