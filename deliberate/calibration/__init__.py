"""From recorded exit traces to calibrators, stopping policies and certificates."""
