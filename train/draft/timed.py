"""``python -m deliberate.train.draft.timed``: own text, states and a draft layer in minutes.

For a GPU that is at hand for minutes. Everything stays on the device; the layer is saved with its
figures when it is ready, and once before. It starts from a saved draft layer (``--draft``), whose
held-out figures are measured beside its own, or from the model's last layer.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from deliberate.api import checkpoint
from deliberate.api.draft_files import draft_settings, load_draft, save_draft
from deliberate.api.model import AdaptiveModel
from deliberate.data.prompts import Encoder, chat_wanted
from deliberate.engine.draft_lengths import DraftPrior
from deliberate.modeling.draft_layer import DraftLayer
from deliberate.train.draft.agreement import DraftAgreement, measure_agreement
from deliberate.train.draft.batched import DeviceTexts, train_for
from deliberate.train.draft.draft_trainer import DraftTraining
from deliberate.train.draft.start import draft_config, start_from_model
from deliberate.train.draft.vocabulary import frequent_tokens, resized
from deliberate.utils.command_errors import one_line_errors
from deliberate.utils.end_tokens import end_tokens
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text
from deliberate.utils.json_files import parse_json, read_json

_DEPTH = 6
ADAPTIVE_NAME = "adaptive_config.json"


@torch.inference_mode()
def write_answers(
    base: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *,
    seconds: float, batch: int, most: int, seed: int = 0, longest_run: int = 1,
) -> list[tuple[list[int], int]]:  # fmt: skip
    """Answers by transformers' `generate`: greedy once, then sampled, until the time is over.

    Args:
        most: new tokens of an answer.
        longest_run: times that the prompts are gone through at most.
    """
    ends = set(end_tokens(base.generation_config, tokenizer))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    began, slowest = time.monotonic(), 0.0
    made: list[tuple[list[int], int]] = []
    torch.manual_seed(seed)
    for turn in range(longest_run):
        for first in range(0, len(prompts), batch):
            if time.monotonic() - began + slowest > seconds and made:
                return made
            start = time.monotonic()
            chosen = prompts[first : first + batch]
            width = max(map(len, chosen))
            ids = torch.full((len(chosen), width), pad, device=base.device)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(chosen):
                ids[row, width - len(prompt) :] = torch.tensor(list(prompt), device=base.device)
                mask[row, width - len(prompt) :] = 1
            sampling: dict[str, Any] = {"do_sample": False}
            if turn:
                sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.95}
            out = base.generate(
                ids, attention_mask=mask, max_new_tokens=most, pad_token_id=pad, **sampling
            )
            for prompt, answer in zip(chosen, out[:, width:].tolist(), strict=True):
                stop = next((at + 1 for at, one in enumerate(answer) if one in ends), len(answer))
                if stop > 2:
                    made.append(([*prompt, *answer[:stop]], len(prompt)))
            slowest = max(slowest, time.monotonic() - start)
            answers = sum(len(ids) - prompt for ids, prompt in made)
            rate = answers / (time.monotonic() - began)
            print(f"own text: {answers} answer tokens, {rate:.0f} tokens/s", flush=True)
    return made


def read_questions(path: Path) -> list[str]:
    """Questions of a JSON list, gzipped or not.

    Raises:
        DeliberateError: a file that is missing or no such list.
    """
    if path.suffix != ".gz":
        found: list[str] = read_json(path)
        return found
    try:
        text = gzip.decompress(path.read_bytes()).decode()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DeliberateError(f"{path} cannot be read: {error}") from None
    found = parse_json(text, str(path))
    return found


def said(agreement: DraftAgreement) -> dict[str, Any]:
    """Figures of held-out drafts, JSON-ready."""
    return {
        "survives": list(agreement.survives),
        "chains": agreement.chains,
        "tokens_per_pass": {n: agreement.tokens_per_pass(n) for n in (1, 2, 3, 5)},
    }


class Result:
    """The folder that the layer and its figures are written to.

    Args:
        start: folder of the draft layer that training began with, whose exits and settings are
            kept; None where there is none.
    """

    def __init__(self, folder: Path, start: Path | None) -> None:
        self.folder, self._start = folder, start
        self.figures: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def save_figures(self) -> None:
        """Writes what is known so far."""
        write_text(self.folder / "training.json", json.dumps(self.figures, indent=1) + "\n")

    def save_layer(self, layer: DraftLayer, prior: DraftPrior) -> None:
        """Writes the layer as a model's folder has it."""
        save_draft(self.folder, layer)
        whole: dict[str, Any] = {}
        if self._start is not None:
            whole = read_json(self._start / ADAPTIVE_NAME)
            exits = self._start / "exits.safetensors"
            if exits.is_file():
                (self.folder / exits.name).write_bytes(exits.read_bytes())
        whole["draft"] = draft_settings(layer, prior)
        write_text(self.folder / ADAPTIVE_NAME, json.dumps(whole, indent=2) + "\n")
        self.save_figures()


