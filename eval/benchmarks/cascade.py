"""`deliberate bench cascade`: what a small model in front of a large one gains.

Both models answer some problems, on which the small one's confidence is calibrated, and others,
which certify from which confidence on its answers are taken. More problems are answered by either
model alone and by the cascade in turn. A control hands over as many problems at random.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from deliberate.api import checkpoint
from deliberate.api.cascade import Cascade, answer_logprobs
from deliberate.api.model import AdaptiveModel
from deliberate.calibration.calibrator import Calibrator
from deliberate.calibration.cascade import (
    MEASURES,
    CascadeCalibration,
    CascadeRecord,
    answer_confidence,
    fit_cascade,
)
from deliberate.config import check_guarantee
from deliberate.data import seeds
from deliberate.eval.benchmarks.harness import (
    UNBOUNDED,
    BenchRequest,
    Clock,
    Session,
    check_clock,
    encode_requests,
    grade_texts,
    interleaved,
    load_model,
    table_console,
    timed,
)
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.eval.statistics import paired_accuracy, ratio_of_sums
from deliberate.eval.tasks.prompts import prompt_encoder
from deliberate.eval.tasks.registry import VERBATIM, command_task
from deliberate.eval.tasks.task import Task
from deliberate.export.draft import export_draft
from deliberate.policies.cascade import Model
from deliberate.utils.checks import all_at_least, one_of
from deliberate.utils.errors import DeliberateError

LARGE, EXACT, SMALL = "large, dense", "large, exact", "small"
CASCADE, CASCADE_EXACT = "cascade", "cascade, large exact"
WIDTH = 110


@dataclass
class Answered:
    """One variant's answers, one entry a problem.

    Attributes:
        texts: of the answers.
        seconds: that they took.
        handed_over: whether the large model answered.
        right: once they are graded.
    """

    texts: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    handed_over: list[bool] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench cascade`` with overrides of `configs/bench_cascade.yaml`.

    Raises:
        DeliberateError: settings that cannot work, or models that no cascade can be made of.
    """
    cfg = bench_config(
        "bench_cascade", arguments, verbatim=(*VERBATIM, "model", "small", "save", "out")
    )
    all_at_least(cfg, {"fit": 20, "test": 1, "problems": 2, "warmup": 0, "threads": 1, "exit": 1})
    one_of("measure", cfg.measure, MEASURES)
    check_guarantee(cfg.epsilon, cfg.delta)
    for share in cfg.budgets:
        if not share > 0:
            raise DeliberateError(f"budgets={list(cfg.budgets)} must be numbers above 0")
    clock = check_clock(cfg)
    session = Session("cascade", arguments, cfg.threads)
    with small_model(cfg) as small:
        setup = _Setup(cfg, load_model(cfg), small)
        fitting, testing = setup.record(0, cfg.fit), setup.record(cfg.fit, cfg.test)
        calibration, tests = setup.fit(fitting, testing)
        if cfg.save is not None:
            calibration.save(Path(str(cfg.save)).expanduser())
        done = setup.compare(calibration, clock)
    session.end()
    console = table_console(WIDTH)
    console.print(curve_line(calibration, fitting))
    if tests.certified is None:
        console.print(tests.refusal(), soft_wrap=True)
    show(done, console, f"{cfg.model}: {cfg.problems} problems")
    console.print(session.line(str(cfg.clock)))
    record = {
        "settings": OmegaConf.to_container(cfg),
        "threshold": None if tests.certified is None else calibration.threshold,
        "observed": calibration.observed,
        "tests": [asdict(one) for one in tests.tests],
        "variants": {name: asdict(one) for name, one in done.items()},
    }
    session.write(cfg.out, record)


