"""Arguments of the command lines that need more than a type."""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from ..configuration_dino_detr import DinoDetrConfig
from ..image_processing_dino_detr import LONGEST_EDGE, SHORTEST_EDGE
from .errors import InputError


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves the description as it is written, and says every default that is a number or a word."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing: tuple[object, ...] = (None, False, [], argparse.SUPPRESS)
        if not action.help or action.default in says_nothing:
            return action.help
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else "%(default)s"
        return f"{action.help} ({default})"


def at_least(lowest: int, highest: float = math.inf) -> Callable[[str], int]:
    """Make the `type` of an argument that is a whole number, `lowest` or more, and `highest` or less."""

    def whole_number(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if number < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, got {number}")
        if number > highest:
            raise argparse.ArgumentTypeError(f"must be at most {highest}, got {number}")
        return number

    return whole_number


def number_between(
    lowest: float, highest: float = math.inf, *, without_lowest: bool = False
) -> Callable[[str], float]:
    """Make the `type` of an argument that is a number from `lowest`, or just above it, to `highest`.

    Example:
    ```python
    >>> number_between(0, 1)("0.5")
    0.5

    ```
    """

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not lowest <= value <= highest or (without_lowest and value == lowest):
            least = f"more than {lowest}" if without_lowest else f"at least {lowest}"
            most = "" if math.isinf(highest) else f" and at most {highest}"
            raise argparse.ArgumentTypeError(f"must be {least}{most}, got {text}")
        return value

    return number


def parse_config_override(text: str) -> tuple[str, Any]:
    """Read `FIELD=VALUE`, a field of [`DinoDetrConfig`] and its value as JSON, or as it is if it is no JSON.

    Which values are legal, the configuration itself says.

    Example:
    ```python
    >>> dict(map(parse_config_override, ["box_noise_scale=1.0", "denoising=plain"]))
    {'box_noise_scale': 1.0, 'denoising': 'plain'}

    ```
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected FIELD=VALUE, got {text!r}")
    try:
        check_config_field(name)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def check_config_field(name: str) -> None:
    """See that there is such a field: a configuration takes any keyword, and a misspelt one would train another model.

    Raises:
        InputError: If [`DinoDetrConfig`] has no field of this name; the message says which one may be meant.
    """
    fields = [field.name for field in dataclasses.fields(DinoDetrConfig)]
    if name not in fields:
        close = get_close_matches(name, fields, n=1)
        hint = f"did you mean {close[0]}?" if close else "python -m pydoc hf_dino.DinoDetrConfig lists them"
        raise InputError(f"DinoDetrConfig has no field {name!r}; {hint}")


def parse_image_size(text: str) -> dict[str, int]:
    """Parse the size that an image processor resizes images to.

    Args:
        text (`str`): `SHORTEST,LONGEST` edge, or `SHORTEST` edge alone for a longest edge in the proportion of the
            official implementation, or `HEIGHTxWIDTH` for exactly that size, in pixels.

    Returns:
        `dict[str, int]`: `shortest_edge` and `longest_edge`, or `height` and `width`.

    Raises:
        InputError: If the text is something else, a number is not positive, or the longest edge is the shorter one.

    Example:
    ```python
    >>> parse_image_size("800"), parse_image_size("480x640")
    ({'shortest_edge': 800, 'longest_edge': 1333}, {'height': 480, 'width': 640})

    ```
    """
    try:
        if "x" in text:
            height, width = map(int, text.split("x"))
            size = {"height": height, "width": width}
        else:
            shortest, *longest = map(int, text.replace(",", " ").split())
            (longest_edge,) = longest or [round(shortest * LONGEST_EDGE / SHORTEST_EDGE)]
            size = {"shortest_edge": shortest, "longest_edge": longest_edge}
    except ValueError:
        raise InputError(f"image_size {text}: expected SHORTEST, SHORTEST,LONGEST or HEIGHTxWIDTH") from None
    if min(size.values()) < 1 or size.get("shortest_edge", 0) > size.get("longest_edge", 0):
        raise InputError(f"image_size {text}: must be positive, and LONGEST at least SHORTEST")
    return size
