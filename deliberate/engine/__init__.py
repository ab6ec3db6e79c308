"""The decode loop: segments, exits, pending tokens, verification and rollback."""
