"""`deliberate swap`, `versions` and `evolve`: versions of a running server."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer

from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import parse_json

UrlOption = Annotated[str, typer.Option(help="Address of the server.")]
KeyOption = Annotated[str | None, typer.Option(help="Its --admin-key, or an --api-key.")]
ReasonOption = Annotated[str, typer.Option(help="Why; it is recorded.")]
HERE = "http://127.0.0.1:8000"
# Loading weights is the longest that a swap waits for.
_PATIENCE = 3600.0


def swap(
    model: Annotated[str | None, typer.Option(help="Other weights, exits or adapter.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Folder that calibrate wrote: another policy.")
    ] = None,
    fidelity: Annotated[str | None, typer.Option(help="Of requests that name none.")] = None,
    threshold: Annotated[
        list[float] | None, typer.Option(help="Of fidelity threshold; once for each exit.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="float, int8, ...: see serve.")] = None,
    version: Annotated[int | None, typer.Option(help="A version that was proposed.")] = None,
    canary: Annotated[
        float | None, typer.Option(help="Share of requests to try it on, instead of all.")
    ] = None,
    back: Annotated[bool, typer.Option("--back", help="Return to the version before.")] = False,
    reason: ReasonOption = "by hand",
    url: UrlOption = HERE,
    key: KeyOption = None,
) -> None:
    """Swap what a running server decodes with; requests in flight end on their version."""
    changes: dict[str, Any] = {
        "model": _place(model),
        "calibration": _place(calibration),
        "fidelity": fidelity,
        "thresholds": threshold or None,
        "weights": weights,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if sum((bool(changes), version is not None, back)) != 1:
        raise DeliberateError(
            "give what is to change (--model, --calibration, --fidelity, --threshold, --weights), "
            "or --version of one that was proposed, or --back"
        )
    why = {"reason": reason}
    if back and canary is not None:
        raise DeliberateError(f"--canary {canary} with --back: give one of the two")
    if back:
        made = call(url, "/admin/roll-back", key, why)
    else:
        if version is None:
            version = int(call(url, "/admin/versions", key, changes | why)["id"])
        step, body = ("promote", why) if canary is None else ("canary", why | {"share": canary})
        made = call(url, f"/admin/versions/{version}/{step}", key, body)
    print(f"version {made['id']} ({made['kind']}) is {made['state']}: {json.dumps(made['source'])}")


def versions(
    url: UrlOption = HERE,
    key: KeyOption = None,
    registry: Annotated[
        Path | None, typer.Option(help="Read this folder instead of that of a server.")
    ] = None,
) -> None:
    """List versions and what happened to them, newest first."""
    if registry is None:
        found = call(url, "/admin/versions", key)
        made, events = found["versions"], found["events"]
    else:
        from deliberate.lifecycle.registry import REGISTRY_NAME, VersionRegistry

        if not (registry / REGISTRY_NAME).is_file():
            raise DeliberateError(f"{registry} holds no registry of versions ({REGISTRY_NAME})")
        opened = VersionRegistry(registry)
        made = [one.to_dict() for one in opened.versions()]
        events = [event.to_dict() for event in opened.history()]
        opened.close()
    for one in made:
        print(f"{one['id']:4} {one['state']:12} {one['kind']:8} {json.dumps(one['source'])}")
        for event in events:
            if event["version"] == one["id"]:
                text = f"     {event['when'][:19]} {event['state']}: {event['reason']}"
                print(f"{text} ({event['who']})")


def evolve(
    registry: Annotated[Path, typer.Argument(help="Folder of a server's versions and traffic.")],
    epsilon: Annotated[
        float, typer.Option(help="Share of an answer's tokens that may differ from full depth.")
    ] = 0.02,
    delta: Annotated[float, typer.Option(help="Largest probability that more of them do.")] = 0.1,
    least_gain: Annotated[
        float, typer.Option(help="Share of the live policy's cost that it must save.")
    ] = 0.02,
    canary: Annotated[
        float | None, typer.Option(help="Then try it on this share of a server's requests.")
    ] = None,
    url: UrlOption = HERE,
    key: KeyOption = None,
) -> None:
    """One round of self-evolution: traffic, policy, certificate, replay, and then a canary."""
    from deliberate.api.model import AdaptiveModel
    from deliberate.lifecycle import evolution
    from deliberate.lifecycle.registry import REGISTRY_NAME, VersionRegistry
    from deliberate.lifecycle.traffic import TrafficLog

    settings = evolution.EvolutionSettings(epsilon, delta, least_gain)
    if not (registry / REGISTRY_NAME).is_file():
        raise DeliberateError(f"{registry} holds no registry of versions ({REGISTRY_NAME})")
    opened = VersionRegistry(registry)
    live = opened.live()
    if live is None:
        raise DeliberateError(f"no version is live in {registry}: serve one first")
    exchanges = TrafficLog(registry).exchanges()
    model = AdaptiveModel.from_pretrained(live.source.model, weights=live.source.weights)
    done = evolution.evolve(model.eval(), exchanges, opened, settings)
    opened.close()
    for step in done.steps:
        print(step)
    number = done.version.id
    state = str(done.version.state)
    if canary is not None and state == "shadow":
        body = {"share": canary, "reason": "evolve"}
        state = call(url, f"/admin/versions/{number}/canary", key, body)["state"]
    print(f"version {number} is {state}")


def call(url: str, path: str, key: str | None, body: dict[str, Any] | None = None) -> Any:
    """What a server's `/admin` answers.

    Raises:
        DeliberateError: it refuses, or nobody answers.
    """
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    if not url.startswith(("http://", "https://")):
        raise DeliberateError(f"--url {url}: it must begin with http:// or https://")
    request = urllib.request.Request(url.rstrip("/") + path, data, headers)
    try:
        # A proxy would make a call from this machine one from elsewhere.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=_PATIENCE) as answer:
            return parse_json(answer.read().decode("utf-8", "replace"), url)
    except urllib.error.HTTPError as error:
        try:
            told = parse_json(error.read().decode("utf-8", "replace"), url)
            text = str(told["error"]["message"])
        except (DeliberateError, KeyError, TypeError):
            text = f"status {error.code}"
        raise DeliberateError(f"{url}: {text}") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise DeliberateError(
            f"{url}: no server answers ({reason}): start one with `deliberate serve MODEL "
            "--registry FOLDER`"
        ) from None


def _place(name: str | Path | None) -> str | None:
    """A path of this folder as the server, in another one, finds it; names stay names."""
    if name is None:
        return None
    return str(Path(name).resolve()) if Path(name).exists() else str(name)
