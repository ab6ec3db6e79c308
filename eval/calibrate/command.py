"""The command calibrate: from a model and problems to calibrators, policy and certificates.

The problems are cut in two. One part fits calibrators and policy; the other, which neither has
seen, gives the calibration error, the comparison of policies and the certificates.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig, ListConfig, OmegaConf

from deliberate import __version__
from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.baselines import optimal_stopping, usual_rules
from deliberate.calibration.break_even import paying_exits
from deliberate.calibration.calibration import (
    CALIBRATION_NAME,
    Calibration,
    assess,
    fit_calibration,
)
from deliberate.calibration.calibrator import TooFewError
from deliberate.calibration.certificate import Certificate, Risk, Testing, check_guarantee
from deliberate.calibration.comparison import (
    RuleAtRisk,
    compare_rules,
    published_point,
    useful_risks,
)
from deliberate.calibration.exit_traces import Recording
from deliberate.calibration.gate_threshold import GateRounds
from deliberate.calibration.gate_traces import record_rounds
from deliberate.calibration.reliability import Reliability
from deliberate.data import seeds
from deliberate.eval.calibrate.certify import Traces, certify
from deliberate.eval.calibrate.costs import exits_that_lose_time, measured_cost, step_costs
from deliberate.eval.calibrate.progress import stage
from deliberate.eval.calibrate.traces import (
    open_partial,
    record_answers,
    stored_answers,
)
from deliberate.eval.report.reliability_figure import write_reliability
from deliberate.eval.runner.command import choose_device, thread_count
from deliberate.eval.runner.partial_file import PartialFile, check_resume
from deliberate.eval.tasks.prompts import prompt_encoder
from deliberate.eval.tasks.registry import VERBATIM, command_task, task_config
from deliberate.eval.tasks.task import Task
from deliberate.utils.errors import DeliberateError, Interrupted
from deliberate.utils.folders import output_folder
from deliberate.utils.hashing import json_sha256


@dataclass(frozen=True)
class CalibrationRun:
    """What a run found.

    Attributes:
        calibration: as written.
        path: of `calibration.json`.
        reliability: per exit on held-out problems, overall and by group.
        comparison: every rule at every risk on held-out problems.
        published: risk and cost of the published thresholds, unchanged.
        testing: the tests behind each certificate, or behind there being none.
        notes: what was left out, in words.
    """

    calibration: Calibration
    path: Path
    reliability: list[tuple[Reliability, dict[str, Reliability]]]
    comparison: list[RuleAtRisk]
    published: tuple[float, float]
    testing: dict[Risk, Testing]
    notes: tuple[str, ...] = ()


def calibration_config(overrides: Sequence[str]) -> DictConfig:
    """The resolved configuration of `deliberate calibrate`.

    Raises:
        DeliberateError: an unknown task or key.
    """
    return task_config("calibrate", overrides, verbatim=(*VERBATIM, "recording"))


def calibrate(cfg: DictConfig, *, progress: bool = True) -> CalibrationRun:
    """Runs a calibration and writes recording, `calibration.json` and the reliability diagram.

    Raises:
        DeliberateError: the configuration, the data or the model cannot work, or the answers are
            too few or too much alike to calibrate on. A recording that was made is kept.
        Interrupted: Ctrl-C; answers decoded until then are kept, and the next run goes on.
    """
    risks = _checked(cfg)
    out = output_folder(cfg.out)
    device = choose_device(cfg)
    if cfg.recording is not None:
        return _calibrate(cfg, risks, out, device, None, progress=progress)
    model, task = _model(cfg, device), calibration_task(cfg)
    with open_partial(cfg, model, task, out) as partial:
        if partial.notice:
            print(partial.notice, file=sys.stderr)
        if partial.lines:
            print(f"going on from {partial.path}", file=sys.stderr)
        try:
            fresh = model, task, partial
            done = _calibrate(cfg, risks, out, device, fresh, progress=progress)
        except KeyboardInterrupt:
            if partial.empty:
                raise
            raise Interrupted(
                f"interrupted: the answers so far are in {partial.path}, and the same command "
                "goes on from there"
            ) from None
        partial.remove()
    return done


def _calibrate(
    cfg: DictConfig,
    risks: list[Risk],
    out: Path,
    device: torch.device,
    fresh: tuple[AdaptiveModel, Task, PartialFile] | None,
    *,
    progress: bool,
) -> CalibrationRun:
    """Of a stored recording, or of a model's answers to a task, decoded as far as is needed."""
    notes: list[str] = []
    if fresh is None:
        recording = Recording.load(Path(str(cfg.recording)).expanduser())
        model = _model(cfg, device) if cfg.costs == "measured" else None
        traces = stored_answers(recording, model)
        if Risk.ACCURACY in risks:
            risks.remove(Risk.ACCURACY)
            notes.append("accuracy is not certified from a recording: it takes whole answers")
    else:
        model, task, partial = fresh
        with thread_count(cfg.threads):
            traces = record_answers(cfg, model, task, out, partial, progress=progress)
        left_out = traces.recording.meta["left_out"]
        if left_out:
            notes.append(
                f"{left_out} problems were left out: their prompts leave less room in the context "
                "than task.max_new_tokens"
            )
    with thread_count(cfg.threads):
        cost = None
        if model is not None and cfg.costs == "measured":
            cost = measured_cost(model, progress=progress)
    steps = step_costs(cost, traces.recording)
    fitting, testing_rows = _split(traces.recording, cfg)
    fit, held = traces.recording.select(fitting), traces.recording.select(testing_rows)
    gate_rounds = None
    if model is not None and model.gate is not None:
        with thread_count(cfg.threads):
            gate_rounds = _gate_rounds(cfg, model, traces, fitting)
        if gate_rounds is None:
            notes.append(
                "the gate keeps its own threshold at every lambda: to choose one "
                "takes problems with a written solution, not a recording"
            )
    try:
        with stage("calibrators and policy", 1, progress):
            calibration = fit_calibration(
                fit,
                steps,
                weights=traces.weights,
                exits=traces.exits,
                data=traces.data,
                gate_rounds=gate_rounds,
                pays=None if cost is None else paying_exits(cost),
                seed=cfg.seed,
            )
    except TooFewError as error:
        if traces.partial is not None:
            traces.partial.remove()  # other settings are needed; the recording is kept
        raise DeliberateError(more_problems(cfg, traces.recording, error)) from None
    found = assess(calibration, held)
    rules = [optimal_stopping(calibration.policy), *usual_rules(held)]
    with stage("comparison of rules", len(rules), progress) as bar:
        comparison = compare_rules(
            rules,
            fit,
            held,
            steps,
            risks=useful_risks(held),
            seed=cfg.seed,
            note=lambda: bar.done(1),
        )
    tests: dict[Risk, Testing] = {}
    certificates: list[Certificate] = []
    with thread_count(cfg.threads):
        for risk in risks:
            tests[risk], certificate = certify(
                risk,
                cfg,
                model,
                calibration.policy,
                held,
                traces,
                testing_rows,
                notes=notes,
                progress=progress,
            )
            if certificate is not None:
                certificates.append(certificate)
    if model is not None and cfg.costs == "measured":
        notes += exits_that_lose_time(model, calibration, certificates, held)
    meta = _meta(cfg, traces.recording, fit, held, found, comparison, tests)
    if gate_rounds is not None:
        meta["thinking"] = {
            "tokens": len(gate_rounds),
            "tried": gate_rounds.uncertain_tokens,
            "gained": int((gate_rounds.helped > 0).sum()),
            "lost": int((gate_rounds.helped < 0).sum()),
        }
    calibration = replace(calibration, certificates=tuple(certificates), meta=meta)
    names = [f"exit after layer {layer}" for layer in calibration.layers]
    out.mkdir(parents=True, exist_ok=True)
    write_reliability(out, names, [overall for overall, _ in found])
    path = out / CALIBRATION_NAME
    calibration.save(path)
    published = published_point(held, steps)
    return CalibrationRun(calibration, path, found, comparison, published, tests, tuple(notes))


