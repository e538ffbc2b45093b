"""Arguments of the command lines that need more than a type."""

import argparse
from collections.abc import Callable, Sequence

from ..data.errors import InputError
from ..image_processing_dino_detr import LONGEST_EDGE, SHORTEST_EDGE


def at_least(lowest: int) -> Callable[[str], int]:
    """Make the `type` of an argument that is a whole number, `lowest` or more."""

    def whole_number(text: str) -> int:
        number = int(text)
        if number < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, got {number}")
        return number

    return whole_number


def parse_size(words: Sequence[str]) -> dict[str, int]:
    """Read the size that an image processor is to give to pictures.

    Args:
        words (`Sequence[str]`): The words of `--image-size`, in pixels: shortest edge and longest edge, or the
            shortest alone for a longest in the original's proportion, or `HEIGHTxWIDTH` for exactly that.

    Returns:
        `dict[str, int]`: `shortest_edge` and `longest_edge`, or `height` and `width`.

    Raises:
        InputError: If the words are something else, not positive, or in the wrong order.

    Example:

    ```python
    >>> parse_size(["800"]), parse_size(["480x640"])
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
        raise InputError(f"--image-size {given}: expected SHORTEST, SHORTEST LONGEST or HEIGHTxWIDTH") from None
    if min(size.values()) < 1 or size.get("shortest_edge", 0) > size.get("longest_edge", 0):
        raise InputError(f"--image-size {given}: must be positive, and LONGEST not less than SHORTEST")
    return size
