"""Servers of `deliberate bench throughput` that close a batch before decoding it, and transformers'
continuous batching; what all servers report."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, StoppingCriteria
from transformers.utils import logging as hf_logging

from deliberate.api.model import AdaptiveModel
from deliberate.eval.benchmarks.decode_variants import Prompts, left_padded
from deliberate.eval.benchmarks.throughput_load import Call, Load
from deliberate.utils.errors import DeliberateError

Clock = Callable[[], float]
Step = tuple[list[list[int]], list[list[float]], int]
"""Of a closed batch: tokens and their times, one list each per request, and bytes of its KV."""

_SLEEP = 0.001


@dataclass
class Served:
    """What a server did of a load.

    Attributes:
        tokens: of each request.
        times: second at which each token was handed out, from the load's beginning on.
        processor: seconds of this process's own time in serving, all threads.
        layers: layers run per token, one per request, where they are counted.
        prefilled: prompt tokens that were run; None where that is not counted.
        kv_bytes: most bytes that keys and values took at a time; None where that is not known.
        kv_tokens: tokens in them at that time.
        notes: further counts, by name.
    """

    tokens: list[list[int]]
    times: list[list[float]]
    processor: float = 0.0
    layers: list[float] = field(default_factory=list)
    prefilled: int | None = None
    kv_bytes: int | None = None
    kv_tokens: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def empty(cls, load: Load) -> Served:
        """Before anything is served."""
        return cls([[] for _ in load.calls], [[] for _ in load.calls])


class Server(Protocol):
    """Serves a load; raises what its library raises."""

    def serve(self, load: Load) -> Served: ...


class Arrivals:
    """The requests of a load as they arrive.

    Args:
        load: in the order of arrival.
        clock: seconds.
    """

    def __init__(self, load: Load, clock: Clock = time.perf_counter) -> None:
        self._calls = load.calls
        self._clock = clock
        self._next = 0
        self.began = clock()
        self._processor = time.process_time()

    @property
    def processor(self) -> float:
        """Seconds of this process's own time since the load began."""
        return time.process_time() - self._processor

    @property
    def seconds(self) -> float:
        """Since the load began."""
        return self._clock() - self.began

    @property
    def over(self) -> bool:
        """All have been taken."""
        return self._next == len(self._calls)

    def take(self, most: int | None = None, *, wait: bool = False) -> list[int]:
        """Indices of those that arrived and were not taken yet; with `wait`, at least one."""
        if wait and not self.over:
            self.sleep()
        now = self.seconds
        taken: list[int] = []
        while not self.over and self._calls[self._next].arrival <= now:
            if most is not None and len(taken) == most:
                break
            taken.append(self._next)
            self._next += 1
        return taken

    def sleep(self) -> None:
        """Until the next one arrives."""
        while (left := self._calls[self._next].arrival - self.seconds) > 0:
            time.sleep(min(left, _SLEEP))


class StaticServer:
    """Decodes closed batches: as many as have arrived, at most `size`, until the longest is done.

    Args:
        decode: a closed batch.
        size: sequences of a batch.
    """

    def __init__(self, decode: Callable[[Sequence[Call]], Step], size: int) -> None:
        self._decode = decode
        self._size = size

    def serve(self, load: Load) -> Served:
        """In the order of arrival."""
        served = Served.empty(load)
        served.prefilled = 0
        arrivals = Arrivals(load)
        while not arrivals.over:
            taken = arrivals.take(min(self._size, load.at_a_time), wait=True)
            calls = [load.calls[index] for index in taken]
            began = arrivals.seconds
            tokens, times, kv_bytes = self._decode(calls)
            for index, call, own, seconds in zip(taken, calls, tokens, times, strict=True):
                served.tokens[index] = own[: call.answer]
                served.times[index] = [began + second for second in seconds[: call.answer]]
            served.prefilled += sum(len(call.prompt) for call in calls)
            if kv_bytes > (served.kv_bytes or 0):
                served.kv_bytes = kv_bytes
                served.kv_tokens = sum(len(call.prompt) + call.answer for call in calls)
        served.processor = arrivals.processor
        return served