def _checked(cfg: DictConfig) -> list[Risk]:
    """The risks to certify; every plain value of the configuration is checked too."""
    for name in ("size", "batch", "threads"):
        value = cfg[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DeliberateError(f"{name}={value} must be a whole number of at least 1")
    if not isinstance(cfg.fit_share, float) or not 0.0 < cfg.fit_share < 1.0:
        raise DeliberateError(f"fit_share={cfg.fit_share} must lie in (0, 1), e.g. 0.5")
    if cfg.costs not in ("measured", "layers"):
        raise DeliberateError(f"costs={cfg.costs} is not one of measured, layers")
    check_guarantee(cfg.epsilon, cfg.delta)
    check_resume(cfg.resume)
    if not isinstance(cfg.certify, ListConfig):
        raise DeliberateError(f"certify={cfg.certify} must be a list: certify=[token,accuracy]")
    risks = []
    for name in cfg.certify:
        if name not in list(Risk):
            raise DeliberateError(f"certify: risk {name!r} is not one of {', '.join(Risk)}")
        risks.append(Risk(name))
    return risks


def _model(cfg: DictConfig, device: torch.device) -> AdaptiveModel:
    model = AdaptiveModel.from_pretrained(
        str(cfg.model), dtype=cfg.dtype, executor=str(cfg.executor), weights=str(cfg.weights)
    )
    if not model.exits.trained:
        layers = ", ".join(map(str, model.exit_config.layers))
        raise DeliberateError(
            f"model={cfg.model}: its exits after layers {layers} are untrained, and a calibration "
            "of them would fit no others: train them with `deliberate train +experiment=heads "
            f"data=self model.path={cfg.model}` and calibrate outputs/heads/model, which it writes"
        )
    return model.to(device)


def calibration_task(cfg: DictConfig) -> Task:
    """Problems of another seed than those of `deliberate eval`, or of the training split."""
    return command_task(cfg, use=seeds.CALIBRATION, size=cfg.size)


def _gate_rounds(
    cfg: DictConfig, model: AdaptiveModel, traces: Traces, rows: NDArray[np.int64]
) -> GateRounds | None:
    """What the gate does to the written solutions of the fitting problems; None without any."""
    if traces.task is None:
        return None
    problems = [traces.task.problems[row] for row in rows]
    context = model.backbone.max_positions or 1 << 30
    tokenizer = checkpoint.load_tokenizer(str(cfg.model))
    encoder = prompt_encoder(cfg, tokenizer, max_tokens=context, template=traces.task.template)
    examples = [encoder.example(problem) for problem in problems if problem.solution]
    kept = [example for example in examples if example is not None]
    if not kept:
        return None
    return record_rounds(
        model, [[*e.prompt, *e.answer] for e in kept], [len(e.prompt) for e in kept]
    )


def _lengths(recording: Recording) -> list[int]:
    """Quantiles of the lengths of the answers; what budgets expect of the first ones."""
    counts = np.bincount(recording.sequence, minlength=recording.num_sequences)
    return [max(1, int(n)) for n in np.quantile(counts, np.linspace(0.05, 0.95, 10))]


def _split(recording: Recording, cfg: DictConfig) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sequence numbers that fit, and those that test."""
    order = np.random.default_rng(cfg.seed).permutation(recording.num_sequences)
    cut = round(cfg.fit_share * len(order))
    if not 0 < cut < len(order):
        raise DeliberateError(
            f"{len(order)} problems at fit_share={cfg.fit_share} leave none to fit or to test: "
            "use more problems, or a fit_share nearer to 0.5"
        )
    return np.sort(order[:cut]), np.sort(order[cut:])


def more_problems(cfg: DictConfig, recording: Recording, error: TooFewError) -> str:
    """The error of a sample that is too small, with what to set: only a share of `size` fits."""
    given = recording.num_sequences
    share = f"of {given} problems {error.sequences} fit calibrators (fit_share={cfg.fit_share:g})"
    # What is too few varies from draw to draw: a tenth more, in round numbers.
    enough = math.ceil(1.1 * given * error.times / 10) * 10
    if cfg.recording is not None:
        return f"{error.problem}; {share}: record about {enough} problems"
    return f"{error.problem}; {share}: use size={max(enough, cfg.size + 10)}"


def _meta(
    cfg: DictConfig,
    recording: Recording,
    fit: Recording,
    held: Recording,
    found: Sequence[tuple[Reliability, dict[str, Reliability]]],
    comparison: Sequence[RuleAtRisk],
    tests: dict[Risk, Testing],
) -> dict[str, Any]:
    """What is written beside the figures, and the figures on held-out problems."""
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    for place in ("out", "resume"):
        config.pop(place)
    config["data"]["dir"] = None  # the file is shared: what was read is named by its hash
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "deliberate": __version__,
        "config": config,
        "config_sha256": json_sha256(config),
        "recorded": dict(recording.meta),
        "lengths": _lengths(recording),
        "fitted": {"sequences": fit.num_sequences, "tokens": len(fit)},
        "held_out": {"sequences": held.num_sequences, "tokens": len(held)},
        "reliability": [
            {
                "layer": layer,
                "overall": overall.to_dict(),
                "groups": {name: each.ece for name, each in groups.items()},
            }
            for layer, (overall, groups) in zip(held.layers, found, strict=True)
        ],
        "comparison": [row.to_dict() for row in comparison],
        "tests": {
            str(risk): [
                {
                    "price": None if math.isinf(test.lambda_) else test.lambda_,
                    **{name: value for name, value in vars(test).items() if name != "lambda_"},
                }
                for test in testing.tests
            ]
            for risk, testing in tests.items()
        },
    }
