"""The options of `deliberate generate` that say where exact mode's drafts come from, and how keys
and values are kept."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from deliberate.utils.errors import DeliberateError

DraftsOption = Annotated[
    str | None,
    typer.Option(help="exact: the model drafts itself: int4, int8, bf16, or layers: 1,2,5."),
]
DraftTokensOption = Annotated[
    int | None, typer.Option(help="exact: drafts of a pass by --drafts or the draft layer at most.")
]
LookupTokensOption = Annotated[
    int | None, typer.Option(help="exact: drafts of a pass that are looked up in the text at most.")
]
KvStorageOption = Annotated[str | None, typer.Option(help="Keys and values: native or int8.")]


def drafting_arguments(
    drafts: str | None, draft_tokens: int | None, lookup_tokens: int | None, kv_storage: str | None
) -> dict[str, Any]:
    """Arguments of `generate`, of the options that are given.

    Raises:
        DeliberateError: `drafts` holds a number that is none.
    """
    made: dict[str, Any] = {}
    if drafts is not None:
        made["drafts"] = _layers(drafts) if drafts[:1].isdigit() else drafts
    given = {
        "draft_tokens": draft_tokens,
        "lookup_tokens": lookup_tokens,
        "kv_storage": kv_storage,
    }
    return made | {name: value for name, value in given.items() if value is not None}


def _layers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise DeliberateError(f"--drafts {text}: give int4, int8, bf16, or layers such as 1,2,5")
    return [int(part) for part in parts]
