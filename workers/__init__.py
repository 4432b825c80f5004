"""One shard of the gateway: what becomes of a frame."""
