"""How many drafts of a draft layer to verify, from measured times and the layer's own confidence.

A further draft costs the layer's time and one more token in the full-depth pass; it gains a token
where it and all drafts before it are accepted. With the seconds per accepted token of the moment as
the value of a token, another draft pays while

    P(all before are accepted) P(it is accepted) * seconds per token > its cost,

which is the policy with the most tokens per second once that value has converged (Dinkelbach's
method for a ratio). P(accepted) is counted by the confidence of the draft, in tenths, from a prior
that is saved with the layer: the first answer is as well planned as the thousandth.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deliberate.engine.draft_switch import DraftSwitch
from deliberate.kernels.draft_rules import CLASSES, ChainRule, confidence_class
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import build_from

# Classes of confidence, of equal width.
BINS = CLASSES
# Observations that a measured prior weighs as much as.
PRIOR_WEIGHT = 256.0
# Weight of the newest time.
_NEWEST = 0.1
# Observations after which older ones have lost half of their weight.
_MEMORY = 512.0
# After so many passes of a sequence without a draft, one is drafted again; where sequences share
# passes after twice as many each time that it does not pay, up to so many times as many.
_TRY_AGAIN, _LONGER = 16, 16
# A time longer than this many of the usual is an interruption.
_OUTLIER = 4.0


@dataclass(frozen=True)
class DraftPrior:
    """What is known of a draft layer before the first draft.

    Attributes:
        acceptance: by tenth of confidence, share of drafts that full depth accepts.
        shares: by tenth of confidence, share of the drafts; they sum to 1.
        survives: share of chains whose first 1, 2, ... drafts are all accepted (held-out text).
        draft_cost: seconds of one draft, as a share of a full-depth pass over one token.
        token_cost: what one more token adds to a full-depth pass, as a share of it.

    Raises:
        DeliberateError: a value out of range, or not one per class.
    """

    acceptance: tuple[float, ...] = tuple((index + 0.5) / BINS for index in range(BINS))
    shares: tuple[float, ...] = (1.0 / BINS,) * BINS
    survives: tuple[float, ...] = ()
    draft_cost: float = 0.1
    token_cost: float = 0.1

    def __post_init__(self) -> None:
        for name in ("acceptance", "shares", "survives"):
            values = getattr(self, name)
            object.__setattr__(self, name, tuple(float(value) for value in values))
            values = getattr(self, name)
            if name != "survives" and len(values) != BINS:
                raise DeliberateError(
                    f"draft prior: {len(values)} {name}: give {BINS}, one per tenth of confidence"
                )
            if not all(0.0 <= value <= 1.0 for value in values):
                raise DeliberateError(f"draft prior: {name} {values} must be within [0, 1]")
        if not (self.draft_cost > 0 and self.token_cost >= 0):
            raise DeliberateError(
                f"draft prior: draft_cost {self.draft_cost} must be positive and token_cost "
                f"{self.token_cost} at least 0"
            )

    @property
    def time_ratio(self) -> float:
        """Seconds of a token with the best number of drafts over those without; at most 1.

        1 too where it is not known how many drafts survive.
        """
        best, tokens, each = 1.0, 1.0, self.draft_cost + self.token_cost
        for drafts, share in enumerate(self.survives, start=1):
            tokens += share
            best = min(best, (1.0 + drafts * each) / tokens)
        return best

    @classmethod
    def from_observed(
        cls,
        confidences: Sequence[float],
        accepted: Sequence[bool],
        *,
        survives: Sequence[float],
        draft_cost: float,
        token_cost: float,
    ) -> DraftPrior:
        """A prior from drafts on held-out text; classes with few drafts lean on their middle."""
        tried, hits = [0.0] * BINS, [0.0] * BINS
        for confidence, hit in zip(confidences, accepted, strict=True):
            place = confidence_class(confidence)
            tried[place] += 1.0
            hits[place] += hit
        total = sum(tried) or 1.0
        acceptance = [
            (hits[place] + 4.0 * (place + 0.5) / BINS) / (tried[place] + 4.0)
            for place in range(BINS)
        ]
        shares = [one / total for one in tried] if sum(tried) else [1.0 / BINS] * BINS
        return cls(
            acceptance=tuple(acceptance), shares=tuple(shares), survives=tuple(survives),
            draft_cost=draft_cost, token_cost=token_cost,
        )  # fmt: skip

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DraftPrior:
        """Reads what `to_dict` gives.

        Raises:
            DeliberateError: a key or value that does not belong.
        """
        return build_from(cls, dict(raw), "draft prior")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }


class DraftLengths:
    """Running estimates of one draft layer on one model; lives as long as the model.

    Threads may share it: estimates may lose an observation then, never become invalid.

    Args:
        prior: see there.
        most: drafts of one pass at most.
        rows: sequences that share its passes, about; times are one sequence's share.
        weight: observations that the prior's acceptance weighs as much as, in all classes together.

    Attributes:
        most, rows: the same.
        switch: whether the layer drafts.
        lookup_switch: whether drafts are looked up where it does not.
    """

    def __init__(
        self, prior: DraftPrior, most: int, *, rows: int = 1, weight: float = PRIOR_WEIGHT
    ) -> None:
        if most < 1:
            raise DeliberateError(f"draft_tokens {most}: it must be at least 1")
        self.most = most
        self.rows = rows
        self._given, self._weight = prior, weight
        self.switch = DraftSwitch(rows)
        self.lookup_switch = DraftSwitch(rows, self.switch.plain)
        self._loads: dict[int, DraftLengths] = {}
        self._lock = threading.Lock()
        self._tried = [max(1.0, weight * share) for share in prior.shares]
        self._hits = [
            rate * tried for rate, tried in zip(prior.acceptance, self._tried, strict=True)
        ]
        # Of a pass that many share each has a small part, of its own further token all.
        self._prior = dataclasses.replace(prior, token_cost=prior.token_cost * rows)
        self._single: float | None = None  # seconds of a pass over one token
        self._draft: float | None = None  # seconds of one draft
        self._slope: float | None = None  # seconds of one more token in a pass
        self._seconds, self._tokens = 0.0, 0.0  # of passes with drafts
        self._idle = 0
        self._patience = _TRY_AGAIN * rows
        self._most_patience = self._patience * (_LONGER if rows > 1 else 1)

    def of_load(self, rows: int) -> DraftLengths:
        """The estimates of steps that so many sequences share: what a draft costs depends on that.

        There are some for each power of two; those of one sequence are these.
        """
        load = (rows - 1).bit_length()
        if not load:
            return self
        lengths = self._loads.get(load)
        if lengths is None:
            with self._lock:
                made = DraftLengths(self._given, self.most, rows=1 << load, weight=self._weight)
                lengths = self._loads.setdefault(load, made)
        return lengths

    def accepts(self, confidence: float) -> float:
        """Probability that a draft of this confidence is accepted."""
        place = confidence_class(confidence)
        return self._hits[place] / self._tried[place]

    @property
    def mean_acceptance(self) -> float:
        """Probability that a draft whose confidence is not known yet is accepted."""
        return sum(self._hits) / sum(self._tried)

    @property
    def seconds_per_token(self) -> float:
        """Of exact decoding with these drafts, in units of a pass over one token until measured."""
        single = self._single or 1.0
        if self._tokens >= 8.0:
            return min(self._seconds / self._tokens, single)
        a = self.mean_acceptance
        drafts = 3
        tokens = 1.0 + sum(a**k for k in range(1, drafts + 1))
        return min(single, (single + drafts * (self.draft_seconds + self._token_seconds)) / tokens)

    @property
    def draft_seconds(self) -> float:
        """Of one draft; a share of a pass until measured."""
        if self._draft is not None:
            return self._draft
        return self._prior.draft_cost * (self._single or 1.0)

    @property
    def _token_seconds(self) -> float:
        if self._slope is not None:
            return self._slope
        return self._prior.token_cost * (self._single or 1.0)

    def begin(self) -> bool:
        """Whether the next pass should have a draft at all, where the switch is on."""
        if self.pays:
            self._idle, self._patience = 0, min(self._patience, _TRY_AGAIN * self.rows)
            return True
        self._idle += 1
        if self._idle < self._patience:
            return False
        self._idle, self._patience = 0, min(2 * self._patience, self._most_patience)
        return True

    def rule(self, limit: int, *, always: bool = False) -> ChainRule:
        """How far the next chains of drafts go, by what is known now.

        Args:
            limit: drafts at most.
            always: they go to their limit, whatever that is worth.
        """
        accepts = tuple(hits / tried for hits, tried in zip(self._hits, self._tried, strict=True))
        if always:
            return ChainRule(accepts, 0.0, -1.0, 0.0, -1.0, limit)
        value, token = self.seconds_per_token, self._token_seconds
        return ChainRule(
            accepts,
            token_value=value,
            token_cost=token,
            draft_value=self.mean_acceptance * value,
            draft_cost=self.draft_seconds + token,
            limit=limit,
        )

    @property
    def pays(self) -> bool:
        """Whether a draft is worth making, before its confidence is known."""
        cost = self.draft_seconds + self._token_seconds
        return self.mean_acceptance * self.seconds_per_token > cost

    @property
    def single(self) -> float | None:
        """Seconds of a pass over one token; None until measured."""
        return self._single

    def expect_token(self, share: float) -> None:
        """One more token in a pass takes this share of a sequence's part of it, until measured."""
        self._prior = dataclasses.replace(self._prior, token_cost=share)

    def note_draft(self, seconds: float) -> None:
        """One draft took so long."""
        with self._lock:
            if self._draft is None or seconds < _OUTLIER * self._draft:
                self._draft = _blend(self._draft, seconds)

    def note_single(self, seconds: float) -> None:
        """A pass over the newest token alone took so long."""
        with self._lock:
            if self._single is None or seconds < _OUTLIER * self._single:
                self._single = _blend(self._single, seconds)

    def note_time(self, seconds: float, tokens: int) -> None:
        """Drafts and the pass that verified them took so long and gave so many tokens."""
        with self._lock:
            usual = self._seconds / self._tokens if self._tokens else seconds
            if seconds > 8.0 * usual * (tokens + 1):
                return  # an interruption, not a cost
            if self._tokens > _MEMORY / 2:
                self._seconds, self._tokens = self._seconds / 2, self._tokens / 2
            self._seconds += seconds
            self._tokens += tokens

    def note_pass(self, confidences: Sequence[float], accepted: int, pass_seconds: float) -> None:
        """A full-depth pass verified drafts of these confidences, and accepted so many."""
        with self._lock:
            for index, confidence in enumerate(confidences[: accepted + 1]):
                place = confidence_class(confidence)
                if self._tried[place] > _MEMORY:
                    self._tried[place] /= 2
                    self._hits[place] /= 2
                self._tried[place] += 1.0
                self._hits[place] += index < accepted
            if self._single is None:
                # No pass without drafts yet: its time follows from the prior's cost of a token.
                self._single = pass_seconds / (1 + self._prior.token_cost * len(confidences))
            if pass_seconds > _OUTLIER * self._single * (len(confidences) + 1):
                return  # an interruption, not a cost
            extra = max(0.0, pass_seconds - self._single) / max(1, len(confidences))
            self._slope = _blend(self._slope, extra)


def _blend(before: float | None, newest: float) -> float:
    return newest if before is None else before + _NEWEST * (newest - before)
