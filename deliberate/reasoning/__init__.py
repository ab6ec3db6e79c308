"""Deliberation on the level of a chain of reasoning."""
