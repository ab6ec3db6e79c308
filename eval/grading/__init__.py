"""Answers taken out of text and compared."""
