"""`deliberate bench agreement`: what exits are worth at a wanted agreement with the last layer.

Greedy continuations of held-out texts are recorded at every exit. Thresholds are chosen on half of
them; on the other half stand the agreement of every exit, the agreement reached, and the time per
token of all modes, interleaved in one run. A stock checkpoint, whose exits are untrained, is the
state before training; given as `baseline` it is timed side by side with the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig
from rich.console import Console

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.break_even import drop_unprofitable
from deliberate.calibration.collect import record_sequences
from deliberate.calibration.exit_traces import Recording
from deliberate.data.prompts import Encoder
from deliberate.data.texts import is_text, load_texts
from deliberate.engine.exit_policy import FixedPolicy
from deliberate.eval.benchmarks.agreement_result import Measured
from deliberate.eval.benchmarks.agreement_tables import show
from deliberate.eval.benchmarks.agreement_thresholds import (
    agreement,
    choose_thresholds,
    exit_rates,
    share,
)
from deliberate.eval.benchmarks.decode import measure, report
from deliberate.eval.benchmarks.decode_variants import Answers, Prompts, Variant, variants
from deliberate.eval.benchmarks.harness import UNBOUNDED, Session
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.eval.runner.batched import decode_answers
from deliberate.eval.runner.runner import plain_greedy
from deliberate.eval.statistics import Estimate
from deliberate.eval.tasks.held_out_loss import TextLoss, compare_losses, text_losses
from deliberate.eval.tasks.prompts import prompt_encoder
from deliberate.eval.tasks.registry import build_task, evaluation_config, task_names
from deliberate.utils.checks import all_at_least
from deliberate.utils.end_tokens import end_tokens
from deliberate.utils.errors import DeliberateError

PROBLEMS = 200
LEAST = 8
# Longest stretch of a held-out document that the loss is taken on.
STRETCH = 256
SUITE = "agreement"
# Threshold mode with the exits too that lose time.
ALL_EXITS = "threshold, all exits"

Row = tuple[float, ...]
"""Thresholds, one per exit."""


@dataclass(frozen=True)
class Held:
    """Held-out texts as token ids.

    Attributes:
        prompts: what is continued.
        documents: what the loss is taken on: stretches of text, or problems with their solutions.
        given: tokens of each that are not predicted: the first, or the question.
    """

    prompts: tuple[tuple[int, ...], ...]
    documents: tuple[tuple[int, ...], ...]
    given: tuple[int, ...]


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench agreement`` with overrides of `configs/bench_agreement.yaml`.

    Raises:
        DeliberateError: settings that cannot work, texts that are not there, or a baseline with
            other tokens; nothing has been written then.
    """
    cfg = bench_config(
        "bench_agreement", arguments, verbatim=("model", "baseline", "out", "source", "data.dir")
    )
    _check(cfg)
    session = Session("agreement", arguments, cfg.threads)
    models = _load(cfg)
    tokenizer = checkpoint.load_tokenizer(str(cfg.model))
    held = held_out(cfg, tokenizer, models["model"].backbone.max_positions)
    results, timings, compared = _measure(cfg, models, tokenizer, held)
    session.end()
    console = Console(highlight=False)
    show(results, timings, compared, target=cfg.target, console=console)
    console.print(session.line(), highlight=False)
    session.write(
        cfg.out,
        {
            "target": cfg.target,
            "source": cfg.source,
            "seed": cfg.seed,
            "models": {one.label: _plain(asdict(one)) for one in results},
            "times": timings,
            "loss_change": None if compared is None else _plain(asdict(compared)),
        },
    )


def held_out(cfg: DictConfig, tokenizer: Any, context: int | None) -> Held:
    """The prompts, and the documents where the source has any.

    Raises:
        DeliberateError: no such source, too few texts, or prompts without room for an answer.
    """
    source, room = str(cfg.source), (context or UNBOUNDED) - cfg.max_new_tokens
    if is_text(source):
        texts = load_texts(source, "test", data_dir=cfg.data.dir, limit=cfg.size)
        encoder = Encoder(tokenizer, max_tokens=min(STRETCH, context or STRETCH))
        made = [next(encoder.stretches(text), None) for text in texts]
        examples = [e for e in made if e is not None and len(e) > cfg.prompt_tokens]
        prompts = tuple(tuple([*e.prompt, *e.answer][: cfg.prompt_tokens]) for e in examples)
    else:
        size = cfg.size or PROBLEMS
        settings = evaluation_config([f"task={source}"]).task
        if "size" in settings:
            settings.size = size
        task = build_task(settings, seed=cfg.seed, limit=size, data_dir=cfg.data.dir)
        encoder = prompt_encoder(
            cfg, tokenizer, max_tokens=context or UNBOUNDED, template=task.template
        )
        prompts = tuple(tuple(encoder.prompt(problem.question)) for problem in task.problems)
        made = [encoder.example(problem) for problem in task.problems]
        examples = [e for e in made if e is not None]
    prompts = tuple(prompt for prompt in prompts if len(prompt) <= room)
    if len(prompts) < LEAST:
        raise DeliberateError(
            f"source={source} gives {len(prompts)} prompts with room for max_new_tokens="
            f"{cfg.max_new_tokens} of the context of {context}: at least {LEAST} are needed"
        )
    return Held(
        prompts=prompts,
        documents=tuple((*e.prompt, *e.answer) for e in examples),
        given=tuple(len(e.prompt) for e in examples),
    )


