"""The deliberation gate: more computation for tokens that are uncertain at full depth.

After the last layer a token with hidden state h may take up to R rounds of

    h <- (1 - g) h + g Block(h; memory),        g = sigmoid(W_d norm(h)),

where Block attends to the final hidden states of the earlier tokens. A round is taken only
while the full-depth model's largest probability is below the gate threshold
(`GateConfig.think_below`). The memory holds the
last layer's outputs from before any round, so the refined state of a token depends only on the
final hidden states up to its position: not on the batch, pending tokens or rollbacks. A whole text
is computed at once (`run_rounds`) as it is token by token.

Related: adaptive computation time (Graves, arXiv:1603.08983), pondering (Banino et al.,
arXiv:2107.05407); here the backbone stays as it is and the rounds come after it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from deliberate.kernels.ops.exit_head import top_probability
from deliberate.utils.errors import DeliberateError

_ROTARY_BASE = 10_000.0
_EPS = 1e-6


class GateBlock(StrEnum):
    """What a round computes.

    ``transformer``: attention of the token's state over the memory, then an MLP.
    ``document``: the memory weighed by softmax(h_{<=t} W_r), one weight per head and position that
    does not depend on the token, mixed into its state.
    """

    TRANSFORMER = "transformer"
    DOCUMENT = "document"


@dataclass(frozen=True)
class GateConfig:
    """A gate's form and when it fires.

    Attributes:
        rounds: most rounds of one token, at least 1.
        think_below: the gate threshold: another round is taken while the full-depth model's
            largest probability is below this. 0: never; above 1: always. Saved files have this key.
        block: ``transformer`` or ``document``.
        width: inner width of the transformer block's MLP.
        heads: attention heads; their width must be even.
        gated: False fixes g at 1: an ordinary layer, the control of the comparison.

    Raises:
        DeliberateError: a value out of range.
    """

    rounds: int = 2
    think_below: float = 0.80
    block: GateBlock = GateBlock.TRANSFORMER
    width: int = 512
    heads: int = 4
    gated: bool = True

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "block", GateBlock(self.block))
        except ValueError:
            raise DeliberateError(
                f"gate block {str(self.block)!r} is unknown; it is one of {', '.join(GateBlock)}"
            ) from None
        for name in ("rounds", "width", "heads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DeliberateError(f"gate {name}={value}: give a whole number of at least 1")
        threshold = self.think_below
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if not number or not math.isfinite(threshold) or threshold < 0:
            raise DeliberateError(
                f"gate think_below={threshold}: give a probability (0: no round, above 1: all)"
            )
        if not isinstance(self.gated, bool):
            raise DeliberateError(f"gate gated={self.gated!r}: give true or false")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` reads it back."""
        return dataclasses.asdict(self) | {"block": str(self.block)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> GateConfig:
        """Reads `to_dict`'s form.

        Raises:
            DeliberateError: a setting that no gate has.
        """
        if not isinstance(raw, Mapping):
            raise DeliberateError(f"gate settings: expected an object, found {raw!r:.60}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(raw) - known)
        if unknown:
            raise DeliberateError(
                f"unknown gate setting {unknown[0]!r}; known: {', '.join(sorted(known))}"
            )
        return cls(**raw)

    def same_weights(self, other: GateConfig) -> bool:
        """Whether a gate of this configuration has the tensors of the other."""
        free = {"rounds": 1, "think_below": 0.0}
        return dataclasses.replace(self, **free) == dataclasses.replace(other, **free)  # type: ignore[arg-type]


def _size(state: Tensor) -> Tensor:
    """Root mean square of ``[..., d]``, ``[..., 1]``: final states differ in it by model and token,
    and a change counts against it once the final norm has divided by it."""
    return state.pow(2).mean(dim=-1, keepdim=True).sqrt()


class _TransformerBlock(nn.Module):
    """Pre-norm attention over the memory with rotary positions, then a SwiGLU MLP.

    Both output projections start at zero, so that the block starts as the identity.
    """

    def __init__(self, config: GateConfig, hidden_size: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.head_dim = hidden_size // config.heads
        self.memory_norm = nn.RMSNorm(hidden_size, eps=_EPS)
        self.mlp_norm = nn.RMSNorm(hidden_size, eps=_EPS)
        self.q = nn.Linear(hidden_size, hidden_size, bias=False)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.up = nn.Linear(hidden_size, 2 * config.width, bias=False)
        self.down = nn.Linear(config.width, hidden_size, bias=False)
        for layer in (self.q, self.kv, self.up):
            nn.init.normal_(layer.weight, std=hidden_size**-0.5)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)
        self._rotary: tuple[Tensor, Tensor] | None = None

    @property
    def scale(self) -> float:
        """Of the attention scores."""
        return self.head_dim**-0.5

    def memory(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, heads, T, head_dim]`` of states ``[B, T, d]``."""
        shape = (*hidden.shape[:-1], 2, self.heads, self.head_dim)
        keys, values = self.kv(self.memory_norm(hidden)).view(shape).unbind(dim=-3)
        return self._turn(keys, positions).transpose(1, 2), values.transpose(1, 2)

    def queries(self, normed: Tensor, positions: Tensor) -> Tensor:
        """``[..., heads, head_dim]`` of normed states ``[..., d]``."""
        split = self.q(normed).view(*normed.shape[:-1], self.heads, self.head_dim)
        return self._turn(split, positions)

    def change(self, state: Tensor, attended: Tensor) -> Tensor:
        """Block(h) - h, ``[..., d]``, from the attention's ``[..., d]``."""
        size = _size(state)
        attended_change = size * self.out(attended)
        gate, inner = self.up(self.mlp_norm(state + attended_change)).chunk(2, dim=-1)
        return attended_change + size * self.down(silu(gate) * inner)

    def _turn(self, split: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of ``[..., heads, head_dim]`` at ``positions [...]``."""
        cos, sin = self._tables(int(positions.max()) + 1, split)
        cos, sin = cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)
        one, two = split.chunk(2, dim=-1)
        return torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1)

    def _tables(self, end: int, like: Tensor) -> tuple[Tensor, Tensor]:
        tables = self._rotary
        if tables is None or len(tables[0]) < end or tables[0].dtype != like.dtype:
            # Outside inference mode: training may come after decoding.
            with torch.inference_mode(False), torch.no_grad():
                half = self.head_dim // 2
                steps = torch.arange(half, dtype=torch.float64) / half
                places = torch.arange(1 << max(end - 1, 255).bit_length(), dtype=torch.float64)
                angles = torch.outer(places, _ROTARY_BASE**-steps)
                tables = self._rotary = (
                    angles.cos().to(like.device, like.dtype),
                    angles.sin().to(like.device, like.dtype),
                )
        return tables


class _DocumentBlock(nn.Module):
    """The history re-weighed by softmax(h_{<=t} W_r), as attention whose query is always 1."""

    scale = 1.0

    def __init__(self, config: GateConfig, hidden_size: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.memory_norm = nn.RMSNorm(hidden_size, eps=_EPS)
        self.weigh = nn.Linear(hidden_size, config.heads, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        nn.init.normal_(self.weigh.weight, std=hidden_size**-0.5)
        nn.init.normal_(self.value.weight, std=hidden_size**-0.5)
        nn.init.zeros_(self.out.weight)

    def memory(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Weights ``[B, heads, T, 1]`` and values ``[B, heads, T, head_dim]``."""
        normed = self.memory_norm(hidden)
        values = self.value(normed).view(*hidden.shape[:-1], self.heads, -1)
        return self.weigh(normed).unsqueeze(-1).transpose(1, 2), values.transpose(1, 2)

    def queries(self, normed: Tensor, positions: Tensor) -> Tensor:
        """Ones ``[..., heads, 1]``."""
        return normed.new_ones(*normed.shape[:-1], self.heads, 1)

    def change(self, state: Tensor, attended: Tensor) -> Tensor:
        """Block(h) - h."""
        return _size(state) * self.out(attended)


class DeliberationGate(nn.Module):
    """The weights of a gate: W_d and the block. Untrained, it changes nothing.

    Raises:
        DeliberateError: heads that do not divide the hidden size into even widths.
    """

    def __init__(self, config: GateConfig, hidden_size: int) -> None:
        super().__init__()
        if hidden_size % config.heads or (hidden_size // config.heads) % 2:
            raise DeliberateError(
                f"gate heads {config.heads} must divide the hidden size {hidden_size} into heads "
                "of even width"
            )
        self.config = config
        self.norm = nn.RMSNorm(hidden_size, eps=_EPS)
        self.mix = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)
        self.block: Any = (
            _TransformerBlock(config, hidden_size)
            if config.block is GateBlock.TRANSFORMER
            else _DocumentBlock(config, hidden_size)
        )

    def memory(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values for later tokens, from final states ``[B, T, d]``.

        Args:
            positions: ``[1 or B, T]``.

        Returns:
            keys ``[B, heads, T, dk]`` and values ``[B, heads, T, dv]``.
        """
        return self.block.memory(hidden, positions)

    def queries(self, state: Tensor, positions: Tensor) -> Tensor:
        """``[..., heads, dk]`` of states ``[..., d]`` at positions ``[...]``."""
        return self.block.queries(self.norm(state), positions)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, **mask: Any) -> Tensor:
        """Attention of ``[B, heads, q, dk]`` over ``[B, heads, T, .]``: ``[B, q, d]``."""
        mixed = scaled_dot_product_attention(queries, keys, values, scale=self.block.scale, **mask)
        return mixed.transpose(1, 2).flatten(-2)

    def step(self, state: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """One round: new states ``[..., d]`` and g ``[...]``."""
        change = self.block.change(state, attended)
        if not self.config.gated:
            return state + change, change.new_ones(change.shape[:-1])
        g = torch.sigmoid(self.mix(self.norm(state)))
        return state + g * change, g.squeeze(-1)


class RoundOutputs(NamedTuple):
    """The deliberation rounds of N tokens of a text.

    Attributes:
        states: after each round, ``[N, d]``; a token that takes no further round keeps its state.
        fires: bool ``[N]`` of each round: which tokens took it.
        gates: g ``[N]`` of each round.
    """

    states: list[Tensor]
    fires: list[Tensor]
    gates: list[Tensor]

    @property
    def rounds(self) -> Tensor:
        """Rounds that each token took, int64 ``[N]``."""
        return torch.stack(self.fires).sum(dim=0)


def run_rounds(
    gate: DeliberationGate,
    hidden: Tensor,
    wanted: Tensor,
    logits: Callable[[Tensor], Tensor],
    *,
    position_ids: Tensor | None = None,
    think_below: float | None = None,
) -> RoundOutputs:
    """Takes the deliberation rounds of whole texts at once, by the rule of decoding.

    Args:
        hidden: final hidden states ``[B, T, d]``, padded on the right or packed.
        wanted: bool ``[B, T]``, the N tokens to refine.
        logits: final norm and head, ``[N, d]`` -> ``[N, V]``.
        position_ids: ``[B, T]`` of packed rows, where each text begins at 0; None for plain rows.
        think_below: gate threshold in place of the gate's own.
    """
    threshold = gate.config.think_below if think_below is None else think_below
    batch, length, _ = hidden.shape
    device = hidden.device
    positions, mask = torch.arange(length, device=device).unsqueeze(0), {"is_causal": True}
    if position_ids is not None:
        positions = position_ids
        text = (position_ids == 0).cumsum(dim=1)
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        same = text.unsqueeze(1) == text.unsqueeze(2)
        mask = {"attn_mask": (causal & same).unsqueeze(1)}  # type: ignore[dict-item]
    keys, values = gate.memory(hidden, positions)
    places = positions.expand(batch, length)[wanted]
    state = hidden[wanted]
    active = torch.ones(len(state), dtype=torch.bool, device=device)
    outputs = RoundOutputs([], [], [])
    for _ in range(gate.config.rounds):
        with torch.no_grad():
            if threshold <= 1.0:
                active = active & (top_probability(logits(state))[1] < threshold)
        own = gate.queries(state, places)
        queries = own.new_zeros(batch, length, *own.shape[1:])
        queries[wanted] = own
        attended = gate.attend(queries.transpose(1, 2), keys, values, **mask)[wanted]
        new, g = gate.step(state, attended)
        state = torch.where(active.unsqueeze(-1), new, state)
        outputs.states.append(state)
        outputs.fires.append(active)
        outputs.gates.append(g)
    return outputs


def refined_states(
    gate: DeliberationGate | None,
    last: Tensor,
    wanted: Tensor,
    logits: Callable[[Tensor], Tensor],
    *,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Final states ``[N, d]`` of the wanted tokens of whole texts, after the gate if there is one.

    Arguments as in `run_rounds`.
    """
    if gate is None:
        return last[wanted]
    return run_rounds(gate, last, wanted, logits, position_ids=position_ids).states[-1]
