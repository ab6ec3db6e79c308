"""Parts of an adaptive model as files that other engines read."""
