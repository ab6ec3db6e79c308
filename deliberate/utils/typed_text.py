"""Texts as they are typed on a command line."""

from __future__ import annotations


def typed_text(text: str) -> str:
    r"""A text typed on a command line, where ``\n`` and ``\t`` are a new line and a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")
