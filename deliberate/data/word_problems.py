"""A seeded grammar of arithmetic word problems with a known number of steps.

A problem is a chain of events; every event is one arithmetic step with one sentence in the
question and one line in the solution, so `difficulty` is the number of steps by construction.
Train and test are disjoint for any seeds: a hash of the question text decides the split of a
problem, and the generator of one split discards problems of the other.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from deliberate.data.problem import Problem
from deliberate.utils.errors import DeliberateError

MIN_STEPS, MAX_STEPS = 1, 6
SPLITS = ("train", "test")


def _listed(names: str) -> tuple[str, ...]:
    return tuple(names.split())


_PEOPLE = _listed(
    "Ada Ben Cora Dan Ella Finn Gina Hugo Iris Jack Kira Leo Mia Noah Olga Paul Rosa Sam Tara Uma "
    "Vera Will Yara Zane"
)
_THINGS = _listed(
    "apples books cards coins shells stamps marbles pencils stickers cookies plums buttons balls "
    "beads nuts roses"
)
_BOXES = _listed("boxes bags baskets jars crates packs")
_GOODS = _listed("notebook lamp shirt ticket cake kite mug puzzle")
_WORK = (
    ("reads", "pages"),
    ("plants", "trees"),
    ("paints", "fences"),
    ("folds", "cranes"),
    ("washes", "plates"),
    ("sews", "masks"),
)


@dataclass(frozen=True)
class _Step:
    """One event: its sentence in the question, its line in the solution, the value after it."""

    sentence: str
    line: str
    value: int


def split_of(question: str) -> str:
    """The split that a question belongs to: one in eight is `test`, by SHA-256 of its text."""
    digest = hashlib.sha256(question.strip().lower().encode()).digest()
    return "test" if digest[0] % 8 == 0 else "train"


def _add(a: int, b: int) -> str:
    return f"{a} + {b} = {a + b}"


def _subtract(a: int, b: int) -> str:
    return f"{a} - {b} = {a - b}"


def _multiply(a: int, b: int) -> str:
    return f"{a} * {b} = {a * b}"


def _divide(a: int, b: int) -> str:
    return f"{a} / {b} = {a // b}"


def _divisor(rng: random.Random, value: int) -> int | None:
    """A one-digit divisor of `value` that leaves at least 2, or None where there is none."""
    found = [d for d in range(2, 10) if value % d == 0 and value // d >= 2]
    return rng.choice(found) if found else None


def _collection_step(rng: random.Random, who: str, thing: str, value: int) -> _Step:
    """One thing that happens to a collection of `value` things."""
    kinds = ["gain", "gain", "boxes"]
    if value >= 4:
        kinds += ["lose", "lose", "used"]
    if value <= 60:
        kinds += ["times"]
    divisor = _divisor(rng, value)
    if divisor is not None:
        kinds += ["share"]
    kind = rng.choice(kinds)
    if kind == "gain":
        k = rng.randint(2, 49)
        other = rng.choice([p for p in _PEOPLE if p != who])
        sentence, cause = rng.choice(
            (
                (f"{who} buys {k} more {thing}.", f"After buying {k} more"),
                (f"{other} gives {who} {k} {thing}.", f"With {k} from {other}"),
                (f"Then {who} finds {k} {thing}.", f"After finding {k}"),
            )
        )
        return _Step(sentence, f"{cause}, {who} has {_add(value, k)} {thing}.", value + k)
    if kind == "lose":
        k = rng.randint(1, min(value - 1, 49))
        other = rng.choice([p for p in _PEOPLE if p != who])
        sentence, cause = rng.choice(
            (
                (f"{who} gives {k} {thing} to {other}.", f"After giving {k} to {other}"),
                (f"{who} loses {k} {thing}.", f"After losing {k}"),
                (f"Then {who} sells {k} of the {thing}.", f"After selling {k}"),
            )
        )
        return _Step(sentence, f"{cause}, {who} has {_subtract(value, k)} {thing}.", value - k)
    if kind == "used":
        k = rng.randint(1, min(value - 1, 20))
        sentence = f"{k} of the {thing} are broken and thrown away."
        return _Step(sentence, f"Without {k}, {_subtract(value, k)} {thing} are left.", value - k)
    if kind == "boxes":
        boxes, each = rng.randint(2, 9), rng.randint(2, 9)
        box = rng.choice(_BOXES)
        # Two operations in one event would hide a step: the total of the boxes is stated.
        k = boxes * each
        sentence = f"{who} gets {boxes} {box} that hold {k} {thing} in all."
        return _Step(sentence, f"With the {box}, {who} has {_add(value, k)} {thing}.", value + k)
    if kind == "times":
        k, word = rng.choice(((2, "doubles"), (3, "triples")))
        sentence = f"Then the number of {thing} {word}."
        line = f"It {word}, so {who} has {_multiply(value, k)} {thing}."
        return _Step(sentence, line, value * k)
    assert divisor is not None  # "share" is offered only with a divisor
    sentence = f"{who} shares all {thing} equally among {divisor} people and takes one share."
    line = f"One share of {divisor} is {_divide(value, divisor)} {thing}."
    return _Step(sentence, line, value // divisor)


def _collection(rng: random.Random, steps: int) -> tuple[str, str, int]:
    """One person's things gain, shrink, multiply and are shared."""
    who, thing = rng.choice(_PEOPLE), rng.choice(_THINGS)
    value = rng.randint(3, 60)
    sentences, lines = [f"{who} has {value} {thing}."], []
    for _ in range(steps):
        step = _collection_step(rng, who, thing, value)
        sentences.append(step.sentence)
        lines.append(step.line)
        value = step.value
    ask = rng.choice(
        (f"How many {thing} does {who} have now?", f"How many {thing} does {who} have in the end?")
    )
    return " ".join([*sentences, ask]), "\n".join(lines), value


