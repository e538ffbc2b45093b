"""The command line `hf-dino`, also `python -m hf_dino`.

Each command is a function that declares its options and calls the library. To keep `--help` fast, modules of this
package import nothing heavy (no torch, no transformers); a command imports what it needs when it runs.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ..utils.errors import InputError, run_cli
from . import checkpoints, compare, data, demo, evaluate, export, predict, push, train
from .options import Command, Facts, JsonOption, log_to_terminal, make_app


app = make_app("Train, evaluate and run DINO object detectors.")
app.command(cls=Command)(train.train)
app.command(cls=Command)(compare.compare)
app.command(cls=Command)(evaluate.evaluate)
app.command(cls=Command)(predict.predict)
app.command(cls=Command)(export.export)
app.command(cls=Command)(export.verify)
app.command(cls=Command)(export.benchmark)
app.command(cls=Command)(push.push)
app.command(cls=Command)(demo.demo)
app.command(cls=Command)(checkpoints.checkpoints)
app.command(cls=Command)(checkpoints.info)
app.add_typer(data.app, name="data")


@app.command(cls=Command)
def convert(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Checkpoint file, its URL, or a name that `hf-dino checkpoints` lists; with --to, a model directory "
            "or Hub id.",
        ),
    ],
    output_dir: Annotated[
        Path | None, typer.Option(metavar="DIRECTORY", help="Directory to write the converted model to.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Write a model as a checkpoint of another code base: official, detrex, mmdet, dab_deformable "
            "(DAB-DETR's) or dn_deformable (DN-DETR's).",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Checkpoint to write with --to.")] = None,
    settings: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Settings (.py, .json or .yaml) that the checkpoint was trained with, if it does not contain them.",
        ),
    ] = None,
    positional_encoding: Annotated[
        str | None,
        typer.Option(
            metavar="TEMPERATURE,OFFSET",
            help="Position embedding of a detrex checkpoint, which does not contain it: 10000,-0.5 or 20,0.",
        ),
    ] = None,
    coco80: Annotated[
        bool, typer.Option("--coco80", help="Keep the 80 classes of COCO and drop the 11 unused category ids.")
    ] = False,
    keep_classes: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Keep only these classes, with commas between them, in this order."),
    ] = None,
    num_labels: Annotated[
        int | None, typer.Option(metavar="NUMBER", help="Replace the class heads by new ones for so many classes.")
    ] = None,
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
    json: JsonOption = False,
) -> Facts:
    """Convert a checkpoint of DINO, DAB-Deformable-DETR or DN-Deformable-DETR to a model directory, or back.

    Checkpoints are read and written in the formats of the official implementation, detrex and mmdetection, DAB-DETR
    and DN-DETR.

    The format is told by the keys in the file. The directory contains the model, its image processor, a model card
    and the code of the model. With --to and --output, a model is written as a checkpoint of another code base.
    """
    log_to_terminal(logging.INFO)
    if (to is None) == (output_dir is None) or (to is None) != (output is None):
        raise InputError("give --output_dir to convert a checkpoint, or --to and --output to write one from a model")
    options: dict[str, Any] = {
        "use_ema": use_ema,
        "trust_pickle": trust_pickle,
        "overwrite": overwrite_output_dir,
        "settings": settings,
        "positional_encoding": None if positional_encoding is None else parse_positional_encoding(positional_encoding),
        "keep_classes": () if keep_classes is None else [name.strip() for name in keep_classes.split(",")],
        "coco80": coco80,
        "num_labels": num_labels,
    }

    from ..conversion import (
        check_class_options,
        check_output,
        convert_checkpoint,
        export_checkpoint,
        fetch_checkpoint,
    )

    if output_dir is not None:
        check_output(output_dir.resolve(), overwrite_output_dir)  # before anything is downloaded
        check_class_options(options["keep_classes"], coco80, num_labels)
        path, known = fetch_checkpoint(checkpoint)
        convert_checkpoint(path, output_dir, known=known, **options)
    elif unread := [f"--{name}" for name, value in options.items() if value not in (None, False, ())]:
        raise InputError(
            f"{', '.join(unread).replace('overwrite', 'overwrite_output_dir')}: not read with --to; remove it"
        )
    elif to is not None and output is not None:
        export_checkpoint(checkpoint, output, to)
    written = output_dir or output or Path()
    files = {path.name: path.stat().st_size for path in (written, *written.glob("*")) if path.is_file()}
    return Facts({"source": checkpoint, "output": written, "format": to or "transformers", "files": files})


def parse_positional_encoding(text: str) -> tuple[float, float]:
    """Parse the value of --positional_encoding.

    Example:

    ```python
    >>> parse_positional_encoding("10000,-0.5")
    (10000.0, -0.5)

    ```
    """
    try:
        temperature, offset = map(float, text.split(","))
        if not math.isfinite(temperature + offset):
            raise ValueError
    except ValueError:
        raise InputError(f"--positional_encoding {text}: expected TEMPERATURE,OFFSET, such as 10000,-0.5") from None
    return temperature, offset


@app.command(cls=Command)
def kernels(
    build: Annotated[
        bool, typer.Option("--build", help="Compile kernels that are not compiled yet, and load them.")
    ] = False,
    json: JsonOption = False,
) -> Facts:
    """Report which compiled kernels this machine uses, and why.

    The exit status is 1 if a kernel is missing that is required or was to be compiled.
    """
    from ..kernels.report import report_kernels

    facts: dict[str, Any] = {}
    try:
        status = report_kernels(build, facts)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="HF_DINO_KERNELS") from None
    return Facts(facts, status)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit status.

    Args:
        arguments (`Sequence[str]`, *optional*): Defaults to those of the process.
    """
    run_cli(lambda: app(arguments, prog_name="hf-dino"))
