"""The embedded SOCKS5 server: one thread, one epoll; TCP by splice(2), UDP in batches.

poll.py      which sockets are ready
server.py    Server: accepts, runs the loop, watches the clock
session.py   a client from its first byte until its request is granted or refused
resolve.py   names, in threads of their own
relay.py     CONNECT granted: bytes both ways
bind.py      BIND: waiting for the one connection
udp.py       UDP ASSOCIATE: datagrams both ways
"""

from gateway.proxy.server import ListenError, Server

__all__ = ["ListenError", "Server"]
