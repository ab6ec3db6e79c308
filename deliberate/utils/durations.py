"""Durations of long jobs as text."""

from __future__ import annotations


def hours_and_minutes(seconds: float) -> str:
    """``45 s``, ``12 min``, ``16 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
