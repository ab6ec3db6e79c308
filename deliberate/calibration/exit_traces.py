"""Recorded traces: what every exit says of every token of answers that were decoded dense.

`deliberate.calibration.collect` makes one from a model; this module needs none. Two policies are
compared on
the same tokens by replaying them. A recording describes single steps after a dense prefix: what a
wrong token does to the rest of an answer is not in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import atomic_file
from deliberate.utils.json_files import build

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Recording:
    """Traces of T tokens of P sequences at K exits and the top.

    Attributes:
        layers: exit k stands after ``layers[k]`` decoder layers.
        num_layers: decoder layers of the model.
        measure: the confidence measure of `scores`.
        scores: float32 ``[T, K]``, the raw measure at each exit.
        tokens: int32 ``[T, K]``, the token that each exit would choose.
        final: int32 ``[T]``, the full-depth token.
        final_scores: float32 ``[T]``, the same measure at the top (for ``gate``, which the top
            does not have, the largest probability).
        sequence: int32 ``[T]``, which sequence, rising from 0 to P - 1.
        position: int32 ``[T]``, index within the answer, from 0.
        meta: what it was recorded from, JSON-ready.
        groups: one name per sequence (its task or subject); empty where there are none.
        others: float32 ``[T, K]`` of further measures by name.
        similarities: float32 ``[T, K]``, cosine similarity of the hidden state at each exit with
            that of the exit below, 0 at the first; None in recordings of earlier releases.

    Raises:
        DeliberateError: shapes that do not fit, or scores that are not finite.
    """

    layers: tuple[int, ...]
    num_layers: int
    measure: str
    scores: NDArray[np.float32]
    tokens: NDArray[np.int32]
    final: NDArray[np.int32]
    final_scores: NDArray[np.float32]
    sequence: NDArray[np.int32]
    position: NDArray[np.int32]
    meta: Mapping[str, Any] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    others: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    similarities: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        object.__setattr__(self, "groups", tuple(str(name) for name in self.groups))
        exits = len(self.layers)
        if np.ndim(self.final) != 1:
            raise DeliberateError(
                f"recording: final has shape {list(np.shape(self.final))}, one token each is needed"
            )
        size = len(self.final)
        depths = [0, *self.layers, self.num_layers]
        if any(low >= high for low, high in pairwise(depths)):
            raise DeliberateError(
                f"recording: exit layers {list(self.layers)} must rise within "
                f"1..{self.num_layers - 1}"
            )
        shapes: list[tuple[str, Any, tuple[int, ...]]] = [
            ("scores", self.scores, (size, exits)),
            ("tokens", self.tokens, (size, exits)),
            ("final", self.final, (size,)),
            ("final_scores", self.final_scores, (size,)),
            ("sequence", self.sequence, (size,)),
            ("position", self.position, (size,)),
            *((f"others[{name}]", values, (size, exits)) for name, values in self.others.items()),
        ]
        if self.similarities is not None:
            shapes.append(("similarities", self.similarities, (size, exits)))
        for name, values, shape in shapes:
            if values.shape != shape:
                raise DeliberateError(
                    f"recording: {name} has shape {list(values.shape)}, "
                    f"{size} tokens at {exits} exits need {list(shape)}"
                )
            kind = "iu" if name in _WHOLE else "f"
            if size and values.dtype.kind not in kind:
                raise DeliberateError(
                    f"recording: {name} holds {values.dtype}, "
                    f"{'whole numbers' if name in _WHOLE else 'floats'} are needed"
                )
        for name, values in (("scores", self.scores), *self.others.items()):
            if not np.isfinite(values).all():
                raise DeliberateError(f"recording: {name} holds NaN or infinity")
        if size and (self.sequence[0] < 0 or (np.diff(self.sequence) < 0).any()):
            raise DeliberateError("recording: sequence numbers must rise from 0")
        if self.groups and len(self.groups) < self.num_sequences:
            raise DeliberateError(
                f"recording: {len(self.groups)} groups for {self.num_sequences} sequences"
            )

    def __len__(self) -> int:
        return len(self.final)

    @property
    def num_exits(self) -> int:
        """K."""
        return len(self.layers)

    @property
    def num_sequences(self) -> int:
        """P: one more than the largest sequence number."""
        return int(self.sequence[-1]) + 1 if len(self) else 0

    @property
    def agrees(self) -> NDArray[np.bool_]:
        """bool ``[T, K]``: the exit's token is the full-depth token."""
        return self.tokens == self.final[:, None]

    @property
    def token_groups(self) -> NDArray[np.str_]:
        """The group of every token, ``[T]``; the empty name where there are no groups."""
        if not self.groups:
            return np.full(len(self), "")
        return np.asarray(self.groups)[self.sequence]

    def with_measure(self, measure: str) -> Recording:
        """The same recording with another of its measures as the score.

        Raises:
            DeliberateError: a measure that was not recorded.
        """
        if measure == self.measure:
            return self
        if measure not in self.others:
            known = ", ".join([self.measure, *self.others])
            raise DeliberateError(f"measure {measure!r} was not recorded; there is {known}")
        others = {name: values for name, values in self.others.items() if name != measure}
        others[self.measure] = self.scores
        return replace(self, measure=measure, scores=self.others[measure], others=others)

    def select(self, sequences: ArrayLike) -> Recording:
        """The tokens of these sequences (numbers, in rising order), renumbered from 0."""
        wanted = np.unique(np.asarray(sequences, dtype=np.int64))
        rows = np.isin(self.sequence, wanted)
        return replace(
            self,
            scores=self.scores[rows],
            tokens=self.tokens[rows],
            final=self.final[rows],
            final_scores=self.final_scores[rows],
            sequence=np.searchsorted(wanted, self.sequence[rows]).astype(np.int32),
            position=self.position[rows],
            groups=tuple(self.groups[i] for i in wanted) if self.groups else (),
            others={name: values[rows] for name, values in self.others.items()},
            similarities=None if self.similarities is None else self.similarities[rows],
        )

    def halves(self, seed: int = 0) -> tuple[Recording, Recording]:
        """Two recordings of half the sequences each, drawn by `seed`."""
        order = np.random.default_rng(seed).permutation(self.num_sequences)
        middle = (len(order) + 1) // 2
        return self.select(order[:middle]), self.select(order[middle:])

    def save(self, path: str | Path) -> None:
        """Writes an .npz file that appears whole or not at all; nothing is pickled."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        head = {
            "format_version": FORMAT_VERSION,
            "layers": list(self.layers),
            "num_layers": self.num_layers,
            "measure": str(self.measure),
            "meta": dict(self.meta),
            "groups": list(self.groups),
            "others": list(self.others),
        }
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {f"other_{name}": values for name, values in self.others.items()}
        if self.similarities is not None:
            arrays["similarities"] = self.similarities
        text = np.frombuffer(json.dumps(head).encode(), dtype=np.uint8)
        with atomic_file(target) as partial, partial.open("wb") as file:
            np.savez_compressed(file, head=text, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Recording:
        """Reads what `save` wrote.

        Raises:
            DeliberateError: a missing, truncated or foreign file.
        """
        source = Path(path)
        if not source.is_file():
            raise DeliberateError(f"recording {source} is not a file")
        try:
            with np.load(source, allow_pickle=False) as stored:
                text = stored["head"].tobytes().decode()
                head = build(_Head, text, f"{source}, head")
                arrays = {name: stored[name] for name in _ARRAYS}
                others = {name: stored[f"other_{name}"] for name in head.others}
                known = "similarities" in stored.files
                similarities = stored["similarities"] if known else None
        except DeliberateError:
            raise
        except Exception as error:  # of NumPy, zipfile and zlib, which raise many types
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DeliberateError(f"{source} is not a recording, or damaged: {reason}") from None
        if head.format_version != FORMAT_VERSION:
            raise DeliberateError(
                f"{source} has format_version {head.format_version}; this release reads "
                f"{FORMAT_VERSION}"
            )
        settings = {name: getattr(head, name) for name in _SETTINGS}
        try:
            return cls(**settings, **arrays, others=others, similarities=similarities)
        except DeliberateError as error:
            raise DeliberateError(f"{source}: {error}") from None


@dataclass(frozen=True)
class _Head:
    """What a recording's file says of its arrays."""

    format_version: int
    layers: tuple[int, ...]
    num_layers: int
    measure: str
    meta: Mapping[str, Any]
    groups: tuple[str, ...]
    others: tuple[str, ...]


