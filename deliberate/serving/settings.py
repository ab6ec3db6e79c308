"""What a server is started with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from deliberate.utils.errors import DeliberateError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SCHEDULERS = ("deadline", "feedback")


@dataclass(frozen=True)
class QuotaSettings:
    """Limits of one client; None is no limit.

    Attributes:
        requests: a minute.
        tokens: a minute.
        concurrent: requests at a time.

    Raises:
        DeliberateError: a limit below 1.
    """

    requests: int | None = None
    tokens: int | None = None
    concurrent: int | None = None

    def __post_init__(self) -> None:
        for name in ("requests", "tokens", "concurrent"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DeliberateError(f"quota of {name} {value} must be at least 1, or None")

    @property
    def limited(self) -> bool:
        """Whether there is any limit."""
        return any(one is not None for one in (self.requests, self.tokens, self.concurrent))


@dataclass(frozen=True)
class ServerSettings:
    """Where a server listens and what it lets a client ask for.

    Attributes:
        host, port: address; the loopback interface unless told otherwise.
        api_keys: bearer tokens that are accepted; none: everybody is.
        max_running: requests that are decoded at a time.
        block_tokens: tokens of a block of the KV cache; requests with the same beginning share its
            blocks. None: a row for each request and nothing shared, which decodes faster.
        scheduler: which requests come first: ``deadline``, earliest first within a priority, or
            ``feedback``, shortest predicted remaining time first
            (`deliberate.engine.feedback_scheduler`).
        max_waiting: requests that may wait for that; a further one is answered 429.
        quota: limits of each client; none by default.
        max_body_bytes: largest body of a request.
        max_prompt_tokens, max_new_tokens: of one request.
        max_images: of one request.
        max_image_pixels: width times height of one image.
        max_choices: largest `n`.
        default_new_tokens: where a request names no limit.
        timeout_seconds: a request that takes longer is ended, with what it has.
        step_seconds: after which a step of the engine counts as hung
            (`deliberate.serving.watchdog`); ten times that for an engine's first.
        drain_seconds: on SIGTERM, how long running requests may take to finish.
        rules: YAML file of what requests must keep to, read again when it changes
            (`deliberate.serving.precheck.Rules`); None for none.
        admission_share: of answers like a request's that must be in time for its deadline to be
            taken, in (0, 1).
        cache_entries: answers that are kept for equal requests; 0 for none.
        cache_seconds: for which one is kept.
        redis_url: of a Redis that keeps them for several servers; None for none.
        reasoning_tags: around the model's reasoning; None for those that its configuration or its
            tokenizer name.
        thinking_token_budget: most tokens of reasoning where a request names no limit; None for
            none.
        registry: folder of the registry of versions; None: one version, which nobody swaps.
        keep_traffic: greedy prompts and answers that the registry's folder keeps for
            `deliberate evolve`; 0 for none.
        admin_key: bearer token of `/admin`; None: only this machine can use it.

    Raises:
        DeliberateError: a value that is not allowed; the message names it.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    max_running: int = 16
    block_tokens: int | None = None
    scheduler: str = "deadline"
    max_waiting: int = 256
    quota: QuotaSettings = field(default_factory=QuotaSettings)
    max_body_bytes: int = 1 << 20
    max_prompt_tokens: int = 8192
    max_new_tokens: int = 4096
    max_images: int = 8
    max_image_pixels: int = 1 << 24
    max_choices: int = 8
    default_new_tokens: int = 256
    timeout_seconds: float = 600.0
    step_seconds: float = 60.0
    drain_seconds: float = 30.0
    rules: Path | None = None
    admission_share: float = 0.5
    cache_entries: int = 0
    cache_seconds: float = 3600.0
    redis_url: str | None = None
    reasoning_tags: tuple[str, str] | None = None
    thinking_token_budget: int | None = None
    registry: Path | None = None
    keep_traffic: int = 0
    admin_key: str | None = None

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS:
            raise DeliberateError(
                f"scheduler {self.scheduler!r} is not one of {', '.join(SCHEDULERS)}"
            )
        if not 0 <= self.port <= 65535:
            raise DeliberateError(f"port {self.port} must be from 0 (any free one) to 65535")
        for name in (
            "max_running",
            "max_body_bytes",
            "max_prompt_tokens",
            "max_new_tokens",
            "max_images",
            "max_image_pixels",
            "max_choices",
            "default_new_tokens",
        ):
            if getattr(self, name) < 1:
                raise DeliberateError(f"{name} {getattr(self, name)} must be at least 1")
        if self.block_tokens is not None and self.block_tokens < 1:
            raise DeliberateError(f"block_tokens {self.block_tokens} must be at least 1, or None")
        if self.keep_traffic and self.registry is None:
            raise DeliberateError("keep_traffic without registry: give a folder for the versions")
        for name in ("keep_traffic", "max_waiting", "cache_entries"):
            if getattr(self, name) < 0:
                raise DeliberateError(f"{name} {getattr(self, name)} must be 0 or more")
        if self.redis_url is not None and not self.cache_entries:
            raise DeliberateError(
                "redis_url without cache_entries: give the cache at least 1 entry"
            )
        for name in ("timeout_seconds", "step_seconds", "drain_seconds", "cache_seconds"):
            if not getattr(self, name) > 0:
                raise DeliberateError(f"{name} {getattr(self, name)} must be more than 0 s")
        if not 0.0 < self.admission_share < 1.0:
            raise DeliberateError(f"admission_share {self.admission_share} is outside (0, 1)")
        tags = self.reasoning_tags
        if tags is not None and not all(tag.strip() for tag in tags):
            raise DeliberateError(f"reasoning_tags {tags}: give two tags that are not empty")
        budget = self.thinking_token_budget
        if budget is not None and budget < 0:
            raise DeliberateError(f"thinking_token_budget {budget} must be 0 or more, or None")
        if self.admin_key is not None and self.registry is None:
            raise DeliberateError("admin_key without registry: give a folder for the versions")
        if any(not key.strip() for key in (*self.api_keys, self.admin_key or "none")):
            raise DeliberateError("an API key is empty: give a text, or no key at all")

    @property
    def public(self) -> bool:
        """Whether other machines can reach it."""
        return self.host not in LOOPBACK
