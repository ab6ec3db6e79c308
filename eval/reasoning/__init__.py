"""Evaluation of rules for the reasoning: tokens, seconds and accuracy together."""
