"""Certificates: with probability at least 1 - delta over calibration draws, risk <= epsilon.

Learn then Test (Angelopoulos, Bates, Candes, Jordan and Lei, 2021): "the risk at this lambda
exceeds epsilon" is tested for one lambda after another, from the largest on, each at level delta.
Testing stops at the first that is not rejected, and the one before it is certified. To test all of
them and take the smallest that passes would not meet the guarantee: with many tries, one that is
too risky passes by luck.

The policy must not have been fitted on the problems that certify it, and these must be
independent draws of the traffic that the guarantee is for: one loss per problem, never per token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

from deliberate.calibration.conditions import conditions_sha256, problem, prompt_problem
from deliberate.calibration.exit_traces import Recording, replay
from deliberate.config import Risk, as_risk, check_guarantee
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import OrInfinity, build_from, file_key, read_json

# Keys of the file that earlier releases wrote under other names than the fields have today.
FILE_KEYS = {"lambda_": "price", "gate_threshold": "band"}


@dataclass(frozen=True)
class Tested:
    """One hypothesis test: at `lambda_` the mean of `n` losses was `mean`; `p_value` of "risk >
    epsilon"; whether it was rejected at delta."""

    lambda_: float
    n: int
    mean: float
    p_value: float
    rejected: bool


@dataclass(frozen=True)
class Testing:
    """A run of fixed-sequence tests.

    Attributes:
        tests: in order; only the last can be not rejected.
        epsilon, delta: the guarantee that was tested.
    """

    tests: tuple[Tested, ...]
    epsilon: float
    delta: float

    @property
    def certified(self) -> Tested | None:
        """The last rejected test, of the smallest lambda that is certified; None without one."""
        passed = [test for test in self.tests if test.rejected]
        return passed[-1] if passed else None

    def refusal(self) -> str:
        """Why there is no certificate, and the number of problems that could give one."""
        first = self.tests[0]
        least = problems_needed(self.epsilon, self.delta, 0.0)
        text = (
            f"no certificate for epsilon={self.epsilon:g}, delta={self.delta:g}: at the most "
            f"careful lambda the mean loss of {first.n} problems is {first.mean:.2g} (p = "
            f"{first.p_value:.2g})"
        )
        if first.mean >= self.epsilon:
            return f"{text}; it is not below epsilon, so more problems would not help"
        enough = problems_needed(self.epsilon, self.delta, first.mean)
        return (
            f"{text}; at this rate about {enough} problems are needed, and never fewer than {least}"
        )


