"""Memory and messages between processes; knows nothing of IP, TCP or SOCKS."""
