"""The conditions of a certificate: what its losses depend on besides model, policy and problems.

A certificate states them by name, with one hash. A request states its own, and what differs is an
error that names it. Certificates of earlier releases state fewer: what follows from how those
releases calibrated is filled in (`ASSUMED`), and what is unknown is not compared.

Names: ``task``, ``prompt``, ``prompt_sha256`` and ``grading`` are known to evaluation only;
``prompt_ends`` are the token ids around every question. All others are of decoding:
``max_new_tokens``, ``dtype``, ``kv_mode``, ``kv_storage``, ``max_pending``, ``schedule``, ``gate``,
``sampling``, ``constraint``, ``executor`` and ``storage``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from deliberate.utils.hashing import json_sha256

LIMIT, PROMPT_ENDS, FORM = "max_new_tokens", "prompt_ends", "prompt"
# How every release before `conditions_sha256` calibrated, where the certificate does not say.
ASSUMED: Mapping[str, Any] = {
    "kv_mode": "defer",
    "kv_storage": "native",
    "sampling": "greedy",
    "constraint": "none",
    "storage": "native",
    "schedule": {},  # what differs from the default
}
# A certificate that does not state these binds less than it should: it is said once.
EXPECTED = (LIMIT,)

_REMEDIES = {
    LIMIT: "give max_new_tokens={stated} or fewer",
    "sampling": "pass do_sample=False and no logits processors",
    "constraint": "leave the constraint out",
    "storage": "load the model with weights={stated!r}",
    "dtype": "load the model with dtype={stated!r}",
}


def conditions_sha256(conditions: Mapping[str, Any]) -> str:
    """The one hash of all conditions."""
    return json_sha256(dict(conditions))


def unstated(conditions: Mapping[str, Any]) -> list[str]:
    """Conditions that a certificate should state and does not."""
    return [name for name in EXPECTED if conditions.get(name) is None]


def problem(conditions: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """One line on the first condition that a request does not meet; None where it meets all.

    Args:
        conditions: of the certificate.
        found: of the request, by the same names; what the certificate does not know is passed over.
    """
    for name, value in found.items():
        stated = conditions.get(name, ASSUMED.get(name))
        if stated is None or stated == value or (name == LIMIT and value <= stated):
            continue
        remedy = _REMEDIES.get(name, "use {name}={stated!r}").format(name=name, stated=stated)
        if name == "executor":
            kind, *engine = str(stated).split()
            how = [f"executor={kind!r}", *(f"engine={one!r}" for one in engine if one != "kernels")]
            remedy = f"load the model with {' and '.join(how)}"
        return (
            f"the certificate is for {name}={stated!r}, not {value!r}: {remedy}, calibrate again, "
            "or use fidelity 'exact'"
        )
    return None


def prompt_problem(conditions: Mapping[str, Any], prompts: Iterable[Sequence[int]]) -> str | None:
    """One line on the first prompt that has not the certified form; None where all have it.

    Args:
        prompts: token ids of each, padding removed.
    """
    ends = conditions.get(PROMPT_ENDS)
    if ends is None:
        return None
    first, last = ends
    for row, prompt in enumerate(prompts):
        kept = len(prompt) >= len(first) + len(last)
        kept = kept and list(prompt[: len(first)]) == first
        if not kept or list(prompt[len(prompt) - len(last) :]) != last:
            return (
                f"the certificate is for prompts of the form {conditions.get(FORM)!r}, and prompt "
                f"{row} is of another (token ids {_some(first)} and {_some(last)} are around a "
                "question): put the question so, calibrate again, or use fidelity 'exact'"
            )
    return None


def _some(ids: Sequence[int]) -> str:
    return f"[{', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}]"


def prompt_ends(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Token ids that all prompts begin with, and those that they end with, without overlap."""
    shortest = min(map(len, prompts))
    first = _common(prompts, range(shortest))
    last = _common(prompts, range(-1, -1 - shortest + first, -1))
    prompt = list(prompts[0])
    return [prompt[:first], prompt[len(prompt) - last :]]


def _common(prompts: Sequence[Sequence[int]], places: range) -> int:
    """How many places from the first on hold the same id in all prompts."""
    for count, place in enumerate(places):
        if any(one[place] != other[place] for one, other in pairwise(prompts)):
            return count
    return len(places)
