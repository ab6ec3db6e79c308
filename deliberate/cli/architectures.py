"""`deliberate architectures`: which architectures of transformers can be wrapped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def architectures(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Model types of transformers; all by default.", metavar="[NAME...]"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the list as a page here.")] = None,
) -> None:
    """Try which architectures of transformers can be wrapped, each with a tiny random model."""
    from rich.console import Console
    from rich.progress import track

    from deliberate.eval import architectures as survey
    from deliberate.utils.files import write_text

    console = Console(highlight=False)
    bar = Console(stderr=True)
    chosen = names or survey.names()
    verdicts = [survey.verdict(name) for name in track(chosen, "probing", console=bar)]
    for one in verdicts:
        mark = {True: "runs", False: "refused", None: "not tried"}[one.runs]
        console.print(f"{one.name:24}{mark:10} {one.detail}", markup=False, soft_wrap=True)
    if out is not None:
        write_text(out, survey.page(verdicts))
