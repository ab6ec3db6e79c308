"""Adaptive-depth inference for causal language models."""

from __future__ import annotations

from deliberate.installation import add_clone_folders, refuse_other_project

__version__ = "0.1.0"

refuse_other_project()
add_clone_folders(__path__, __file__)
