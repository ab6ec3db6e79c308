"""Steps of a GPU session with a real model: its decoding against transformers, and its draft layer.

Each writes below the session's folder as it goes, so that a step that runs over leaves what it
knows. Whoever has the machine brings the model (`deliberate.kernels.tools.parts`) and two JSON
lists of questions.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from deliberate.utils.errors import DeliberateError

VARIABLE = "DELIBERATE_SMOLLM2"


@dataclass(frozen=True)
class Step:
    """A command, the seconds it may take, and packages that it cannot do without."""

    name: str
    command: tuple[str, ...]
    limit: float
    needs: tuple[str, ...] = ()


def real_steps(
    model: Path, out: Path, *, draft: Path | None = None, questions: Path | None = None,
    prompts: Path | None = None, toy: bool = False,
) -> tuple[Step, ...]:  # fmt: skip
    """The steps of a model; with its trained draft layer, at most eight and a half minutes.

    Args:
        model: folder with tokenizer.
        out: folder that results are written to.
        draft: folder of a draft layer for it; the bundled one by default.
        questions, prompts: JSON lists; the steps that need one that is missing are left out.
        toy: sizes that show that the steps work.

    Raises:
        DeliberateError: no such model, or neither list.
    """
    if not (model / "config.json").is_file():
        raise DeliberateError(f"{model} has no config.json: give the folder of a model")
    if questions is None and prompts is None:
        raise DeliberateError("a real model needs --questions FILE, --prompts FILE or both")
    draft = draft or Path(str(resources.files("deliberate.checkpoints") / "smollm2-draft"))
    made = []

    def decode(name: str, layer: Path, *more: str) -> Step:
        module: tuple[str, ...] = (sys.executable, "-m", "deliberate.kernels.tools.real_decode")
        given: tuple[str, ...] = (
            "--model",
            str(model),
            "--draft",
            str(layer),
            "--prompts",
            str(prompts),
        )
        sizes = ("--count", "2", "--rivals", "1", "--tokens", "8", "--dtypes", "float32")
        given += (*(sizes if toy else more), "--out", str(out / name.replace(" ", "-")))
        return Step(name, module + given, 110, ("transformers",))

    if prompts is not None:
        made.append(decode("real decoding", draft, "--seconds", "75", "--compile"))
    if questions is not None:
        trained = out / "draft"
        command: tuple[str, ...] = (
            *(sys.executable, "-m", "deliberate.train.draft.timed", "--model", str(model)),
            *("--draft", str(draft), "--questions", str(questions), "--out", str(trained)),
        )
        if toy:
            command += ("--text-seconds", "2", "--train-seconds", "5", "--batch", "2")
            command += ("--new-tokens", "8", "--texts-per-step", "2", "--held-out", "2")
        made.append(Step("draft layer", command, 290, ("transformers",)))
        if prompts is not None:
            sizes = ("--seconds", "40", "--dtypes", "float32", "--rivals", "1")
            made.append(decode("decoding with it", trained, *sizes))
    return tuple(made)
