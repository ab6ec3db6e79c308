"""The deliberation gate while decoding: its memory, and rounds for the tokens that need them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deliberate.backbone import Backbone
from deliberate.cache import SegmentCache
from deliberate.contexts import StepContext
from deliberate.gate import DeliberationGate
from deliberate.kernels.exit_head import top_probability


class GateRunner:
    """A gate over the sequences of one batch.

    The memory is one more layer of keys and values: a token's slot is its position, it is written
    for every token that reaches the top, cropped on rollback and compacted with the batch. Rounds
    run for the tokens below the band only.

    Args:
        gate: the weights and the rule.
        backbone: for its head.
        thoughts: gets the number of tokens of every round, in order.
    """

    def __init__(self, gate: DeliberationGate, backbone: Backbone, thoughts: list[int]) -> None:
        self._gate = gate
        self._backbone = backbone
        self._thoughts = thoughts
        self._memory = SegmentCache(1)
        # Slots of tokens that left early and were skipped: bool [rows, slots].
        self._holes: Tensor | None = None

    def begin(self, lengths: Sequence[int], hidden: Tensor, ctx: StepContext) -> None:
        """Remembers the prompts: the first ``lengths`` states of ``[B, T, d]`` are theirs."""
        self._memory = SegmentCache(1, 2 * max(lengths), len(lengths))
        self._holes = None
        self.remember(hidden, ctx)
        for row, length in enumerate(lengths):
            self._memory.crop(length, row)

    def remember(self, hidden: Tensor, ctx: StepContext) -> None:
        """Writes the memory of final states ``[R, M, d]`` of the pass `ctx`."""
        keys, values = self._gate.memory(hidden, ctx.positions)
        self._memory.begin(ctx, 0, 1)
        self._memory.update(keys, values, 0)

    def skip(self, row: int, length: int) -> None:
        """A row's token at position `length` - 1 left early and will never be remembered."""
        if self._holes is None or self._holes.shape[1] < length:
            wider = torch.zeros((self._memory.batch, 2 * length), dtype=torch.bool)
            if self._holes is not None:
                wider[:, : self._holes.shape[1]] = self._holes
            self._holes = wider
        self._holes[row, length - 1] = True
        self._memory.skip(0, row, length)

    def crop(self, length: int, row: int) -> None:
        """Forgets a row's tokens at `length` and after."""
        self._memory.crop(length, row)

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps these rows only, renumbered in this order."""
        self._memory.keep(rows)
        if self._holes is not None:
            self._holes = self._holes[list(rows)]

    def think(
        self, hidden: Tensor, logits: Tensor, rows: Sequence[int], positions: Sequence[int]
    ) -> tuple[Tensor, list[int]]:
        """Logits ``[N, V]`` after the rounds of each token, and how many it took.

        Args:
            hidden: final states ``[N, d]``, all of them remembered.
            logits: what the head says of them before any round.
            rows, positions: of each token.
        """
        config = self._gate.config
        rounds = [0] * len(rows)
        going = list(range(len(rows)))
        state, heard = hidden, logits
        keys = values = mask = places = None
        for _ in range(config.rounds):
            if config.think_below <= 1.0:
                sure = top_probability(heard)[1].tolist()
                stay = [i for i, p in enumerate(sure) if p < config.think_below]
            else:
                stay = list(range(len(going)))
            if not stay:
                break
            if len(stay) < len(going) or keys is None:
                going = [going[i] for i in stay]
                state = state if len(stay) == len(state) else state[stay]
                keys, values, mask = self._seen([rows[i] for i in going], positions, going)
                places = torch.tensor([positions[i] for i in going], device=hidden.device)
            assert values is not None and places is not None
            queries = self._gate.queries(state, places).unsqueeze(2)
            attended = self._gate.attend(queries, keys, values, attn_mask=mask).squeeze(1)
            state, _ = self._gate.step(state, attended)
            heard = self._backbone.logits(state)
            self._thoughts.append(len(going))
            for i in going:
                rounds[i] += 1
            if len(going) == len(rows):
                logits = heard
            else:
                logits = logits.index_copy(0, torch.tensor(going, device=logits.device), heard)
        return logits, rounds

    def _seen(
        self, rows: Sequence[int], positions: Sequence[int], going: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What tokens may look at: keys, values ``[N, heads, T, .]`` and mask ``[N, 1, 1, T]``."""
        last = [positions[i] for i in going]
        end = max(last) + 1
        keys, values = self._memory.states(0)
        keys, values = keys[:, :, :end], values[:, :, :end]
        index = torch.tensor(list(rows), device=keys.device)
        if list(rows) != list(range(self._memory.batch)):
            keys, values = keys.index_select(0, index), values.index_select(0, index)
        if min(last) + 1 == end and self._holes is None:
            return keys, values, None
        slots = torch.arange(end, device=keys.device)
        mask = slots <= torch.tensor(last, device=keys.device).unsqueeze(1)
        if self._holes is not None:
            holes = torch.nn.functional.pad(self._holes, (0, max(0, end - self._holes.shape[1])))
            mask = mask & ~holes.to(keys.device)[index, :end]
        return keys, values, mask[:, None, None]