def _comparison(rng: random.Random, steps: int) -> tuple[str, str, int]:
    """A chain of people, each compared with the one before; the sentences may be shuffled."""
    people = rng.sample(_PEOPLE, steps + 1)
    thing = rng.choice(_THINGS)
    value = rng.randint(4, 60)
    facts, lines = [f"{people[0]} has {value} {thing}."], []
    for before, who in pairwise(people):
        kinds = ["more"]
        if value >= 4:
            kinds += ["fewer"]
        if value <= 60:
            kinds += ["times"]
        if value % 2 == 0 and value >= 4:
            kinds += ["half"]
        kind = rng.choice(kinds)
        if kind == "more":
            k = rng.randint(1, 39)
            facts.append(f"{who} has {k} more {thing} than {before}.")
            work, value = _add(value, k), value + k
        elif kind == "fewer":
            k = rng.randint(1, min(value - 1, 39))
            facts.append(f"{who} has {k} fewer {thing} than {before}.")
            work, value = _subtract(value, k), value - k
        elif kind == "times":
            k = rng.randint(2, 4)
            word = {2: "twice", 3: "three times", 4: "four times"}[k]
            facts.append(f"{who} has {word} as many {thing} as {before}.")
            work, value = _multiply(value, k), value * k
        else:
            facts.append(f"{who} has half as many {thing} as {before}.")
            work, value = _divide(value, 2), value // 2
        lines.append(f"{who} has {work} {thing}.")
    if rng.random() < 0.3:
        rng.shuffle(facts)
    question = " ".join([*facts, f"How many {thing} does {people[-1]} have?"])
    return question, "\n".join(lines), value


