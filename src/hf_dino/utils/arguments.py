"""Values of command-line options that need more than a type."""

from collections.abc import Sequence

from ..image_processing_dino_detr import LONGEST_EDGE, SHORTEST_EDGE
from .errors import InputError


def parse_image_size(words: Sequence[str]) -> dict[str, int]:
    """Parse the size that an image processor resizes images to.

    Args:
        words (`Sequence[str]`): Values of `--image_size`, in pixels: the shortest and the longest edge, or the
            shortest edge alone for a longest edge in the proportion of the official implementation, or `HEIGHTxWIDTH`
            for exactly that size.

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
