"""`deliberate export`: parts of an adaptive model for other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

export = typer.Typer(
    help="Write parts of an adaptive model for other engines.",
    rich_markup_mode=None,
)


@export.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@export.command()
def draft(
    model: Annotated[str, typer.Argument(help="Bundled model, folder, GGUF file or hub name.")],
    out: Annotated[Path, typer.Option(help="A new folder, or a file that ends in .gguf.")],
    layer: Annotated[
        int | None,
        typer.Option(help="The exit after it (default: the first); the last: the whole."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="GGUF: matrices in f32, f16 (default), bf16 or q8_0.")
    ] = None,
    pre: Annotated[
        str | None, typer.Option(help="GGUF: llama.cpp's name of the tokenizer's way to cut text.")
    ] = None,
) -> None:
    """Write an exit as a draft model for transformers or llama.cpp."""
    from transformers.utils import logging

    from deliberate.export.draft import export_draft

    logging.disable_progress_bar()
    made = export_draft(model, out, layer=layer, dtype=dtype, pre=pre)
    whole = made.layer == made.layers
    what = (
        f"all {made.layers} layers"
        if whole
        else f"the exit after layer {made.layer} of {made.layers}"
    )
    print(f"{made.path}: {what}, {made.megabytes:.1f} MB")


@export.command()
def speculator(
    model: Annotated[
        str, typer.Argument(help="Bundled model, folder or hub name; it has a draft layer.")
    ],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    verifier: Annotated[
        str, typer.Option(help="Hub name or folder of the whole model, as vLLM loads it.")
    ],
) -> None:
    """Write the draft layer in EAGLE-3's layout, for vLLM (format of `speculators`)."""
    from transformers.utils import logging

    from deliberate.export.speculator import export_speculator

    logging.disable_progress_bar()
    made = export_speculator(model, out, verifier=verifier)
    print(
        f"{made.path}: drafts of {made.vocabulary} tokens for {verifier}, {made.megabytes:.1f} MB; "
        f"within {made.apart:.1g} of the draft layer (in units of its outputs' spread)"
    )


@export.command()
def onnx(
    model: Annotated[str, typer.Argument(help="Bundled model, folder, GGUF file or hub name.")],
    out: Annotated[Path, typer.Option(help="A new file that ends in .onnx.")],
    past: Annotated[
        bool, typer.Option("--past", help="Keys and values as inputs and outputs, for decoding.")
    ] = False,
) -> None:
    """Write the logits of all exits as one ONNX graph."""
    from transformers.utils import logging

    from deliberate.export.onnx_graph import export_onnx

    logging.disable_progress_bar()
    made = export_onnx(model, out, past=past)
    cached = ", keys and values of earlier tokens as inputs" if past else ""
    print(
        f"{made.path}: {', '.join(made.outputs)}{cached}, {made.megabytes:.1f} MB; ONNX Runtime is "
        f"within {made.apart:.1g} of torch (in units of the logits' spread)"
    )
