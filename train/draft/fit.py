"""`deliberate fit`: exits and a draft layer for a checkpoint that has none, from its own text."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from deliberate.api import checkpoint
from deliberate.api.model import AdaptiveModel
from deliberate.engine.draft_lengths import DraftPrior
from deliberate.executors.draft_executor import DraftExecutor
from deliberate.modeling.draft_layer import DraftLayer
from deliberate.modeling.exit_config import ExitConfig, Translator
from deliberate.modeling.exit_heads import ExitHeads
from deliberate.train.draft.agreement import measure_agreement
from deliberate.train.draft.costs import draft_seconds, pass_seconds
from deliberate.train.draft.draft_trainer import DraftData, DraftTrainer, DraftTraining
from deliberate.train.draft.exit_vocabulary import (
    ExitVocabulary,
    measure_vocabularies,
    with_vocabulary,
)
from deliberate.train.draft.fit_card import write_card
from deliberate.train.draft.fit_texts import draft_states, exit_states, own_texts
from deliberate.train.draft.hidden_cache import HiddenCache, Text
from deliberate.train.draft.own_text import OwnText
from deliberate.train.draft.start import draft_config, fit_joining, start_from_model
from deliberate.train.draft.translators import ExitAgreement, fit_translators
from deliberate.train.draft.vocabulary import (
    SizeCost,
    cost_of_size,
    coverage,
    frequent_tokens,
    resized,
)
from deliberate.utils.errors import DeliberateError
from deliberate.utils.files import write_text
from deliberate.utils.json_files import read_json

# Sizes of the draft vocabulary that are measured; the layer is trained with the first.
SIZES = (2048, 4096, 8192, 16384)
_TRAINED_SIZE = 2048
# Drafts of a chain that are measured.
_DEPTH = 6
# Texts for the closed-form start of the joining matrix.
_START_TEXTS = 80
RECORD_NAME = "fit.json"


@dataclass(frozen=True)
class Fitted:
    """What `fit` found.

    Attributes:
        model: saved in `folder`.
        exits: agreement of each exit on held-out answers.
        vocabularies: of the exits, measured.
        sizes: of the draft vocabulary, measured; empty without a draft layer.
        chosen: the size that was taken; None without.
        seconds: of each part.
    """

    model: AdaptiveModel
    folder: Path
    exits: list[ExitAgreement]
    vocabularies: list[ExitVocabulary]
    sizes: list[SizeCost]
    chosen: SizeCost | None
    seconds: dict[str, float]


def fit(cfg: DictConfig, *, say: Callable[[str], None] = print) -> Fitted:
    """Writes own text, caches hidden states, fits exits and a draft layer, and saves the model.

    A run that was interrupted is continued by the same command.

    Raises:
        DeliberateError: a setting that cannot work, or a model without a tokenizer or text.
    """
    training = _settings(DraftTraining, cfg.draft, more={"seed": int(cfg.seed)})
    how = _settings(OwnText, cfg.text)
    _check(cfg)
    torch.set_num_threads(int(cfg.threads))
    work = Path(cfg.out) / "work"
    seconds: dict[str, float] = {}
    model = AdaptiveModel.from_pretrained(cfg.model)
    kept = None if cfg.draft.train else model.draft
    model.attach_draft(None)
    model.base.requires_grad_(False)
    tokenizer = checkpoint.load_tokenizer(cfg.model)
    layers = _exit_layers(cfg, model)
    with _timed(seconds, "text"):
        texts, digest = own_texts(cfg, how, model, tokenizer, work, say)
    split = max(1, round(len(texts) * float(cfg.held_out)))
    if len(texts) <= split:
        raise DeliberateError(
            f"{len(texts)} texts are too few to fit on: raise text.tokens={how.tokens}"
        )
    few = texts[: split + max(_START_TEXTS, int(cfg.exits.texts))]
    with _timed(seconds, "states"):
        cache = exit_states(cfg, model, few, layers, digest, work, say)
    held, trained = cache.texts[:split], cache.texts[split:]
    if not trained:
        raise DeliberateError(f"cache_tokens={cfg.cache_tokens} leaves no text to fit on: raise it")
    config = ExitConfig.build(model.backbone.num_layers, list(layers), translator=Translator.FULL)
    with _timed(seconds, "exits"):
        exits = ExitHeads(config, model.backbone.hidden_size)
        fit_translators(exits, cache, trained[: int(cfg.exits.texts)], model.backbone.norm)
        counted = _answers(cache, trained)
        vocabularies = measure_vocabularies(
            exits, model.backbone, cache, held, counted, say=say,
            target=float(cfg.exits.target_agreement),
            wanted=None if cfg.exits.vocabulary == "auto" else int(cfg.exits.vocabulary),
        )  # fmt: skip
        taken = min(vocabularies, key=lambda one: one.seconds_per_token)
        found = list(taken.exits)
        fitted = _with_exits(model, exits, taken, counted)
    for one in found:
        say(
            f"exit after layer {one.layer}: {one.agreement:.1%} of held-out tokens agree; at "
            f"threshold {one.threshold:.3g} {one.exits:.1%} exit"
        )
    sizes: list[SizeCost] = []
    chosen: SizeCost | None = None
    many: HiddenCache | None = None
    if cfg.draft.train:
        with _timed(seconds, "last_states"):
            many = draft_states(cfg, texts[split:], digest, work, say)
        with _timed(seconds, "draft"):
            layer, counted = _train_draft(fitted, cache, trained, many, training, work, say)
        with _timed(seconds, "sizes"):
            sizes, chosen = _choose_size(cfg, fitted, layer, counted, cache, held, say)
    elif kept is not None:
        fitted.attach_draft(kept.layer, kept.prior)
        say("the model's own draft layer is kept")
    fitted.save_pretrained(cfg.out)
    tokenizer.save_pretrained(cfg.out)
    done = Fitted(fitted, Path(cfg.out), found, vocabularies, sizes, chosen, seconds)
    _record(cfg, done, cache, many or cache, held)
    if not cfg.keep_cache:
        for name in ("states", "last-states"):
            shutil.rmtree(work / name, ignore_errors=True)
    return done


def _settings(kind: Any, given: DictConfig, more: dict[str, Any] | None = None) -> Any:
    names = {one.name for one in fields(kind)}
    values = {name: value for name, value in given.items() if name in names}
    return kind(**values | (more or {}))


def _check(cfg: DictConfig) -> None:
    for name, least, most in (("held_out", 0.0, 0.5), ("exits.target_agreement", 0.0, 1.0)):
        value = OmegaConf.select(cfg, name)
        if not least < value <= most:
            raise DeliberateError(f"{name}={value} must be above {least} and at most {most}")
    given = cfg.exits.vocabulary
    if given != "auto" and (isinstance(given, bool) or not isinstance(given, int) or given < 0):
        raise DeliberateError(f"exits.vocabulary={given}: auto, 0 for every token, or rows to read")
    if cfg.draft.vocabulary != "auto" and int(cfg.draft.vocabulary) < 2:
        raise DeliberateError(f"draft.vocabulary={cfg.draft.vocabulary}: auto, or at least 2")


def _with_exits(
    model: AdaptiveModel, exits: ExitHeads, taken: ExitVocabulary, counted: Tensor
) -> AdaptiveModel:
    """The base model with fitted exits over the vocabulary that was taken, at its thresholds."""
    ids = None
    if taken.size:
        ids = frequent_tokens(counted, taken.size, model.backbone.vocab_size)
    chosen = with_vocabulary(exits, ids)
    thresholds = [one.threshold for one in taken.exits]
    fitted = AdaptiveModel(model.base, chosen.config.with_thresholds(thresholds))
    fitted.exits.load_state_dict(chosen.state_dict())
    return fitted.eval()


class _timed:
    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = round(time.monotonic() - self._began, 1)


def _exit_layers(cfg: DictConfig, model: AdaptiveModel) -> tuple[int, ...]:
    depth = model.backbone.num_layers
    if cfg.exits.layers == "auto":
        wanted = {max(1, round(depth * share)) for share in (3 / 5, 4 / 5, 9 / 10)}
        layers = tuple(sorted(layer for layer in wanted if layer < depth))
        return ExitConfig.build(depth, list(layers)).layers
    return ExitConfig.build(depth, list(cfg.exits.layers)).layers


def _answers(cache: HiddenCache, texts: Sequence[Text]) -> Tensor:
    tokens = cache.tokens()
    parts = [tokens[one.start + one.prompt : one.start + one.length] for one in texts]
    return torch.cat(parts)


def _train_draft(
    model: AdaptiveModel, cache: HiddenCache, first: Sequence[Text], many: HiddenCache,
    how: DraftTraining, work: Path, say: Callable[[str], None],
) -> tuple[DraftLayer, Tensor]:  # fmt: skip
    """Trains on all texts of `many`; the joining matrix begins by the `first` ones of `cache`."""
    backbone = model.backbone
    texts = many.texts
    counted = _answers(many, texts)
    size = min(_TRAINED_SIZE, backbone.vocab_size)
    torch.manual_seed(how.seed)
    layer = DraftLayer(draft_config(backbone, size))
    ids = frequent_tokens(counted, size, backbone.vocab_size)
    layer.vocabulary.copy_(ids)
    data = DraftData(many, backbone.embed_tokens, backbone.norm)
    depth = backbone.num_layers
    if start_from_model(layer, backbone) and depth - 1 in cache.layers:
        below = cache.states(depth - 1)
        whole = DraftData(cache, backbone.embed_tokens, backbone.norm, prompt_entries=None)
        pairs = []
        for text in first[:_START_TEXTS]:
            read = whole.read(text)
            wanted = below[text.start + 1 : text.start + text.length].float()
            pairs.append((read.embedded, read.normed[:-1], wanted))
        fit_joining(layer, pairs)
    head: Any = backbone.lm_head.weight
    trainer = DraftTrainer(layer, head.detach().float()[ids], data, texts, how)
    state = work / "draft.pt"
    if trainer.resume(state):
        say(f"draft layer: going on after step {trainer.step} of {trainer.steps}")
    total = sum(parameter.numel() for parameter in layer.parameters())
    say(
        f"draft layer: {total:,} parameters, {len(texts)} texts, {trainer.steps} steps, products "
        f"in {str(trainer.dtype).removeprefix('torch.')}"
    )
    losses: list[float] = []
    shown = max(1, trainer.steps // 20)

    def note(step: int, loss: float) -> None:
        losses.append(loss)
        if step % shown == 0:
            mean, each = sum(losses) / len(losses), trainer.seconds / step
            left = each * (trainer.steps - step) / 60
            pace = f"{each:.2f} s a step, {left:.0f} min left"
            say(f"draft layer: step {step}, loss {mean:.3f}, {pace}")
            losses.clear()

    trainer.run(note=note, save=state)
    return layer, counted


def _choose_size(
    cfg: DictConfig, model: AdaptiveModel, layer: DraftLayer, counted: Tensor,
    cache: HiddenCache, held: Sequence[Text], say: Callable[[str], None],
) -> tuple[list[SizeCost], SizeCost]:  # fmt: skip
    """Measures sizes of the draft vocabulary; attaches the layer with the best, if drafts pay."""
    backbone = model.backbone
    single, more = pass_seconds(backbone)
    data = DraftData(cache, backbone.embed_tokens, backbone.norm)
    lm_head: Any = backbone.lm_head
    full: Tensor = lm_head.weight.detach().float()
    wanted = SIZES if cfg.draft.vocabulary == "auto" else (int(cfg.draft.vocabulary),)
    sizes = sorted({min(size, backbone.vocab_size) for size in wanted})
    measured = []
    for size in sizes:
        trial = resized(layer, frequent_tokens(counted, size, backbone.vocab_size))
        head = full[trial.vocabulary]
        found = measure_agreement(trial, head, full, data, held, depth=_DEPTH)
        cost = draft_seconds(DraftExecutor(trial, backbone), backbone.hidden_size)
        measured.append((cost_of_size(size, found.survives, cost, single, more), trial, found))
        one = measured[-1][0]
        say(
            f"draft vocabulary of {size}: {coverage(_answers(cache, held), trial.vocabulary):.1%} "
            f"of held-out tokens, {cost * 1e3:.2f} ms a draft, accepted "
            f"{' '.join(f'{share:.2f}' for share in found.survives)}, best {one.drafts} drafts: "
            f"{one.seconds_per_token * 1e3:.2f} ms a token against {single * 1e3:.2f}"
        )
    best, trial, found = min(measured, key=lambda one: one[0].seconds_per_token)
    prior = DraftPrior.from_observed(
        found.confidences.tolist(), found.accepted.tolist(), survives=found.survives,
        draft_cost=best.draft_seconds / single, token_cost=more / single,
    )  # fmt: skip
    if best.drafts:
        model.attach_draft(trial.eval().requires_grad_(False), prior)
    else:
        say(
            "no number of drafts is faster than none here: the draft layer is left out, since "
            f"its first drafts are accepted in {found.survives[0]:.0%} of the places"
        )
    return [one for one, _, _ in measured], best


def _record(
    cfg: DictConfig, done: Fitted, cache: HiddenCache, trained: HiddenCache,
    held: Sequence[Text],
) -> None:  # fmt: skip
    read = [text for text in trained.texts if trained is not cache or text not in held]
    before = Path(checkpoint.resolve(str(cfg.model))) / RECORD_NAME
    kept = done.chosen is None and done.model.draft is not None and before.is_file()
    record = {
        "model": str(cfg.model),
        "settings": OmegaConf.to_container(cfg, resolve=True),
        "texts": {"fitted": len(read), "held_out": len(held)},
        "tokens": {
            "cached": trained.count,
            "answers": len(_answers(trained, read)),
            "held_out": len(_answers(cache, held)),
            "bytes_each": {"exits": cache.bytes_per_token, "draft": trained.bytes_per_token},
        },
        "exits": [
            asdict(one) | {"threshold": None if one.threshold == float("inf") else one.threshold}
            for one in done.exits
        ],
        "exit_vocabulary": [
            {name: value for name, value in asdict(one).items() if name != "exits"}
            for one in done.vocabularies
        ],
        "draft_vocabulary": [asdict(one) for one in done.sizes],
        "chosen": None if done.chosen is None else asdict(done.chosen),
        "seconds": done.seconds,
        "date": time.strftime("%Y-%m-%d"),
        "kept_draft": read_json(before) if kept else None,
    }
    write_text(done.folder / RECORD_NAME, json.dumps(record, indent=1) + "\n")
    write_card(done.folder, record)
