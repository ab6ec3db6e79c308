"""Tasks by name: every YAML of `configs/task`, and of a folder that `task_dir` names.

All modes and benchmarks run the same problems in the same order. Generated problems come from the
side of the hash split that training never draws from.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from deliberate.data import seeds
from deliberate.data.sources import DATA_VARIABLE
from deliberate.eval.grading.answer_style import answer_style, trained_mark
from deliberate.eval.tasks.readers import (
    TRAIN_ONLY,
    ReadRequest,
    check_settings,
    check_size,
    find_reader,
    refuse_training_set,
)
from deliberate.eval.tasks.task import Task
from deliberate.eval.unread import refuse_unread
from deliberate.utils.checks import at_least
from deliberate.utils.errors import DeliberateError
from deliberate.utils.hydra_config import compose

VERBATIM = ("model", "out", "data.dir", "task_dir")
TASK_DIR = "task_dir"
BUNDLED_DEMO = "tiny"
# transformers' generate takes most of the time of a demo with a real model.
DEMO_TRANSFORMERS = 8
# Readers of tasks that were saved before a task named its reader.
_READER_OF_SOURCE = {"words": "word_problems", "gym": "reasoning_gym"}


def task_names(task_dir: str | Path | None = None) -> list[str]:
    """Names that `task=` takes.

    Args:
        task_dir: a folder with a YAML for each further task.

    Raises:
        DeliberateError: no such folder, or a task of a name that is built in.
    """
    root = resources.files("deliberate.configs") / "task"
    names = {e.name.removesuffix(".yaml") for e in root.iterdir() if e.name.endswith(".yaml")}
    if task_dir is None:
        return sorted(names)
    folder = Path(task_dir).expanduser()
    if not folder.is_dir():
        raise DeliberateError(f"{TASK_DIR}={task_dir} is no folder: give one that holds NAME.yaml")
    own = {path.stem for path in folder.glob("*.yaml")}
    if names & own:
        raise DeliberateError(
            f"{TASK_DIR}={task_dir}: {min(names & own)}.yaml has the name of a built-in task; "
            "give it another"
        )
    return sorted(names | own)


def task_config(name: str, overrides: Sequence[str], *, verbatim: Collection[str]) -> DictConfig:
    """The resolved configuration of a command that runs a task.

    Args:
        name: of a root configuration with the group ``task``.
        overrides: ``key=value``; ``task_dir=FOLDER`` adds the tasks of a folder.
        verbatim: keys whose values are taken as they are, see `compose`.

    Raises:
        DeliberateError: an unknown task or key.
    """
    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    task_dir = given.get(TASK_DIR)
    known = task_names(task_dir)
    if "task" in given and given["task"] not in known:
        raise DeliberateError(f"task {given['task']!r} is unknown: one of {', '.join(known)}")
    if task_dir is None:
        return compose(name, overrides, verbatim=verbatim)
    # Hydra finds a group's options in folders named like the group.
    with tempfile.TemporaryDirectory() as root:
        group = Path(root) / "task"
        group.mkdir()
        for path in Path(task_dir).expanduser().glob("*.yaml"):
            shutil.copy(path, group)
        search = f"hydra.searchpath=[file://{root}]"
        return compose(name, [search, *overrides], verbatim=verbatim)


def evaluation_config(overrides: Sequence[str]) -> DictConfig:
    """The resolved configuration of `deliberate eval`.

    Raises:
        DeliberateError: an unknown task or key, or a setting that this run would not read.
    """
    cfg = task_config("eval", overrides, verbatim=(*VERBATIM, "calibration"))
    refuse_unread(cfg)
    return cfg


def demo_config(problems: int, out: str, model: str = BUNDLED_DEMO) -> DictConfig:
    """A model on fresh word problems, all modes, by the fastest executor there is.

    Another than the bundled one is taken for a real model: it is asked GSM8K's test questions where
    the data folder has them, in dense and exact mode, and by transformers the first few of them.
    """
    at_least("problems", problems, 1)
    task = ["task=words", f"task.size={problems}"]
    real = []
    if model != BUNDLED_DEMO:
        real = ["modes=[transformers,dense,exact]", f"transformers_limit={DEMO_TRANSFORMERS}"]
        folder = os.environ.get(DATA_VARIABLE)
        if folder and (Path(folder) / "gsm8k" / "test.jsonl").is_file():
            task = ["task=gsm8k", f"limit={problems}"]
    cfg = compose("eval", [*task, *real, "device=cpu"])
    cfg.out, cfg.model = out, model
    return cfg


def command_task(
    cfg: DictConfig,
    *,
    use: str = seeds.EVALUATION,
    size: int | None = None,
    excluded: Callable[[str], bool] | None = None,
) -> Task:
    """The task of a command's configuration: the one reader of ``cfg.task`` and ``cfg.data``.

    Args:
        cfg: with ``task``, ``seed``, ``data.dir``, ``data.hub`` and ``model``, perhaps ``limit``.
        use: the command's entry in `deliberate.data.seeds`.
        size: how many problems the command takes, instead of ``task.size`` and ``limit``.
        excluded: whether a question must not be used.

    Raises:
        DeliberateError: see `build_task`.
    """
    settings: Any = OmegaConf.to_container(cfg.task, resolve=True)
    if size is not None and "size" in settings:
        settings["size"] = size
    data_dir = None if cfg.data.dir is None else str(Path(str(cfg.data.dir)).expanduser())
    task_dir = cfg.get(TASK_DIR)
    return build_task(
        settings,
        seed=cfg.seed,
        limit=cfg.get("limit") if size is None else size,
        data_dir=data_dir,
        hub=cfg.data.get("hub"),
        task_dir=None if task_dir is None else str(Path(str(task_dir)).expanduser()),
        excluded=excluded,
        model=str(cfg.model),
        use=use,
    )


def build_task(
    cfg: Mapping[str, Any],
    *,
    seed: int = 0,
    limit: int | None = None,
    data_dir: str | None = None,
    hub: str | None = None,
    task_dir: str | None = None,
    excluded: Callable[[str], bool] | None = None,
    model: str | None = None,
    use: str = seeds.EVALUATION,
) -> Task:
    """The task of a `configs/task` entry.

    `limit` keeps the first so many problems. Questions that are `excluded` are passed over: a
    generator draws others in their place, a fixed set is shorter by them. Where the entry leaves
    the style open, the `model`'s checkpoint decides it (`answer_style`). For `CALIBRATION` the
    entry's ``calibration`` settings replace its own (a fixed set's train split).

    Raises:
        DeliberateError: an unknown reader or setting, a training-only source, an impossible size,
            missing data.
    """
    if limit is not None:
        at_least("limit", limit, 1)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise DeliberateError(f"seed={seed!r} must be a whole number")
    settings = {key: cfg[key] for key in cfg}
    if use == seeds.CALIBRATION:
        settings |= dict(settings.get("calibration") or {})
    reader = find_reader(_reader_name(settings))
    check_settings(settings, reader)
    size = check_size(settings)
    if model is not None and settings.get("source") in TRAIN_ONLY:
        refuse_training_set(str(settings["source"]), trained_mark(model))
    if reader.generated and size is None:
        raise DeliberateError("task.size has no value: say how many problems are drawn")
    counts = [count for count in (size, limit) if count is not None]
    request = ReadRequest(
        seed=seed,
        wanted=min(counts, default=None),
        use=use,
        data_dir=data_dir,
        hub=hub,
        task_dir=task_dir,
        excluded=excluded or (lambda question: False),
    )
    read = (p for p in reader.read(settings, request) if not request.excluded(p.question))
    mark: Any = settings.get("mark") or "gsm8k"
    return Task(
        name=str(settings["name"]),
        split=str(settings.get("split") or "test"),
        problems=tuple(islice(read, request.wanted)),
        template=str(settings["prompt"]),
        style=answer_style(settings["style"], mark, model),
        max_new_tokens=settings["max_new_tokens"],
        own_score=reader.own_score,
        mark=mark,
    )


def _reader_name(settings: Mapping[str, Any]) -> str:
    if "reader" in settings:
        return str(settings["reader"])
    source = str(settings.get("source"))
    return _READER_OF_SOURCE.get(source, "data_set")
