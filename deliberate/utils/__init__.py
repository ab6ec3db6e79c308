"""Errors, files, hashes, the machine: what every other room may use."""
