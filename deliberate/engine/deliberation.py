"""The deliberation gate while decoding: its memory, and rounds for tokens that are uncertain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deliberate.cache.attention_metadata import StepContext
from deliberate.cache.kv_cache import SegmentCache
from deliberate.engine.sequence import DecodingSequence
from deliberate.kernels.ops.exit_head import top_probability
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.deliberation_gate import DeliberationGate


class GateRunner:
    """A gate over the sequences of one batch, or over those of an engine that are decoded with it.

    `open` comes first: it makes the memory.

    The memory is one more layer of a cache: a token's slot is its position; its final state is kept
    when it completes all layers, cropped on rollback and compacted with the batch. Rounds run only
    for tokens whose top probability is below the gate threshold, and only then are keys and values
    of their history computed: a sequence without rounds costs one copy a token.

    Args:
        gate: the weights and the settings.
        backbone: for its head.
        rounds: gets the number of tokens of every round, in order.
    """

    def __init__(self, gate: DeliberationGate, backbone: Backbone, rounds: list[int]) -> None:
        self._gate = gate
        self._backbone = backbone
        self._rounds = rounds
        # Slots of tokens that exited early and have no final state: bool [rows, slots].
        self._holes: Tensor | None = None

    def open(self, rows: int, room: int = 0) -> None:
        """Makes the memory of so many rows, all of them empty, with room for so many tokens."""
        # States, and keys and values of the first ones of each row, as far as they were needed.
        self._states, self._memory = SegmentCache(1, room, rows), SegmentCache(1, room, rows)
        self._holes = None

    @property
    def threshold(self) -> float:
        """The gate's own: rounds run for tokens whose top probability is below it."""
        return self._gate.config.think_below

    def remember_rows(
        self,
        rows: Sequence[DecodingSequence],
        hidden: Tensor,
        counts: Sequence[int],
        ctx: StepContext,
    ) -> None:
        """Keeps the final states of those of `rows` that have the gate, as `remember`.

        Args:
            counts: states of each row; the others of ``[R, M, d]`` are padding.

        Raises:
            RuntimeError: a row whose memory does not end where the pass began.
        """
        if all(sequence.gated for sequence in rows):
            self.remember(hidden, ctx)
            return
        starts = ctx.starts if ctx.ragged else (ctx.start,) * len(rows)
        for place, (sequence, start, count) in enumerate(zip(rows, starts, counts, strict=True)):
            if not sequence.gated:
                continue
            held = self._states.length(0, sequence.row)
            if held != start:
                raise RuntimeError(f"a pass from position {start} meets {held} final states")
            states = hidden[place : place + 1, :count]
            self._states.adopt(0, sequence.row, start, states, states[..., :0])

    def remember(self, hidden: Tensor, ctx: StepContext) -> None:
        """Keeps the final states ``[R, M, d]`` of the pass `ctx`."""
        states = hidden.unsqueeze(1)
        self._states.begin(ctx, 0, 1)
        self._states.update(states, states[..., :0], 0)

    def skip(self, row: int, length: int) -> None:
        """A row's token at position `length` - 1 exited early and has no final state."""
        if self._holes is None or self._holes.shape[1] < length:
            wider = torch.zeros((self._states.batch, 2 * length), dtype=torch.bool)
            if self._holes is not None:
                wider[:, : self._holes.shape[1]] = self._holes
            self._holes = wider
        self._holes[row, length - 1] = True
        self._states.skip(0, row, length)

    def crop(self, length: int, row: int) -> None:
        """Drops a row's tokens at `length` and after."""
        self._states.crop(length, row)
        self._memory.crop(length, row)

    def clear(self, row: int) -> None:
        """Drops all states of a row, whose tokens are all run again."""
        self.crop(0, row)
        if self._holes is not None:
            self._holes[row] = False

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps these rows only, renumbered in this order."""
        self._states.keep(rows)
        self._memory.keep(rows)
        if self._holes is not None:
            self._holes = self._holes[list(rows)]

    def deliberate(
        self,
        hidden: Tensor,
        logits: Tensor,
        rows: Sequence[int],
        positions: Sequence[int],
        thresholds: Sequence[float],
    ) -> tuple[Tensor, list[int]]:
        """Logits ``[N, V]`` after each token's rounds, and how many rounds each took.

        Args:
            hidden: final states ``[N, d]``, all of them in the memory.
            logits: of these states, before any round.
            rows, positions: of each token.
            thresholds: of each token: a round runs while its top probability is below.
        """
        rounds = [0] * len(rows)
        going = list(range(len(rows)))
        state, refined = hidden, logits
        for _ in range(self._gate.config.rounds):
            own = [thresholds[i] for i in going]
            stay = [i for i, threshold in enumerate(own) if threshold > 1.0]
            if any(0.0 < threshold <= 1.0 for threshold in own):
                certain = self.probabilities(refined)
                stay = [i for i, p in enumerate(certain) if p < own[i] or own[i] > 1.0]
            if not stay:
                break
            if len(stay) < len(going):
                going, state = [going[i] for i in stay], state[stay]
            state, refined = self.round(
                state, [rows[i] for i in going], [positions[i] for i in going]
            )
            self._rounds.append(len(going))
            for i in going:
                rounds[i] += 1
            if len(going) == len(rows):
                logits = refined
            else:
                logits = logits.index_copy(0, torch.tensor(going, device=logits.device), refined)
        return logits, rounds

    def probabilities(self, logits: Tensor) -> list[float]:
        """The top probability of each row of ``[N, V]``."""
        return top_probability(logits)[1].tolist()

    def round(
        self, state: Tensor, rows: Sequence[int], positions: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """One round of states ``[N, d]``: the new states, and logits ``[N, V]`` of them."""
        keys, values, mask = self._visible(rows, positions)
        places = torch.tensor(list(positions), device=state.device)
        queries = self._gate.queries(state, places).unsqueeze(2)
        attended = self._gate.attend(queries, keys, values, attn_mask=mask).squeeze(1)
        state, _ = self._gate.step(state, attended)
        return state, self._backbone.logits(state)

    def _visible(
        self, rows: Sequence[int], positions: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What tokens attend to: keys, values ``[N, heads, T, .]`` and mask ``[N, 1, 1, T]``."""
        for row in dict.fromkeys(rows):
            self._write(row)
        end = max(positions) + 1
        keys, values = self._memory.states(0)
        keys, values = keys[:, :, :end], values[:, :, :end]
        index = torch.tensor(list(rows), device=keys.device)
        if list(rows) != list(range(self._memory.batch)):
            keys, values = keys.index_select(0, index), values.index_select(0, index)
        if min(positions) + 1 == end and self._holes is None:
            return keys, values, None
        slots = torch.arange(end, device=keys.device)
        mask = slots <= torch.tensor(list(positions), device=keys.device).unsqueeze(1)
        if self._holes is not None:
            holes = torch.nn.functional.pad(self._holes, (0, max(0, end - self._holes.shape[1])))
            mask = mask & ~holes.to(keys.device)[index, :end]
        return keys, values, mask[:, None, None]

    def _write(self, row: int) -> None:
        """Computes keys and values of those states of a row that have none yet."""
        first, end = self._memory.length(0, row), self._states.length(0, row)
        if first == end:
            return
        states = self._states.states(0, row)[0][:, 0, first:]
        places = torch.arange(first, end, device=states.device).unsqueeze(0)
        keys, values = self._gate.memory(states, places)
        self._memory.adopt(0, row, first, keys[0], values[0])
