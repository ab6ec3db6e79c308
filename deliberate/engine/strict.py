"""Exact mode where rounding can decide: near-ties are chosen by passes of the shape of dense's.

A pass over several tokens adds in another order than a pass over one. In float32 that moves a logit
in its seventh digit; in bf16 it moves it in its third, and one token in twenty has two candidates
that are closer than that. Such a token could be another than dense's, and so could its keys and
values, which all later logits depend on. So a near-tie is not decided by the verifying pass: the
tokens since the last that was run as dense runs it are run again, one at a time through all layers,
which gives dense's own keys, values and logits bit for bit. That assumes that no gap between two
candidates moves by more than the bound; an infinite bound assumes nothing and runs every token so.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deliberate.engine.sampler import TokenChooser
from deliberate.engine.segment_runner import SegmentRunner
from deliberate.engine.sequence import DecodingSequence
from deliberate.engine.spec import DecodingSpec, as_strict
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.deliberation_gate import DeliberationGate
from deliberate.utils.errors import DeliberateError

# Steps of the dtype, relative to the largest logit of a position: docs/performance.md has what gaps
# moved by at most in what was measured.
NEAR_TIE = 8.0


def check_strict(
    spec: DecodingSpec,
    backbone: Backbone,
    batch: int,
    chooser: TokenChooser | None,
    gate: DeliberationGate | None,
) -> float | None:
    """The bound for `NearTies`, or None where nothing needs it.

    Args:
        spec: of the generation; `DecodingSpec` refuses strict mode with other fidelities.
        backbone: its executor; the C++ kernels give a token the same arithmetic in every pass.
        batch: sequences that are decoded as one batch; an engine's are by themselves.
        chooser: how logits become tokens.
        gate: that changes the logits, or None.

    Raises:
        DeliberateError: a generation that the bound cannot hold for.
    """
    bound = as_strict(spec.strict)
    if bound is None:
        return None
    reason = None
    if batch > 1:
        reason = f"a batch of {batch}: dense's own passes depend on the batch; give one prompt"
    elif chooser is not None and "sampling" in chooser.describe():
        reason = "sampling: it compares gaps of logits; use do_sample=False"
    elif chooser is not None and chooser.may_keep_state:
        name = chooser.may_keep_state[0]
        reason = (
            f"logits_processor {name}, which it calls twice for a near-tie: set {name}.stateless "
            "= True if its scores do not depend on earlier calls"
        )
    elif gate is not None or spec.long_text is not None:
        reason = "a deliberation gate or long_text: leave them out (gate=False, long_text=None)"
    elif type(backbone) is not Backbone and backbone.multi_step(None) is None:
        reason = "this engine of the fused executor: use executor='generic' or its C++ kernels"
    if reason is not None:
        raise DeliberateError(f"strict={spec.strict!r} with {reason}")
    return bound if type(backbone) is Backbone else None


class NearTies:
    """Finds near-ties of one sequence and runs its tokens as dense would.

    What a pass over several sequences computed is not dense's own, whatever its number of tokens.

    Args:
        backbone: a plain one, which runs transformers' modules.
        runner: of the sequence; it notes which passes were shared.
        bound: gap in logits up to which two candidates are a near-tie; NaN for `NEAR_TIE` steps of
            the model's dtype at the position's largest logit.
    """

    def __init__(self, backbone: Backbone, runner: SegmentRunner, bound: float) -> None:
        self._runner = runner
        self._backbone = backbone
        self._bound = bound
        if runner.shared is None:
            runner.shared = set()
        # Positions from the front whose keys and values are dense's own, in every layer.
        self._dense = 0

    def begin(self, tokens: int) -> None:
        """The first `tokens` tokens were run in the pass that dense runs them in."""
        self._dense = tokens

    def note_pass(self, sequence: DecodingSequence, count: int) -> None:
        """The last `count` tokens of a sequence have just completed all layers, in one pass."""
        held = self._runner.cache.length(self._backbone.num_layers - 1, sequence.row)
        # Alone in the last layer means alone below it: tokens that meet at an exit stay together.
        if count == 1 and self._dense == held - 1 and not self._was_shared(sequence):
            self._dense = held

    def _was_shared(self, sequence: DecodingSequence) -> bool:
        """Whether other sequences took part in a pass since this was last read."""
        shared = self._runner.shared
        if not shared or sequence.index not in shared:
            return False
        shared.remove(sequence.index)
        return True

    def undecided(self, sequence: DecodingSequence, index: int, logits: Tensor) -> bool:
        """Whether the token at `index` is a near-tie, which the verifying pass must not decide.

        Args:
            logits: scores ``[V]`` or ``[1, V]`` of it.
        """
        if sequence.prompt_tokens + index <= self._dense:
            return False
        scores = logits.reshape(-1).float()
        best = scores.topk(2).values
        bound = self._bound
        if math.isnan(bound):
            largest = float(scores[scores.isfinite()].abs().max())
            bound = NEAR_TIE * torch.finfo(self._backbone.model.dtype).eps * largest
        near = float(best[0] - best[1]) <= bound
        sequence.trace.near_ties += near
        return near

    def finish(self, sequence: DecodingSequence) -> None:
        """Gives every token but the newest dense's keys and values, for the caller's cache."""
        if self._dense < sequence.position:
            self.run_again(sequence, len(sequence.records) - 1)

    def run_again(self, sequence: DecodingSequence, index: int) -> Tensor:
        """Final state ``[1, d]`` that the token at `index` is chosen from, by dense's passes.

        Drops what the layers held of it and of all tokens after it, pending states included.
        """
        end = sequence.prompt_tokens + index
        sequence.trace.run_again += end - self._dense
        hidden = self._run_singly(sequence, self._dense, end)
        self._dense = end
        return hidden

    def _run_singly(self, sequence: DecodingSequence, first: int, end: int) -> Tensor:
        """Runs tokens first..end-1 one at a time through all layers; the last state ``[1, d]``."""
        runner = self._runner
        full = len(runner.boundaries) - 1
        runner.cache.crop(first, sequence.row)
        runner.forget(sequence)
        self._was_shared(sequence)
        known = sequence.ids(len(sequence.records))
        known = known[len(known) - sequence.position - 1 :]  # the prefix may begin with padding
        for token in known[first:end]:
            ids = torch.tensor([[token]], device=self._backbone.device)
            hidden = runner.run(0, [sequence], ids, [1], through=full)
        return hidden[:, -1]
