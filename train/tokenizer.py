"""A small byte-level BPE tokenizer with single digits, for models trained from scratch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, marks: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`; every digit is a token of its own, and a text begins with `BOS`.

    Any text can be encoded, since the 256 bytes are in the vocabulary.

    Args:
        vocab_size: `marks` included.
        marks: texts that are always one token, and that decoding keeps, such as think tags.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(marks),
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        add_bos_token=True,  # models are trained on texts that begin with it
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )
