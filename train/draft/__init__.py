"""Drafts for a model that was not trained to exit: what is fitted on its own text, and how."""
