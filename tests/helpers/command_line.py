"""The command `hf-dino` in this process."""

from collections.abc import Sequence

import pytest

from hf_dino.cli import app, main
from hf_dino.training_arguments import FineTuningArguments


def hf_dino(arguments: Sequence[object]) -> int:
    """Return the exit status; errors that the command prints as one line are raised."""
    try:
        app([str(argument) for argument in arguments], prog_name="hf-dino")
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError("a command ends the process")


def exit_status(arguments: Sequence[object]) -> int:
    """Return the exit status of the process, which prints its error."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def train_arguments(arguments: Sequence[object]) -> FineTuningArguments:
    """Return what `hf-dino train` makes of a command line, without training."""
    made: list[FineTuningArguments] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_dino.cli.train.run", made.append)
        assert hf_dino(["train", *arguments]) == 0
    return made[0]
