"""What a pass through decoder layers needs beside the hidden states: positions, rotary, masks.

A pass is *uniform* when every row of the batch starts at the same position, and *ragged* when each
row has its own start and its own number of tokens. Ragged rows are padded on the right: a token's
key goes to the cache slot of its position, so "attend to slots at or before my position" is the
causal mask of every row. What padding writes lies behind the row's end and is overwritten before it
is read.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deliberate.utils.errors import DeliberateError

FULL = "full_attention"
SLIDING = "sliding_attention"
# transformers' modules of these rotary embeddings keep the frequencies of their last call.
_LENGTH_DEPENDENT = threading.Lock()


@dataclass(frozen=True, slots=True, eq=False)
class StepContext:
    """What every layer of one pass over q consecutive tokens of R sequences shares.

    Attributes:
        positions: int64 ``[1, q]`` (uniform) or ``[R, q]`` (ragged).
        position_embeddings: rotary (cos, sin) or one complex table, each
            ``[1 or R, q, rotary_dim]`` in the model's dtype, or None; a mapping of such pairs by
            layer type where the model has two tables.
        masks: by layer type, None (nothing to mask) or ``[1 or R, 1, q, keys]``: boolean with
            True = attend for sdpa, additive in the model's dtype for eager.
        start: position of the first token; ragged: of the first row.
        rows: ragged: cache rows, int64 ``[R]``, None where they are all rows in order.
        starts: ragged: first position of each row; empty when uniform.
        counts: ragged: tokens of each row, the others up to q being padding.
        keys: ragged: cache slots that the pass reads.
    """

    positions: Tensor
    position_embeddings: Any
    masks: Mapping[str, Tensor | None]
    start: int
    rows: Tensor | None = None
    row_ids: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    keys: int = 0

    @property
    def ragged(self) -> bool:
        """Whether rows differ in start or count, or only some rows take part."""
        return bool(self.starts)


@dataclass(frozen=True, slots=True)
class _Tables:
    """Positions ``[1, size]`` and rotary tables ``[1, size, rotary_dim]``, sliced by each pass.

    `sin` is None where the module gives one complex table (DeepSeek-V2), which is then `cos`.
    """

    key: tuple[torch.device | str, torch.dtype]
    size: int
    positions: Tensor
    cos: Tensor | None
    sin: Tensor | None
    by_type: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def slice(self, start: int, q: int) -> Any:
        """Rotary embeddings of positions start..start+q-1, as `StepContext` has them; or None."""
        return self._each(lambda table: table.narrow(1, start, q))

    def gather(self, positions: Tensor) -> Any:
        """Rotary embeddings of ``positions [R, q]``, as `StepContext` has them; or None."""
        return self._each(lambda table: table[0, positions])

    def _each(self, take: Callable[[Tensor], Tensor]) -> Any:
        if self.by_type:
            return {kind: (take(cos), take(sin)) for kind, (cos, sin) in self.by_type.items()}
        if self.cos is None:
            return None
        return take(self.cos) if self.sin is None else (take(self.cos), take(self.sin))


class ContextBuilder:
    """Makes the contexts of one model's passes.

    Args:
        embedding: the token embedding; its weight tells the dtype.
        rotary: the model's rotary module, or None.
        rope_follows_length: the rotary frequencies depend on the sequence length.
        eager: additive masks instead of boolean ones.
        window: sliding window in tokens, or None.
        learned_positions: size of the table of learned positions, or None.
        rotary_types: layer types that have a rotary table each; none where all layers share one.
    """

    def __init__(
        self,
        embedding: Any,
        rotary: Any,
        *,
        rope_follows_length: bool,
        eager: bool,
        window: int | None,
        learned_positions: int | None,
        rotary_types: Sequence[str] = (),
    ) -> None:
        self._embedding = embedding
        self._rotary = rotary
        self._rope_follows_length = rope_follows_length
        self._eager = eager
        self._window = window
        self._learned_positions = learned_positions
        self._rotary_types = tuple(rotary_types)
        self._no_masks: dict[str, Tensor | None] = dict.fromkeys((FULL, SLIDING))
        self._tables: _Tables | None = None
        self._placed: Tensor | None = None
        self._rows: dict[int, Tensor] = {}
        self.takes_rows = False

    def with_rows(self) -> ContextBuilder:
        """The same contexts, for a cache whose rows may be placed by `place_row`."""
        made = copy.copy(self)
        made._rows, made.takes_rows = {}, True
        return made

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Of a cache's rows these are left, numbered anew in this order."""
        if self._rows:
            found = {new: self._rows[old] for new, old in enumerate(rows) if old in self._rows}
            self._rows.clear()
            self._rows.update(found)

    def place_row(self, row: int, positions: Tensor | None) -> None:
        """The rotary positions ``[axes, n]`` of the prompt in a row of the cache, as of `placed`;
        None: 0, 1, 2, ... again."""
        if positions is None:
            self._rows.pop(row, None)
        else:
            self._rows[row] = positions

    @property
    def places_rows(self) -> bool:
        """Whether any row has rotary positions of its own, so that passes must be ragged."""
        return bool(self._rows)

    def placed(self, positions: Tensor) -> ContextBuilder:
        """Contexts of one prompt whose tokens have rotary positions of their own (M-RoPE).

        A token behind the prompt has that of its slot, moved by as much as the one after the prompt
        is (Qwen2-VL, arXiv:2409.12191). Slots, masks and windows stay what they are.

        Args:
            positions: ``[axes, n]`` of the prompt's tokens.
        """
        made = copy.copy(self)
        made._placed, made._tables = positions, None
        return made

    def uniform(self, start: int, q: int, *, device: torch.device | str) -> StepContext:
        """A causal pass over q tokens at positions start..start+q-1 of every row.

        The tokens see the keys 0..start+q-1 that are not after them, and in sliding-window layers
        only the last ``window`` of those, themselves included. Where the rotary frequencies
        depend on the sequence length ("dynamic" and "longrope"), a pass at start 0 takes those of
        its full length, and a later pass those that each of its tokens would have alone.
        """
        if q < 1 or start < 0:
            raise DeliberateError(f"a pass needs start >= 0 and q >= 1, got start={start}, q={q}")
        self._check_room(start + q)
        tables, dtype = self._tables_for(start + q, device)
        positions = tables.positions.narrow(1, start, q)
        if tables.sin is not None and tables.cos is not None:  # nearly always; once a pass
            rotary: Any = (tables.cos.narrow(1, start, q), tables.sin.narrow(1, start, q))
        else:
            rotary = tables.slice(start, q)
        if rotary is None and self._rotary is not None:
            rotary = self._rotary_by_length(positions, start, dtype)
        return StepContext(positions, rotary, self._masks(tables, start, start + q, dtype), start)

    def ragged(
        self,
        rows: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        *,
        batch: int,
        device: torch.device | str,
        holes: Tensor | None = None,
    ) -> StepContext:
        """A causal pass of ``max(counts)`` tokens in which row i begins at ``starts[i]``.

        Args:
            rows: rows of the cache that take part, rising.
            starts, counts: of each of them; what lies between its count and the longest is padding.
            batch: rows of the cache.
            holes: bool ``[R, keys or more]``, True where a slot was never written ("skip" mode).
        """
        if not len(rows) == len(starts) == len(counts) or min(counts) < 1 or min(starts) < 0:
            raise DeliberateError(
                f"a pass needs a start >= 0 and a count >= 1 for each of {len(rows)} rows, got "
                f"starts={list(starts)}, counts={list(counts)}"
            )
        q = max(counts)
        self._check_room(max(s + c for s, c in zip(starts, counts, strict=True)))
        keys = max(starts) + q
        tables, dtype = self._tables_for(keys, device)
        first = torch.tensor(starts, device=device).unsqueeze(1)
        positions = first + tables.positions.narrow(1, 0, q)
        if self._learned_positions is not None:
            # Padding may reach past the table; what it embeds is never read.
            positions = positions.clamp(max=self._learned_positions - 1)
        rotary = tables.gather(positions)
        if rotary is None and self._rotary is not None:
            rotary = self._rotary_each(positions, starts, counts, dtype)
        if self._rows:
            rotary = self._rotary_of_rows(rotary, positions, rows, dtype)
        all_rows = len(rows) == batch
        if len(rows) == 1 and holes is None:  # as alone in a cache: the same masks, or none
            masks = self._masks(tables, starts[0], keys, dtype)
        else:
            masks = self._ragged_masks(tables, first, q, keys, dtype, holes)
        return StepContext(
            positions,
            rotary,
            masks,
            starts[0],
            rows=None if all_rows else torch.tensor(rows, device=device),
            row_ids=tuple(rows),
            starts=tuple(starts),
            counts=tuple(counts),
            keys=keys,
        )

    def rotary_tables(self, end: int, device: torch.device | str) -> tuple[Tensor, Tensor] | None:
        """cos and sin of positions 0..end-1 or more, ``[size, rotary_dim]``; None where there are
        none or they depend on the sequence length."""
        tables, _ = self._tables_for(end, device)
        if tables.cos is None or tables.sin is None:
            return None
        return tables.cos[0], tables.sin[0]

    def _check_room(self, end: int) -> None:
        if self._learned_positions is not None and end > self._learned_positions:
            raise DeliberateError(
                f"{end} tokens do not fit the {self._learned_positions} learned positions of this "
                "model; shorten the prompt or the answer"
            )

    def _tables_for(self, end: int, device: torch.device | str) -> tuple[_Tables, torch.dtype]:
        # Blocks of quantised weights name it; they are not widened to be asked.
        dtype = vars(self._embedding).get("states_dtype") or self._embedding.weight.dtype
        if isinstance(device, str):
            device = torch.device(device)  # one form, or callers of both would rebuild the tables
        tables = self._tables
        if tables is None or tables.size < end or tables.key != (device, dtype):
            tables = self._tables = self._build_tables(end, device, dtype)
        return tables, dtype

    def _masks(
        self, tables: _Tables, start: int, end: int, dtype: torch.dtype
    ) -> Mapping[str, Tensor | None]:
        q = end - start
        window = self._window
        windowed = window is not None and end > window
        # sdpa masks causally by itself, but from the first key on: right only when start == 0.
        causal_needed = q > 1 and (self._eager or start > 0)
        if not windowed and not causal_needed:
            return self._no_masks
        keys = tables.positions.narrow(1, 0, end).view(1, 1, 1, end)
        queries = tables.positions.narrow(1, start, q).view(1, 1, q, 1)
        causal = keys <= queries
        full = self._form(causal, dtype) if causal_needed else None
        if windowed and window is not None:
            return {FULL: full, SLIDING: self._form(causal & (keys > queries - window), dtype)}
        return {FULL: full, SLIDING: full}

    def _ragged_masks(
        self,
        tables: _Tables,
        first: Tensor,
        q: int,
        keys: int,
        dtype: torch.dtype,
        holes: Tensor | None,
    ) -> Mapping[str, Tensor | None]:
        # Not from the clamped positions: the mask is over cache slots.
        queries = (first + tables.positions.narrow(1, 0, q))[:, None, :, None]
        slots = tables.positions.narrow(1, 0, keys).view(1, 1, 1, keys)
        causal = slots <= queries
        if holes is not None:
            causal = causal & ~holes[:, None, None, :keys]
        full = self._form(causal, dtype)
        if self._window is None or keys <= self._window:
            return {FULL: full, SLIDING: full}
        return {FULL: full, SLIDING: self._form(causal & (slots > queries - self._window), dtype)}

    def _form(self, attend: Tensor, dtype: torch.dtype) -> Tensor:
        """A boolean mask in the form that the attention implementation takes."""
        if not self._eager:
            return attend
        blocked = torch.finfo(dtype).min
        return torch.zeros(attend.shape, dtype=dtype, device=attend.device).masked_fill_(
            ~attend, blocked
        )

    def _build_tables(self, needed: int, device: torch.device | str, dtype: torch.dtype) -> _Tables:
        size = 1 << max(needed - 1, 255).bit_length()  # powers of two: few rebuilds
        # Outside inference mode, so that the tables serve every later pass, with gradients or not.
        with torch.inference_mode(False), torch.no_grad():
            positions = torch.arange(size, device=device).unsqueeze(0)
            cos = sin = None
            like = torch.empty(0, dtype=dtype, device=device)
            by_type = {kind: self._rotary(like, positions, kind) for kind in self._rotary_types}
            if self._rotary is not None and not by_type and not self._rope_follows_length:
                made = self._rotary(like, self._places(positions))
                cos, sin = (made, None) if isinstance(made, Tensor) else made
        return _Tables((device, dtype), size, positions, cos, sin, by_type)

    def _places(self, slots: Tensor) -> Tensor:
        """Rotary positions of slots ``[1, size]``: themselves, or ``[axes, 1, size]``."""
        if self._placed is not None:
            return _places_of(self._placed, slots)
        # In transformers 5.17 the modules of M-RoPE take positions with axes only.
        return slots.expand(3, *slots.shape) if hasattr(self._rotary, "mrope_section") else slots

    def _rotary_of_rows(
        self, rotary: Any, positions: Tensor, rows: Sequence[int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The same with the places of rows that have some."""
        cos, sin = (table.clone() for table in rotary)
        like = torch.empty(0, dtype=dtype, device=positions.device)
        for place, row in enumerate(rows):
            prompt = self._rows.get(row)
            if prompt is not None:
                own = self._rotary(like, _places_of(prompt, positions[place : place + 1]))
                cos[place], sin[place] = own[0][0], own[1][0]
        return cos, sin

    def _rotary_by_length(
        self, positions: Tensor, start: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Rotary embeddings that depend on the sequence length, from the model's own module."""
        if start == 0 or positions.shape[1] == 1:
            return self._rotary_as_new(positions, dtype)
        # One at a time: the module takes the frequencies of the last position of a call.
        pairs = [self._rotary_as_new(one, dtype) for one in positions.split(1, dim=1)]
        return torch.cat([c for c, _ in pairs], dim=1), torch.cat([s for _, s in pairs], dim=1)

    def _rotary_as_new(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin as from a new module: the "dynamic" type keeps the frequencies of the longest
        sequence it was called with, drafts that were rolled back included."""
        rotary = self._rotary
        longest = getattr(rotary, "original_max_seq_len", None)
        like = torch.empty(0, dtype=dtype, device=positions.device)
        with _LENGTH_DEPENDENT:
            dynamic = "dynamic" in getattr(rotary, "rope_type", "")
            if dynamic and rotary.max_seq_len_cached != longest:
                rotary.max_seq_len_cached = longest
                rotary.inv_freq = rotary.original_inv_freq.to(positions.device)
            return rotary(like, positions)

    def _rotary_each(
        self, positions: Tensor, starts: Sequence[int], counts: Sequence[int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The same for ragged rows: each row by itself, its padding apart from its tokens."""
        pairs = []
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            own = positions[row : row + 1]
            cos, sin = self._rotary_by_length(own[:, :count], start, dtype)
            pad = own.shape[1] - count
            if pad:
                cos, sin = (torch.nn.functional.pad(part, (0, 0, 0, pad)) for part in (cos, sin))
            pairs.append((cos, sin))
        return torch.cat([c for c, _ in pairs]), torch.cat([s for _, s in pairs])


def _places_of(prompt: Tensor, slots: Tensor) -> Tensor:
    """Rotary positions ``[axes, 1, q]`` of slots ``[1, q]``, of a text that begins with a prompt's
    ``[axes, n]``."""
    prompt = prompt.to(slots.device)
    count = prompt.shape[1]
    within = prompt[:, slots[0].clamp(max=count - 1)]
    after = slots + (prompt.max() + 1 - count)
    return torch.where(slots < count, within, after).unsqueeze(1)
