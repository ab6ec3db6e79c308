"""`deliberate architectures`: which causal language models of transformers are run, by trying them.

Every class in transformers' table of causal models is built with a tiny random configuration and
probed (`deliberate.modeling.probe`): its layers, run one by one with tokens pending at half depth,
in ragged rows and past a sliding window, must give the logits of its own ``forward``.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deliberate.modeling.architectures import ARCHITECTURES
from deliberate.modeling.backbone import Backbone
from deliberate.modeling.probe import TOLERANCE, probe
from deliberate.utils.errors import DeliberateError

# Settings under the names that configurations give them; each takes those that it has.
_SETTINGS: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "query_pre_attn_scalar": 8,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "rotary_dim": 8,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 128,
    "ffn_dim": 64,
}
_NO_TOKENS: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
_INTRODUCTION = """\
Written by `deliberate architectures --out docs/architectures.md` with transformers {}: every
causal language model that it has, built tiny and random, its layers run one by one with tokens
pending at half depth, in ragged rows and past a sliding window, against the logits of its own
`forward`. A model that you wrap is probed in the same way, unless its architecture is a tested
entry. The fused executor runs the Llama family; all others run by transformers' own modules.
"""
MOST_PARAMETERS = 30_000_000


@dataclass(frozen=True)
class Verdict:
    """Of one architecture.

    Attributes:
        name: ``model_type`` in transformers.
        runs: the probe passed; None where no tiny model could be built.
        detail: the largest difference, or why not; one line.
    """

    name: str
    runs: bool | None
    detail: str


def names() -> list[str]:
    """Every ``model_type`` that transformers has a causal language model for."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(name: str) -> PreTrainedModel:
    """A tiny random model of an architecture, in float64 where it can, in eval mode.

    Raises:
        DeliberateError: its configuration does not take sizes as others do.
    """
    reasons = []
    settings = _SETTINGS | _NO_TOKENS
    for drop in ((), tuple(_NO_TOKENS), (*_NO_TOKENS, "head_dim", "v_head_dim")):
        for implementation, dtype in (
            ("sdpa", torch.float64),
            ("eager", torch.float64),
            ("eager", torch.float32),
        ):
            try:
                return _build(
                    name,
                    {k: v for k, v in settings.items() if k not in drop},
                    implementation,
                    dtype,
                )
            except DeliberateError:
                raise
            except Exception as error:  # of whatever kind a configuration or a model raises
                reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
    raise DeliberateError(reasons[0][:140])


def _build(
    name: str, settings: dict[str, Any], implementation: str, dtype: torch.dtype
) -> PreTrainedModel:
    known = AutoConfig.for_model(name)
    taken = {k: v for k, v in settings.items() if hasattr(known, k) or k in known.attribute_map}
    if "kv_lora_rank" in taken and "num_key_value_heads" in taken:
        taken["num_key_value_heads"] = taken[
            "num_attention_heads"
        ]  # latent attention has no groups
    config = AutoConfig.for_model(name, **taken)
    # Only this implementation of mixtures of experts multiplies in double precision.
    config._experts_implementation = "eager"
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(config)
    size = sum(parameter.numel() for parameter in shape.parameters())
    if size > MOST_PARAMETERS:
        raise DeliberateError(f"its smallest configuration here has {size / 1e6:.0f} M parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=implementation
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # a norm that is left out must show
                    parameter.add_(0.1 * torch.randn_like(parameter))
            model.eval()(torch.zeros((1, 2), dtype=torch.int64), use_cache=False)
    return model


def verdict(name: str) -> Verdict:
    """Tries one architecture.

    Raises:
        DeliberateError: transformers has no such causal language model.
    """
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise DeliberateError(
            f"architecture {name!r} is unknown to transformers {transformers.__version__}: "
            "`deliberate architectures` lists those it has"
        )
    with _silence():
        try:
            model = tiny(name)
        except DeliberateError as error:
            return Verdict(name, None, str(error))
        try:
            found = probe(Backbone(model))
        except DeliberateError as error:
            reason = str(error).removeprefix(f"architecture {name!r} is not supported: ")
            return Verdict(name, False, reason.split("; `deliberate")[0])
    worst = max(found.differences, key=lambda way: found.differences[way])
    value = found.differences[worst]
    if not value <= TOLERANCE[model.dtype]:
        return Verdict(name, False, f"logits differ by {value:.2g} standard deviations: {worst}")
    window = ", past its window" if found.past_window else ""
    how = "tested entry" if name in ARCHITECTURES else "by convention"
    return Verdict(name, True, f"{how}{window}; largest difference {value:.1e}")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No warnings of tiny configurations that nobody will use."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def page(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as the text of `docs/architectures.md`."""
    groups = (
        ("Run", True, "difference in standard deviations of the logits"),
        ("Refused by name", False, "why"),
        ("Not tried: no tiny model could be built", None, "why"),
    )
    lines = ["# Architectures", "", *_INTRODUCTION.format(transformers.__version__).splitlines()]
    for title, runs, column in groups:
        chosen = [one for one in verdicts if one.runs is runs]
        lines += ["", f"## {title}: {len(chosen)}", "", f"| architecture | {column} |", "|---|---|"]
        lines += [f"| `{one.name}` | {one.detail.replace('|', '/')} |" for one in chosen]
    return "\n".join(lines) + "\n"
