"""``python -m deliberate.kernels.tools.real_decode``: a real model's answers against transformers.

Batch 1, greedy, chat template. Ways: dense and exact (drafts looked up, by the draft layer, both)
of this package, and transformers' `generate`, with a growing and, last, a compiled static cache.
Tokens are compared within a dtype; where two ways part, the gap between the two best logits of
transformers there tells a tie of bfloat16 from an error. What is known is written after each way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deliberate.api import checkpoint
from deliberate.api.draft_files import load_draft
from deliberate.api.model import AdaptiveModel
from deliberate.data.prompts import Encoder, chat_wanted
from deliberate.kernels.backends import describe
from deliberate.utils.command_errors import one_line_errors
from deliberate.utils.environment import load_average
from deliberate.utils.files import write_text
from deliberate.utils.json_files import read_json

WAYS: dict[str, dict[str, Any]] = {
    "dense": {"fidelity": "dense"},
    "exact, looked up": {"fidelity": "exact", "draft_tokens": 0, "lookup_tokens": 6},
    "exact, draft layer": {"fidelity": "exact", "draft_tokens": 6, "lookup_tokens": 0},
    "exact, both": {"fidelity": "exact"},
}


class RealDecode:
    """One dtype of the model, by both packages.

    Args:
        prompts: token ids.
        tokens: new tokens of an answer at most.
    """

    def __init__(
        self, folder: str, draft: Path | None, dtype: torch.dtype, prompts: Sequence[Sequence[int]],
        tokens: int,
    ) -> None:  # fmt: skip
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        how: dict[str, Any] = {"dtype": dtype, "device_map": self.device}
        self.model = AdaptiveModel.from_pretrained(folder, **how)
        if draft is not None:
            settings = read_json(draft / "adaptive_config.json")["draft"]
            self.model.attach_draft(*load_draft(draft, settings))
        self.base: Any = self.model.base
        self.prompts = [torch.tensor([list(one)], device=self.device) for one in prompts]
        self.tokens = tokens

    def ours(self, way: str, count: int) -> dict[str, Any]:
        """Milliseconds and tokens a pass of one of `WAYS`, and the tokens themselves."""
        passes = made = 0

        def answer(ids: Tensor) -> list[int]:
            nonlocal passes, made
            out = self.model.generate(
                ids, max_new_tokens=self.tokens, return_dict_in_generate=True, **WAYS[way]
            )
            # The prompt's pass gives the first token.
            passes += out.trace.layer_calls[-1]
            made += len(out.trace.tokens) - 1
            return list(out.trace.tokens)

        row = self._timed(answer, count)
        # The warm-up's are counted with them: a ratio of the same prompts.
        captures = getattr(self.model.backbone, "captures", None)
        return row | {
            "tokens_per_pass": made / max(1, passes),
            "executor": str(self.model.executor),
            "no_graphs_because": getattr(captures, "reason", None),
        }

    def theirs(self, count: int, **settings: Any) -> dict[str, Any]:
        """The same of transformers' `generate`."""

        def answer(ids: Tensor) -> list[int]:
            out = self.base.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.tokens,
                do_sample=False, pad_token_id=0, **settings,
            )  # fmt: skip
            found: list[int] = out[0, ids.shape[1] :].tolist()
            return found

        return self._timed(answer, count)

    @torch.inference_mode()
    def gap(self, prompt: int, tokens: Sequence[int]) -> float:
        """Best logit less the second best after an answer's beginning, by transformers."""
        more = torch.tensor([list(tokens)], dtype=torch.int64, device=self.device)
        ids = torch.cat([self.prompts[prompt], more], dim=1)
        best = self.base(input_ids=ids).logits[0, -1].float().topk(2).values
        return float(best[0] - best[1])

    def _timed(self, answer: Callable[[Tensor], list[int]], count: int) -> dict[str, Any]:
        for ids in self.prompts[:2]:  # graphs are captured, estimates begun
            answer(ids)
        each, answers = [], []
        for ids in self.prompts[:count]:
            self._wait()
            began = time.perf_counter()
            answers.append(answer(ids))
            self._wait()
            each.append(1e3 * (time.perf_counter() - began) / len(answers[-1]))
        return {
            "ms_per_token": statistics.median(each),
            "low": min(each),
            "high": max(each),
            "answers": answers,
        }

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def compare(
    ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]],
    gap: Callable[[int, Sequence[int]], float],
) -> dict[str, Any]:  # fmt: skip
    """How many answers are the same, and where the others part: prompt, place, gap of logits."""
    same, parts = 0, []
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        if list(mine) == list(other):
            same += 1
            continue
        pairs = zip(mine, other, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(other)))
        parts.append({"prompt": index, "token": at, "gap": gap(index, mine[:at])})
    return {"identical": same, "compared": min(len(ours), len(theirs)), "parts": parts}


