"""Command-line options: their spelling, and those that several commands have."""

from typing import Any

import typer
from typer.core import TyperCommand


class Command(TyperCommand):
    """A command whose options are spelled with underscores, as in transformers; dashes are accepted too."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for parameter in self.params:
            parameter.opts = [_underscored(name) for name in parameter.opts]
            parameter.secondary_opts = [_underscored(name) for name in parameter.secondary_opts]


def _underscored(option: str) -> str:
    """Replace the dashes in the name of an option, but not the leading ones."""
    return option[:2] + option[2:].replace("-", "_")


def make_app(help: str) -> typer.Typer:
    """Make a group of commands. Options and commands may be written with dashes or underscores."""
    return typer.Typer(
        help=help,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={
            "help_option_names": ["--help", "-h"],
            "token_normalize_func": lambda token: token.replace("-", "_"),
        },
    )
