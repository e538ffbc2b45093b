"""`hf-dino kernels`: report which compiled kernels are used on this machine, and compile them."""

from typing import Annotated

import typer


def kernels(
    build: Annotated[
        bool, typer.Option("--build", help="Compile and load kernels that are not compiled yet.")
    ] = False,
) -> None:
    """Report which compiled kernels are used on this machine and why.

    The exit status is 1 if a kernel is missing that is required or was to be compiled.
    """
    from ..kernels.__main__ import report_kernels

    try:
        status = report_kernels(build)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="HF_DINO_KERNELS") from None
    raise typer.Exit(status)
