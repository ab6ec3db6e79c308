"""Model checkpoints that ship with the package."""
