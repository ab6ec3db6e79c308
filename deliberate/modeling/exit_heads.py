"""Exit heads: what turns the hidden state after an early layer into a token and a confidence.

An exit head is the model's own final norm, a translator (identity at first) and the model's own
LM head, so an untrained exit is the logit lens (nostalgebraist, 2020) and a trained one the tuned
lens (Belrose et al., 2023). The exit gate is a linear probe on the normed hidden state that
predicts, without the head, whether the token chosen here equals that of the last layer.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deliberate.cache.kv_cache import SegmentCache
from deliberate.modeling.exit_config import DEFAULT_THRESHOLD, ExitConfig, Translator
from deliberate.modeling.head_rows import head_rows
from deliberate.modeling.measures import MEASURES, Measure, measure_named


class LowRankTranslator(nn.Module):
    """x -> x + B A x with A ``[rank, d]`` random and B ``[d, rank]`` zero: identity at first.

    A is drawn by `seed` alone, so that untrained exits are the same at every load: what was
    measured of them can be matched to them by hash.
    """

    def __init__(self, hidden_size: int, rank: int, seed: int = 0) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, hidden_size, bias=False)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(
            rank, hidden_size, generator=generator, dtype=torch.float32, device="cpu"
        )
        with torch.no_grad():
            self.down.weight.copy_(drawn * hidden_size**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, normed: Tensor) -> Tensor:
        return normed + self.up(self.down(normed))

    def matrix(self) -> Tensor:
        """The whole map as one ``[d, d]`` matrix."""
        update = self.up.weight @ self.down.weight
        return update + torch.eye(update.shape[0], dtype=update.dtype, device=update.device)


class FullTranslator(nn.Module):
    """x -> x + W x with W ``[d, d]`` zero: identity at first."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.delta = nn.Linear(hidden_size, hidden_size, bias=False)
        nn.init.zeros_(self.delta.weight)

    def forward(self, normed: Tensor) -> Tensor:
        return normed + self.delta(normed)

    def matrix(self) -> Tensor:
        """The whole map as one ``[d, d]`` matrix."""
        weight = self.delta.weight
        return weight + torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)


def _translator(kind: Translator, hidden_size: int, rank: int, seed: int) -> nn.Module:
    if kind is Translator.LOW_RANK:
        return LowRankTranslator(hidden_size, min(rank, hidden_size), seed)
    if kind is Translator.FULL:
        return FullTranslator(hidden_size)
    return nn.Identity()


def _gate(hidden_size: int) -> nn.Linear:
    """A probe whose probability is 1/2 at first."""
    gate = nn.Linear(hidden_size, 1)
    nn.init.zeros_(gate.weight)
    nn.init.zeros_(gate.bias)
    return gate


