"""`deliberate serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

WeightsOption = Annotated[
    str, typer.Option(help="float, bf16, int8, int4, q8_0, or file (a GGUF file's blocks).")
]

ThreadsOption = Annotated[
    int | None, typer.Option(help="CPU threads while decoding; torch's own number by default.")
]


def use_threads(count: int | None) -> None:
    """Lets torch and the C++ kernels use so many threads in this process; None: torch's number.

    Raises:
        DeliberateError: fewer than one.
    """
    if count is None:
        return
    import torch

    from deliberate.utils.checks import at_least

    at_least("threads", count, 1)
    torch.set_num_threads(count)


def serve(
    model: Annotated[str, typer.Argument(help="Bundled model, folder, GGUF file or hub name.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    fidelity: Annotated[str | None, typer.Option(help="Of requests that name none.")] = None,
    executor: Annotated[str, typer.Option(help="auto, generic or fused.")] = "auto",
    weights: WeightsOption = "float",
    threads: ThreadsOption = None,
    api_key: Annotated[list[str] | None, typer.Option(help="Accepted key; may repeat.")] = None,
    max_running: Annotated[int, typer.Option(help="Requests decoded at a time.")] = 16,
    block_tokens: Annotated[
        int | None, typer.Option(help="Share beginnings of prompts in KV blocks of this size.")
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(help="Largest body of a request.")] = 1 << 20,
    max_images: Annotated[int, typer.Option(help="Images of a request at most.")] = 8,
    max_image_pixels: Annotated[int, typer.Option(help="Width times height of one at most.")] = 1
    << 24,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait.")] = 256,
    scheduler: Annotated[
        str, typer.Option(help="deadline, or feedback: shortest predicted time first.")
    ] = "deadline",
    quota_requests: Annotated[
        int | None, typer.Option(help="Requests a minute of one client (API key, or address).")
    ] = None,
    quota_tokens: Annotated[
        int | None, typer.Option(help="Tokens a minute of one client, prompts included.")
    ] = None,
    quota_concurrent: Annotated[
        int | None, typer.Option(help="Requests at a time of one client.")
    ] = None,
    rules: Annotated[
        Path | None, typer.Option(help="YAML file of rules for requests, re-read on change.")
    ] = None,
    admission_share: Annotated[
        float, typer.Option(help="Share of answers that must be in time to take a deadline.")
    ] = 0.5,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Log as JSON, with a line for each request.")
    ] = False,
    cache_entries: Annotated[
        int, typer.Option(help="Answers kept for equal requests; 0 keeps none.")
    ] = 0,
    cache_seconds: Annotated[float, typer.Option(help="For which an answer is kept.")] = 3600.0,
    redis: Annotated[
        str | None, typer.Option(help="redis://HOST:PORT that several servers share answers by.")
    ] = None,
    reasoning_tags: Annotated[
        tuple[str, str] | None, typer.Option(help="Tags around the model's reasoning.")
    ] = None,
    thinking_token_budget: Annotated[
        int | None, typer.Option(help="Most tokens of reasoning, where a request names none.")
    ] = None,
    registry: Annotated[
        Path | None, typer.Option(help="Folder of versions, which can then be swapped.")
    ] = None,
    keep_traffic: Annotated[
        int, typer.Option(help="Greedy prompts and answers kept there for evolve; 0 keeps none.")
    ] = 0,
    admin_key: Annotated[
        str | None, typer.Option(help="Key of /admin; without one it is for this machine.")
    ] = None,
    step_seconds: Annotated[
        float, typer.Option(help="After which a step of the engine counts as hung.")
    ] = 60.0,
    otlp: Annotated[
        str | None, typer.Option(help="http://HOST:PORT of a collector of traces; none by default.")
    ] = None,
    cascade: Annotated[
        str | None, typer.Option(help="Small model that answers first, where it is sure.")
    ] = None,
    cascade_calibration: Annotated[
        Path | None, typer.Option(help="File that bench cascade saved of both models.")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(help="Engines in processes of their own, by Ray Serve.")
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(help="Most of them, where the load calls for more.")
    ] = None,
    target_wait: Annotated[
        float, typer.Option(help="Seconds of predicted waiting that call for more replicas.")
    ] = 1.0,
    ray_address: Annotated[
        str | None, typer.Option(help="Running Ray cluster; one is started without it.")
    ] = None,
) -> None:
    """Serve a model to OpenAI's clients: completions, chats, health, metrics."""
    from deliberate.installation import install_extra
    from deliberate.serving.settings import QuotaSettings, ServerSettings
    from deliberate.utils.errors import DeliberateError
    from deliberate.utils.typed_text import typed_text

    settings = ServerSettings(
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        max_running=max_running,
        max_waiting=max_waiting,
        max_body_bytes=max_body_bytes,
        max_images=max_images,
        max_image_pixels=max_image_pixels,
        scheduler=scheduler,
        quota=QuotaSettings(quota_requests, quota_tokens, quota_concurrent),
        block_tokens=block_tokens,
        rules=rules,
        admission_share=admission_share,
        cache_entries=cache_entries,
        cache_seconds=cache_seconds,
        redis_url=redis,
        reasoning_tags=None
        if reasoning_tags is None
        else (typed_text(reasoning_tags[0]), typed_text(reasoning_tags[1])),
        thinking_token_budget=thinking_token_budget,
        registry=registry,
        keep_traffic=keep_traffic,
        admin_key=admin_key,
        step_seconds=step_seconds,
    )
    try:
        from deliberate.serving.command import serve as run_server
        from deliberate.serving.request_log import log_as_json
    except ImportError as error:
        raise DeliberateError(
            f"deliberate serve needs {error.name}: {install_extra('serve')}"
        ) from None
    if log_json:
        log_as_json()
    if (cascade is None) != (cascade_calibration is None):
        raise DeliberateError("--cascade and --cascade-calibration belong together: give both")
    if replicas is not None:
        if cascade is not None:
            raise DeliberateError("--cascade with --replicas: give one of the two")
        from deliberate.serving.ray_app import ReplicaOptions
        from deliberate.serving.scale.command import serve_replicas
        from deliberate.serving.scale.fleet_settings import FleetSettings

        each = max(1, (os.cpu_count() or 1) // replicas) if threads is None else threads
        fleet = FleetSettings(
            replicas, max_replicas, target_wait, cpus=float(each), address=ray_address
        )
        options = ReplicaOptions(model, name or model, settings, executor, weights, fidelity, each)
        serve_replicas(options, fleet, otlp=otlp)
        return
    for option, given in (("max-replicas", max_replicas), ("ray-address", ray_address)):
        if given is not None:
            raise DeliberateError(f"--{option} without --replicas: say how many there are at first")
    use_threads(threads)
    run_server(
        model,
        settings,
        served_name=name,
        executor=executor,
        weights=weights,
        fidelity=fidelity,
        otlp=otlp,
        cascade=None
        if cascade is None or cascade_calibration is None
        else (cascade, cascade_calibration),
    )
