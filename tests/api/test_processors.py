"""Logits processors over batches: what each row sees, and what it costs."""

from __future__ import annotations

import pytest
import torch
from ragged_batches import LENGTHS, OWN, ragged_batch, ragged_model
from tiny_models import VOCAB, random_ids
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkLogitsProcessor,
)

from deliberate.api.model import AdaptiveModel
from deliberate.engine import processors as kinds
from deliberate.engine.processors import OWN_IDS, OWN_SCORES, keeps_state, may_keep_state
from deliberate.engine.sampler import TokenChooser
from deliberate.utils.errors import DeliberateError

NEW = 10


@pytest.fixture(scope="module")
def model() -> AdaptiveModel:
    return ragged_model()


@pytest.fixture(scope="module")
def batch():
    return ragged_batch()


class Counting(LogitsProcessor):
    """Forbids a token by the row's index and its last id; counts what it is shown."""

    stateless = True  # its scores do not depend on the counts

    def __init__(self):
        self.calls = self.rows = 0

    def __call__(self, input_ids, scores):
        self.calls, self.rows = self.calls + 1, self.rows + len(input_ids)
        assert input_ids.shape[0] == scores.shape[0]
        scores = scores.clone()
        for row, last in enumerate(input_ids[:, -1].tolist()):
            scores[row, (7 * row + last) % VOCAB] = -float("inf")
            scores[row, 11 * row : 11 * row + 30] -= 2.0
        return scores


@pytest.mark.parametrize("fidelity", ["dense", "exact"])
def test_a_processor_that_looks_at_the_row_index_changes_what_it_changes_in_transformers(
    model, batch, fidelity
):
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    stock = model.base.generate(**batch, logits_processor=[Counting()], **settings)
    out = model.generate(
        **batch, logits_processor=[Counting()], fidelity=fidelity, **settings, **OWN
    )
    assert torch.equal(out, stock)


@pytest.mark.parametrize("fidelity", ["dense", "exact"])
def test_allowed_tokens_by_batch_id_are_those_of_the_row(model, batch, fidelity):
    seen = []

    def allowed(row, ids):
        seen.append((row, len(ids)))
        return [t for t in range(VOCAB) if (t + int(ids[-1])) % 4 == row]

    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    stock = model.base.generate(**batch, prefix_allowed_tokens_fn=allowed, **settings)
    seen.clear()
    out = model.generate(
        **batch, prefix_allowed_tokens_fn=allowed, fidelity=fidelity, **settings, **OWN
    )
    assert torch.equal(out, stock)
    if fidelity == "dense":
        assert len(seen) == NEW * len(LENGTHS)


@pytest.mark.parametrize("fidelity", ["dense", "exact"])
def test_the_repetition_penalty_of_a_padded_batch_ignores_each_rows_own_padding(
    model, batch, fidelity
):
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    settings |= {"repetition_penalty": 2.5}
    stock = model.base.generate(**batch, **settings)
    assert torch.equal(model.generate(**batch, fidelity=fidelity, **settings, **OWN), stock)


# -- cost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [4, 16])
def test_sampling_costs_one_row_of_processing_for_each_token(model, rows, monkeypatch):
    shown = []
    inner = logits_process.TopPLogitsWarper.__call__

    def counted(self, input_ids, scores):
        shown.append(len(scores))
        return inner(self, input_ids, scores)

    monkeypatch.setattr(logits_process.TopPLogitsWarper, "__call__", counted)
    ids = random_ids(6, batch=rows)
    settings = {"do_sample": True, "top_p": 0.9, "max_new_tokens": NEW, "seed": 1}
    model.generate(ids, fidelity="dense", **settings)
    assert sum(shown) == rows * NEW
    shown.clear()
    out = model.generate(ids, fidelity="exact", return_dict_in_generate=True, **settings, **OWN)
    drafted = sum(trace.drafted for trace in out.traces)
    rejected = sum(trace.rejected for trace in out.traces)
    assert drafted > 0
    # Each draft once where it was drafted; each token of the output and each rejected draft once
    # at full depth, the token that replaces it included.
    assert sum(shown) <= drafted + rows * NEW + rejected


