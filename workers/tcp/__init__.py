"""TCP (RFC 9293) without I/O: segments, calls and the time go in; segments, events and the next deadline come out."""
