"""Small settings and a runner for tests of training recipes."""

from __future__ import annotations

from deliberate.train.app import train
from deliberate.utils.hydra_config import compose

SMALL = [
    "data=words", "data.max_tokens=150", "trainer.max_steps=4", "trainer.tokens_per_step=600",
    "trainer.micro_batches=2", "trainer.warmup_steps=1", "trainer.log_every=1",
    "trainer.save_every=2", "trainer.bf16=false", "exits.layers=[1,2]", "exits.rank=4",
]  # fmt: skip


def run(stock, folder, *overrides):
    # An experiment's own settings come before those of the command line, which win.
    cfg = compose("train", [*overrides[:1], *SMALL, f"model.path='{stock}'",
                            f"output_dir='{folder}'", *overrides[1:]])  # fmt: skip
    return train(cfg)
