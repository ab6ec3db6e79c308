"""Prometheus metrics, under vLLM's names where vLLM has one."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from deliberate.engine.admitted import EngineStats, StepOutput
from deliberate.trace import GenerationTrace

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


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
        self.preemptions = gauge("vllm:num_preemptions", "Preemptions so far.")
        self.prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens of answers.")
        self.drafted = counter("vllm:spec_decode_num_draft_tokens", "Tokens drafted at an exit.")
        self.rejected = counter("deliberate:draft_tokens_rejected", "Drafts that were rejected.")
        self.first_token = histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", _SECONDS
        )
        self.between_tokens = histogram(
            "vllm:inter_token_latency_seconds", "Mean time between tokens of a request.", _SECONDS
        )
        self.whole = histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the last token.", _SECONDS
        )
        self.depth = histogram(
            "deliberate:exit_layer",
            "Layer after which a token was chosen.",
            tuple(float(layer) for layer in range(layers + 1)),
        )
        self.step = histogram("deliberate:step_seconds", "Time of one step.", _SECONDS)
        self.deadlines_missed = counter("deliberate:deadlines_missed", "Answers after deadline.")
        self.deadlines_kept = counter("deliberate:deadlines_kept", "Answers within deadline.")
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
        self._labels = labels

    def note_step(self, outputs: list[StepOutput], seconds: float) -> None:
        """A step was run; in the engine's thread."""
        self.step.observe(seconds)
        self.generation_tokens.inc(sum(len(output.tokens) for output in outputs))

    def note_refusal(self, status: int) -> None:
        """A request was answered with an error."""
        self.refused.labels(**self._labels, status=str(status)).inc()

    def note_end(self, reason: str, trace: GenerationTrace | None) -> None:
        """A request has ended."""
        self.finished.labels(**self._labels, finished_reason=reason).inc()
        if trace is not None:
            self.drafted.inc(trace.drafted)
            self.rejected.inc(trace.rejected)
            for record in trace.records:
                self.depth.observe(record.exit_layer)

    def text(self, stats: EngineStats) -> bytes:
        """The page of `/metrics`, with the engine's present state."""
        self.running.set(stats.running)
        self.waiting.set(stats.waiting)
        self.free_blocks.set(stats.free_blocks)
        self.preemptions.set(stats.preempted)
        return generate_latest(self.registry)
