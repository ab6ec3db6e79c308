"""`DeliberateLM`: an adaptive model under lm-evaluation-harness.

Everything but decoding is the harness's own Hugging Face model: tokenizer, chat template, batching
and log-likelihoods. Those come from the full-depth model, whose tokens are known beforehand, so
early exits gain nothing there; a log line says so.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM, stop_sequences_criteria
from torch import Tensor

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.config import as_fidelity
from deliberate.trace import GenerationTrace
from deliberate.utils.errors import DeliberateError

logger = logging.getLogger(__name__)


@register_model("deliberate")
class DeliberateLM(HFLM):
    """``lm_eval --model deliberate --model_args pretrained=NAME,fidelity=exact``.

    Args:
        pretrained: an `AdaptiveModel`, or a bundled name, folder, GGUF file or hub name.
        fidelity: dense, exact, threshold, certified or budget; the model's own by default.
        thresholds: fidelity threshold: least confidence to exit early.
        ms_per_token: fidelity budget: the budget.
        executor, weights: as for `AdaptiveModel`.
        tokenizer: of the model's folder by default.
        **kwargs: of the harness's `HFLM` (batch_size, max_length, enable_thinking, ...).

    Raises:
        DeliberateError: a model that cannot be loaded, or an unknown fidelity.
    """

    def __init__(
        self,
        pretrained: str | AdaptiveModel,
        *,
        fidelity: str | None = None,
        thresholds: float | None = None,
        ms_per_token: float | None = None,
        executor: str = "auto",
        weights: str | None = None,
        tokenizer: Any = None,
        device: str | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(pretrained, AdaptiveModel):
            model = pretrained
            if tokenizer is None:
                raise DeliberateError("DeliberateLM of a model in memory needs tokenizer=")
        else:
            model = AdaptiveModel.from_pretrained(pretrained, executor=executor, weights=weights)
            tokenizer = tokenizer or checkpoint.load_tokenizer(pretrained)
        # "cuda:0" is the harness's default wherever it runs; the model stays where there is none.
        if device is not None and (torch.cuda.is_available() or "cuda" not in device):
            model = model.to(device)
        self.adaptive = model.eval()
        self.traces: list[GenerationTrace] = []
        self._decoding: dict[str, Any] = {}
        if fidelity is not None:
            self._decoding["fidelity"] = as_fidelity(fidelity)
        if thresholds is not None:
            self._decoding["thresholds"] = float(thresholds)
        if ms_per_token is not None:
            self._decoding["latency_budget"] = {"ms_per_token": float(ms_per_token)}
        self._told = False
        super().__init__(
            pretrained=model.base, tokenizer=tokenizer, device=str(model.device), **kwargs
        )

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        """Continues ``context [B, n]`` to `max_length` tokens at most; ids ``[B, m]``."""
        temperature = generation_kwargs.pop("temperature", 0.0)
        sample = generation_kwargs.pop("do_sample", None)
        if sample is None:
            sample = temperature > 0.0
        if sample:
            generation_kwargs["temperature"] = temperature
        made = self.adaptive.generate(
            input_ids=context,
            max_length=max_length,
            do_sample=sample,
            stopping_criteria=stop_sequences_criteria(
                self.tokenizer, stop, context.shape[1], context.shape[0]
            ),
            pad_token_id=self.tokenizer.pad_token_id,
            return_dict_in_generate=True,
            **self._decoding,
            **generation_kwargs,
        )
        self.traces += made.traces
        return made.sequences

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As the harness's own, of the full-depth model."""
        self._say_that_exits_gain_nothing()
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As the harness's own, of the full-depth model."""
        self._say_that_exits_gain_nothing()
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: its own facts, and how deep tokens ran."""
        return super().get_model_info() | {
            "deliberate_executor": self.adaptive.executor,
            "deliberate_fidelity": str(self._decoding.get("fidelity", self.adaptive.fidelity)),
            "deliberate_decoding": depth_facts(self.traces),
        }

    def _say_that_exits_gain_nothing(self) -> None:
        if not self._told:
            self._told = True
            logger.warning(
                "log-likelihoods are those of the full-depth model: the tokens are given, so early "
                "exits gain nothing in this task"
            )


def depth_facts(traces: Sequence[GenerationTrace]) -> dict[str, float]:
    """Tokens made, layers run per token, and the share of drafts that were rejected."""
    tokens = sum(len(trace.tokens) for trace in traces)
    drafted = sum(trace.drafted for trace in traces)
    if not tokens:
        return {"tokens": 0}
    return {
        "tokens": tokens,
        "layers_per_token": sum(t.layers_per_token * len(t.tokens) for t in traces) / tokens,
        "drafts_rejected": sum(t.rejected for t in traces) / drafted if drafted else 0.0,
    }
