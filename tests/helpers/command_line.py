"""The command `hf-dino` in this process."""

import re
from collections.abc import Sequence
from pathlib import Path

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


def documented_keys() -> dict[str, set[str]]:
    """Return the names in the table of docs/cli.md, which has the keys that each command prints with `--json`."""
    page = Path(__file__).parents[2] / "docs" / "cli.md"
    rows = re.findall(r"^\| `([a-z ]+)` \| (.*) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", text)) for name, text in rows}


def train_arguments(arguments: Sequence[object]) -> FineTuningArguments:
    """Return what `hf-dino train` makes of a command line, without training."""
    made: list[FineTuningArguments] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_dino.cli.train.run", made.append)
        assert hf_dino(["train", *arguments]) == 0
    return made[0]
