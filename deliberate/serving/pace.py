"""How fast this server decodes: the machine's cost model, corrected by the steps that were run."""

from __future__ import annotations

from collections import Counter

from deliberate.cost.model import CostModel

# Weight of the newest step in a mean.
_NEWEST = 0.1
# Prompt tokens from which a step says something about the speed of prompts.
_LEAST_PROMPT = 8


class Pace:
    """Seconds of a prompt and of a token, with so many requests running.

    A mean of the steps so far is kept for each power of two of running requests, and of how many
    these were; between two such points times are interpolated. Where none was
    run yet, the cost model's time is taken, corrected by the ratio at the loads that are known;
    without a cost model the nearest known load's time. None is returned while nothing is known.

    Args:
        cost: measured on this machine, or None.
    """

    def __init__(self, cost: CostModel | None = None) -> None:
        self._cost = cost
        self._tokens: dict[int, float] = {}
        self._running: dict[int, float] = {}
        self._prompt: float | None = None
        self._steps: Counter[int] = Counter()

    def note_step(self, running: int, tokens: int, prefilled: int, seconds: float) -> None:
        """A step was run.

        Args:
            running: requests that it decoded.
            tokens: accepted in it.
            prefilled: tokens of prompts that it ran.
            seconds: that it took.
        """
        if prefilled >= _LEAST_PROMPT:
            decoding = 0.0
            if tokens and running:
                decoding = tokens / running * (self.token_seconds(running) or 0.0)
            per_token = max(seconds - decoding, 0.0) / prefilled
            self._prompt = _mixed(self._prompt, per_token)
        elif not prefilled and tokens and running:
            load = running.bit_length()
            self._steps[load] += 1
            self._tokens[load] = _mixed(self._tokens.get(load), seconds * running / tokens)
            self._running[load] = _mixed(self._running.get(load), running)

    def ratio(self, other: Pace, least: int) -> float | None:
        """A token's time here over the other's, at the loads at which both were measured.

        Args:
            least: steps that make a measured load.

        Returns:
            The mean of the loads, weighted by the steps here; None where there is none.
        """
        both = [
            load
            for load, steps in self._steps.items()
            if steps >= least and other._steps[load] >= least
        ]
        if not both:
            return None
        weights = sum(self._steps[load] for load in both)
        ratios = (self._steps[load] * self._tokens[load] / other._tokens[load] for load in both)
        return sum(ratios) / weights

    def token_seconds(self, running: int) -> float | None:
        """Between two tokens of one request while `running` of them are decoded; from 1."""
        load = max(1, running).bit_length()
        if load in self._tokens:
            return self._interpolated(running, load)
        near = min(self._tokens, key=lambda one: (abs(one - load), one), default=None)
        if self._cost is None:
            return None if near is None else self._tokens[near]
        predicted = self._predicted(running)
        if near is None:
            return predicted
        return predicted * self._tokens[near] / self._predicted((1 << near) - 1)

    def _interpolated(self, running: int, load: int) -> float:
        """Between the means of this load and of the next one that is known."""
        own = self._running[load]
        known = [one for one in self._tokens if (one > load) == (running > own) and one != load]
        if running == own or not known:
            return self._tokens[load]
        other = min(known, key=lambda one: abs(one - load))
        share = (running - own) / (self._running[other] - own)
        return self._tokens[load] + share * (self._tokens[other] - self._tokens[load])

    def prompt_seconds(self, tokens: int) -> float | None:
        """A prompt of so many tokens, run alone."""
        if self._prompt is not None:
            return self._prompt * tokens
        return None if self._cost is None else self._cost.prompt_seconds(tokens)

    def _predicted(self, running: int) -> float:
        """The cost model's time of a dense step of so many sequences."""
        assert self._cost is not None
        layers = sum(
            self._cost.segment_seconds(k, batch=running) for k in range(len(self._cost.segments))
        )
        return self._cost.step + layers + self._cost.head.seconds(running, 1, 0)


def _mixed(mean: float | None, newest: float) -> float:
    return newest if mean is None else mean + _NEWEST * (newest - mean)
