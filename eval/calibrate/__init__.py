"""The command calibrate."""