@dataclass(frozen=True)
class Certificate:
    """A lambda with a guarantee, bound to what it was tested with.

    Attributes:
        risk: what is bounded.
        epsilon, delta: the guarantee.
        n: problems it was tested on.
        observed: mean loss on them at this lambda.
        lambda_, thresholds: the certified policy; infinity: no token exits there.
        disagreement: share of disagreeing tokens per answer up to which traffic is like that of
            the certificate; what `drift.DriftMonitor` watches.
        weights, exits, policy, data: SHA-256 of the base weights, the exits, the policy table and
            the problems.
        conditions: whatever else the losses depend on (task, prompt, length limit, sampling, ...),
            by the names of `deliberate.calibration.conditions`, JSON-ready.
        created: ISO time.
        band: `think_below` of the deliberation gate; None: the gate's own, or no gate.
    """

    risk: Risk
    epsilon: float
    delta: float
    n: int
    observed: float
    lambda_: Annotated[OrInfinity, file_key("price")]
    thresholds: tuple[OrInfinity, ...]
    disagreement: float
    weights: str
    exits: str
    policy: str
    data: str
    conditions: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""
    gate_threshold: Annotated[float | None, file_key("band")] = None
    conditions_sha256: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "risk", as_risk(self.risk))
        object.__setattr__(self, "thresholds", tuple(float(t) for t in self.thresholds))
        check_guarantee(self.epsilon, self.delta)
        if self.n < 1:
            raise DeliberateError(f"certificate: n={self.n} must be at least 1 problem")
        if math.isnan(self.lambda_) or self.lambda_ < 0:
            raise DeliberateError(f"certificate: lambda {self.lambda_} must be 0 or more")
        if not all(threshold >= 0 for threshold in self.thresholds):  # NaN is not either
            raise DeliberateError(
                f"certificate: thresholds {list(self.thresholds)} must be 0 or more; infinity "
                "(null in the file) = never exit there"
            )
        if not 0.0 <= self.observed <= 1.0:
            raise DeliberateError(f"certificate: observed {self.observed} outside [0, 1]")
        if not 0.0 < self.disagreement < 1.0:
            raise DeliberateError(f"certificate: disagreement {self.disagreement} outside (0, 1)")
        if self.conditions_sha256 and self.conditions_sha256 != conditions_sha256(self.conditions):
            raise DeliberateError(
                "the certificate's conditions are not those of its hash: the file was edited; "
                "calibrate again"
            )

    def check(
        self,
        *,
        weights: str | None = None,
        exits: str | None = None,
        policy: str | None = None,
        data: str | None = None,
        conditions: Mapping[str, Any] | None = None,
        prompts: Iterable[Sequence[int]] = (),
    ) -> None:
        """Raises unless everything given is what the certificate was made for.

        Args:
            conditions: by the names of `deliberate.calibration.conditions`.
            prompts: token ids of each, padding removed.

        Raises:
            DeliberateError: names the first thing that differs.
        """
        given = {"weights": weights, "exits": exits, "policy": policy, "data": data}
        for name, found in given.items():
            stated = getattr(self, name)
            if found is not None and found != stated:
                raise DeliberateError(
                    f"the certificate is for other {name} ({stated[:12]}... stated, "
                    f"{found[:12]}... loaded): calibrate again"
                )
        differs = problem(self.conditions, conditions or {})
        differs = differs or prompt_problem(self.conditions, prompts)
        if differs is not None:
            raise DeliberateError(differs)

    def check_numbers(self) -> None:
        """Raises unless the loss that was observed on n problems supports epsilon and delta.

        Raises:
            DeliberateError: it does not, so one of the numbers was changed.
        """
        if math.isinf(self.lambda_):
            return  # full depth loses nothing, whatever the problems
        if self.risk is Risk.TOKEN:
            p_value = hoeffding_bentkus_p_value(self.observed, self.n, self.epsilon)
        else:
            p_value = binomial_p_value(round(self.observed * self.n), self.n, self.epsilon)
        if not p_value <= self.delta:
            raise DeliberateError(
                f"the certificate states epsilon={self.epsilon:g} at delta={self.delta:g}, but a "
                f"loss of {self.observed:.6g} on {self.n} problems gives p = {p_value:.2g}: the "
                "file was edited; calibrate again"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, infinity as null; `from_dict` reads it back."""
        raw = asdict(self) | {"risk": str(self.risk), "conditions": dict(self.conditions)}
        raw["lambda_"] = None if math.isinf(self.lambda_) else self.lambda_
        raw["thresholds"] = [None if math.isinf(t) else t for t in self.thresholds]
        if self.gate_threshold is None:
            del raw["gate_threshold"]  # earlier releases can read the file then
        if not self.conditions_sha256:
            del raw["conditions_sha256"]
        return {FILE_KEYS.get(name, name): value for name, value in raw.items()}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Certificate:
        """Reads `to_dict`'s form.

        Raises:
            DeliberateError: a missing or unknown key.
        """
        if not isinstance(raw, Mapping):
            raise DeliberateError("certificate: an object is needed")
        known = {FILE_KEYS.get(f.name, f.name) for f in fields(cls)}
        for key in sorted((known ^ set(raw)) - {FILE_KEYS["gate_threshold"], "conditions_sha256"}):
            problem = "lacks" if key in known else "has the unknown key"
            raise DeliberateError(f"certificate {problem} {key!r}")
        return build_from(cls, raw, "certificate")

    def save(self, path: str | Path) -> None:
        """Writes JSON that appears whole or not at all."""
        from deliberate.utils.files import write_text

        write_text(Path(path), json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Reads what `save` wrote.

        Raises:
            DeliberateError: a missing, damaged or foreign file.
        """
        raw = read_json(path)
        try:
            return cls.from_dict(raw)
        except DeliberateError as error:
            raise DeliberateError(f"{path}: {error}") from None


def fixed_sequence(
    lambdas: Sequence[float],
    losses_at: Callable[[float], ArrayLike],
    risk: Risk,
    *,
    epsilon: float,
    delta: float,
) -> Testing:
    """Tests lambdas from the largest, the most careful, on until one is not rejected.

    Args:
        lambdas: in any order, fixed before the losses are seen; dense (infinity) is left out, as
            its losses are zero by definition.
        losses_at: lambda -> one loss in [0, 1] per problem, the same problems for every lambda;
            called for a lambda only when it is tested.
        risk: which of the two; `ACCURACY` has 0/1 losses and gets the exact binomial test, `TOKEN`
            that of Hoeffding and Bentkus.
        epsilon, delta: the guarantee.

    Raises:
        DeliberateError: epsilon or delta outside (0, 1), no lambda, no losses, or losses outside
            [0, 1].
    """
    check_guarantee(epsilon, delta)
    order = sorted({float(lambda_) for lambda_ in lambdas if not math.isinf(lambda_)}, reverse=True)
    if not order:
        raise DeliberateError("there is no lambda to test below that of dense")
    tests: list[Tested] = []
    for lambda_ in order:
        losses = np.asarray(losses_at(lambda_), dtype=np.float64)
        p_value = risk_p_value(losses, epsilon, risk)
        rejected = p_value <= delta
        tests.append(Tested(lambda_, len(losses), float(losses.mean()), p_value, rejected))
        if not rejected:
            break
    return Testing(tuple(tests), epsilon, delta)


def token_losses(recording: Recording, thresholds: ArrayLike) -> NDArray[np.float64]:
    """Share of each answer's tokens that differ from full depth, ``[P]``.

    Sequences without a token lose nothing.
    """
    wrong = ~replay(recording, thresholds).agrees
    tokens = np.bincount(recording.sequence, minlength=recording.num_sequences)
    errors = np.bincount(recording.sequence, weights=wrong, minlength=recording.num_sequences)
    return errors / np.maximum(tokens, 1)


def accuracy_losses(dense_right: ArrayLike, policy_right: ArrayLike) -> NDArray[np.float64]:
    """1 for every problem that dense solves and the policy does not, ``[P]``."""
    dense, policy = np.asarray(dense_right, dtype=bool), np.asarray(policy_right, dtype=bool)
    if dense.shape != policy.shape:
        raise DeliberateError(f"{len(dense)} dense and {len(policy)} policy answers: one of each")
    return (dense & ~policy).astype(np.float64)


def risk_p_value(losses: ArrayLike, epsilon: float, risk: Risk) -> float:
    """p-value of "the expected loss exceeds epsilon" from independent losses in [0, 1].

    Raises:
        DeliberateError: no losses, one outside [0, 1], or for `ACCURACY` one between 0 and 1.
    """
    values = np.asarray(losses, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise DeliberateError("a certificate needs at least one problem's loss")
    if not ((values >= 0) & (values <= 1)).all():
        raise DeliberateError("losses must lie in [0, 1]")
    if risk is Risk.TOKEN:
        return hoeffding_bentkus_p_value(float(values.mean()), len(values), epsilon)
    if not np.isin(values, (0.0, 1.0)).all():
        raise DeliberateError("losses of accuracy must be 0 or 1")
    return binomial_p_value(int(values.sum()), len(values), epsilon)


def binomial_p_value(failures: int, n: int, epsilon: float) -> float:
    """P(Binomial(n, epsilon) <= failures): exact for 0/1 losses."""
    return float(binom.cdf(failures, n, epsilon))


def hoeffding_bentkus_p_value(mean: float, n: int, epsilon: float) -> float:
    """The smaller of Hoeffding's (with relative entropy) and Bentkus's bounds.

    For the mean of n independent losses in [0, 1] (Bates et al., JACM 2021, section 3.1).
    """
    low = min(mean, epsilon)
    entropy = (1 - low) * math.log((1 - low) / (1 - epsilon))
    if low > 0:
        entropy += low * math.log(low / epsilon)
    # rounding must not lift a count that is whole to the next one
    bentkus = math.e * float(binom.cdf(math.ceil(n * mean - 1e-9), n, epsilon))
    return min(1.0, math.exp(-n * entropy), bentkus)


def upper_bound(losses: ArrayLike, delta: float) -> float:
    """The expected loss in [0, 1] is below this with probability at least 1 - delta."""
    low, high = 0.0, 1.0 - 1e-12
    for _ in range(60):
        middle = (low + high) / 2
        if middle > 0 and risk_p_value(losses, middle, Risk.TOKEN) <= delta:
            high = middle
        else:
            low = middle
    return high


def problems_needed(epsilon: float, delta: float, rate: float) -> int:
    """Fewest problems whose 0/1 losses, at this rate, are rejected; `rate` < `epsilon`."""
    check_guarantee(epsilon, delta)
    if rate >= epsilon:
        raise DeliberateError(f"a loss of {rate:g} is not below epsilon={epsilon:g}")
    least = math.ceil(math.log(delta) / math.log1p(-epsilon))
    if rate <= 0:
        return least
    low, high = least, least

    def passes(n: int) -> bool:
        return binomial_p_value(math.ceil(rate * n - 1e-9), n, epsilon) <= delta

    while not passes(high):
        low, high = high, 2 * high
        if high > 1 << 40:
            return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high
