"""Trains the bundled `tiny-chain` in a given number of seconds, without the configuration packages.

    python -m deliberate.train.tiny_chain FOLDER --seconds 110

Size and recipe are those of ``deliberate train +experiment=tiny_chain``; here the time that is
given, not a number of steps, decides the learning-rate schedule and the end. It needs torch,
transformers and accelerate only, for machines with an accelerator and little else.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from deliberate.api.model import AdaptiveModel
from deliberate.calibration.thresholds import (
    describe_thresholds,
    exit_shares,
    read_exits,
    thresholds_in_turn,
)
from deliberate.data.chains import CHAINS, CLOSE_TAG, OPEN_TAG, chain_problems
from deliberate.data.problem import ANSWER_MARK, mark_of
from deliberate.data.prompts import Encoder, prompt_text
from deliberate.data.seeds import THRESHOLD_OFFSET, TOKENIZER_SEED
from deliberate.kernels.backends import describe
from deliberate.modeling.exit_config import ExitConfig, Translator
from deliberate.train.batches import MixtureBatches
from deliberate.train.objectives.pretrain import PretrainObjective
from deliberate.train.tokenizer import train_tokenizer
from deliberate.train.trainer import AdaptiveTrainer, training_arguments

# As in configs/experiment/tiny_chain.yaml and what it builds on; a test compares them.
SIZE: dict[str, Any] = {
    "num_hidden_layers": 8,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
VOCABULARY, MAX_TOKENS, CURRICULUM = 1024, 640, 0.1
EXITS = ExitConfig(
    layers=(2, 4, 6),
    thresholds=(0.9, 0.9, 0.9),
    translator=Translator.LOW_RANK,
    rank=48,
    max_pending=32,
)
RECIPE: dict[str, Any] = {
    "scale": "linear",
    "early_scale": 0.4,
    "layer_dropout": 0.05,
    "gate_weight": 0.1,
}
TRAINER: dict[str, Any] = {
    "learning_rate": 4e-3,
    "weight_decay": 0.05,
    "warmup_steps": 60,
    "decay_share": 0.35,
    "max_grad_norm": 1.0,
    "bf16": "auto",
    "fsdp": False,
    "processes": 1,
    "micro_batches": 1,
    "log_every": 50,
    "save_every": 10**9,
}
TARGET_AGREEMENT = 0.998
TOKENIZER_TEXTS, THRESHOLD_BATCHES = 6000, 4


class TimedTrainer(AdaptiveTrainer):
    """Trains for a time: warm-up by steps, a plateau, and a decay to 0 over the last share of it.

    Args:
        seconds: from the first step on.
    """

    def __init__(self, *args: Any, seconds: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds = seconds
        self._began: float | None = None
        self.add_callback(_StopInTime(self))

    def progress(self) -> float:
        """Share of the run that is over, by its time or its steps, whichever is more."""
        if self._began is None:
            return 0.0
        elapsed = (time.monotonic() - self._began) / self.seconds
        return min(1.0, max(elapsed, self.state.global_step / max(1, self.state.max_steps)))

    def begin(self) -> None:
        """Starts the clock, at the first call."""
        self._began = self._began or time.monotonic()

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LambdaLR:
        """The schedule of the configured recipe, with the time in place of the steps."""
        warmup, decay = TRAINER["warmup_steps"], TRAINER["decay_share"]

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / warmup)
            return warm * min(1.0, max(0.0, (1.0 - self.progress()) / decay))

        target = optimizer or self.optimizer
        assert target is not None  # created before the scheduler
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(target, factor)
        return self.lr_scheduler


class _StopInTime(TrainerCallback):
    def __init__(self, trainer: TimedTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.trainer.begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        control.should_training_stop |= self.trainer.progress() >= 1.0


def build(attention: str) -> tuple[AdaptiveModel, Encoder]:
    """The untrained model with its tokenizer in an encoder."""
    problems = chain_problems("train", size=TOKENIZER_TEXTS, seed=TOKENIZER_SEED)
    texts = (f"{prompt_text(p.question)} {p.solution}" for p in problems)
    tokenizer = train_tokenizer(texts, VOCABULARY, marks=(OPEN_TAG, CLOSE_TAG))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **SIZE,
    )
    setattr(config, ANSWER_MARK, mark_of([CHAINS]))
    base = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention
    )
    model = AdaptiveModel(base, EXITS, executor="generic")
    return model, Encoder(tokenizer, max_tokens=MAX_TOKENS)


def batches(encoder: Encoder, *, seed: int, tokens: int, steps: int) -> MixtureBatches:
    """Packed batches of chains, one micro-batch a step."""
    return MixtureBatches(
        encoder, {}, {CHAINS: 1.0}, pools=steps, parts=1, tokens_per_step=tokens, seed=seed,
        curriculum=CURRICULUM, packing=True,
    )  # fmt: skip


def save_rounded(
    model: AdaptiveModel, encoder: Encoder, folder: Path, *, seed: int, tokens: int
) -> None:
    """Rounds the weights to bfloat16, chooses the exits' thresholds with them, and saves."""
    model.base.config.use_cache = True  # Trainer turned it off
    model.eval().to(torch.bfloat16)
    model.save_pretrained(folder, merge=True)  # kept, should what follows fail
    encoder.tokenizer.save_pretrained(folder)
    model.to(torch.float32)
    fresh = batches(encoder, seed=seed + THRESHOLD_OFFSET, tokens=tokens, steps=THRESHOLD_BATCHES)
    fresh.curriculum = 0.0
    confidences, agreements = read_exits(model, (fresh[n] for n in range(len(fresh))))
    thresholds = thresholds_in_turn(confidences, agreements, TARGET_AGREEMENT)
    model.set_exit_config(model.exit_config.with_thresholds(thresholds))
    shares = exit_shares(confidences, thresholds)
    layers = model.exit_config.layers
    print(describe_thresholds(layers, thresholds, shares, TARGET_AGREEMENT), flush=True)
    model.to("cpu").to(torch.bfloat16)
    model.save_pretrained(folder, merge=True)


