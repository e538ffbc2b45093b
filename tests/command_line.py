"""The command `hf-dino` in this process."""

from collections.abc import Sequence

from hf_dino.cli import app


def hf_dino(arguments: Sequence[object]) -> int:
    """Return the exit status; errors that the command prints as one line are raised."""
    try:
        app([str(argument) for argument in arguments], prog_name="hf-dino")
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError("a command ends the process")
