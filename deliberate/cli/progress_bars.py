"""Progress bars of transformers."""

from __future__ import annotations


def quiet_transformers() -> None:
    """Turns off the progress bars of loading weights, which would break up an answer."""
    from transformers.utils import logging

    logging.disable_progress_bar()
