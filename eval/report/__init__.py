"""Results for reading: page, figures, terminal."""
