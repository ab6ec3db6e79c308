"""Plausible evaluation records without a model: what the report and the schema are tested on."""

from __future__ import annotations

import random

from deliberate.eval.runner.outcomes import ModeOutcome, ProblemRecord
from deliberate.eval.runner.results import EvaluationResult
from deliberate.eval.runner.summary import summarise

LAYERS = 8
MODES = ("transformers", "dense", "exact", "threshold")
NAMES = ("Mara", "Tom", "Ines", "Oskar", "Lena", "Piet")
THINGS = ("apples", "stamps", "marbles", "tickets", "shells")


def make_records(
    count: int = 40, seed: int = 0, modes: tuple[str, ...] = MODES
) -> list[ProblemRecord]:
    """Word problems of 1-6 steps; exact repeats dense, threshold sometimes errs."""
    rng = random.Random(seed)
    return [_record(rng, index, index % 6 + 1, modes) for index in range(count)]


def make_result(
    records: list[ProblemRecord], name: str = "tiny on word problems", **changes: object
) -> EvaluationResult:
    fields: dict = {
        "name": name,
        "created": "2026-03-01T12:00:00+00:00",
        "task": {
            "name": "word_problems",
            "split": "test",
            "data_sha256": "5f" * 32,
            "problems": len(records),
        },
        "model": {
            "name": "tiny",
            "sha256": "a1" * 32,
            "architecture": "LlamaForCausalLM",
            "num_layers": LAYERS,
            "exits": [2, 4, 6, 8],
            "parameters": 6_291_456,
        },
        "config": {"task": "word_problems", "threshold": 0.9, "max_new_tokens": 256},
        "config_sha256": "c0" * 32,
        "environment": {"python": "3.11.2", "torch": "2.13.0", "cpu": "Xeon", "threads": 2},
        "load": {"before": [0.12, 0.20, 0.31], "after": [1.4, 0.9, 0.5]},
        "warmup_seconds": 1.84,
        "modes": summarise(records, num_layers=LAYERS),
        "notes": [],
    }
    return EvaluationResult(**(fields | changes))


def _record(
    rng: random.Random, index: int, difficulty: int, modes: tuple[str, ...]
) -> ProblemRecord:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    total = rng.randint(5, 40)
    question, lines = f"{name} has {total} {thing}.", []
    for _ in range(difficulty):
        change = rng.randint(2, 30)
        lines.append(f"{total} + {change} = {total + change}\n")
        question += f" Then {name} gets {change} more."
        total += change
    text = "".join(lines) + f"#### {total}"
    right = rng.random() > 0.08 * difficulty
    spoiled = not right or rng.random() < 0.07
    pace = rng.lognormvariate(0, 0.08)
    dense = _pieces(text if right else text[:-1] + str((total + 1) % 10))
    early = _pieces(text[:-1] + str((total + 1) % 10)) if right and spoiled else dense
    outcomes = {
        "transformers": _outcome(rng, dense, total, 5.3 * pace, "none"),
        "dense": _outcome(rng, dense, total, 4.6 * pace, "full"),
        "exact": _outcome(rng, dense, total, 2.5 * pace, "exact"),
        "threshold": _outcome(rng, early, total, 1.9 * pace, "early"),
    }
    return ProblemRecord(
        id=f"word-{index:03d}",
        question=question + f" How many {thing} does {name} have now?",
        answer=str(total),
        source="grammar",
        difficulty=difficulty,
        subject=("gain", "loss", "sharing")[index % 3],
        prompt_tokens=len(question) // 4,
        modes={mode: outcomes[mode] for mode in modes},
    )


def _pieces(text: str) -> list[str]:
    """Single letters, a space at the end of the last letter of its word, then the end token."""
    letters: list[str] = []
    for letter in text:
        if letter == " ":
            letters[-1] += " "
        else:
            letters.append(letter)
    return [*letters, "<|end|>"]


def _outcome(
    rng: random.Random, pieces: list[str], total: int, ms: float, depth: str
) -> ModeOutcome:
    steps = len(pieces) - 1
    layers, confidences = [], []
    for piece in pieces:
        chances = [0.3, 0.25, 0.2, 0.25] if piece[0].isdigit() else [0.7, 0.2, 0.06, 0.04]
        layer = LAYERS if depth in ("none", "full") else rng.choices([2, 4, 6, 8], chances)[0]
        layers.append(layer)
        confidences.append(round(rng.uniform(0.9, 1.0), 4))
    drafted = sum(layer < LAYERS for layer in layers) if depth == "exact" else 0
    passes = {"none": 0, "full": LAYERS * steps, "early": sum(layers[1:])}.get(depth)
    if passes is None:
        passes = int(sum(layers[1:]) * 1.15)
    answer = "".join(pieces[:-1]).split("####")[-1].strip()
    prefill = 0.006 * rng.lognormvariate(0, 0.1)
    return ModeOutcome(
        text="".join(pieces[:-1]),
        predicted=answer,
        correct=answer == str(total),
        tokens=[sum(map(ord, piece)) for piece in pieces],
        pieces=pieces,
        exit_layers=[] if depth == "none" else layers,
        confidences=[] if depth == "none" else confidences,
        seconds=prefill + ms * steps * rng.lognormvariate(0, 0.06) / 1000,
        prefill_seconds=prefill,
        layer_passes=passes,
        layer_positions=LAYERS * steps if depth in ("exact", "full") else passes,
        drafted=drafted,
        rejected=drafted // 25,
    )
