"""The bytes of packets: IP headers, checksums, flow keys, the virtio_net_hdr."""
