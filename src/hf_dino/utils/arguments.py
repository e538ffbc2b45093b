"""Values of command-line options that need more than a type."""

from collections.abc import Sequence

from ..image_processing_dino_detr import LONGEST_EDGE, SHORTEST_EDGE
from .errors import InputError


def parse_image_size(words: Sequence[str]) -> dict[str, int]:
    """Parse the size that an image processor resizes images to.
=======
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


def config_field(text: str) -> tuple[str, Any]:
    """Read `FIELD=VALUE`, a field of [`DinoDetrConfig`] and its value as JSON, or as it is if it is no JSON.

    Which values are legal, the configuration itself says.

    Example:

    ```python
    >>> dict(map(config_field, ["box_noise_scale=1.0", "denoising=plain"]))
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


def parse_size(words: Sequence[str]) -> dict[str, int]:
    """Read the size that an image processor is to give to images.
>>>>>>> r-conv

    Args:
        words (`Sequence[str]`): Values of `--image_size`, in pixels: the shortest and the longest edge, or the shortest
            edge alone for a longest edge in the proportion of the official implementation, or `HEIGHTxWIDTH` for
            exactly that size.

    Returns:
        `dict[str, int]`: `shortest_edge` and `longest_edge`, or `height` and `width`.

    Raises:
        InputError: If the values are something else, not positive, or in the wrong order.

    Example:
    ```python
    >>> parse_image_size(["800"]), parse_image_size(["480x640"])
    ({'shortest_edge': 800, 'longest_edge': 1333}, {'height': 480, 'width': 640})

    ```
    """
    given = " ".join(words)
    try:
        if "x" in given:
            height, width = map(int, given.split("x"))
            size = {"height": height, "width": width}
        else:
            shortest, *longest = map(int, words)
            (longest_edge,) = longest or [round(shortest * LONGEST_EDGE / SHORTEST_EDGE)]
            size = {"shortest_edge": shortest, "longest_edge": longest_edge}
    except ValueError:
        raise InputError(f"--image_size {given}: expected SHORTEST, SHORTEST LONGEST or HEIGHTxWIDTH") from None
    if min(size.values()) < 1 or size.get("shortest_edge", 0) > size.get("longest_edge", 0):
        raise InputError(f"--image_size {given}: must be positive, and LONGEST not less than SHORTEST")
    return size