def test_a_processor_of_unknown_kind_is_called_once_a_step(model):
    ids, counting = random_ids(6, batch=16), Counting()
    settings = {"max_new_tokens": NEW, "do_sample": False}
    model.generate(ids, fidelity="dense", logits_processor=[counting], **settings)
    assert (counting.calls, counting.rows) == (NEW, 16 * NEW)


# -- one row's scores do not depend on the others --------------------------------------------------


def repetition_penalty(ignored):
    try:
        return RepetitionPenaltyLogitsProcessor(1.3, ignored)
    except ValueError:  # older versions of transformers take one number for all rows
        return RepetitionPenaltyLogitsProcessor(1.3, 2)


def processors():
    return LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor([[[3], 2.0], [[5, 6], -1.0]]),
            repetition_penalty(torch.tensor([0, 2, 1, 0, 3])),
            NoRepeatNGramLogitsProcessor(2),
            MinLengthLogitsProcessor(20, torch.tensor([4])),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(500),
            TopPLogitsWarper(0.97),
            MinPLogitsWarper(1e-4),
            TypicalLogitsWarper(0.95),
            EpsilonLogitsWarper(1e-5),
            EtaLogitsWarper(1e-4),
            WatermarkLogitsProcessor(1003, "cpu"),
            LogitNormalization(),
        ]
    )


def test_a_rows_scores_are_the_same_bits_in_every_company():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 1003, generator=generator)
    texts = torch.randint(0, 1003, (5, 12), generator=generator).tolist()
    texts = [text[: 12 - (row == 3)] for row, text in enumerate(texts)]
    places = [(row, 4, text) for row, text in enumerate(texts)]
    chooser = TokenChooser(processors(), sample=True, seed=3, batch=5)
    tokens, scores = chooser.choose_rows(logits, places)
    for rows in ([0], [4, 1], [3, 0, 2], [2, 3, 4, 0]):
        some, own = chooser.choose_rows(logits[rows], [places[row] for row in rows])
        assert torch.equal(own, scores[rows]) and some == [tokens[row] for row in rows]
    # As a GPU calls them, all rows of one length at once: the same up to rounding.
    grouped = TokenChooser(processors(), sample=True, seed=3, batch=5, grouped=True)
    again, close = grouped.choose_rows(logits, places)
    torch.testing.assert_close(close, scores)
    assert again == tokens
    # And as transformers would, each row in its place of a whole batch.
    inner = processors()
    for row, text in enumerate(texts):
        whole = inner(torch.tensor([text] * 5), logits[row].repeat(5, 1))[row]
        torch.testing.assert_close(whole, scores[row])


def test_every_processor_is_known_to_be_of_one_row_or_is_shown_the_whole_batch():
    """Names in the lists are transformers' own; a class derived from one is of unknown kind."""
    known = OWN_SCORES | OWN_IDS | kinds._STATEFUL | kinds._OTHERS
    missing = {name for name in known if not hasattr(logits_process, name)}
    assert missing <= {"TopHLogitsWarper"}, "renamed in transformers?"

    class Derived(TemperatureLogitsWarper):
        pass

    assert TokenChooser([Derived(0.5)]).needs_ids
    assert not TokenChooser([TemperatureLogitsWarper(0.5)]).needs_ids


def test_what_processors_are_shown_can_be_kept_and_trained_on(model):
    kept = []

    class Keep(LogitsProcessor):
        def __call__(self, input_ids, scores):
            kept.append((input_ids, scores))
            return scores

    model.generate(random_ids(4), max_new_tokens=2, logits_processor=[Keep()], **OWN)
    for ids, scores in kept:
        assert not ids.is_inference() and not scores.is_inference()


