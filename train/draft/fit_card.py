"""The card of a folder that `deliberate fit` wrote, from its record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deliberate.utils.files import write_text

CARD_NAME = "README.md"


def write_card(folder: Path, record: Mapping[str, Any]) -> Path:
    """Writes `README.md`: what was fitted, on what, and what was measured on held-out text."""
    tokens, texts = record["tokens"], record["texts"]
    lines = [
        f"# Exits and drafts for {Path(record['model']).name}",
        "",
        f"Written by `deliberate fit` on {record['date']}, from the model's own text: "
        f"{tokens['answers']:,} answer tokens of {texts['fitted']} texts; {texts['held_out']} "
        f"other texts ({tokens['held_out']:,} answer tokens) give the figures below. The base "
        "model's weights are not in this folder. In exact mode every draft is verified by them, "
        "so the output is the base model's own; with other weights fewer drafts may be accepted.",
        "",
        "| exit after layer | agrees with full depth | threshold | tokens that exit |",
        "|---|---|---|---|",
    ]
    for one in record["exits"]:
        threshold = "none" if one["threshold"] is None else f"{one['threshold']:.3g}"
        lines.append(
            f"| {one['layer']} | {one['agreement']:.1%} | {threshold} | {one['exits']:.1%} |"
        )
    for one in record["exit_vocabulary"]:
        paying = "exits " + ", ".join(map(str, one["used"])) if one["used"] else "no exit pays"
        lines.append(
            f"{'' if one is not record['exit_vocabulary'][0] else chr(10)}"
            f"- exits over {one['size'] or 'all'} tokens: {one['read_seconds'] * 1e3:.2f} ms a "
            f"reading, {one['seconds_per_token'] * 1e3:.2f} ms a token at these thresholds "
            f"({paying}), {one['dense_seconds'] * 1e3:.2f} at full depth"
        )
    drafted = record["kept_draft"] or record
    if record["kept_draft"] is not None:
        lines += [
            "",
            f"The draft layer is that of {record['model']}, fitted on {drafted['date']} to "
            f"{drafted['tokens']['answers']:,} answer tokens of {drafted['texts']['fitted']} "
            f"texts; {drafted['texts']['held_out']} other texts give its figures.",
        ]
    if drafted["chosen"] is not None:
        lines += [
            "",
            "| draft vocabulary | ms a draft | all of the first 1, 2, ... drafts accepted | drafts "
            "| ms a token |",
            "|---|---|---|---|---|",
        ]
        for one in drafted["draft_vocabulary"]:
            mark = " (taken)" if one["size"] == drafted["chosen"]["size"] else ""
            survives = " ".join(f"{share:.2f}" for share in one["survives"])
            lines.append(
                f"| {one['size']}{mark} | {one['draft_seconds'] * 1e3:.2f} | {survives} | "
                f"{one['drafts']} | {one['seconds_per_token'] * 1e3:.2f} |"
            )
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in record["seconds"].items())
    lines += ["", f"Time: {parts}. Settings and all figures: `fit.json`.", ""]
    path = folder / CARD_NAME
    write_text(path, "\n".join(lines))
    return path
