"""Which mark a model puts before its final answer.

Models trained here on problems write ``#### 18``, as GSM8K's solutions do, and their checkpoints
say so in `config.json`. A stock instruct model has never seen the mark: held to it, it would answer
nothing, whatever it solves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from deliberate.api import checkpoint
from deliberate.data.problem import ANSWER_MARK
from deliberate.eval.grading.answers import STYLES, Style
from deliberate.utils.json_files import read_json


def trained_mark(model: str) -> str | None:
    """The answer style that a model's checkpoint says it was trained on, or None.

    Args:
        model: a bundled name, a folder, or a hub name; of exits or an adapter the base counts.

    Raises:
        DeliberateError: there is no such model.
    """
    source = checkpoint.resolve(model)
    saved = checkpoint.read_adaptive_config(source)
    base = saved.base if saved is not None else checkpoint.adapter_base(source) or source
    path = Path(base) / "config.json"
    try:
        if path.is_file():
            found = read_json(path, finite=False).get(ANSWER_MARK)
        else:
            found = getattr(AutoConfig.from_pretrained(base), ANSWER_MARK, None)
    except (OSError, ValueError, AttributeError):
        return None  # loading the model says what is wrong with it
    return found if isinstance(found, str) and found in STYLES else None


def answer_style(style: Any, mark: Style, model: str | None) -> Any:
    """A task's style: as set, or else the task's mark where the model was trained on it, or auto.

    Args:
        style: `task.style`; None to decide by the model.
        mark: the task's own mark.
        model: None: of no model; the mark then.
    """
    if style is not None:
        return style
    return mark if model is None or trained_mark(model) == mark else "auto"
