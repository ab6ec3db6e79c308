"""The `deliberate` command."""