@contextmanager
def small_model(cfg: DictConfig) -> Iterator[AdaptiveModel]:
    """``cfg.small``, or an exit of the large model as a model of its own.

    Raises:
        DeliberateError: the large model has no such exit.
    """
    if cfg.small is not None:
        yield AdaptiveModel.from_pretrained(str(cfg.small), executor=str(cfg.executor)).eval()
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small"
        export_draft(str(cfg.model), path, layer=int(cfg.exit))
        yield AdaptiveModel.from_pretrained(path, executor=str(cfg.executor)).eval()


class _Setup:
    """Both models, and the problems in their prompts."""

    def __init__(self, cfg: DictConfig, large: AdaptiveModel, small: AdaptiveModel) -> None:
        self.cfg, self.large, self.small = cfg, large.eval(), small
        self.tokenizer = checkpoint.load_tokenizer(str(cfg.model))
        count = cfg.fit + cfg.test + cfg.problems + cfg.warmup
        self.task: Task = command_task(cfg, use=seeds.EVALUATION, size=count)
        encoder = prompt_encoder(
            cfg, self.tokenizer, max_tokens=UNBOUNDED, template=self.task.template
        )
        self.requests = encode_requests(self.task, encoder, large.backbone.max_positions, warmup=0)
        if len(self.requests) < count:
            raise DeliberateError(
                f"{len(self.requests)} problems fit the context: lower fit, test or problems, "
                f"which need {count}"
            )
        # Problems come by difficulty where a task orders them: parts must be alike.
        order = torch.randperm(count, generator=torch.Generator().manual_seed(cfg.seed))
        self.requests = [self.requests[int(one)] for one in order]

    def decode(self, model: AdaptiveModel, request: BenchRequest, fidelity: str) -> list[int]:
        """Tokens of the greedy answer."""
        ids = torch.tensor([request.prompt], device=model.device)
        limit = self.task.max_new_tokens
        made = model.generate(ids, max_new_tokens=limit, do_sample=False, fidelity=fidelity)
        return [int(one) for one in made[0, len(request.prompt) :]]

    def record(self, first: int, count: int) -> CascadeRecord:
        """Both models' answers to some problems."""
        requests = self.requests[first : first + count]
        confidence: list[float] = []
        texts: dict[str, list[str | None]] = {SMALL: [], LARGE: []}
        for request in requests:
            tokens = self.decode(self.small, request, "dense")
            logprobs = answer_logprobs(self.small, request.prompt, tokens)
            confidence.append(answer_confidence(logprobs, self.cfg.measure))
            texts[SMALL].append(self.text(tokens))
            texts[LARGE].append(self.text(self.decode(self.large, request, "dense")))
        right = self.grade(requests, texts)
        return CascadeRecord(confidence, right[SMALL], right[LARGE])  # type: ignore[arg-type]

    def fit(self, fitting: CascadeRecord, testing: CascadeRecord) -> tuple[CascadeCalibration, Any]:
        """Curve and certificate."""
        return fit_cascade(
            fitting,
            testing,
            measure=self.cfg.measure,
            epsilon=self.cfg.epsilon,
            delta=self.cfg.delta,
            small=self.small.fingerprints()[0],
            large=self.large.fingerprints()[0],
            max_new_tokens=self.task.max_new_tokens,
            task=self.task.name,
        )

    def compare(self, calibration: CascadeCalibration, clock: Clock) -> dict[str, Answered]:
        """Further problems by every variant in turn."""
        plain = {LARGE: (self.large, "dense"), EXACT: (self.large, "exact")}
        plain[SMALL] = (self.small, "dense")
        budgets = {f"cascade, {share:g} of the time": float(share) for share in self.cfg.budgets}
        cascades = {
            name: Cascade(self.small, self.large, calibration, fidelity=how, clock=clock)
            for name, how in (
                (CASCADE, "dense"),
                (CASCADE_EXACT, "exact"),
                *((name, "dense") for name in budgets),
            )
        }
        done = {name: Answered() for name in (*plain, *cascades)}
        requests = self.requests[self.cfg.fit + self.cfg.test :]
        large_seconds: list[float] = []
        for turn, request, name in interleaved(
            requests, list(done), warmup=self.cfg.warmup, title="bench cascade"
        ):
            if name in plain:
                model, fidelity = plain[name]
                tokens, seconds = timed(
                    lambda m=model, r=request, f=fidelity: self.decode(m, r, f),  # type: ignore[misc]
                    clock,
                )
                by = Model.SMALL if name == SMALL else Model.LARGE
                if name == LARGE:
                    large_seconds.append(seconds)
            else:
                mean = None
                if name in budgets and large_seconds:
                    spent = sum(large_seconds) / len(large_seconds)
                    mean = 1000 * budgets[name] * spent
                one = cascades[name].answer(request.prompt, mean_ms=mean)
                tokens, seconds, by = list(one.tokens), one.seconds, one.by
            if turn.counted:
                own = done[name]
                own.texts.append(self.text(tokens))
                own.seconds.append(seconds)
                own.handed_over.append(by is Model.LARGE)
        texts = {name: own.texts for name, own in done.items()}
        for name, right in self.grade(requests[self.cfg.warmup :], texts).items():
            done[name].right = right
        return done

    def text(self, tokens: Sequence[int]) -> str:
        """Of an answer."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def grade(
        self, requests: Sequence[BenchRequest], texts: Mapping[str, Sequence[str | None]]
    ) -> dict[str, list[bool]]:
        """Whether each variant's answers are right."""
        problems = [one.problem for one in requests]
        return grade_texts(self.task, problems, texts, self.cfg.graders)


