"""AdaptiveModel and its `generate`: what users import."""