_WHOLE = ("tokens", "final", "sequence", "position")
_ARRAYS = ("scores", "tokens", "final", "final_scores", "sequence", "position")
_SETTINGS = ("layers", "num_layers", "measure", "meta", "groups")
assert {*_ARRAYS, *_SETTINGS, "others", "similarities"} == {f.name for f in fields(Recording)}


@dataclass(frozen=True)
class Replay:
    """Where the tokens of a recording exit under a policy.

    Attributes:
        exits: int64 ``[T]``, the exit at which each token exits; K is full depth.
        agrees: bool ``[T]``, whether the token chosen there is the full-depth one.
        layers: int64 ``[T]``, decoder layers below that exit.
        counts: tokens by exit, K + 1 numbers.
    """

    exits: NDArray[np.int64]
    agrees: NDArray[np.bool_]
    layers: NDArray[np.int64]
    counts: tuple[int, ...]

    @property
    def risk(self) -> float:
        """Share of tokens that differ from full depth."""
        return float(1.0 - self.agrees.mean()) if len(self.agrees) else 0.0

    @property
    def mean_layers(self) -> float:
        """Layers below the exit where a token exits, mean over tokens."""
        return float(self.layers.mean()) if len(self.layers) else 0.0

    def seconds(self, first: float, onward: ArrayLike) -> NDArray[np.float64]:
        """Cost of every token, ``[T]``: `first` up to the first exit's reading, ``onward[k]``
        from exit k's reading to the next one's or the top's."""
        steps = np.concatenate([[first], np.asarray(onward, dtype=np.float64)])
        return np.cumsum(steps)[self.exits]