@torch.no_grad()
def spot_check(model: AdaptiveModel, encoder: Encoder, count: int) -> float:
    """Share of `count` test problems whose greedy answer after ``####`` is right."""
    problems = list(chain_problems("test", size=count, seed=TOKENIZER_SEED))
    tokenizer, base = encoder.tokenizer, model.base.eval()
    prompts = [encoder.prompt(problem.question) for problem in problems]
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    out = base.generate(
        input_ids=ids, attention_mask=(ids != pad).long(), max_new_tokens=MAX_TOKENS,
        do_sample=False,
    )  # fmt: skip
    texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    print(texts[-1], flush=True)
    right = sum(
        text.rpartition("####")[2].strip() == problem.answer
        for text, problem in zip(texts, problems, strict=True)
    )
    return right / count


def main() -> None:
    """Trains, saves the model into ``FOLDER/model`` and the record into ``FOLDER/run.json``."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m deliberate.train.tiny_chain")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=110.0, help="of the training steps")
    parser.add_argument("--steps", type=int, default=4000, help="at most")
    parser.add_argument("--tokens", type=int, default=65536, help="in a step, at least")
    parser.add_argument("--workers", type=int, default=8, help="that draw the batches")
    parser.add_argument("--check", type=int, default=256, help="test problems to answer; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    set_seed(given.seed)
    model, encoder = build("sdpa")
    settings = SimpleNamespace(**TRAINER, max_steps=given.steps)
    args = training_arguments(
        given.folder, settings, seed=given.seed, report_to=[], run_name=given.folder.name
    )
    args.save_strategy = "no"  # type: ignore[assignment]
    args.dataloader_num_workers = given.workers
    trainer = TimedTrainer(
        PretrainObjective(model, **RECIPE),
        args,
        batches(encoder, seed=given.seed, tokens=given.tokens, steps=given.steps),
        optimizer="muon",
        processing_class=encoder.tokenizer,
        seconds=given.seconds,
    )
    print(f"ready after {time.monotonic() - began:.0f} s on {model.device}", flush=True)
    trainer.train()
    model = trainer.finish(given.folder)
    steps, history = trainer.state.global_step, trainer.state.log_history
    print(f"{steps} steps, {time.monotonic() - began:.0f} s", flush=True)
    save_rounded(model, encoder, given.folder / "model", seed=given.seed, tokens=given.tokens)
    seconds = time.monotonic() - began
    right = None
    if given.check:
        where = "cuda" if torch.cuda.is_available() else "cpu"
        right = spot_check(model.to(where).to(torch.float32), encoder, given.check)
        print(f"{given.check} test problems: {right:.1%} right", flush=True)
    record = {
        "settings": {name: str(value) for name, value in vars(given).items()},
        "steps": steps,
        "tokens_per_step": given.tokens,
        "seconds": round(seconds, 1),
        "right": right,
        "finite": math.isfinite(float(history[-1].get("train_loss", math.nan))),
        "environment": describe(),
        "history": history,
    }
    (given.folder / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"model: {given.folder / 'model'}, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
