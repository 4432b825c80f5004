"""Integration tests in network namespaces, with kernel TCP at both ends and real SOCKS servers between."""
