"""Tasks: their problems and prompts."""
