"""Keys and values whose layers may hold different numbers of tokens."""
