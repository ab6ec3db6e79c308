"""Recorded chains: whole chains with the answers of probes along the way, in JSON lines.

A file has one chain a line. Its first line may be a header that says which model made the chains,
under which conditions, where they were probed, and what a token and a probe cost. Chains of other
systems need no header: a line with ``id``, ``reasoning`` (text) and ``answer`` is enough, with
``probes`` where there are some.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from deliberate.utils.checks import at_least, text_list
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text
from deliberate.utils.hashing import json_sha256
from deliberate.utils.json_files import build, read_text

FORMAT = "deliberate chains 1"


@dataclass(frozen=True)
class RecordedProbe:
    """What the chain answered when it was made to.

    Attributes:
        at: tokens of reasoning before the probe.
        answer: its text; empty: none.
        confidence: mean probability of its tokens from the second one on, in [0, 1].
        tokens: that it cost.
    """

    at: int
    answer: str
    confidence: float = 0.0
    tokens: int = 0

    def __post_init__(self) -> None:
        at_least("at", self.at, 0)
        at_least("tokens", self.tokens, 0)
        if not 0.0 <= self.confidence <= 1.0:
            raise DeliberateError(f"confidence={self.confidence} must be in [0, 1]")


@dataclass(frozen=True)
class RecordedChain:
    """One chain from its beginning to its own end.

    Attributes:
        id: of the problem; chains of one problem are samples of it.
        answer: of the whole chain; empty: none.
        expected: the reference answer, where it is known.
        tokens: ids of the reasoning; empty where only its text is known.
        reasoning: its text; empty where the ids say it.
        answer_tokens: of the answer, closing tag included.
        sample: number of the chain among those of its problem.
        confidence: of the whole chain's own answer, as a probe's.
        finished: the chain ended by itself, not by its length limit.
        probes: in the order of their places.

    Raises:
        DeliberateError: probes that are out of order or beyond the chain's end.
    """

    id: str
    answer: str
    expected: str | None = None
    tokens: tuple[int, ...] = ()
    reasoning: str = ""
    answer_tokens: int = 0
    sample: int = 0
    confidence: float = 0.0
    finished: bool = True
    probes: tuple[RecordedProbe, ...] = ()

    def __post_init__(self) -> None:
        places = [probe.at for probe in self.probes]
        if places != sorted(set(places)):
            raise DeliberateError(f"chain {self.id!r}: probes must be in order, one at a place")
        if self.tokens and places and places[-1] > len(self.tokens):
            raise DeliberateError(
                f"chain {self.id!r}: a probe at token {places[-1]} of {len(self.tokens)}"
            )

    def probe_at(self, place: int, *, exact: bool = True) -> RecordedProbe | None:
        """The probe after so many tokens; with `exact` False the last one up to there.

        None where there is none.
        """
        found = [probe for probe in self.probes if probe.at <= place]
        if not found or (exact and found[-1].at != place):
            return None
        return found[-1]


@dataclass(frozen=True)
class ProbePlaces:
    """Where chains are probed while they are recorded.

    Attributes:
        chunk: after every so many tokens.
        boundaries: texts that end a line or a step, after each of which there is a probe.
        switches: words after each of which there is a probe.
        answer_tokens: most tokens of a probe's answer.
    """

    chunk: int = 16
    boundaries: tuple[str, ...] = ("\n", ".\n", "\n\n", ".\n\n")
    switches: tuple[str, ...] = ("Wait", "Alternatively", "Hmm")
    answer_tokens: int = 20

    def __post_init__(self) -> None:
        at_least("chunk", self.chunk, 1)
        at_least("answer_tokens", self.answer_tokens, 1)
        for name in ("boundaries", "switches"):
            object.__setattr__(self, name, text_list(name, getattr(self, name)))


@dataclass(frozen=True)
class ChainCosts:
    """Seconds of decoding, one chain at a time.

    Attributes:
        token: of a token of the chain or of an answer.
        probe: of a probe besides its tokens: its prompt pass and the chain's new beginning.
        chain: of a chain besides its tokens, as for the prompt.
    """

    token: float = 1.0
    probe: float = 0.0
    chain: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value >= 0.0:
                raise DeliberateError(f"cost {name}={value} must be 0 s or more")


@dataclass(frozen=True)
class RecordingHeader:
    """What the chains of a file were made by.

    Attributes:
        format: of the file.
        model: its name.
        weights, exits, data: hashes of weights, exits and problems.
        conditions: of decoding, by the names of `deliberate.calibration.conditions`.
        places: where chains were probed; None where it is not known.
        costs: None where they were not measured: then a token counts 1 and all else nothing.
        fidelity: by which they were decoded: dense, exact or threshold.
    """

    format: str = FORMAT
    model: str = ""
    weights: str = ""
    exits: str = ""
    data: str = ""
    conditions: Mapping[str, Any] = field(default_factory=dict)
    places: ProbePlaces | None = None
    costs: ChainCosts | None = None
    fidelity: str = "dense"

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise DeliberateError(f"format={self.format!r} is not {FORMAT!r}")


@dataclass(frozen=True)
class ChainSet:
    """Recorded chains and what made them."""

    header: RecordingHeader
    chains: tuple[RecordedChain, ...]

    def __post_init__(self) -> None:
        if not self.chains:
            raise DeliberateError("no chains: record at least one")

    @property
    def costs(self) -> ChainCosts:
        """Measured costs; else 1 a token."""
        return self.header.costs or ChainCosts()

    @property
    def sha256(self) -> str:
        """Hash of the chains."""
        return json_sha256([asdict(chain) for chain in self.chains])

    def save(self, path: str | Path) -> None:
        """Writes JSON lines that appear whole or not at all."""
        records = [asdict(self.header), *(asdict(chain) for chain in self.chains)]
        lines = [json.dumps(record, allow_nan=False) for record in records]
        write_text(Path(path), "\n".join(lines) + "\n")

    @classmethod
    def load(
        cls, path: str | Path, encode: Callable[[str], Sequence[int]] | None = None
    ) -> ChainSet:
        """Reads JSON lines, with a header or without one.

        Args:
            path: the file.
            encode: ids of a text, for chains that have text alone; None: they are refused.

        Raises:
            DeliberateError: a missing or damaged file, or chains without ids and no `encode`.
        """
        header, chains = RecordingHeader(), []
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            source = f"{path}, line {number}"
            if not line.strip():
                continue
            if number == 1 and '"format"' in line:
                header = build(RecordingHeader, line, source)
                continue
            chain = build(RecordedChain, line, source)
            if not chain.tokens and chain.reasoning:
                if encode is None:
                    raise DeliberateError(
                        f"{source}: the chain has text and no token ids: name a tokenizer"
                    )
                chain = replace(chain, tokens=tuple(encode(chain.reasoning)))
            chains.append(chain)
        if not chains:
            raise DeliberateError(f"{path}: no chains")
        return cls(header, tuple(chains))
