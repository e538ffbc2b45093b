"""The command line `hf-dino`, also `python -m hf_dino`.

Each command is a function that declares its options and calls the library. To keep `--help` fast, modules of this
package import nothing heavy (no torch, no transformers); a command imports what it needs when it runs.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ..utils.errors import run_cli
from . import checkpoints, data, evaluate, export, predict, train
from .options import Command, log_to_terminal, make_app


app = make_app("Train, evaluate and run DINO object detectors.")
app.command(cls=Command)(train.train)
app.command(cls=Command)(evaluate.evaluate)
app.command(cls=Command)(predict.predict)
app.command(cls=Command)(export.export)
app.command(cls=Command)(checkpoints.checkpoints)
app.command(cls=Command)(checkpoints.info)
app.add_typer(data.app, name="data")


@app.command(cls=Command)
def convert(
    checkpoint: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Checkpoint file, its URL, or a name that `hf-dino checkpoints` lists; downloaded once.",
        ),
    ],
    output_dir: Annotated[Path, typer.Option(metavar="DIRECTORY", help="Directory to write the model to.")],
    use_ema: Annotated[
        bool, typer.Option("--use_ema", help="Convert the EMA weights of the checkpoint instead of the trained ones.")
    ] = False,
    overwrite_output_dir: Annotated[
        bool, typer.Option("--overwrite_output_dir", help="Replace an --output_dir that is not empty.")
    ] = False,
    trust_pickle: Annotated[
        bool,
        typer.Option(
            "--trust_pickle",
            help="Unpickle arbitrary Python objects in the checkpoint. This RUNS CODE FROM THE FILE.",
        ),
    ] = False,
) -> None:
    """Convert a checkpoint of the official implementation to a model directory.

    The directory contains the model, its image processor, a model card and the code of the model.
    """
    log_to_terminal(logging.INFO)

    from ..conversion import convert_checkpoint
    from ..conversion.convert import check_output
    from ..conversion.known import fetch_checkpoint

    check_output(output_dir.resolve(), overwrite_output_dir)
    path, known = fetch_checkpoint(checkpoint)
    convert_checkpoint(
        path, output_dir, known=known, use_ema=use_ema, trust_pickle=trust_pickle, overwrite=overwrite_output_dir
    )


@app.command(cls=Command)
def kernels(
    build: Annotated[
        bool, typer.Option("--build", help="Compile kernels that are not compiled yet, and load them.")
    ] = False,
) -> None:
    """Report which compiled kernels this machine uses, and why.

    The exit status is 1 if a kernel is missing that is required or was to be compiled.
    """
    from ..kernels.report import report_kernels

    try:
        status = report_kernels(build)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="HF_DINO_KERNELS") from None
    raise typer.Exit(status)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit status.

    Args:
        arguments (`Sequence[str]`, *optional*): Defaults to those of the process.
    """
    run_cli(lambda: app(arguments, prog_name="hf-dino"))
