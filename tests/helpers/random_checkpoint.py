"""A tiny random model with a tokenizer of its own, saved as a folder: what the commands run on."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import tiny_model

from deliberate.api.model import AdaptiveModel
from deliberate.data.word_problems import word_problems
from deliberate.modeling.exit_config import ExitConfig
from deliberate.train.tokenizer import train_tokenizer

LAYERS = 4
CONTEXT = 160


def save_checkpoint(folder: Path, *, seed: int = 0, threshold: float = 0.1) -> Path:
    """Writes the checkpoint; many tokens exit early, and often wrongly."""
    texts = [f"{p.question}\n{p.solution}" for p in word_problems("train", size=60, seed=3)]
    tokenizer = train_tokenizer(texts, 400)
    base = tiny_model(
        "llama",
        layers=LAYERS,
        dtype=torch.float32,
        seed=seed,
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
    )
    exits = ExitConfig(layers=(1, 2), thresholds=(threshold, threshold), translator="none")
    AdaptiveModel(base, exits).save_pretrained(folder, merge=True)
    tokenizer.save_pretrained(folder)
    return folder
