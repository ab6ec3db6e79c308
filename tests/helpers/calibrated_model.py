"""A small model with a calibration and a cost model of its own, for tests of what is promised."""

from __future__ import annotations

from tiny_models import random_ids

LAYER = 1e-3  # seconds, of the made-up cost model
NEW = 24
PROMPT = 12


def generate(model, **how):
    return model.generate(
        random_ids(PROMPT), max_new_tokens=NEW, return_dict_in_generate=True, **how
    )


class Ticking:
    """A clock that a test sets: so many seconds at every reading."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now = seconds, 0.0

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now
