"""What the CUDA decoding benchmark times: a random model, executors over it, ways to decode."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from deliberate.config import Fidelity, KVMode
from deliberate.cost.grid import Grid
from deliberate.cost.measure import measure
from deliberate.cost.meter import Work, predict_seconds
from deliberate.cost.model import CostModel
from deliberate.engine.decode_loop import DecodeLoop
from deliberate.engine.loop_settings import LoopSettings
from deliberate.executors.fused.cuda.backbone import CudaFusedBackbone
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.exit_config import ExitConfig
from deliberate.modeling.exit_heads import ExitHeads, ExitReader
from deliberate.utils.devices import synchronize
from deliberate.utils.errors import DeliberateError

SIZES: Mapping[str, Mapping[str, int]] = {
    "0.5b": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
# A threshold that every confidence reaches, and one that none does.
ALWAYS, NEVER = 0.0, 2.0


@dataclass(frozen=True)
class Variant:
    """One way to decode.

    Attributes:
        name: as it stands in the table.
        executor: key of the executors.
        fidelity, threshold, kv_mode: of the loop; the one exit is at half depth.
        batch: sequences.
        prefetch: launch the upper half while the exit is evaluated.
    """

    name: str
    executor: str
    fidelity: Fidelity = Fidelity.DENSE
    threshold: float = NEVER
    kv_mode: KVMode = KVMode.DEFER
    batch: int = 1
    multi_step: bool = False


VARIANTS = (
    Variant("transformers' modules, dense", "generic"),
    Variant("dense", "cuda"),
    Variant("dense, int8", "int8"),
    Variant(
        "exits at half depth, keys filled", "cuda", Fidelity.THRESHOLD, ALWAYS, KVMode.PROPAGATE
    ),
    Variant("exits at half depth, deferred", "cuda", Fidelity.THRESHOLD, ALWAYS),
    Variant("exact, exits at half", "cuda", Fidelity.EXACT, ALWAYS),
    Variant("evaluated, continues", "cuda", Fidelity.THRESHOLD, NEVER, KVMode.PROPAGATE),
    Variant(
        "evaluated, continues, prefetch",
        "cuda",
        Fidelity.THRESHOLD,
        NEVER,
        KVMode.PROPAGATE,
        multi_step=True,
    ),
    Variant("transformers' modules, dense, 8", "generic", batch=8),
    Variant("dense, 8", "cuda", batch=8),
    Variant(
        "exits at half, keys filled, 8", "cuda", Fidelity.THRESHOLD, ALWAYS, KVMode.PROPAGATE, 8
    ),
)


@dataclass(frozen=True)
class Line:
    """What a way took.

    Attributes:
        ms_per_token: median over rounds, of the time after the prompt over its tokens; a batch's
            step counts once.
        floor_ms: bytes of weights of the layers and heads it needs, over the measured bandwidth.
        predicted_ms: by the cost model of its executor; None where none was measured.
        layers_per_token: as the loop counted them.
        discarded: launches whose result was not used, per token.
        agrees: share of its tokens that are those of transformers' modules; None where none are to
            be compared.
    """

    variant: str
    ms_per_token: float
    low: float
    high: float
    floor_ms: float
    predicted_ms: float | None
    layers_per_token: float
    discarded: float
    agrees: float | None


def random_model(size: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A random model of Qwen2's kind with tied embeddings.

    Raises:
        DeliberateError: an unknown size.
    """
    if size not in SIZES:
        raise DeliberateError(f"size {size!r} is unknown: one of {', '.join(SIZES)}")
    sizes: dict[str, Any] = dict(SIZES[size])
    config = Qwen2Config(
        **sizes,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype=dtype,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = Qwen2ForCausalLM(config)
    return model.to(dtype).eval()


class DecodeBench:
    """Executors over one model, and the ways timed on them.

    Args:
        model: random, of Qwen2's kind.
        ops: as for `CudaFusedBackbone`.
        tokens, prompt: of each generation.
        clock: seconds, monotonic.

    Attributes:
        pairs: executors and their readers, by name, once used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        ops: bool | None,
        tokens: int,
        prompt: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.tokens, self.prompt, self.clock = model, tokens, prompt, clock
        depth = Backbone(model).num_layers
        self.exits = ExitConfig.build(depth, [depth // 2])
        like = next(model.parameters())
        heads = ExitHeads(self.exits, Backbone(model).hidden_size).to(like.device, like.dtype)
        self._heads = heads.eval()
        self._ops = ops
        self.pairs: dict[str, tuple[Backbone, ExitReader]] = {}

    def pair(self, executor: str) -> tuple[Backbone, ExitReader]:
        """An executor and its reader of the exit."""
        if executor not in self.pairs:
            settings = {"model_bytes": sum(p.nbytes for p in self.model.parameters())}
            if executor == "generic":
                plain = Backbone(self.model)
                reader = ExitReader(
                    self._heads, plain.norm, plain.lm_head, plain.head_logits, plain.softcap,
                    **settings,
                )  # fmt: skip
                self.pairs[executor] = plain, reader
            else:
                weights = "int8" if executor == "int8" else None
                made = CudaFusedBackbone(
                    self.model, boundaries=self.exits.layers, weights=weights, ops=self._ops
                )
                self.pairs[executor] = made, made.exit_reader(self._heads, **settings)
        return self.pairs[executor]

    def generate(self, variant: Variant, seed: int = 0) -> tuple[DecodeLoop, float]:
        """One generation; the loop, and its seconds after the prompt."""
        backbone, reader = self.pair(variant.executor)
        if isinstance(backbone, CudaFusedBackbone):
            backbone.launches.enabled = variant.multi_step
        settings = LoopSettings(
            exits=self.exits.layers,
            thresholds=(variant.threshold,),
            fidelity=variant.fidelity,
            max_pending=self.exits.max_pending,
            max_new_tokens=self.tokens,
            kv_mode=variant.kv_mode,
        )
        loop = DecodeLoop(
            backbone,
            None if variant.fidelity is Fidelity.DENSE else reader,
            settings,
        )
        generator = torch.Generator().manual_seed(seed)
        shape = (variant.batch, self.prompt)
        prompts = torch.randint(0, backbone.vocab_size, shape, generator=generator)
        synchronize(backbone.device)
        steps = loop.run(prompts.to(backbone.device))
        next(steps)
        synchronize(backbone.device)
        began = self.clock()
        for _ in steps:
            pass
        synchronize(backbone.device)
        return loop, self.clock() - began

    def cost(self, executor: str, seconds: float) -> CostModel:
        """The cost model of an executor, without prefetch."""
        backbone, reader = self.pair(executor)
        if isinstance(backbone, CudaFusedBackbone):
            backbone.launches.enabled = False
        grid = Grid(
            tokens=(1, 2, 4, 8),
            contexts=(self.prompt,),
            batches=(1, 2),
            prompts=(min(64, self.prompt),),
            steps=24,
            rounds=5,
            seconds=seconds,
        )
        return measure(backbone, reader, self.exits, grid=grid)

    def floor_bytes(self, variant: Variant) -> int:
        """Bytes of weights that one token of this way cannot do without."""
        backbone = self.pair("int8" if variant.executor == "int8" else "cuda")[0]
        assert isinstance(backbone, CudaFusedBackbone)
        layers = backbone.layer_weights
        half = self.exits.layers[0]
        if variant.threshold == ALWAYS and variant.kv_mode is KVMode.PROPAGATE:
            # Keys and values of the upper half: their share of QKV.
            shape = backbone.layer_shapes[0]
            share = 2 * shape.kv_heads / (shape.heads + 2 * shape.kv_heads)
            above = sum(int(layer.qkv.nbytes * share) for layer in layers[half:])
            return sum(layer.nbytes for layer in layers[:half]) + above + backbone.head.nbytes
        requested = variant.fidelity is not Fidelity.DENSE
        heads = 2 if requested and variant.threshold == NEVER else 1
        if requested and variant.threshold == ALWAYS:
            # The upper half once for every `max_pending` tokens and the one that takes them along.
            above = sum(layer.nbytes for layer in layers[half:]) // (self.exits.max_pending + 1)
            return sum(layer.nbytes for layer in layers[:half]) + above + backbone.head.nbytes
        return sum(layer.nbytes for layer in layers) + heads * backbone.head.nbytes

    @torch.inference_mode()
    def line(
        self,
        variant: Variant,
        rounds: int,
        bandwidth: float,
        cost: CostModel | None,
        expected: Sequence[Sequence[int]] | None,
    ) -> tuple[Line, list[list[int]]]:
        """Times a way after one generation that captures; the line, and the tokens."""
        self.generate(variant)
        backbone = self.pair(variant.executor)[0]
        launches = backbone.launches if isinstance(backbone, CudaFusedBackbone) else None
        before = (launches.launched, launches.taken) if launches is not None else (0, 0)
        taken, predicted, layers = [], [], []
        made: list[list[int]] = []
        for seed in range(rounds):
            loop, seconds = self.generate(variant, seed)
            taken.append(1e3 * seconds / (self.tokens - 1))
            layers.append(statistics.fmean(trace.layers_per_token for trace in loop.traces))
            if cost is not None:
                predicted.append(1e3 * _predicted(cost, loop) / (self.tokens - 1))
            if seed == 0:
                made = [trace.tokens for trace in loop.traces]
        after = (launches.launched, launches.taken) if launches is not None else (0, 0)
        discarded = (after[0] - before[0]) - (after[1] - before[1])
        agrees = None
        if expected is not None and variant.threshold == NEVER:
            pairs = [
                a == b
                for mine, other in zip(made, expected, strict=True)
                for a, b in zip(mine, other, strict=True)
            ]
            agrees = sum(pairs) / len(pairs)
        line = Line(
            variant.name,
            statistics.median(taken),
            min(taken),
            max(taken),
            1e3 * self.floor_bytes(variant) / bandwidth,
            statistics.median(predicted) if predicted else None,
            statistics.fmean(layers),
            discarded / (rounds * (self.tokens - 1)),
            agrees,
        )
        return line, made


def _predicted(cost: CostModel, loop: DecodeLoop) -> float:
    """Seconds of a generation after its prompt, by the cost model."""
    work = Work(
        layers=loop.boundaries[:-1],
        passes=loop.batch.passes,
        verifies=loop.exact,
        reads=loop.batch.reads,
        runs=loop.batch.runs,
    )
    return predict_seconds(cost, work)
