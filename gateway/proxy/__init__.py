"""The embedded SOCKS5 server: one thread, one epoll; TCP by splice(2), UDP in batches, or inside TCP.

poll.py       which sockets are ready
server.py     Server: accepts, runs the loop, watches the clock
stream.py     Stream: bytes over a connection, through the layers of a carrier: tls.py, websocket.py
httpserver.py, httpclient.py: a stream over many HTTP requests
session.py    a client from its first byte until its request is granted or refused
outbound.py   where granted requests go: Direct, or forward.py to another server; opening.py makes the tunnels
dial.py       CONNECT: a name, its addresses, a connection; resolve.py asks for names in threads of their own
join.py       CONNECT granted: bytes both ways; relay.py does it for two plain sockets
bind.py       BIND: waiting for the one connection
datagrams.py  what the two sides of an association know of each other
udp.py        its client as RFC 1928 has it; framed.py: inside a stream, in the dialects of gost, hev and sing-box
egress.py     its way out of this machine; relayed.py: as SOCKS datagrams to another server; framed.py: in a tunnel
tunnelurl.py  the URLs of all that
"""

from gateway.proxy.server import ListenError, Server

__all__ = ["ListenError", "Server"]
