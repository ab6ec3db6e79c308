"""Tags of several tokens, of which blanks beside them may share a token."""

from __future__ import annotations

import pytest
import torch

from deliberate.reasoning.budget_state import Phase
from deliberate.reasoning.chain_output import ChainTokens
from deliberate.reasoning.marks import begun_in, blank_tokens, marks_of, utf8_ends
from deliberate.reasoning.token_budget import BudgetSettings, ReasoningConstraint
from deliberate.serving.reasoning_text import ReasoningText

# As in GPT-2's and Llama 3's vocabularies, where a blank before "</" and new lines after ">" merge.
TEXTS = ["<", " <", "</", " </", "think", ">", ">\n", ">\n\n", "a", " b", "7", " ", "", "\n"]
END = 12


class Tokenizer:
    """Cuts the longest texts off first."""

    def __len__(self) -> int:
        return len(TEXTS)

    def encode(self, text, **_):
        made = []
        while text:
            token = max((t for t in TEXTS if t and text.startswith(t)), key=len)
            made.append(TEXTS.index(token))
            text = text[len(token) :]
        return made

    def decode(self, tokens, **_):
        return "".join(TEXTS[token] for token in tokens)

    def batch_decode(self, rows, **_):
        return [self.decode(row) for row in rows]

    def convert_ids_to_tokens(self, ids):
        return [TEXTS[token] or None for token in ids]


TOKENIZER = Tokenizer()
MARKS = marks_of(TOKENIZER)
OUTPUTS = ["a b</think>7", "a b </think>7", "a b</think>\n7", "a b </think>\n\n7"]


def test_the_forms_of_a_tag_are_those_with_blanks_beside_it():
    assert [{TEXTS[token] for token in ids} for ids in MARKS.closes] == [
        {"</", " </"},
        {"think"},
        {">", ">\n", ">\n\n"},
    ]
    assert TOKENIZER.decode(MARKS.closing) == "</think>"


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_chain_ends_at_its_tag_however_that_is_written(output):
    marks = begun_in(MARKS, TOKENIZER.encode("a <think>\n"), blank_tokens(TOKENIZER), chat=True)
    assert not marks.opens
    tokens = TOKENIZER.encode(output)
    chain = ChainTokens(marks, tokens)
    assert chain.closed and TOKENIZER.decode(chain.reasoning).strip() == "a b"
    assert TOKENIZER.decode(chain.answer).strip() == "7"
    constraint = ReasoningConstraint(
        BudgetSettings(40, 8), marks, [END], utf8_ends(TOKENIZER), blank_tokens(TOKENIZER)
    )
    constraint.follow(tokens)
    assert constraint.phase is Phase.ANSWER and constraint.reasoning_tokens == 2
    text = ReasoningText(TOKENIZER, marks, apart=True)
    said = {True: "", False: ""}
    for token in tokens:
        piece = text.push(token)
        said[text.is_reasoning] += piece
    piece = text.finish()
    said[text.is_reasoning] += piece
    assert (said[True].strip(), said[False]) == ("a b", "7")


def test_reasoning_that_a_prompt_has_closed_in_another_form_is_not_begun():
    prompt = TOKENIZER.encode("a <think>\n\n </think>\n\n")
    assert begun_in(MARKS, prompt, blank_tokens(TOKENIZER), chat=True).opens


def test_no_opening_tag_is_completed_in_any_form_where_there_is_no_room():
    constraint = ReasoningConstraint(BudgetSettings(40, 0), MARKS, [END])
    for token in TOKENIZER.encode(" <think"):
        constraint.advance(token)
    scores = constraint.mask(torch.zeros(len(TEXTS)))
    closed = [TEXTS.index(text) for text in (">", ">\n", ">\n\n")]
    assert all(scores[token] == float("-inf") for token in closed)


def test_a_mask_for_several_tokens_leaves_other_forms_to_the_constraint():
    marks = begun_in(MARKS, TOKENIZER.encode("<think>"), (), chat=True)
    constraint = ReasoningConstraint(BudgetSettings(40, 30), marks, [END])
    left = {TEXTS[token] for token in constraint.steady().rules.until}
    assert left == {" </", ">\n", ">\n\n"}
    constraint.advance(TEXTS.index(" </"))
    assert constraint.steady().matched == 1
