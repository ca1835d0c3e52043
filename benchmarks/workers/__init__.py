"""What runs inside a peer's own environment: one module a peer, each a server of JSON lines (see `protocol`)."""
