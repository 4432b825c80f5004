"""UDP of one worker: an association for each client socket, all its datagrams through one upstream socket.

                 frame_arrives        end_of_batch                    send / sendmsg + UDP_SEGMENT
    RX frame ──► Udp ─► Flow.pieces ─► Udp._leave ──► Association ──────────────────► relay of the proxy
    TX frame ◄── Answers.from_relay ◄───────────────── Association ◄──────────────── (or anyone, for direct://)
                                                          │ ProxyConnection: UDP ASSOCIATE, open as long as it lives;
                                                          │ of a Tunnel: the datagrams themselves, in frames

| object          | one for each                        | ends                                                     |
| --------------- | ----------------------------------- | -------------------------------------------------------- |
| Association     | client socket (address, port)¹      | idle, control connection closed, least recently used     |
| Flow            | client socket and destination       | with its association, or when the table of flows is full |
| DatagramHeaders | client socket and source of answers | with its association, or when its table is full          |

DNS questions share one association (dns.py); with direct:// only if there is a cache, and one for each IP version.

¹ With udp-mapping address-port: for each flow.
"""

from workers.udp.datagrams import Udp

__all__ = ["Udp"]
