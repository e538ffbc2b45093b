"""The command line `hf-dino`, also `python -m hf_dino`.

Each command is a function in a module of this package, which declares its options and calls the library. To keep
`--help` fast, these modules import only the standard library, typer and each other; a command imports everything else
inside its function.
"""

from collections.abc import Sequence
from typing import NoReturn

from ..utils.errors import run_cli
from . import kernels, train
from .options import Command, make_app


app = make_app("Train, evaluate and run DINO object detectors.")
app.command(cls=Command)(kernels.kernels)
app.command(cls=train.TrainCommand)(train.train)
app.callback()(lambda: None)  # a group of commands, even while there is one only


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit status.

    Args:
        arguments (`Sequence[str]`, *optional*): Replace those of the process.
    """
    run_cli(lambda: app(arguments))
