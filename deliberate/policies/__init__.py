"""Guarantees turned into decisions while decoding: certificates, budgets, drift."""