class ExitHeads(nn.Module):
    """Translators and gates of all exits; norm and LM head stay the backbone's.

    Holds only what was added to the model, which is what `save_pretrained` writes.

    Attributes:
        vocabulary: rising ids int64 ``[V']`` of the tokens that the exits choose among; None for
            all. Rows of the model's own head, so none of them is stored.
    """

    vocabulary: Tensor | None

    def __init__(self, config: ExitConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self._warned = False
        self.translators = nn.ModuleList(
            _translator(config.translator, hidden_size, config.rank, layer)
            for layer in config.layers
        )
        self.gates = nn.ModuleList(_gate(hidden_size) for _ in config.layers)
        if config.vocabulary:
            self.register_buffer("vocabulary", torch.arange(config.vocabulary))
        else:
            self.vocabulary = None

    @property
    def measure(self) -> Measure:
        """The confidence measure of the exits."""
        return measure_named(self.config.measure)

    @property
    def trained(self) -> bool:
        """Whether the exits were trained.

        Untrained translators are the identity and untrained probes zero. Without translators the
        exits are the model's own norm and head, and there is nothing to train unless their measure
        is the probe's.
        """
        if self.config.translator is Translator.NONE and not self.measure.before_head:
            return True
        learned: list[Any] = [gate.weight for gate in self.gates]
        for translator in self.translators:
            if isinstance(translator, LowRankTranslator):
                learned.append(translator.up.weight)
            elif isinstance(translator, FullTranslator):
                learned.append(translator.delta.weight)
        return any(bool(weight.detach().any()) for weight in learned)

    @property
    def unproven(self) -> bool:
        """Whether nothing speaks for the exits: never trained, and with the default thresholds."""
        default = all(threshold == DEFAULT_THRESHOLD for threshold in self.config.thresholds)
        return default and not self.trained

    def warn_if_untrained(self, *, evaluated: bool = True) -> None:
        """Warns, once, that the exits were never trained.

        Args:
            evaluated: they are evaluated all the same; else drafts are looked up in the text.
        """
        if self._warned:
            return
        self._warned = True  # checked once: weights are not scanned before every generation
        if self.trained or not self.config.layers:
            return
        what = (
            "few tokens can exit early, and decoding may be slower than fidelity='dense'"
            if evaluated
            else "they are not evaluated, and exact mode looks its drafts up in prompt and output"
        )
        warnings.warn(
            f"the exits after layers {list(self.config.layers)} were never trained: {what}; fit "
            "them with `deliberate fit MODEL out=DIR`, or load a folder that save_pretrained wrote",
            stacklevel=2,
        )

    def translate(self, exit_index: int, normed: Tensor) -> Tensor:
        """Normed hidden state ``[..., d]`` at an exit -> what the LM head reads, ``[..., d]``."""
        return self.translators[exit_index](normed)

    def gate_logit(self, exit_index: int, normed: Tensor) -> Tensor:
        """Log-odds ``[...]`` that this exit's token equals the full-depth token."""
        return self.gates[exit_index](normed).squeeze(-1)


def _fold(head: Any, translator: Any) -> Tensor:
    if isinstance(translator, nn.Identity):
        return head.contiguous()
    return (head @ translator.matrix().to(head.dtype)).contiguous()


# Share of the head's and the body's bytes that folded heads may take together.
FOLD_BUDGET = 0.12


class ExitReader:
    """Evaluates one model's exits while decoding: norm, probe, head and score in few launches.

    With an ordinary bias-free LM head the translator is folded into it (``W (I + BA)``, one
    ``[V, d]`` matrix per exit), so that a trained translator costs nothing at run time; the
    shallowest exits first, as long as all folded heads stay within `FOLD_BUDGET` of the model's
    bytes. Built from the weights as they are: build a new one after they change.

    Exits over a draft vocabulary choose among its tokens only, by folded rows of the head, and
    their confidence is within it. What the other tokens would get is not known there: thresholds
    are set on agreement with full depth, which counts every token.

    Args:
        model_bytes: of the weights of the wrapped model.
    """

    def __init__(
        self,
        heads: ExitHeads,
        norm: nn.Module,
        lm_head: nn.Module,
        head_logits: Callable[[Tensor], Tensor],
        softcap: Callable[[Tensor], Tensor],
        *,
        model_bytes: int,
    ) -> None:
        self._heads = heads
        self._norm = norm
        self._head_logits = head_logits
        self._softcap = softcap
        self._measure = heads.measure
        self._score = heads.measure.score
        self._folded: dict[int, Tensor] = {}
        self._rows_bias: Tensor | None = None
        self._vocab_size: int = getattr(lm_head, "out_features", 0)
        self.ids: Tensor | None = heads.vocabulary
        if self.ids is not None:
            with torch.inference_mode(False), torch.no_grad():
                rows, self._rows_bias = head_rows(lm_head, self.ids)
                self.ids = self.ids.to(rows.device)
                for index, translator in enumerate(heads.translators):
                    self._keep_folded(index, _fold(rows, translator))
            return
        # A quantised head has another weight class, which cannot be multiplied out.
        foldable = (
            isinstance(lm_head, nn.Linear)
            and lm_head.bias is None
            and type(lm_head.weight) is nn.Parameter
        )
        if foldable and heads.config.translator is not Translator.NONE:
            weight: Any = lm_head.weight
            affordable = int(FOLD_BUDGET * model_bytes) // weight.nbytes
            # Outside inference mode, so that the matrices serve every later pass.
            with torch.inference_mode(False), torch.no_grad():
                for index, translator in enumerate(heads.translators):
                    if index < affordable:
                        self._keep_folded(index, _fold(weight, translator))

    def _keep_folded(self, index: int, matrix: Tensor) -> None:
        """Takes the head of an exit, ``[V', d]``, with its translator folded in."""
        self._folded[index] = matrix

    @property
    def measure(self) -> Measure:
        """The confidence measure of the exits."""
        return self._measure

    @property
    def folded_bytes(self) -> int:
        """Bytes of the heads with translators folded in."""
        return sum(matrix.nbytes for matrix in self._folded.values())

    def logits(self, exit_index: int, normed: Tensor) -> Tensor:
        """Logits ``[..., V]`` of an exit from its normed hidden state ``[..., d]``; minus infinity
        for tokens that it does not choose among."""
        return self.widened(self.own_logits(exit_index, normed))

    def own_logits(self, exit_index: int, normed: Tensor) -> Tensor:
        """Logits ``[..., V']`` of the tokens that an exit chooses among."""
        if exit_index not in self._folded:
            return self._head_logits(self._heads.translate(exit_index, normed))
        folded = self._folded[exit_index]
        return self._softcap(nn.functional.linear(normed, folded, self._rows_bias))

    def widened(self, logits: Tensor) -> Tensor:
        """Logits ``[..., V']`` as those of every token, ``[..., V]``."""
        if self.ids is None:
            return logits
        wide = logits.new_full((*logits.shape[:-1], self._vocab_size), -torch.inf)
        return wide.index_copy_(-1, self.ids, logits)

    def tokens_of(self, places: Tensor) -> Tensor:
        """Tokens ``[...]`` of places ``[...]`` in what `own_logits` gives."""
        return places if self.ids is None else self.ids[places]

    def score(self, exit_index: int, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Token and confidence ``[...]`` of an exit from normed hidden states ``[..., d]``."""
        place, score = self._score(self.own_logits(exit_index, normed))
        token = self.tokens_of(place)
        if self._measure.before_head:
            return token, torch.sigmoid(self._heads.gate_logit(exit_index, normed))
        return token, score

    def every_score(self, exit_index: int, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Token ``[R]`` and, by name, every measure's confidence ``[R]`` of states ``[R, d]``."""
        normed = self._norm(hidden)
        logits = self.own_logits(exit_index, normed)
        place, own = self._measure.score(logits)
        scores = {}
        for name, measure in MEASURES.items():
            if measure.before_head:
                scores[name] = torch.sigmoid(self._heads.gate_logit(exit_index, normed))
            else:
                scores[name] = own if measure is self._measure else measure.score(logits)[1]
        return self.tokens_of(place), scores

    def evaluate(
        self,
        exit_index: int,
        hidden: Tensor,
        threshold: float,
        *,
        keep_logits: bool = False,
        cache: SegmentCache | None = None,
    ) -> Reading:
        """Evaluates an exit head on states ``[R, d]``, those of the newest tokens.

        With the measure ``gate`` the head runs only for tokens that reach the threshold, and for
        others on demand.

        Args:
            keep_logits: the caller will read logits.
            cache: of the pass that gave the states; an executor may go on with it before the answer
                is known.
        """
        normed = self._norm(hidden)
        if not self._measure.before_head:
            logits = self.own_logits(exit_index, normed)
            place, score = self._score(logits)
            return self.reading(score.tolist(), self.tokens_of(place).tolist(), logits)
        confidences = torch.sigmoid(self._heads.gate_logit(exit_index, normed)).tolist()
        sure = [row for row, confidence in enumerate(confidences) if confidence >= threshold]
        tokens: list[int | None] = [None] * len(confidences)
        if sure and not keep_logits:
            chosen = normed if len(sure) == len(normed) else normed[sure]
            picked = self.tokens_of(self.own_logits(exit_index, chosen).argmax(dim=-1)).tolist()
            for row, token_id in zip(sure, picked, strict=True):
                tokens[row] = token_id
        return Reading(confidences, tokens, None, lambda row: self.logits(exit_index, normed[row]))

    def reading(self, scores: list[float], tokens: list[int], logits: Tensor) -> Reading:
        """A reading of what `own_logits` gave."""
        if self.ids is None:
            return Reading(scores, tokens, logits)
        return Reading(scores, tokens, None, lambda row: self.widened(logits[row]))


class Reading:
    """Confidences and tokens of an exit head for R states.

    Attributes:
        confidences: R numbers in [0, 1].
    """

    __slots__ = ("_compute", "_logits", "_tokens", "confidences")

    def __init__(
        self,
        confidences: list[float],
        tokens: Sequence[int | None],
        logits: Tensor | None,
        compute: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.confidences = confidences
        self._tokens = tokens
        self._logits = logits
        self._compute = compute

    def token(self, row: int) -> int:
        """The exit's most likely token."""
        token = self._tokens[row]
        return int(self.logits(row).argmax(dim=-1)) if token is None else token

    def logits(self, row: int) -> Tensor:
        """The exit's logits ``[V]``."""
        if self._logits is not None:
            return self._logits[row]
        assert self._compute is not None
        return self._compute(row)


@torch.inference_mode()
def time_exit_heads(reader: ExitReader, backbone: Any, exits: int) -> tuple[float, ...]:
    """Seconds of evaluating each exit head on one state: the median of a few tries."""
    # Not like the norm's weight: OLMo's has none.
    hidden = torch.randn(1, backbone.hidden_size, dtype=backbone.dtype, device=backbone.device)
    medians = []
    for index in range(exits):
        reader.evaluate(index, hidden, 1.0)
        tries = []
        for _ in range(5):
            began = time.perf_counter()
            reader.evaluate(index, hidden, 1.0)  # ends with a copy to the host, which waits for it
            tries.append(time.perf_counter() - began)
        medians.append(sorted(tries)[2])
    return tuple(medians)
