"""SOCKS5 without I/O: the byte formats, and the client's side of the handshake."""
