"""Logits processors: what each kind's scores depend on, and whether it may keep state.

transformers' own classes are known by name. Any other class may keep state from call to call, e.g.
count them, unless it says ``stateless = True``: its scores are then a function of ids, scores and
the row's index alone.
"""

from __future__ import annotations

import pickle
from typing import Any

_OF_TRANSFORMERS = "transformers.generation.logits_process"
# transformers' own processors by what a row's result depends on. All others may depend on the index
# of a row, so they are called with every sequence of the batch at its own index.
OWN_SCORES = frozenset(
    {
        *("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TopHLogitsWarper"),
        *("MinPLogitsWarper", "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper"),
        *("InfNanRemoveLogitsProcessor", "LogitNormalization", "SuppressTokensLogitsProcessor"),
    }
)
OWN_IDS = frozenset(
    {
        *("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor"),
        *("NoRepeatNGramLogitsProcessor", "SequenceBiasLogitsProcessor"),
        *("NoBadWordsLogitsProcessor", "ForcedBOSTokenLogitsProcessor"),
        *("ForcedEOSTokenLogitsProcessor", "ExponentialDecayLengthPenalty"),
        *("SuppressTokensAtBeginLogitsProcessor", "WatermarkLogitsProcessor"),
        *("RepetitionPenaltyLogitsProcessor", "PrefixConstrainedLogitsProcessor"),
    }
)
# Stateless too, but made for the ids of an encoder, for pairs of rows or for one model.
_OTHERS = frozenset(
    {
        *("EncoderRepetitionPenaltyLogitsProcessor", "EncoderNoRepeatNGramLogitsProcessor"),
        *("ClassifierFreeGuidanceLogitsProcessor", "AlternatingCodebooksLogitsProcessor"),
        *("BarkEosPrioritizerLogitsProcessor", "WhisperTimeStampLogitsProcessor"),
    }
)
# They count their calls or keep a cache of their own, which a rejected draft would change.
_STATEFUL = frozenset(
    {"SynthIDTextWatermarkLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor"}
)


def among(processor: Any, names: frozenset[str]) -> bool:
    """Whether it is one of these classes of transformers itself, not one derived from it."""
    kind = type(processor)
    return kind.__name__ in names and kind.__module__ == _OF_TRANSFORMERS


def keeps_state(processor: Any) -> bool:
    """Whether it is one of transformers' own that keep state from token to token."""
    return among(processor, _STATEFUL)


def may_keep_state(processor: Any) -> bool:
    """Whether its scores may depend on earlier calls: a class that is not known to be stateless."""
    if getattr(processor, "stateless", False) is True:
        return False
    return not any(among(processor, names) for names in (OWN_SCORES, OWN_IDS, _OTHERS))


def state_of(processor: Any) -> bytes | str:
    """What it holds, to be compared before and after a call: attributes and closed-over values."""
    cells = getattr(processor, "__closure__", None) or ()
    held = (getattr(processor, "__dict__", {}), [cell.cell_contents for cell in cells])
    try:
        return pickle.dumps(held)
    except Exception:  # what it holds cannot be copied
        return repr(held)