def record_continuations(
    model: AdaptiveModel, tokenizer: Any, held: Held, cfg: DictConfig
) -> Recording:
    """What the exits say of the model's own greedy continuations; empty ones are left out."""
    answers = decode_answers(
        model,
        tokenizer,
        held.prompts,
        max_new_tokens=cfg.max_new_tokens,
        batch=cfg.batch,
        title="continuations",
    )
    return record_sequences(
        model,
        [(*prompt, *answer) for prompt, answer in zip(held.prompts, answers, strict=True)],
        list(map(len, held.prompts)),
    )


def paying_thresholds(
    model: AdaptiveModel, recording: Recording, target: float, *, drop: bool
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[str, ...]]:
    """Thresholds for an agreement, those without the exits that would lose time, and why."""
    chosen = choose_thresholds(recording, target)
    if not drop or all(map(np.isinf, chosen)):
        return chosen, chosen, ()
    from deliberate.cost.measure import cached_cost

    cost = cached_cost(model.backbone, model.reader(), model.exit_config)
    kept, reasons = drop_unprofitable(cost, exit_rates(recording, chosen))
    used = chosen
    if reasons:
        used = choose_thresholds(recording, target, [e in kept for e in recording.layers])
    return chosen, used, tuple(reasons)


def _measure(
    cfg: DictConfig, models: Mapping[str, AdaptiveModel], tokenizer: Any, held: Held
) -> tuple[list[Measured], dict[str, Any], Estimate | None]:
    """Figures of every model, the times of all, and the change of the held-out loss."""
    runs: dict[str, Variant] = {}
    chosen: dict[str, tuple[Row, Row, tuple[str, ...], Recording]] = {}
    for label, model in models.items():
        recording = record_continuations(model, tokenizer, held, cfg)
        first, second = recording.halves(cfg.seed)
        every, used, dropped = paying_thresholds(model, first, cfg.target, drop=cfg.drop)
        chosen[label] = every, used, dropped, second
        for name, run in _variants(model, tokenizer, cfg.max_new_tokens, every, used).items():
            runs[f"{label}: {name}"] = run
    # The same halves as the recordings': sequences are numbered as prompts are.
    order = np.random.default_rng(cfg.seed).permutation(len(held.prompts))
    middle = (len(order) + 1) // 2
    timed = [*order[: cfg.warmup], *order[middle : middle + cfg.timed]]
    prompts = [_prompt(held.prompts[row], models["model"].device) for row in timed]
    clocked = measure(runs, prompts, cfg.warmup, "bench agreement")
    continued = [held.prompts[row] for row in timed[cfg.warmup :]]
    results, times = [], {}
    losses: dict[str, TextLoss] = {}
    for label, model in models.items():
        own = {n.partition(": ")[2]: t for n, t in clocked.items() if n.startswith(f"{label}: ")}
        times[label] = report(own, SUITE, cfg.seed)
        every, used, dropped, second = chosen[label]
        if held.documents:
            losses[label] = text_losses(
                model, held.documents, given=held.given, batch=cfg.batch, seed=cfg.seed
            )
        results.append(
            Measured(
                label=label,
                name=str(cfg[label]),
                layers=model.exit_config.layers,
                num_layers=model.backbone.num_layers,
                executor=model.executor,
                thresholds=every,
                figures=agreement(second, every, seed=cfg.seed),
                requested=used,
                dropped=dropped,
                decoding=agreement(second, used, seed=cfg.seed),
                free={
                    name: free_agreement(model, continued, timing.tokens, seed=cfg.seed)
                    for name, timing in own.items()
                    if name.startswith("threshold")
                },
                loss=losses.get(label),
            )
        )
    compared = None
    if "baseline" in losses:
        compared = compare_losses(losses["model"], losses["baseline"], seed=cfg.seed)
    return results, times, compared


def free_agreement(
    model: AdaptiveModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    seed: int = 0,
) -> Estimate:
    """Share of the tokens that the full depth would have chosen after the same text.

    Raises:
        DeliberateError: no token was generated.
    """
    recording = record_sequences(
        model,
        [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)],
        list(map(len, prompts)),
    )
    if not len(recording):
        raise DeliberateError("nothing was generated: every answer is empty")
    made = np.concatenate([np.asarray(answer, dtype=np.int64) for answer in answers])
    return share(recording.final == made, recording.sequence, seed=seed)


def _variants(
    model: AdaptiveModel, tokenizer: Any, limit: int, every: Row, used: Row
) -> dict[str, Variant]:
    """The variants, all plain greedy, whatever the checkpoint's own settings say."""
    ends = end_tokens(model.base.generation_config, tokenizer)

    def adaptive(fidelity: str, thresholds: Row = used) -> Variant:
        def run(prompts: Prompts) -> Answers:
            out = model.generate(
                prompts.ids,
                attention_mask=prompts.mask,
                max_new_tokens=limit,
                fidelity=fidelity,
                exit_policy=FixedPolicy(thresholds),
                return_dict_in_generate=True,
            )
            return Answers([trace.tokens for trace in out.traces], out.traces)

        return run

    def greedy(run: Variant) -> Variant:
        def plain(prompts: Prompts) -> Answers:
            with plain_greedy(model, ends):
                return run(prompts)

        return plain

    with plain_greedy(model, ends):
        made = variants(model, limit, None, "batch")
    made |= {fidelity: adaptive(fidelity) for fidelity in ("exact", "threshold")}
    if every != used:
        made[ALL_EXITS] = adaptive("threshold", every)
    return {name: greedy(run) for name, run in made.items()}


def _prompt(ids: Sequence[int], device: torch.device) -> Prompts:
    row = torch.tensor([list(ids)], device=device)
    return Prompts(row, torch.ones_like(row))


def _load(cfg: DictConfig) -> dict[str, AdaptiveModel]:
    """The baseline, where there is one, and the model, with exits at the same layers."""
    names = {"model": str(cfg.model)}
    if cfg.baseline is not None:
        names = {"baseline": str(cfg.baseline)} | names
    saved = {n: checkpoint.read_adaptive_config(checkpoint.resolve(n)) for n in names.values()}
    own = [list(config.exits["layers"]) for config in saved.values() if config is not None]
    exits: Any = list(cfg.layers) if isinstance(cfg.layers, ListConfig) else cfg.layers
    if exits == "auto" and own:
        exits = own[0]
    models = {}
    for label, name in names.items():
        stock = saved[name] is None
        model = AdaptiveModel.from_pretrained(
            name, exits=exits if stock else None, executor=cfg.executor
        )
        models[label] = model.to("cuda") if torch.cuda.is_available() else model
    sizes = {label: model.backbone.vocab_size for label, model in models.items()}
    if len(set(sizes.values())) > 1:
        raise DeliberateError(
            f"baseline={cfg.baseline} has {sizes['baseline']} tokens, the model {sizes['model']}: "
            "they must share a tokenizer"
        )
    return models


def _check(cfg: DictConfig) -> None:
    least: dict[str, int] = {
        "prompt_tokens": 1, "max_new_tokens": 2, "timed": 2, "warmup": 0, "batch": 1, "threads": 1,
    }  # fmt: skip
    if cfg.size is not None:
        least["size"] = LEAST
    all_at_least(cfg, least)
    share_given = isinstance(cfg.target, int | float) and not isinstance(cfg.target, bool)
    if not share_given or not 0.0 < cfg.target <= 1.0:
        raise DeliberateError(f"target={cfg.target} must be a share in (0, 1]")
    if not is_text(str(cfg.source)) and cfg.source not in task_names():
        raise DeliberateError(
            f"source={cfg.source} is neither text nor text/NAME nor one of "
            f"{', '.join(task_names())}"
        )
    if not isinstance(cfg.layers, ListConfig) and cfg.layers != "auto":
        raise DeliberateError(f"layers={cfg.layers} must be auto or a list: layers=[2,4]")
    if not isinstance(cfg.drop, bool):
        raise DeliberateError(f"drop={cfg.drop} must be true or false")


def _plain(value: Any) -> Any:
    """JSON has no infinity: null stands for a threshold that is never reached."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