def main(given: Sequence[str] | None = None) -> int:
    """Trains and saves; prints the held-out figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the model, with its tokenizer")
    parser.add_argument("--draft", type=Path, help="folder of the draft layer to start from")
    parser.add_argument("--questions", type=Path, required=True, help="JSON list, may be .gz")
    parser.add_argument("--held-out", type=int, default=96, help="questions, the last ones")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text-seconds", type=float, default=70)
    parser.add_argument("--train-seconds", type=float, default=130)
    parser.add_argument("--batch", type=int, default=1024, help="answers at a time")
    parser.add_argument("--new-tokens", type=int, default=320)
    parser.add_argument("--texts-per-step", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=4096, help="while it is trained")
    parser.add_argument("--kept", type=int, default=2048, help="draft vocabulary that is saved")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--depth", type=int, default=4)
    how = parser.parse_args(given)
    _train(how)
    return 0


def _train(how: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    result = Result(how.out, how.draft)
    tokenizer = checkpoint.load_tokenizer(how.model)
    questions = read_questions(how.questions)
    if len(questions) <= how.held_out:
        raise DeliberateError(
            f"--held-out {how.held_out} of {len(questions)} questions leaves none to train on"
        )
    chat = chat_wanted("auto", tokenizer, system=None)
    encoder = Encoder(tokenizer, max_tokens=1 << 30, chat=chat)
    prompts = [encoder.prompt(one) for one in questions]
    held_prompts, prompts = prompts[-how.held_out :], prompts[: -how.held_out]
    random.Random(0).shuffle(prompts)
    model = AdaptiveModel.from_pretrained(
        how.model, executor="generic", dtype=torch.float32, device_map=device
    )
    model.base.requires_grad_(False)
    lower = torch.bfloat16 if device == "cuda" else torch.float32
    began = time.monotonic()
    base: Any = model.base
    written = {"batch": how.batch, "most": how.new_tokens}
    held_rows = write_answers(base, tokenizer, held_prompts, seconds=1e9, **written)
    base.to(lower)
    rows = write_answers(
        base, tokenizer, prompts, seconds=how.text_seconds, longest_run=8, **written
    )
    del base
    text_seconds = time.monotonic() - began
    _keep_text(how.out / "own-text.jsonl.gz", rows)
    # Loaded again: weights that were rounded to bfloat16 stay so.
    model = AdaptiveModel.from_pretrained(
        how.model, executor="generic", dtype=torch.float32, device_map=device
    )
    model.base.requires_grad_(False)
    backbone = model.backbone
    began = time.monotonic()
    data = DeviceTexts(model.base, backbone, [*held_rows, *rows])
    held, texts = data.texts[: len(held_rows)], data.texts[len(held_rows) :]
    result.figures = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"torch": torch.__version__},
        "texts": len(texts),
        "answer_tokens": sum(one.length - one.prompt for one in texts),
        "held_out": {"texts": len(held), "tokens": sum(one.length - one.prompt for one in held)},
        "seconds": {"text": text_seconds, "states": time.monotonic() - began},
    }
    print(json.dumps(result.figures), flush=True)
    counted = torch.cat(
        [data.tokens[one.start + one.prompt : one.start + one.length] for one in texts]
    ).cpu()
    lm_head: Any = backbone.lm_head
    full = lm_head.weight.detach().float()
    size = min(how.vocabulary, backbone.vocab_size)
    ids = frequent_tokens(counted, size, backbone.vocab_size)
    torch.manual_seed(0)
    prior = DraftPrior()
    if how.draft is not None:
        start, prior = load_draft(how.draft, read_json(how.draft / ADAPTIVE_NAME)["draft"])
        start = start.to(device)
        before = measure_agreement(
            start, full[start.vocabulary], full, data, held, depth=_DEPTH
        )  # fmt: skip
        result.figures["before"] = said(before)
        print(f"before: {result.figures['before']}", flush=True)
        layer = resized(start, ids.to(device)).to(device)
    else:
        layer = DraftLayer(draft_config(backbone, size))
        layer.vocabulary.copy_(ids)
        start_from_model(layer, backbone)
        layer = layer.to(device)
    layer.requires_grad_(True)
    training = DraftTraining(
        depth=how.depth, texts_per_step=how.texts_per_step, learning_rate=how.learning_rate
    )
    result.figures["training"] = asdict(training) | {"passes": None, "vocabulary": size}
    result.save_figures()
    began = time.monotonic()
    shown = [began]

    def note(step: int, loss: float, passes: float) -> None:
        if time.monotonic() - shown[0] < 5:
            return
        shown[0] = time.monotonic()
        each = (shown[0] - began) / step
        print(f"step {step}: loss {loss:.3f}, {passes:.2f} passes, {each:.3f} s each", flush=True)
        result.figures["training"] |= {"steps": step, "passes": passes, "loss": loss}
        result.save_figures()

    head = full[layer.vocabulary]
    steps = train_for(how.train_seconds, layer, head, data, texts, training, note=note)
    result.figures["training"]["steps"] = steps
    result.figures["seconds"]["training"] = time.monotonic() - began
    kept_ids = frequent_tokens(counted, min(how.kept, backbone.vocab_size), backbone.vocab_size)
    kept = resized(layer, kept_ids.to(device)).to(device).eval().requires_grad_(False)
    found = measure_agreement(kept, full[kept.vocabulary], full, data, held, depth=_DEPTH)
    result.figures["after"] = said(found)
    new = DraftPrior.from_observed(
        found.confidences.tolist(), found.accepted.tolist(), survives=found.survives,
        draft_cost=prior.draft_cost, token_cost=prior.token_cost,
    )  # fmt: skip
    result.save_layer(kept, new)
    print(f"after: {result.figures['after']}\nsaved: {how.out}", flush=True)


def _keep_text(path: Path, rows: Sequence[tuple[Sequence[int], int]]) -> None:
    lines = (json.dumps({"prompt": prompt, "tokens": list(ids)}) for ids, prompt in rows)
    path.write_bytes(gzip.compress("".join(line + "\n" for line in lines).encode(), 6))


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
