"""`deliberate card`: packs a trained model for shipping and writes its card from the records.

The weights are stored in bfloat16 (loading upcasts them), and every figure of the card is read
from the training run's `run.json` and from evaluation folders of the packed weights; a folder that
evaluated other weights is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.eval.report.numbers import percent, percent_interval
from deliberate.eval.runner.model_names import model_name
from deliberate.eval.runner.results import EvaluationResult, ModeSummary, read_results
from deliberate.eval.runner.runner import model_info
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text
from deliberate.utils.training_record import RunRecord, RunSettings, read_run

CARD_NAME = "README.md"
CURVE_NAME = "loss.svg"


def pack(run: str | Path, target: str | Path) -> Path:
    """Writes the model of a training run to `target` in bfloat16, with its tokenizer.

    Raises:
        DeliberateError: the run has no finished model.
    """
    source, folder = Path(run) / "model", Path(target)
    if not (source / checkpoint.CONFIG_NAME).is_file():
        raise DeliberateError(f"{run} has no model/{checkpoint.CONFIG_NAME}: has the run finished?")
    model = AdaptiveModel.from_pretrained(source, executor="generic").to(torch.bfloat16)
    model.config.use_cache = True  # Trainer turned it off
    model.save_pretrained(folder, merge=True)
    checkpoint.load_tokenizer(source).save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


def write_card(run: str | Path, model: str | Path, evaluations: Sequence[str | Path]) -> Path:
    """Writes `README.md` and the loss curve beside the weights in `model`.

    Raises:
        DeliberateError: a folder is not what it should be, or evaluated other weights.
    """
    record = read_run(run)
    loaded = AdaptiveModel.from_pretrained(model, executor="generic")
    info = model_info(loaded, model_name(model))
    results = []
    for folder in evaluations:
        result, _ = read_results(folder)
        if result.model["sha256"] != info["sha256"]:
            raise DeliberateError(
                f"{folder} evaluated weights {result.model['sha256'][:12]}, {model} has "
                f"{info['sha256'][:12]}: evaluate this model"
            )
        results.append(result)
    rows = _loss_rows(record, run, loaded)
    curve = _loss_curve(rows, loaded.exits.config.layers)
    write_text(Path(model) / CURVE_NAME, curve)
    path = Path(model) / CARD_NAME
    write_text(path, "\n".join(_card(record, rows[-1], loaded, info, results)) + "\n")
    return path


def _card(
    record: RunRecord,
    last: Mapping[str, Any],
    model: AdaptiveModel,
    info: Mapping[str, Any],
    results: Sequence[EvaluationResult],
) -> list[str]:
    config, exits, machine = record.config, model.exit_config, record.environment
    trainer, shape = config.trainer, model.config
    lines = [
        f"# {info['name']}",
        "",
        f"A {info['architecture']} decoder of {info['parameters']:,} parameters with exits after "
        f"layers {', '.join(map(str, exits.layers))} of {info['num_layers']}: width "
        f"{shape.hidden_size}, {shape.num_attention_heads} heads, vocabulary {shape.vocab_size}, "
        f"context {shape.max_position_embeddings}. {origin(config, record.recipe)} "
        "Weights stored in bfloat16, computed in float32.",
        "",
        "## Training",
        "",
        f"- command: `{record.command}`",
        f"- seed {record.seed}, {record.steps} steps of at least "
        f"{trainer.tokens_per_step:,} tokens, {record.seconds / 60:.0f} minutes on "
        f"{machine.cpu} ({machine.cores} cores, {trainer.processes} process(es)), "
        f"torch {machine.versions.torch}, transformers {machine.versions.transformers}",
        f"- recipe `{record.recipe}`: " + _settings(config.recipe),
        f"- optimizer {trainer.optimizer}, learning rate {trainer.learning_rate}, decayed over the "
        f"last {trainer.decay_share:.0%}",
    ]
    lines += [f"- {note}" for note in record.notes]
    lines += ["", "| data (train splits only) | share of problems |", "|---|---|"]
    weights = config.data.weights
    total = sum(weights.values())
    lines += [
        f"| {name} | {weight / total:.0%} |" for name, weight in weights.items() if weight > 0
    ]
    lines += [
        "",
        f"![loss by exit]({CURVE_NAME})",
        "",
        "| exit | loss (nats) | agrees with the top ",
    ]
    lines[-1] += "| threshold |"
    lines += ["|---|---|---|---|"]
    names = [*(f"exit{layer}" for layer in exits.layers), f"exit{info['num_layers']}"]
    for name, threshold in zip(names, [*exits.thresholds, None], strict=True):
        lines.append(
            f"| {name.removeprefix('exit')} | {last[f'loss/{name}']:.3f} | "
            f"{percent(last[f'agree/{name}'])} | "
            f"{'-' if threshold is None else f'{threshold:.4f}'} |"
        )
    lines += ["", "Loss and agreement: last log line of training, on training text.", ""]
    lines += ["## Accuracy", ""]
    lines += _accuracy(results)
    return lines


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if key != "name")


def _accuracy(results: Sequence[EvaluationResult]) -> list[str]:
    """One table over all runs, and one by difficulty for each run that has several."""
    lines = [
        "Exact match with 95 % Wilson intervals, greedy. Speed is in the reports, not here.",
        "",
        "| task | problems | mode | accuracy | interval | McNemar p against dense |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        for mode, summary in result.modes.items():
            if mode == "transformers":
                continue
            compared = summary.versus_dense
            p = "-" if compared is None or mode == "dense" else f"{compared.mcnemar.p:.3g}"
            lines.append(
                f"| {result.task['name']} ({result.task['split']}) | {summary.total} | {mode} | "
                f"{percent(summary.accuracy)} | {percent_interval(summary.accuracy_interval)} | "
                f"{p} |"
            )
    for result in results:
        dense = result.modes.get("dense")
        if dense is not None and len(dense.by_difficulty) > 1:
            lines += ["", f"### {result.task['name']} by difficulty (dense)", ""]
            lines += _by_difficulty(dense)
    return lines


def _by_difficulty(summary: ModeSummary) -> list[str]:
    lines = ["| difficulty | problems | accuracy | interval |", "|---|---|---|---|"]
    for row in summary.by_difficulty:
        lines.append(
            f"| {row.group} | {row.total} | {percent(row.correct / row.total)} | "
            f"{percent_interval(row.interval)} |"
        )
    return lines


def origin(config: RunSettings, recipe: str) -> str:
    """Sentences that say where the weights came from, by the configuration of the run."""
    if config.model.kind == "scratch":
        return (
            "Trained from scratch by this project. It solves small arithmetic word problems and is "
            "there to test and show adaptive depth; it is no general language model."
        )
    given = config.model.path
    base = f"`{given}`" if given else "a given checkpoint"
    if config.model.keep_layers:
        base += f", of which layers {', '.join(map(str, config.model.keep_layers))} were kept"
    what = _TRAINED.get(recipe, f"recipe `{recipe}` trained it on, exits included")
    return (
        f"The base model is {base}: this project did not train it from scratch; {what}. What "
        "the base model can do and may be used for is in its own card."
    )


_TRAINED = {
    "heads": "it added the exits and trained them with the base model frozen",
    "gate": "it added a deliberation gate and trained it with base model and exits frozen",
    "lora": "it added exits, trained them together with low-rank adapters, and merged these",
    "layerskip": "it added exits and went on training the whole model with them",
    "distill": "it added exits and trained the whole model with them by distillation",
    "pretrain": "it added exits and went on training the whole model with them",
}
"""What a recipe does to a model that it was given."""


def _loss_rows(record: RunRecord, run: str | Path, model: AdaptiveModel) -> list[dict[str, Any]]:
    """Log lines with the loss of every exit, oldest first.

    Raises:
        DeliberateError: there is none, or the last one lacks a figure of one of the exits.
    """
    rows = [row for row in record.history if "target_tokens" in row]
    if not rows:
        raise DeliberateError(f"{run}: the record has no log line of training steps")
    for layer in (*model.exit_config.layers, model.backbone.num_layers):
        for name in (f"loss/exit{layer}", f"agree/exit{layer}"):
            if not isinstance(rows[-1].get(name), int | float):
                raise DeliberateError(
                    f"{run}: the last log line has no {name}: it is not a run of this model"
                )
    return rows


def _loss_curve(rows: Sequence[Mapping[str, Any]], layers: Sequence[int]) -> str:
    """The loss of every exit over training steps, as SVG."""
    names = sorted(
        (key for key in rows[0] if key.startswith("loss/")), key=lambda key: int(key[9:])
    )
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for name in names:
        depth = int(name[9:])
        label = f"after layer {depth}" if depth in layers else f"top (layer {depth})"
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=label, lw=1.2)
    axes.set_yscale("log")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss on solution tokens (nats)")
    axes.grid(alpha=0.3, which="both", lw=0.4)
    axes.legend(frameon=False)
    out = StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