def _shopping(rng: random.Random, steps: int) -> tuple[str, str, int]:
    """Money: earned, spent on several goods of one price, given and doubled."""
    who = rng.choice(_PEOPLE)
    value = rng.randint(10, 120)
    sentences, lines = [f"{who} has ${value}."], []
    left = steps
    while left:
        kinds = ["earn", "spend"] if value >= 6 else ["earn"]
        if left >= 2 and value >= 24:
            kinds += ["buy", "buy"]
        if left >= 2:
            kinds += ["work", "work"]
        kind = rng.choice(kinds)
        if kind == "earn":
            k = rng.randint(2, 49)
            sentences.append(rng.choice((f"{who} earns ${k}.", f"{who} gets ${k} as a gift.")))
            lines.append(f"With ${k} more, {who} has {_add(value, k)} dollars.")
            value, left = value + k, left - 1
        elif kind == "spend":
            k = rng.randint(2, min(value - 1, 49))
            good = rng.choice(_GOODS)
            sentences.append(f"{who} buys a {good} for ${k}.")
            lines.append(f"After paying ${k}, {who} has {_subtract(value, k)} dollars.")
            value, left = value - k, left - 1
        elif kind == "buy":
            count = rng.randint(2, 9)
            price = rng.randint(2, max(2, min(9, (value - 1) // count)))
            good = rng.choice(_GOODS)
            cost = count * price
            if cost >= value:
                continue
            sentences.append(f"{who} buys {count} {good}s for ${price} each.")
            lines.append(f"The {good}s cost {_multiply(count, price)} dollars.")
            lines.append(f"After paying ${cost}, {who} has {_subtract(value, cost)} dollars.")
            value, left = value - cost, left - 2
        else:
            hours, wage = rng.randint(2, 9), rng.randint(3, 12)
            pay = hours * wage
            sentences.append(f"{who} works {hours} hours for ${wage} an hour.")
            lines.append(f"{who} earns {_multiply(hours, wage)} dollars.")
            lines.append(f"With ${pay} more, {who} has {_add(value, pay)} dollars.")
            value, left = value + pay, left - 2
    question = " ".join([*sentences, f"How many dollars does {who} have now?"])
    return question, "\n".join(lines), value


def _work(rng: random.Random, steps: int) -> tuple[str, str, int]:
    """Work at a daily rate that changes, summed over several days."""
    who = rng.choice(_PEOPLE)
    verb, thing = rng.choice(_WORK)
    rate, days = rng.randint(2, 12), rng.randint(2, 9)
    value = rate * days
    sentences = [f"{who} {verb} {rate} {thing} a day for {days} days."]
    lines = [f"In {days} days {who} does {_multiply(rate, days)} {thing}."]
    left = steps - 1
    while left:
        kinds = ["extra"]
        if left >= 2:
            kinds += ["more", "more"]
        if value >= 4:
            kinds += ["undo"]
        kind = rng.choice(kinds)
        if kind == "extra":
            k = rng.randint(2, 39)
            helper = rng.choice([p for p in _PEOPLE if p != who])
            sentences.append(f"{helper} {verb} {k} more {thing}.")
            lines.append(f"With {k} from {helper} it is {_add(value, k)} {thing}.")
            value, left = value + k, left - 1
        elif kind == "undo":
            k = rng.randint(1, min(value - 1, 29))
            sentences.append(f"{k} of the {thing} do not count.")
            lines.append(f"Without {k} it is {_subtract(value, k)} {thing}.")
            value, left = value - k, left - 1
        else:
            rate, days = rng.randint(2, 12), rng.randint(2, 9)
            k = rate * days
            sentences.append(f"Then {who} {verb} {rate} {thing} a day for {days} days.")
            lines.append(f"In {days} days {who} does {_multiply(rate, days)} {thing}.")
            lines.append(f"Together it is {_add(value, k)} {thing}.")
            value, left = value + k, left - 2
    question = " ".join([*sentences, f"How many {thing} count in all?"])
    return question, "\n".join(lines), value


_FAMILIES: dict[str, Callable[[random.Random, int], tuple[str, str, int]]] = {
    "collection": _collection,
    "comparison": _comparison,
    "shopping": _shopping,
    "work": _work,
}
FAMILIES = tuple(_FAMILIES)


def word_problem(rng: random.Random, steps: int) -> Problem:
    """Draws one problem of exactly `steps` arithmetic steps, of any split.

    Raises:
        DeliberateError: `steps` outside 1..6.
    """
    if not MIN_STEPS <= steps <= MAX_STEPS:
        raise DeliberateError(
            f"steps is {steps}: the grammar makes problems of {MIN_STEPS} to {MAX_STEPS} steps"
        )
    family = rng.choice(FAMILIES)
    question, work, value = _FAMILIES[family](rng, steps)
    key = hashlib.sha256(question.encode()).hexdigest()[:12]
    return Problem(
        id=f"words/{key}",
        question=question,
        answer=str(value),
        solution=f"{work}\n#### {value}",
        source="words",
        difficulty=steps,
        subject=family,
    )


def draw_in_split(
    rng: random.Random, split: str, draw: Callable[[random.Random], Problem]
) -> Problem:
    """Draws from `draw` until a problem belongs to `split` (at most 8 tries on average)."""
    if split not in SPLITS:
        raise DeliberateError(f"split is {split!r}: it is one of {', '.join(SPLITS)}")
    while True:
        problem = draw(rng)
        if split_of(problem.question) == split:
            return problem


def distinct_problems(
    draw: Callable[[random.Random, int], Problem],
    seed: str,
    split: str,
    size: int,
    steps: tuple[int, int],
) -> Iterator[Problem]:
    """Yields `size` problems of a split with distinct questions, steps cycling evenly.

    Args:
        draw: a problem from a generator and its number of steps.
        seed: of the generator; one problem set is one seed.
        steps: least and most.
    """
    low, high = steps
    rng = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < size:
        wanted = low + len(seen) % (high - low + 1)
        problem = draw_in_split(rng, split, lambda r, n=wanted: draw(r, n))  # type: ignore[misc]
        if problem.question not in seen:
            seen.add(problem.question)
            yield problem


def word_problems(
    split: str, *, size: int, seed: int = 0, steps: tuple[int, int] = (MIN_STEPS, MAX_STEPS)
) -> Iterator[Problem]:
    """Yields `size` distinct problems of a split, steps cycling evenly through the range."""
    yield from distinct_problems(word_problem, f"words:{split}:{seed}", split, size, steps)
