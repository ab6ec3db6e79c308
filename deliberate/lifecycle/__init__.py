"""Versions of what is served, and the registry that keeps them on disk."""
