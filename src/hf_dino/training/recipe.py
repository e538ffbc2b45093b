"""Recipes: the options of a run as a file, which `--recipe FILE` puts below those of the command line."""

import argparse
import copy
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from ..utils.errors import InputError
from ..utils.io import read_text


def parse_args_with_recipe(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line and the recipe that it names.

    A recipe is a YAML file with one entry per option: its long name, with dashes or underscores, and its value as the
    command line would have it. A list is several words, and a mapping several of the form `KEY=VALUE`; `true` and
    `false` switch a flag on and off. What the command line says itself wins.

    Args:
        parser (`argparse.ArgumentParser`): Has the options, `--recipe` among them.
        words (`Sequence[str]`): The command line.

    Returns:
        `argparse.Namespace`: As of `parser.parse_args`.

    Raises:
        InputError: If the recipe cannot be read, names an unknown option, or gives a value that an option refuses.
            What is wrong with the command line itself ends the program as `argparse` does.
    """
    early = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    early.add_argument("--recipe", type=Path)
    path = early.parse_known_args(words)[0].recipe
    recipe = [] if path is None else list(_recipe_words(parser, path))
    return parser.parse_args([*recipe, *words])


def _recipe_words(parser: argparse.ArgumentParser, path: Path) -> Iterator[str]:
    """The recipe as a command line, each option checked by itself so that an error is known to be the recipe's."""
    known = {option: action for action in parser._actions for option in action.option_strings}
    options = [option for option in known if option.startswith("--") and option not in ("--help", "--recipe")]
    for name, value in _read_recipe(path).items():
        option = f"--{name}"
        if option not in options:
            close = get_close_matches(option, options, n=1)
            hint = f"did you mean {close[0][2:]}?" if close else "--help names the options"
            raise InputError(f"{path}: there is no option {name}; {hint}")
        try:
            words = _words(known[option], option, value)
            _check(known[option], words)
        except (argparse.ArgumentError, ValueError) as error:
            raise InputError(f"{path}: {name}: {getattr(error, 'message', error)}") from None
        yield from words


def _read_recipe(path: Path) -> dict[str, Any]:
    """Names of options, with dashes, and values as YAML has them."""
    text = read_text(path)
    try:
        recipe, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(recipe, dict):
        raise InputError(f"{path}: must hold lines such as `epochs: 12`, got {type(recipe).__name__}")
    # YAML itself lets the last of two entries win
    names = Counter(key.value.replace("_", "-") for key, _ in tree.value)
    if doubled := [name for name, count in names.items() if count > 1]:
        raise InputError(f"{path}: {', '.join(doubled)} is there more than once")
    return {str(name).replace("_", "-"): value for name, value in recipe.items()}


def _words(action: argparse.Action, option: str, value: Any) -> list[str]:
    """What one would type for an entry of a recipe."""
    is_switch = action.nargs == 0
    if value is None:
        raise ValueError("has no value; leave the line out for the default")
    if is_switch and not isinstance(value, bool):
        raise ValueError(f"is switched on by true and off by false, got {value!r}")
    if is_switch:
        opposite = f"--no-{option[2:]}"
        return [option] if value else [word for word in action.option_strings if word == opposite]
    if isinstance(value, bool):
        raise ValueError("got true or false, which is how YAML reads yes and no too; put a word in quotes, as in 'no'")
    if isinstance(value, dict):
        return [option, *(f"{key}={_word(each)}" for key, each in value.items())]
    if isinstance(value, list):
        return [option, *map(_word, value)]
    return [f"{option}={_word(value)}"]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _check(action: argparse.Action, words: list[str]) -> None:
    """Let argparse look at the words of one option as it will later, but say what is wrong instead of ending."""
    alone = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    alone._add_action(copy.copy(action))
    _, left_over = alone.parse_known_args(words)
    if left_over:
        raise ValueError(f"takes one value, got {len(words) - 1}")
