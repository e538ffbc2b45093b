"""The command line `hf-dino`, also `python -m hf_dino`.

Each command is a function that declares its options and calls the library. To keep `--help` fast, modules of this
package import only the standard library, typer and each other; a command imports everything else when it runs.
"""

from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from ..utils.errors import run_cli
from . import data, evaluate, predict, train
from .options import Command, make_app


app = make_app("Train, evaluate and run DINO object detectors.")
app.command(cls=Command)(train.train)
app.command(cls=Command)(evaluate.evaluate)
app.command(cls=Command)(predict.predict)
app.add_typer(data.app, name="data")


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
