"""Measures of repetition and coherence, and `deliberate bench longtext` from prompts to figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_checkpoint import save_checkpoint

from deliberate.api.checkpoint import load_tokenizer
from deliberate.api.model import AdaptiveModel
from deliberate.eval.benchmarks.long_text_tables import mean_difference
from deliberate.eval.benchmarks.repetition import (
    Judge,
    distinct,
    fresh_characters,
    repetition,
    words,
)
from deliberate.eval.benchmarks.settings import run_benchmark
from deliberate.utils.errors import DeliberateError

SMALL = ("prompts=2", "warmup=1", "steps=[1,1]", "new_tokens=32", "repetition_penalty=[1.3]")
SMALL += ("policies=[]",)
SMALL += ("no_repeat_ngram_size=[3]", "executor=generic")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="module")
def judge(checkpoint) -> Judge:
    return Judge(AdaptiveModel.from_pretrained(checkpoint).base, load_tokenizer(checkpoint))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_repetition_is_the_share_of_ngrams_that_stood_before():
    assert words("The end. The  end!") == ["The", "end", ".", "The", "end", "!"]
    assert repetition(list("abcdef"), 2) == 0.0
    assert repetition(list("ababab"), 2) == pytest.approx(3 / 5)
    assert repetition(list("aaaa"), 3) == pytest.approx(1 / 2)
    assert repetition(list("ab"), 3) == 0.0


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 4))
def test_repetition_and_distinct_of_one_text_add_up_to_one(text, n):
    rep = repetition(text, n)
    assert 0 <= rep < 1
    assert distinct([text], n) == pytest.approx(1 - rep)
    # A second, equal text adds nothing new.
    assert distinct([text, text], n) == pytest.approx((1 - rep) / 2 if len(text) >= n else 1.0)


def test_the_last_word_of_a_repeated_four_gram_is_not_fresh():
    text = "I saw a dog. I saw a dog. Then"
    stale = "".join(c for c, fresh in zip(text, fresh_characters(text), strict=True) if not fresh)
    # the second "dog" ends "I saw a dog"; the second "." ends "saw a dog ."
    assert stale == "dog."
    assert fresh_characters("a b c a b c").all()
    assert len(fresh_characters("")) == 0


def test_a_judge_scores_the_characters_of_a_text_after_what_stands_before(judge, checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    model = AdaptiveModel.from_pretrained(checkpoint).base
    before, text = "Tom has 3 apples.", " He buys 4 more."
    shown = tokenizer(before, add_special_tokens=False)["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    given_ids = torch.tensor([[tokenizer.bos_token_id, *shown, *ids]])
    labels = given_ids.clone()
    labels[:, : 1 + len(shown)] = -100
    with torch.inference_mode():
        loss = float(model(given_ids, labels=labels).loss)
    scores = judge.characters(before, text)
    assert scores.shape == (len(text),)
    assert scores.sum() == pytest.approx(-loss * len(ids), rel=1e-4)


def test_a_verdict_is_of_the_parts_it_names(judge):
    prompt, text = "Tom has 3 apples.", " He buys 4 more. He buys 4 more. He buys 9 pears."
    found = judge.verdict(prompt, text)
    middle = text.index("4", 12)  # word 7 of 15
    first = judge.characters(prompt, text[:middle])
    second = judge.characters(prompt + text[:middle], text[middle:])
    alone = judge.characters("", text[middle:])
    fresh = fresh_characters(text)
    every = np.concatenate((first, second))
    assert found.likelihood == pytest.approx(every.mean())
    assert found.fresh == pytest.approx(every[fresh].mean())
    assert found.coherence == pytest.approx((second - alone)[fresh[middle:]].mean())
    assert math.isnan(judge.verdict(prompt, "").likelihood)


def test_what_repeats_adds_nothing_to_the_fresh_score():
    """With a judge that finds repeating easy, likelihood rises and the fresh score does not."""

    class Copyist(Judge):
        def __init__(self):
            pass

        def characters(self, before, text):
            whole = before + text
            stale = ~fresh_characters(whole)[len(before) :]
            return np.where(stale, -0.01, -1.0)

    once = "One dog ran to a big tree and sat."
    judge = Copyist()
    loop = " ".join([once] * 6)
    assert judge.verdict("", loop).likelihood > judge.verdict("", once).likelihood + 0.5
    assert judge.verdict("", loop).fresh == pytest.approx(-1.0)


def test_a_text_that_does_not_fit_the_judge_is_named(judge):
    with pytest.raises(DeliberateError, match="does not fit the judge's context of 160"):
        judge.characters("", "seven " * 400)


def test_differences_are_paired_and_their_interval_holds_the_value():
    a = np.arange(40.0)
    found = mean_difference(a + 1, a, seed=0)
    assert (found.value, found.interval.low, found.interval.high) == (1.0, 1.0, 1.0)
    noisy = mean_difference(np.random.default_rng(0).permutation(a), a, seed=0)
    assert noisy.value == pytest.approx(0.0) and noisy.interval.low < 0 < noisy.interval.high
    assert mean_difference([1.0, math.nan], [0.0, 0.0], seed=0).value == 1.0


def test_every_way_continues_the_same_prompts(checkpoint, tmp_path, capsys):
    out = tmp_path / "longtext.json"
    rule = ("long_text.window=4", "long_text.threshold=4", "long_text.strength=30")
    policies = (
        "policies=[{variance:{window:4,threshold:4,strength:30}},"
        "{variance:{action:fork,window:4,threshold:4,tokens:8}},"
        "{rollback:{window:12,every:4,gram:2}}]"
    )
    run_benchmark(["longtext", f"model={checkpoint}", f"out={out}", *rule, *SMALL, policies])
    raw = json.loads(out.read_text())
    assert raw["long_text"]["window"] == 4 and raw["settings"]["judge"] is None
    for mode in ("greedy", "sample"):
        rows = raw["figures"][mode]
        assert list(rows) == [
            "without",
            "watch alone",
            "trigger",
            "variance window=4 threshold=4 strength=30",
            "variance fork window=4 threshold=4 tokens=8",
            "rollback window=12 every=4 gram=2",
            "penalty 1.3",
            "no repeated 3",
        ]
        assert all(row["texts"] == 2 and row["tokens"] == 2 * 32 for row in rows.values())
        assert all(0 <= row[f"rep-{n}"] < 1 for row in rows.values() for n in (2, 3, 4))
        alone = rows["watch alone"]
        assert alone["same_as_without"] == 2 and alone["triggers_per_100"] == 0
        assert alone["rep-4 difference"] == [0.0, 0.0, 0.0]
        own = rows["variance window=4 threshold=4 strength=30"]
        for measure in ("example", "rep-4", "triggers_per_100", "reweighed"):
            assert own[measure] == rows["trigger"][measure]
        forked = rows["variance fork window=4 threshold=4 tokens=8"]
        assert forked["triggers_per_100"] > 0 and forked["reweighed"] == 0
        acted = rows["trigger"]["triggers_per_100"] > 0
        assert acted == (rows["trigger"]["reweighed"] > 0)
    assert raw["figures"]["greedy"]["trigger"]["triggers_per_100"] > 0
    assert "judge: the model itself" in capsys.readouterr().out


def test_documents_are_continued_and_stand_beside_their_continuations(checkpoint, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [{"text": f"Story {n}. " + "The dog has 4 coins. " * 8} for n in range(60)]
    (folder / "stories.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out.json"
    settings = ("source=text", f"data.dir={tmp_path}", "prompt_tokens=12", "modes=[greedy]")
    small = ("prompts=2", "warmup=0", "new_tokens=8", "repetition_penalty=[]")
    run_benchmark(["longtext", f"model={checkpoint}", f"out={out}", *settings, *small])
    documents = json.loads(out.read_text())["figures"]["documents"]
    assert 0 < documents["words"] <= 16


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("modes=[beam]", "modes=beam is not one of greedy, sample"),
        ("modes=[]", "modes is empty"),
        ("prompts=1", "prompts=1 must be a whole number of at least 2"),
        ("clock=sun", "clock=sun is not one of wall, cpu"),
        ("temperature=0", "temperature=0 must be above 0"),
        ("source=novel", "source=novel is unknown: words, text or text/NAME"),
        ("policies=[{probe:{}}]", "policies=probe is not one of rollback, variance"),
        ("policies=[{variance:{size:3}}]", "'variance' has no setting 'size'"),
        ("policies=[variance]", "policies='variance': give {NAME: settings}"),
        ("long_text.size=3", "there is no setting 'long_text.size'"),
        ("long_text.window=0", "long_text window 0 must be"),
        ("new_tokens=5000", "more than the model's context of 160"),
    ],
)
def test_settings_that_cannot_work_are_named(checkpoint, wrong, message):
    with pytest.raises(DeliberateError, match=message) as error:
        run_benchmark(["longtext", f"model={checkpoint}", *SMALL, wrong])
    assert "\n" not in str(error.value)
