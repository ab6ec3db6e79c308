"""Adaptive-depth inference for causal language models."""

from __future__ import annotations

from deliberate.installation import complete_clone, refuse_other_project

__version__ = "0.1.0"

refuse_other_project()
complete_clone(__path__, __file__)