def markdown(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    out = [f"# A real model's answers, {figures['device']}, {figures['created']}", ""]
    out += ["| dtype | way | ms/token | low-high | tokens a pass | as transformers | as dense |"]
    out += ["|---|---|---|---|---|---|---|"]

    def share(found: dict[str, Any] | None) -> str:
        return "-" if found is None else f"{found['identical']} of {found['compared']}"

    for row in figures["ways"]:
        drafted = row.get("tokens_per_pass")
        out.append(
            f"| {row['dtype']} | {row['way']} | {row['ms_per_token']:.3f} | "
            f"{row['low']:.3f}-{row['high']:.3f} | {'-' if drafted is None else f'{drafted:.2f}'} "
            f"| {share(row.get('as_transformers'))} | {share(row.get('as_dense'))} |"
        )
    out += [f"\nNot measured: {name}: {reason}" for name, reason in figures["failed"].items()]
    return "\n".join(out) + "\n"


def run(how: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Measures way by way into `figures`, which is written after each."""
    began = time.monotonic()
    tokenizer = checkpoint.load_tokenizer(how.model)
    chat = chat_wanted("auto", tokenizer, system=None)
    encoder = Encoder(tokenizer, max_tokens=1 << 30, chat=chat)
    prompts = [encoder.prompt(one) for one in read_json(how.prompts)][: how.count]

    def attempt(dtype: str, way: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        name = f"{dtype}, {way}"
        if time.monotonic() - began > how.seconds:
            figures["failed"][name] = "no time was left"
            return None
        try:
            row = {"dtype": dtype, "way": way} | work()
        except Exception as error:  # the other ways are worth more than this one
            reason = (str(error).strip().splitlines() or ["-"])[0]
            figures["failed"][name] = f"{type(error).__name__}: {reason[:300]}"
            print(f"{name}: {figures['failed'][name]}", flush=True)
            return None
        figures["ways"].append(row)
        print(f"{name}: {row['ms_per_token']:.3f} ms a token", flush=True)
        return row

    rivals: list[tuple[str, RealDecode]] = []
    for dtype in how.dtypes:
        bench = RealDecode(how.model, how.draft, getattr(torch, dtype), prompts, how.tokens)
        rivals.append((dtype, bench))
        found = {
            way: attempt(dtype, way, partial(bench.ours, way, len(prompts))) for way in WAYS
        }  # fmt: skip
        other = attempt(dtype, "transformers", partial(bench.theirs, how.rivals))
        dense = found["dense"]
        for way, row in found.items():
            if row is None:
                continue
            if other is not None:
                row["as_transformers"] = compare(row["answers"], other["answers"], bench.gap)
            if dense is not None and way != "dense":
                row["as_dense"] = compare(row["answers"], dense["answers"], bench.gap)
        _write(how, figures)
    if how.compile:
        dtype, bench = rivals[0]
        attempt(
            dtype, "transformers, static cache",
            partial(bench.theirs, how.rivals, cache_implementation="static"),
        )  # fmt: skip
        _write(how, figures)


def _write(how: argparse.Namespace, figures: dict[str, Any]) -> None:
    figures["load"]["after"] = load_average()
    write_text(how.out.with_suffix(".json"), json.dumps(figures, indent=1) + "\n")
    write_text(how.out.with_suffix(".md"), markdown(figures))


def main(given: Sequence[str] | None = None) -> int:
    """Measures and prints; status 1 where a way failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the model, with its tokenizer")
    parser.add_argument("--draft", type=Path, help="folder of a draft layer for it")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON list of questions")
    parser.add_argument("--count", type=int, default=12, help="prompts of this package's ways")
    parser.add_argument("--rivals", type=int, default=6, help="prompts of transformers' ways")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--seconds", type=float, default=80, help="no way is begun after them")
    parser.add_argument("--compile", action="store_true", help="transformers' static cache, too")
    parser.add_argument("--out", type=Path, required=True, help="write OUT.json and OUT.md")
    how = parser.parse_args(given)
    figures: dict[str, Any] = {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "settings": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(how).items()
        },
        "environment": describe(),
        "load": {"before": load_average()},
        "ways": [],
        "failed": {},
    }
    run(how, figures)
    print(markdown(figures))
    return 1 if figures["failed"] else 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