def static_dense(model: AdaptiveModel) -> Callable[[Sequence[Call]], Step]:
    """Closed batches by our `generate`, dense."""

    def decode(calls: Sequence[Call]) -> Step:
        prompts = _padded(calls, model.device)
        out = model.generate(
            prompts.ids,
            attention_mask=prompts.mask,
            max_new_tokens=max(call.answer for call in calls),
            eos_token_id=None,
            fidelity="dense",
            return_dict_in_generate=True,
        )
        times = [[record.seconds for record in trace.records] for trace in out.traces]
        return [trace.tokens for trace in out.traces], times, out.batch.cache_bytes

    return decode


def transformers_static(model: AdaptiveModel) -> Callable[[Sequence[Call]], Step]:
    """Closed batches by transformers' `generate`."""
    base: Any = model.base
    token_bytes = bytes_per_token(model)

    def decode(calls: Sequence[Call]) -> Step:
        prompts = _padded(calls, model.device)
        steps = _StepTimes()
        longest = max(call.answer for call in calls)
        out = base.generate(
            input_ids=prompts.ids,
            attention_mask=prompts.mask,
            max_new_tokens=longest,
            eos_token_id=None,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[steps],
        )
        width = prompts.ids.shape[1]
        # Its cache has no row shorter than the longest: all are padded to it.
        kv_bytes = len(calls) * (width + longest - 1) * token_bytes
        return out[:, width:].tolist(), [steps.seconds] * len(calls), kv_bytes

    return decode


class _StepTimes(StoppingCriteria):
    """Never stops; notes when each step ended."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = time.perf_counter()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seconds.append(time.perf_counter() - self._began)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class TransformersContinuous:
    """transformers' continuous batching, on a copy of the model.

    Its cache is as large as the load needs, since its own choice takes most of the machine's memory
    and a minute to fill. Setting it up is not timed.

    Args:
        model: whose weights it takes.
        attention: attention implementation.
        page_size, max_batch_tokens: of its `ContinuousBatchingConfig`.
    """

    def __init__(
        self, model: AdaptiveModel, *, attention: str, page_size: int, max_batch_tokens: int
    ) -> None:
        self._base: Any = copy.deepcopy(model.base)
        self._base.set_attn_implementation(attention)
        self._page, self._most = page_size, max_batch_tokens
        self._page_bytes = page_size * bytes_per_token(model)

    def serve(self, load: Load) -> Served:
        """Adds requests as they arrive; the library's own thread decodes them."""
        pages = sum(-(-(len(c.prompt) + c.answer) // self._page) + 1 for c in load.calls)
        verbosity = hf_logging.get_verbosity()
        hf_logging.set_verbosity_error()
        manager = self._base.init_continuous_batching(
            generation_config=GenerationConfig(
                max_new_tokens=max(call.answer for call in load.calls),
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=0,
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=self._page,
                num_blocks=pages,
                max_batch_tokens=self._most,
                max_requests_per_batch=load.at_a_time,
            ),
        )
        try:
            manager.warmup()
            manager.start()
            return self._run(manager, load, pages)
        finally:
            manager.stop(block=True)
            manager.destroy()
            hf_logging.set_verbosity(verbosity)

    def _run(self, manager: Any, load: Load, pages: int) -> Served:
        served = Served.empty(load)
        numbers: dict[str, int] = {}
        left = len(load.calls)
        arrivals = Arrivals(load)
        while left:
            for index in arrivals.take():
                call = load.calls[index]
                added = manager.add_request(
                    list(call.prompt), max_new_tokens=call.answer, record_timestamps=True
                )
                numbers[str(added)] = index
            result = manager.get_result(timeout=_SLEEP if not arrivals.over else 1.0)
            if result is None:
                if not manager.is_running():
                    raise DeliberateError(f"its thread ended with {left} requests unfinished")
                continue
            if not result.is_finished():
                continue
            if result.error is not None:
                raise DeliberateError(result.error)
            index = numbers[result.request_id]
            served.tokens[index] = list(result.generated_tokens)
            served.times[index] = [stamp - arrivals.began for stamp in result.timestamps]
            left -= 1
        served.processor = arrivals.processor
        served.notes["reserved_kv_bytes"] = pages * self._page_bytes
        return served


def _padded(calls: Sequence[Call], device: Any) -> Prompts:
    prompts = left_padded([torch.tensor([call.prompt]) for call in calls])
    return Prompts(prompts.ids.to(device), prompts.mask.to(device))


def bytes_per_token(model: AdaptiveModel) -> int:
    """Bytes of one token's keys and values in all layers."""
    config = model.base.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = next(model.base.parameters()).element_size()
    return int(2 * config.num_hidden_layers * heads * width * size)