def curve_line(calibration: CascadeCalibration, record: CascadeRecord) -> str:
    """What was fitted and certified, in one line."""
    calibrator: Calibrator = calibration.calibrator
    found = calibrator(record.confidence)
    return (
        f"small right {record.small_right.mean():.1%}, large {record.large_right.mean():.1%} of "
        f"{len(found)}; probability that a small answer loses nothing {found.min():.2f} to "
        f"{found.max():.2f}; taken from {calibration.threshold:g} on: loss "
        f"{calibration.observed:.3f} of {calibration.n} (epsilon {calibration.epsilon:g}, delta "
        f"{calibration.delta:g})"
    )


def control(done: Mapping[str, Answered], name: str, large: str) -> tuple[float, float]:
    """Accuracy and mean seconds where as many problems as in a variant went to the large model, at
    random."""
    share = sum(done[name].handed_over) / len(done[name].handed_over)
    means = {
        one: (sum(done[one].right) / len(done[one].right), sum(done[one].seconds))
        for one in (SMALL, large)
    }
    count = len(done[name].seconds)
    right = (1 - share) * means[SMALL][0] + share * means[large][0]
    return right, (means[SMALL][1] + share * means[large][1]) / count


def show(done: Mapping[str, Answered], console: Any, title: str) -> None:
    """The table: every variant against the large model alone, and its random control."""
    table = Table(title=title)
    for name in ("variant", "right", "at random", "to large", "ms", "faster", "against large"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    base = done[LARGE]
    for name, own in done.items():
        ratio = ratio_of_sums(base.seconds, own.seconds)
        within = ratio.interval
        spread = "" if within is None else f" [{within.low:.2f}, {within.high:.2f}]"
        paired = paired_accuracy(own.right, base.right)
        limits = paired.interval
        chance = ""
        if name not in (LARGE, EXACT, SMALL):
            chance = f"{control(done, name, EXACT if name == CASCADE_EXACT else LARGE)[0]:.1%}"
        table.add_row(
            name,
            f"{sum(own.right) / len(own.right):.1%}",
            chance,
            f"{sum(own.handed_over) / len(own.right):.0%}",
            f"{1000 * sum(own.seconds) / len(own.right):.2f}",
            f"{ratio.value:.2f}x{spread}",
            f"{100 * paired.difference:+.1f} [{100 * limits.low:+.1f}, {100 * limits.high:+.1f}]",
        )
    console.print(table)
