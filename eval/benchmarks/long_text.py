"""`deliberate bench longtext`: long continuations with and without the trigger of long text.

Every prompt is continued at batch 1 by every variant before the next prompt, in rotating order:
full depth without and with the trigger, watching alone (a threshold that nothing crosses: its
output is the first's, its time shows what watching costs), the stop policies that act on
repetition, and transformers' `repetition_penalty` and `no_repeat_ngram_size`. Compared text by text
with a paired bootstrap over prompts.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.data import seeds
from deliberate.data.texts import is_text, load_texts
from deliberate.data.word_problems import word_problems
from deliberate.engine.long_text import LongTextConfig
from deliberate.eval.benchmarks.harness import (
    CLOCKS,
    UNBOUNDED,
    Session,
    check_clock,
    interleaved,
    load_model,
    table_console,
    timed,
)
from deliberate.eval.benchmarks.long_text_policies import Continued, PolicyTexts, policy_variants
from deliberate.eval.benchmarks.long_text_tables import (
    GRAMS,
    WITHOUT,
    Start,
    Taken,
    show,
    summarise,
)
from deliberate.eval.benchmarks.repetition import Judge, repetition, words
from deliberate.eval.benchmarks.settings import bench_config, listed, mapped
from deliberate.eval.report.detokenize import decode_text
from deliberate.eval.runner.runner import plain_greedy
from deliberate.eval.tasks.prompts import prompt_encoder
from deliberate.utils.checks import all_at_least, one_of
from deliberate.utils.end_tokens import end_tokens
from deliberate.utils.errors import DeliberateError

MODES = ("greedy", "sample")
BASELINES = {"repetition_penalty": "penalty", "no_repeat_ngram_size": "no repeated"}
# Of tables in a file, where nothing says how wide they may be.
WIDTH = 100


def main(arguments: Sequence[str]) -> None:
    """Runs ``bench longtext`` with overrides of `configs/bench_longtext.yaml`.

    Raises:
        DeliberateError: an unknown mode, setting or source, or texts that do not fit the context.
    """
    cfg = bench_config("bench_longtext", arguments, verbatim=("model", "judge", "out"))
    chosen = mapped(cfg, "long_text")
    rule = LongTextConfig(**chosen)
    _check(cfg)
    variants(cfg, rule)  # a wrong one is reported before the model is loaded
    session = Session("longtext", arguments, cfg.threads)
    model = load_model(cfg)
    tokenizer = checkpoint.load_tokenizer(cfg.model)
    starts = starts_of(cfg, tokenizer)
    _fits(cfg, starts, model.backbone.max_positions)
    judge = _judge(cfg, model, tokenizer)
    console = table_console(WIDTH)
    figures: dict[str, Any] = {}
    for mode in cfg.modes:
        taken = run(model, tokenizer, starts, variants(cfg, rule), cfg, sample=mode == "sample")
        figures[mode] = summarise(taken, starts[cfg.warmup :], judge, cfg.seed)
        show(mode, figures[mode], console)
    documents = [start.document for start in starts[cfg.warmup :] if start.document]
    if documents:
        split = [words(text) for text in documents]
        means = [float(np.mean([repetition(one, n) for one in split])) for n in GRAMS]
        figures["documents"] = {
            "rep": dict(zip(map(str, GRAMS), means, strict=True)),
            "words": float(np.mean(list(map(len, split)))),
        }
        console.print(
            "the documents themselves: rep-2, 3, 4 "
            + ", ".join(f"{100 * mean:.1f}" for mean in means)
            + f" % over {figures['documents']['words']:.0f} words on average",
            highlight=False,
        )
    session.end()
    console.print(
        f"judge: {cfg.judge or 'the model itself'}; {dataclasses.asdict(rule)}\n"
        f"{session.line(str(cfg.clock))}",
        highlight=False,
    )
    session.write(
        cfg.out,
        {
            "settings": OmegaConf.to_container(cfg),
            "long_text": dataclasses.asdict(rule),
            "figures": figures,
        },
    )


def _check(cfg: DictConfig) -> None:
    for mode in cfg.modes:
        one_of("modes", mode, MODES)
    if not cfg.modes:
        raise DeliberateError(f"modes is empty: name at least one of {', '.join(MODES)}")
    least = {"prompts": 2, "prompt_tokens": 1, "new_tokens": 2, "warmup": 0, "threads": 1}
    all_at_least(cfg, least)
    check_clock(cfg)
    if not cfg.temperature > 0:
        raise DeliberateError(f"temperature={cfg.temperature} must be above 0")
    if cfg.source != "words" and not is_text(cfg.source):
        raise DeliberateError(f"source={cfg.source} is unknown: words, text or text/NAME")


def starts_of(cfg: DictConfig, tokenizer: Any) -> list[Start]:
    """So many prompts, those of the warm-up included.

    Raises:
        DeliberateError: too few documents that are longer than the prompt.
    """
    count = cfg.prompts + cfg.warmup
    if cfg.source == "words":
        encoder = prompt_encoder(cfg, tokenizer, max_tokens=UNBOUNDED)
        own, (low, high) = seeds.WORD_PROBLEMS[seeds.LONG_TEXT_BENCHMARK], cfg.steps
        seed = own.of(cfg.seed, f"the {seeds.LONG_TEXT_BENCHMARK}")
        drawn = word_problems(cfg.split, size=count, seed=seed, steps=(low, high))
        made = [(encoder.prompt(problem.question), problem.answer) for problem in drawn]
        # Where the end is forbidden, no answer is finished that could be graded.
        return [
            Start(ids, decode_text(tokenizer, ids), answer=answer if cfg.until_end else None)
            for ids, answer in made
        ]
    texts = [document.text for document in load_texts(cfg.source, cfg.split, data_dir=cfg.data.dir)]
    random.Random(cfg.seed).shuffle(texts)
    starts: list[Start] = []
    for text in texts:
        ids = tokenizer.encode(text)
        if len(ids) > cfg.prompt_tokens and len(starts) < count:
            prompt, rest = ids[: cfg.prompt_tokens], ids[cfg.prompt_tokens :][: cfg.new_tokens]
            going_on = decode_text(tokenizer, rest)
            starts.append(Start(prompt, decode_text(tokenizer, prompt), document=going_on))
    if len(starts) < count:
        raise DeliberateError(
            f"{cfg.source}/{cfg.split} has {len(starts)} documents of more than "
            f"prompt_tokens={cfg.prompt_tokens}; prompts + warmup = {count} are needed"
        )
    return starts


def _fits(cfg: DictConfig, starts: Sequence[Start], context: int | None) -> None:
    longest = max(len(start.ids) for start in starts)
    if context is not None and longest + cfg.new_tokens > context:
        raise DeliberateError(
            f"new_tokens={cfg.new_tokens} after a prompt of {longest} tokens is more than the "
            f"model's context of {context}"
        )


def _judge(cfg: DictConfig, model: AdaptiveModel, tokenizer: Any) -> Judge:
    if cfg.judge is None:
        return Judge(model.base, tokenizer)
    base: Any = AdaptiveModel.from_pretrained(cfg.judge, executor="generic").base
    return Judge(base.to(model.device), checkpoint.load_tokenizer(cfg.judge))


def variants(cfg: DictConfig, rule: LongTextConfig) -> dict[str, Mapping[str, Any]]:
    """What `generate` is given in each variant, by name."""
    found: dict[str, Mapping[str, Any]] = {
        WITHOUT: {},
        "watch alone": {"long_text": dataclasses.replace(rule, threshold=0.0)},
        "trigger": {"long_text": rule},
    }
    policies = listed(cfg, "policies")
    found |= {name: {"policies": chosen} for name, chosen in policy_variants(policies).items()}
    for name, short in BASELINES.items():
        found |= {f"{short} {value}": {name: value} for value in cfg[name]}
    return found


def run(
    model: AdaptiveModel,
    tokenizer: Any,
    starts: Sequence[Start],
    found: Mapping[str, Mapping[str, Any]],
    cfg: DictConfig,
    *,
    sample: bool,
) -> dict[str, Taken]:
    """Continues every prompt by every variant; the first `warmup` prompts are not counted."""
    common: dict[str, Any] = {
        "max_new_tokens": cfg.new_tokens,
        "fidelity": "dense",
        "return_dict_in_generate": True,
    }
    if not cfg.until_end:
        common["min_new_tokens"] = cfg.new_tokens
    clock, ends = CLOCKS[cfg.clock], end_tokens(model.base.generation_config, tokenizer)
    by_policies = PolicyTexts(model, tokenizer, ends, cfg.new_tokens, until_end=cfg.until_end)

    def continued(prompt: Sequence[int], chosen: Mapping[str, Any], seed: int | None) -> Continued:
        if "policies" in chosen:
            how = {"seed": seed, "temperature": cfg.temperature}
            return by_policies.text(prompt, chosen["policies"], **how)
        settings = common | dict(chosen)
        if seed is not None:
            drawing = {"temperature": cfg.temperature, "top_k": 0}
            settings |= {"do_sample": True, "seed": seed} | drawing
        ids = torch.tensor([prompt], device=model.device)
        trace = model.generate(ids, **settings).trace
        return Continued(trace.tokens, len(trace.triggers), trace.reweighed)

    taken = {name: Taken() for name in found}
    turns = interleaved(starts, list(found), warmup=cfg.warmup, title="bench longtext")
    with plain_greedy(model, ends):
        for turn, start, name in turns:
            # One seed a prompt: all variants draw with the same noise.
            seed = cfg.seed + turn.index if sample else None
            call = partial(continued, start.ids, found[name], seed)
            made, seconds = timed(call, clock, model.device)
            if not turn.counted:
                continue
            one = taken[name]
            one.texts.append(decode_text(tokenizer, made.tokens))
            one.tokens.append(len(made.tokens))
            one.seconds.append(seconds / len(made.tokens))
            one.triggers.append(made.triggers)
            one.reweighed.append(made.reweighed)
    return taken
