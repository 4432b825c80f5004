"""The benchmark: the gateway beside the bare kernel and beside clients that speak SOCKS themselves (`make bench`)."""
