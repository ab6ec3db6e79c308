"""Several processes and sharded weights."""
