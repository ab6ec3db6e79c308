"""`deliberate bench soak`: minutes of mixed traffic and faults on one server, with swaps.

Clients send well-formed requests and faults in a closed loop, while versions are swapped. The share
of well-formed requests that got a whole answer, the memory of the server before and after, and
faults that were not refused cleanly are what counts; a target that is missed ends the command with
an error.
"""

from __future__ import annotations

import asyncio
import importlib.util
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from deliberate.eval.benchmarks.harness import Session, table_console
from deliberate.eval.benchmarks.server_process import served
from deliberate.eval.benchmarks.settings import bench_config
from deliberate.eval.benchmarks.soak_requests import REFUSED, SoakRequest, SoakRequests
from deliberate.installation import install_extra
from deliberate.utils.checks import all_at_least
from deliberate.utils.errors import DeliberateError
from deliberate.utils.json_files import parse_json

_MOST_NOTES = 20
# Fidelities that versions are swapped between.
_SWAPS = ("dense", "exact", "threshold")


@dataclass
class SoakCounts:
    """What became of the requests.

    Attributes:
        sent, failed: by kind; failed are well-formed ones without a whole answer, and faults that
            were not refused cleanly.
        notes: the first failures, in a line each.
        swaps, swaps_failed: of versions.
        memory: second since the beginning, and MiB of the server's processes.
        free_blocks: of the KV cache before the load, and some time after it.
    """

    sent: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    swaps: int = 0
    swaps_failed: int = 0
    memory: list[tuple[float, float]] = field(default_factory=list)
    free_blocks: tuple[int, int] = (0, 0)

    def note(self, request: SoakRequest, error: str | None) -> None:
        """A request has ended; None where as it should."""
        self.sent[request.kind] += 1
        if error is not None:
            self.failed[request.kind] += 1
            self.notes = [*self.notes, f"{request.kind}: {error}"][:_MOST_NOTES]

    def _total(self, counts: Counter[str], well: bool) -> int:
        return sum(n for kind, n in counts.items() if SoakRequest(kind, b"").well_formed == well)

    @property
    def availability(self) -> float:
        """Share of the well-formed requests that got a whole answer."""
        sent = self._total(self.sent, True)
        return 1.0 - self._total(self.failed, True) / sent if sent else 0.0

    @property
    def unclean(self) -> int:
        """Faults that were not refused cleanly."""
        return self._total(self.failed, False)

    def growth(self, settle: float) -> float:
        """Share by which the memory grew: median of the last tenth over that after `settle` s."""
        late = [mib for second, mib in self.memory if second >= settle]
        if len(late) < 2:
            return 0.0
        part = max(1, len(late) // 10)
        return statistics.median(late[-part:]) / statistics.median(late[:part]) - 1.0


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench soak`` with overrides of `configs/bench_soak.yaml`.

    Raises:
        DeliberateError: the configuration cannot work, or a target was missed.
    """
    cfg = bench_config("bench_soak", arguments, verbatim=("model", "out"))
    check(cfg)
    try:
        import httpx  # noqa: F401
    except ImportError as error:
        raise DeliberateError(f"bench soak needs {error.name}: {install_extra('serve')}") from None
    session = Session("soak", arguments, cfg.threads)
    with tempfile.TemporaryDirectory() as folder:
        options = ["--registry", folder, *map(str, cfg.serve_options)]
        with served(str(cfg.model), options, executor=str(cfg.executor), threads=cfg.threads) as (
            url,
            pid,
        ):
            counts = asyncio.run(_soak(cfg, url, psutil.Process(pid)))
    session.end()
    settle = 60 * cfg.minutes * cfg.settle
    console = table_console()
    table = Table("kind", "sent", "not as it should be")
    for kind, sent in sorted(counts.sent.items()):
        table.add_row(kind, str(sent), str(counts.failed[kind]))
    console.print(table)
    for note in counts.notes:
        console.print(note, markup=False, soft_wrap=True)
    line = summary(counts, settle)
    console.print(line, soft_wrap=True)
    console.print(session.line())
    record = {
        "settings": OmegaConf.to_container(cfg),
        "sent": dict(counts.sent),
        "failed": dict(counts.failed),
        "notes": counts.notes,
        "swaps": counts.swaps,
        "swaps_failed": counts.swaps_failed,
        "availability": counts.availability,
        "memory_growth": counts.growth(settle),
        "memory": counts.memory,
        "free_blocks": counts.free_blocks,
    }
    session.write(cfg.out, record)
    missed = misses(counts, cfg, settle)
    if missed:
        raise DeliberateError(f"soak: {'; '.join(missed)}")


def summary(counts: SoakCounts, settle: float) -> str:
    """What was found, in one line."""
    first = counts.memory[0][1] if counts.memory else 0.0
    last = counts.memory[-1][1] if counts.memory else 0.0
    return (
        f"{sum(counts.sent.values())} requests, availability {100 * counts.availability:.4f} %, "
        f"faults not refused cleanly {counts.unclean}, swaps {counts.swaps} "
        f"({counts.swaps_failed} failed), memory {first:.0f} to {last:.0f} MiB, "
        f"{100 * counts.growth(settle):+.1f} % after {settle:.0f} s, free blocks "
        f"{counts.free_blocks[0]} before and {counts.free_blocks[1]} after"
    )


def misses(counts: SoakCounts, cfg: DictConfig, settle: float) -> list[str]:
    """The targets that were missed, each in a few words."""
    made = []
    if counts.availability < cfg.least_availability:
        made.append(
            f"availability {100 * counts.availability:.4f} % is below "
            f"{100 * cfg.least_availability:g} %"
        )
    if counts.growth(settle) > cfg.most_growth:
        made.append(
            f"memory grew by {100 * counts.growth(settle):.1f} %, more than "
            f"{100 * cfg.most_growth:g} %"
        )
    if counts.unclean:
        made.append(f"{counts.unclean} faults were not refused cleanly")
    if counts.swaps_failed:
        made.append(f"{counts.swaps_failed} of {counts.swaps} swaps failed")
    if counts.free_blocks[1] < counts.free_blocks[0]:
        made.append(
            f"{counts.free_blocks[0] - counts.free_blocks[1]} blocks of the KV cache were not freed"
        )
    return made


def check(cfg: DictConfig) -> None:
    """Refuses settings that cannot work.

    Raises:
        DeliberateError: the message names the first of them.
    """
    all_at_least(cfg, {"clients": 1, "threads": 1})
    for name in ("minutes", "swap_seconds", "timeout"):
        if not cfg[name] > 0:
            raise DeliberateError(f"{name}={cfg[name]} must be a number above 0")
    for name in ("faults", "settle", "least_availability"):
        if not 0 <= cfg[name] <= 1:
            raise DeliberateError(f"{name}={cfg[name]} must be from 0 to 1")


async def _soak(cfg: DictConfig, url: str, process: psutil.Process) -> SoakCounts:
    import httpx

    counts = SoakCounts()
    structured = importlib.util.find_spec("llguidance") is not None
    source = SoakRequests(str(cfg.model), cfg.seed, cfg.faults, structured)
    end = time.monotonic() + 60 * cfg.minutes
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=url, timeout=cfg.timeout, limits=limits, trust_env=False
    ) as http:
        before = await _free_blocks(http)

        async def client() -> None:
            while time.monotonic() < end:
                request = source.draw()
                counts.note(request, await _send(http, request, cfg.timeout))

        watching = asyncio.create_task(_watch(counts, process, end, cfg))
        swapping = asyncio.create_task(_swap(counts, http, end, cfg))
        await asyncio.gather(*(client() for _ in range(cfg.clients)))
        await asyncio.gather(watching, swapping)
        await asyncio.sleep(1.0)
        counts.free_blocks = (before, await _free_blocks(http))
    return counts


async def _free_blocks(http: Any) -> int:
    answer = await http.get("/health")
    return int(answer.json()["engine"]["free_blocks"])


async def _send(http: Any, request: SoakRequest, timeout: float) -> str | None:
    """Sends one request; None where what came of it is as it should be."""
    import httpx

    headers = {"Content-Type": "application/json"}
    path = "/v1/completions"
    try:
        async with (
            asyncio.timeout(timeout),
            http.stream("POST", path, content=request.body, headers=headers) as answer,
        ):
            if request.kind == "disconnect":
                count = 0
                async for _ in answer.aiter_lines():
                    if (count := count + 1) >= 5:
                        break
                return None if answer.status_code == 200 else f"status {answer.status_code}"
            text = (await answer.aread()).decode("utf-8", "replace")
    except (httpx.HTTPError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}"
    status = answer.status_code
    if not request.well_formed:
        return None if status in REFUSED else f"status {status}: {text[:200]}"
    if status != 200:
        return f"status {status}: {text[:200]}"
    return _whole(request, text)


def _whole(request: SoakRequest, text: str) -> str | None:
    """None where an answer of status 200 has all its choices, each ended."""
    if request.stream:
        ended = text.rstrip().endswith("data: [DONE]") and '"finish_reason":"' in text
        return None if ended else f"the stream broke off: {text[-200:]}"
    choices = parse_json(text, "an answer")["choices"]
    ended = all(one["finish_reason"] in ("stop", "length") for one in choices)
    if len(choices) != request.choices or not ended:
        return f"{len(choices)} choices of {request.choices}: {text[:200]}"
    return None


async def _watch(counts: SoakCounts, process: psutil.Process, end: float, cfg: DictConfig) -> None:
    """Notes the server's memory once a second."""
    began = end - 60 * cfg.minutes
    while (now := time.monotonic()) < end:
        whole = [process, *process.children(recursive=True)]
        used = sum(one.memory_info().rss for one in whole if one.is_running())
        counts.memory.append((now - began, used / 2**20))
        await asyncio.sleep(1.0)


async def _swap(counts: SoakCounts, http: Any, end: float, cfg: DictConfig) -> None:
    """Swaps the policy of the live version from time to time."""
    for number in range(1, 1 << 30):
        await asyncio.sleep(cfg.swap_seconds)
        if time.monotonic() >= end:
            return
        change = {"fidelity": _SWAPS[number % len(_SWAPS)], "reason": "soak"}
        counts.swaps += 1
        proposed = await http.post("/admin/versions", json=change)
        step = proposed
        if proposed.status_code == 200:
            path = f"/admin/versions/{proposed.json()['id']}/promote"
            step = await http.post(path, json={"reason": "soak"})
        if step.status_code != 200:
            counts.swaps_failed += 1
            note = f"swap: status {step.status_code}: {step.text[:200]}"
            counts.notes = [*counts.notes, note][:_MOST_NOTES]