def replay(recording: Recording, thresholds: ArrayLike) -> Replay:
    """Each token exits at its first exit whose score reaches the threshold, else at full depth.

    Args:
        thresholds: ``[K]``, or ``[T, K]`` where they differ by token; infinity means never.
    """
    least = np.asarray(thresholds, dtype=np.float64)
    if least.shape not in ((recording.num_exits,), recording.scores.shape):
        raise DeliberateError(
            f"thresholds of shape {list(least.shape)} for {recording.num_exits} exits: give one "
            "per exit"
        )
    return replay_exits(recording, first_true(recording.scores >= least))


def replay_exits(recording: Recording, exits: NDArray[np.int64]) -> Replay:
    """The replay of a policy that has already chosen an exit, 0..K, for each token ``[T]``."""
    top = recording.num_exits
    right = np.concatenate([recording.agrees, np.ones((len(recording), 1), dtype=bool)], axis=1)
    depth = np.asarray([*recording.layers, recording.num_layers])
    agrees = np.take_along_axis(right, exits[:, None], axis=1)[:, 0]
    counts = np.bincount(exits, minlength=top + 1)
    return Replay(exits, agrees, depth[exits], tuple(int(count) for count in counts))


def first_true(reached: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Index of the first True of each row of ``[T, K]``, K where there is none."""
    closed = np.concatenate([reached, np.ones((len(reached), 1), dtype=bool)], axis=1)
    return closed.argmax(axis=1)


def join_recordings(
    parts: Sequence[Recording],
    counts: Sequence[int],
    *,
    meta: Mapping[str, Any] | None = None,
    groups: Sequence[str] = (),
) -> Recording:
    """Recordings of one model, one after the other, as one.

    Args:
        counts: sequences of each part, those without a token too.
        meta, groups: of the whole.

    Raises:
        DeliberateError: no part, or parts of other exits or measures.
    """
    kinds = {(part.layers, part.num_layers, part.measure, *sorted(part.others)) for part in parts}
    if len(kinds) != 1 or len(counts) != len(parts):
        raise DeliberateError(
            f"{len(parts)} recordings of {len(kinds)} kinds and {len(counts)} counts: parts of one "
            "recording are of the same exits and measures, with a count each"
        )
    first = parts[0]
    starts = np.cumsum([0, *counts[:-1]])
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS
    }
    alike = [part.similarities for part in parts]
    return replace(
        first,
        **columns,
        sequence=np.concatenate(
            [part.sequence + start for part, start in zip(parts, starts, strict=True)]
        ).astype(np.int32),
        others={name: np.concatenate([p.others[name] for p in parts]) for name in first.others},
        similarities=_joined(alike),
        meta=dict(meta or {}),
        groups=tuple(groups),
    )


def _joined(columns: Sequence[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    there = [column for column in columns if column is not None]
    return np.concatenate(there) if len(there) == len(columns) else None


_COLUMNS = ("scores", "tokens", "final", "final_scores", "position")
