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
        int | None, typer.Option(help="The exit after this layer; the shallowest by default.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="GGUF: matrices in f32, f16 (default), bf16 or q8_0.")
    ] = None,
    pre: Annotated[
        str | None, typer.Option(help="GGUF: llama.cpp's name of the tokenizer's way to cut text.")
    ] = None,
) -> None:
    """Write the layers up to an exit and its head as a model: transformers' assistant_model,
    llama.cpp's draft model."""
    from transformers.utils import logging

    from deliberate.export.draft import export_draft

    logging.disable_progress_bar()
    made = export_draft(model, out, layer=layer, dtype=dtype, pre=pre)
    print(
        f"{made.path}: the exit after layer {made.layer} of {made.layers}, {made.megabytes:.1f} MB"
    )


@export.command()
def onnx(
    model: Annotated[str, typer.Argument(help="Bundled model, folder, GGUF file or hub name.")],
    out: Annotated[Path, typer.Option(help="A new file that ends in .onnx.")],
) -> None:
    """Write one ONNX graph, without KV cache: logits of every exit and of the last layer."""
    from transformers.utils import logging

    from deliberate.export.onnx_graph import export_onnx

    logging.disable_progress_bar()
    made = export_onnx(model, out)
    print(
        f"{made.path}: {', '.join(made.outputs)}, {made.megabytes:.1f} MB; ONNX Runtime is within "
        f"{made.apart:.1g} of torch (in units of the logits' spread)"
    )