def test_a_failing_processor_in_a_batch_names_the_sequence_that_it_failed_on(model, batch):
    class FailsOn(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if (input_ids[:, -1] == int(batch["inputs"][2, -1])).any():
                raise ValueError("cannot go on\nafter this")
            return scores

    with pytest.raises(DeliberateError, match="FailsOn failed on sequence 2 at generated") as error:
        model.generate(**batch, logits_processor=[FailsOn()], max_new_tokens=2)
    assert "\n" not in str(error.value)


# -- processors that keep state --------------------------------------------------------------------


class EveryThird(LogitsProcessor):
    """Forbids even tokens at every third call."""

    def __init__(self):
        self.calls = 0
        self.lengths = []

    def __call__(self, input_ids, scores):
        self.calls += 1
        self.lengths.append(input_ids.shape[1])
        if self.calls % 3:
            return scores
        scores = scores.clone()
        scores[:, ::2] = -torch.inf
        return scores


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        *({"thresholds": 0.05, "online": False, "max_pending": n} for n in (1, 2, 4, 8)),
        {"thresholds": 0.05},
        {"lookup_tokens": 4},
    ],
)
def test_a_processor_that_counts_its_calls_gives_the_tokens_of_dense(model, sample, settings):
    ids, more = random_ids(6), {"max_new_tokens": 3 * NEW, "do_sample": sample, "seed": 3}
    dense, exact = EveryThird(), EveryThird()
    expected = model.generate(ids, fidelity="dense", logits_processor=[dense], **more)
    out = model.generate(
        ids,
        fidelity="exact",
        logits_processor=[exact],
        return_dict_in_generate=True,
        **more,
        **settings,
    )
    assert torch.equal(out.sequences, expected)
    assert not torch.equal(expected, model.generate(ids, fidelity="dense", **more))
    # Once for every token of the output, in order.
    assert exact.lengths == dense.lengths == list(range(6, 6 + 3 * NEW))
    if not sample and "thresholds" in settings:
        assert out.trace.drafted > 0


def test_in_threshold_mode_it_is_called_once_for_every_token(model):
    counting = EveryThird()
    out = model.generate(
        random_ids(6),
        fidelity="threshold",
        thresholds=0.05,
        logits_processor=[counting],
        max_new_tokens=NEW,
        return_dict_in_generate=True,
    )
    assert counting.lengths == list(range(6, 6 + NEW))
    assert {1, 4} & set(out.trace.exit_layers)


def test_a_processor_that_changes_is_refused_where_rows_reach_a_token_at_different_times(
    batch, model
):
    counting, settings = EveryThird(), {"max_new_tokens": 4, "do_sample": False}
    with pytest.raises(DeliberateError, match="EveryThird changes its attributes") as error:
        model.generate(**batch, fidelity="exact", logits_processor=[counting], **settings, **OWN)
    assert "EveryThird.stateless = True" in str(error.value) and "\n" not in str(error.value)
    stock = model.base.generate(**batch, logits_processor=[EveryThird()], **settings)
    out = model.generate(
        **batch, fidelity="dense", logits_processor=[EveryThird()], **settings, **OWN
    )
    assert torch.equal(out, stock)


def test_a_function_that_counts_in_its_closure_is_refused_in_a_batch(batch, model):
    def counted():
        calls = 0

        def processor(input_ids, scores):
            nonlocal calls
            calls += 1
            return scores

        return processor

    with pytest.raises(DeliberateError, match="function changes its attributes"):
        model.generate(
            **batch, fidelity="exact", logits_processor=[counted()], max_new_tokens=4, **OWN
        )


def test_drafts_are_chosen_with_processors_that_are_known_to_be_stateless():
    class Quiet(EveryThird):
        stateless = True

    known = TemperatureLogitsWarper(0.5)
    chooser = TokenChooser([known, EveryThird()])
    assert chooser.may_keep_state == ("EveryThird",)
    assert chooser.drafting.describe() == "TemperatureLogitsWarper"
    quiet = TokenChooser([known, Quiet()])
    assert quiet.may_keep_state == () and quiet.drafting is quiet


def test_every_processor_of_transformers_is_known_or_refused():
    """A class that a new release adds counts as one that may keep state until it is entered."""
    unknown = {
        name
        for name, kind in vars(logits_process).items()
        if isinstance(kind, type)
        and issubclass(kind, LogitsProcessor)
        and kind.__module__ == logits_process.__name__
        and kind is not LogitsProcessor
        and may_keep_state(kind.__new__(kind))
        and not keeps_state(kind.__new__(kind))
    }
    assert unknown <= {
        *("DiaClassifierFreeGuidanceLogitsProcessor", "DiaEOSChannelFilterLogitsProcessor"),
        *("DiaEOSDelayPatternLogitsProcessor", "WhisperNoSpeechDetection"),
        "HammingDiversityLogitsProcessor",  # of older versions
    }
