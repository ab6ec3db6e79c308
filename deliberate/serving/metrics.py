"""Prometheus metrics, under vLLM's names where vLLM has one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from deliberate.engine.admitted import EngineStats, StepOutput
from deliberate.trace import GenerationTrace

_TOKENS = (1.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0)
_SHORT = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.1)
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


@dataclass
class CacheCounts:
    """What became of look-ups.

    Attributes:
        local, redis: found there.
        shared: answers that were on their way for an equal request.
        missed: decoded.
        errors: of Redis, or values there that cannot be read.
    """

    local: int = 0
    redis: int = 0
    shared: int = 0
    missed: int = 0
    errors: int = 0


@dataclass(frozen=True)
class VersionState:
    """A version that has an engine.

    Attributes:
        name: its number in the registry; "-" without one.
        role: live, canary, control or retiring.
        unfinished: requests that wait or run.
        drifted: its certificate does not describe the traffic any more.
    """

    name: str
    role: str
    unfinished: int
    drifted: bool


class Metrics:
    """Metrics of one server, in a registry of its own.

    Args:
        model_name: label of every series.
        layers: of the model; the buckets of the depth histogram.

    Attributes:
        layers: as given.
    """

    def __init__(self, model_name: str, layers: int) -> None:
        self.layers = layers
        self.registry = CollectorRegistry()
        labels = {"model_name": model_name}

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, list(labels), registry=self.registry).labels(**labels)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, list(labels), registry=self.registry).labels(**labels)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(name, text, list(labels), registry=self.registry, buckets=buckets)
            return made.labels(**labels)

        self.running = gauge("vllm:num_requests_running", "Requests that are decoded.")
        self.waiting = gauge("vllm:num_requests_waiting", "Requests that wait for a place.")
        self.free_blocks = gauge("deliberate:free_blocks", "Free blocks (or rows) of the KV cache.")
        self.usage = gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.")
        self.preemptions = counter("vllm:num_preemptions", "Preemptions.")
        self.prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens of answers.")
        self.drafted = counter("vllm:spec_decode_num_draft_tokens", "Tokens drafted at an exit.")
        self.accepted = counter(
            "vllm:spec_decode_num_accepted_tokens", "Drafted tokens that full depth confirmed."
        )
        self.rejected = counter("deliberate:draft_tokens_rejected", "Drafts that were rejected.")
        self.first_token = histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", _SECONDS
        )
        self.overhead = histogram(
            "deliberate:overhead_seconds",
            "From arrival to the first token, without the engine's share.",
            _SHORT,
        )
        self.between_tokens = histogram(
            "vllm:inter_token_latency_seconds", "From one token to the next.", _SECONDS
        )
        self.per_token = histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time between the tokens of a request.",
            _SECONDS,
        )
        self.whole = histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the last token.", _SECONDS
        )
        self.depth = histogram(
            "deliberate:exit_layer",
            "Layer after which a token was chosen.",
            tuple(float(layer) for layer in range(layers + 1)),
        )
        self.tokens_per_pass = histogram(
            "deliberate:tokens_per_full_depth_pass",
            "Tokens of a request for each time that its last layer ran.",
            (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0),
        )
        self.prompt_length = histogram(
            "vllm:request_prompt_tokens", "Tokens of a request's prompt.", _TOKENS
        )
        self.answer_length = histogram(
            "vllm:request_generation_tokens", "Tokens of a request's answer.", _TOKENS
        )
        self.step = histogram("deliberate:step_seconds", "Time of one step.", _SECONDS)
        self.engine_restarts = counter(
            "deliberate:engine_restarts", "Engines that died or hung and were replaced."
        )
        self.deadlines_missed = counter("deliberate:deadlines_missed", "Answers after deadline.")
        self.deadlines_kept = counter("deliberate:deadlines_kept", "Answers within deadline.")
        self.budgets_missed = counter(
            "deliberate:budgets_missed", "Answers that took longer than their latency budget."
        )
        self.budgets_kept = counter("deliberate:budgets_kept", "Answers within their budget.")
        self.cache_hits = Counter(
            "deliberate:answer_cache_hits",
            "Answers that were not decoded again, by where they were found.",
            [*labels, "where"],
            registry=self.registry,
        )
        self.cache_misses = counter(
            "deliberate:answer_cache_misses", "Determined answers that had to be decoded."
        )
        self.cache_errors = counter(
            "deliberate:answer_cache_errors", "Errors of Redis, and values that cannot be read."
        )
        self.precheck = histogram(
            "deliberate:precheck_seconds", "Time of the rules that come first.", _SHORT
        )
        self.finished = Counter(
            "vllm:request_success",
            "Finished requests, by reason.",
            [*labels, "finished_reason"],
            registry=self.registry,
        )
        self.refused = Counter(
            "deliberate:requests_refused",
            "Requests answered with an error, by status.",
            [*labels, "status"],
            registry=self.registry,
        )
        self._cascade = Counter(
            "deliberate:cascade_answers",
            "Requests that a cascade's calibration covers, by the model that answers them.",
            [*labels, "answered_by"],
            registry=self.registry,
        )
        # One series for each version that has an engine.
        per_version = [*labels, "version", "role"]
        self._in_version = Gauge(
            "deliberate:version_requests",
            "Requests of a version that wait or run, by what the version does.",
            per_version,
            registry=self.registry,
        )
        self._drifted = Gauge(
            "deliberate:certificate_drifted",
            "1 where the traffic has left what the version's certificate describes.",
            per_version,
            registry=self.registry,
        )
        self._labels = labels
        # A series that appears with its first event shows no rise: these begin at 0.
        for reason in ("stop", "length", "abort", "error"):
            self.finished.labels(**labels, finished_reason=reason)
        for status in ("400", "429", "500", "503"):
            self.refused.labels(**labels, status=status)
        self._preempted = 0  # of the engine's count, as far as it is in the counter
        self._blocks = 0
        self._looked_up = CacheCounts()  # the cache's counts, as far as they are in the counters

    def note_step(self, outputs: list[StepOutput], seconds: float) -> None:
        """A step was run; in the engine's thread."""
        self.step.observe(seconds)
        self.generation_tokens.inc(sum(len(output.tokens) for output in outputs))

    def note_versions(self, versions: Iterable[VersionState]) -> None:
        """What decodes at present; series of versions that have gone end."""
        self._in_version.clear()
        self._drifted.clear()
        for one in versions:
            labels = {**self._labels, "version": one.name, "role": one.role}
            self._in_version.labels(**labels).set(one.unfinished)
            self._drifted.labels(**labels).set(one.drifted)

    def note_refusal(self, status: int) -> None:
        """A request was answered with an error."""
        self.refused.labels(**self._labels, status=str(status)).inc()

    def note_cascade(self, model: str, count: int = 1) -> None:
        """So many requests are answered by a cascade's model of that name; from 0."""
        self._cascade.labels(**self._labels, answered_by=model).inc(count)

    def note_end(self, reason: str, trace: GenerationTrace | None) -> None:
        """A request has ended."""
        self.finished.labels(**self._labels, finished_reason=reason).inc()
        if trace is not None:
            self.drafted.inc(trace.drafted)
            self.rejected.inc(trace.rejected)
            self.prompt_length.observe(trace.prompt_tokens)
            self.answer_length.observe(len(trace.records))
            for record in trace.records:
                self.depth.observe(record.exit_layer)
            confirmed = (one.verified and one.exit_layer < self.layers for one in trace.records)
            self.accepted.inc(sum(confirmed))
            if trace.layer_calls and trace.layer_calls[-1]:
                self.tokens_per_pass.observe(len(trace.records) / trace.layer_calls[-1])

    def text(self, stats: EngineStats, looked_up: CacheCounts | None = None) -> bytes:
        """The page of `/metrics`, with the present state of the engine and the answer cache."""
        if looked_up is not None:
            before, self._looked_up = self._looked_up, replace(looked_up)
            for where in ("local", "redis", "shared"):
                found = getattr(looked_up, where) - getattr(before, where)
                self.cache_hits.labels(**self._labels, where=where).inc(found)
            self.cache_misses.inc(looked_up.missed - before.missed)
            self.cache_errors.inc(looked_up.errors - before.errors)
        self.running.set(stats.running)
        self.waiting.set(stats.waiting)
        self.free_blocks.set(stats.free_blocks)
        self._blocks = max(self._blocks, stats.free_blocks)
        self.usage.set(1 - stats.free_blocks / self._blocks if self._blocks else 0.0)
        # A restarted engine counts from 0.
        self.preemptions.inc(max(0, stats.preempted - self._preempted))
        self._preempted = stats.preempted
        return generate_latest(self.registry)
