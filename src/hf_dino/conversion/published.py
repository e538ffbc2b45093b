"""Recognize the checkpoints that the authors of DINO published, and list them."""

import logging
from collections.abc import Mapping
from typing import Any

from .key_tables import COCO_NUM_LABELS, PUBLISHED, PublishedCheckpoint


logger = logging.getLogger(__name__)


def find_published_checkpoint(
    name: str, digest: str, settings: Mapping[str, Any], epochs: int | None
) -> PublishedCheckpoint | None:
    """Find the published file with this hash or, if its hash is not known, with this name, settings and epochs.

    Args:
        name (`str`): Name of the file.
        digest (`str`): Its SHA-256, in hexadecimal.
        settings (`dict`): The settings in it, with the official names.
        epochs (`int`, *optional*): Number of epochs trained, from [`~checkpoint.finished_epochs`].

    Returns:
        `PublishedCheckpoint` or `None`: `None`, with a warning, if only the name is that of a published file.
    """
    if same := [published for published in PUBLISHED.values() if published.sha256 == digest]:
        return same[0]
    namesake = PUBLISHED.get(name)
    if namesake is None:
        return None
    if namesake.sha256:
        got, expected = f"SHA-256 {digest}", f"SHA-256 {namesake.sha256}"
    else:
        got = _describe(settings["backbone"], settings["num_feature_levels"], settings["num_classes"], epochs)
        expected = _describe(namesake.backbone, namesake.num_feature_levels, COCO_NUM_LABELS, epochs_in_name(name))
    if got == expected:
        return namesake
    logger.warning(
        "%s has the name of a published file but not its content: %s instead of %s. "
        "The model card will not call it official, nor quote the published AP",
        name,
        got,
        expected,
    )
    return None


def _describe(backbone: str, num_feature_levels: int, num_classes: int, epochs: int | None) -> str:
    return f"backbone {backbone}, {num_feature_levels} feature levels, {num_classes} classes, {epochs} epochs"


def epochs_in_name(name: str) -> int:
    """Return the number of epochs trained according to an official file name, which counts the last one from 0.

    Example:

    ```python
    >>> epochs_in_name("checkpoint0011_4scale.pth")
    12

    ```
    """
    return int(name.removeprefix("checkpoint")[:4]) + 1


_BACKBONE_NAMES = {"resnet50": "ResNet-50", "swin_L_384_22k": "Swin-L"}


def checkpoint_table() -> str:
    """Return the Markdown table of the published checkpoints in the documentation.

    Example:

    ```python
    >>> print("\\n".join(checkpoint_table().splitlines()[:3]))
    | file | backbone | feature levels | epochs | COCO AP |
    |---|---|---|---|---|
    | `checkpoint0011_4scale.pth` | ResNet-50 | 4 | 12 | 49.0 |

    ```
    """
    rows = [
        f"| `{name}` | {_BACKBONE_NAMES[published.backbone]} | {published.num_feature_levels} "
        f"| {epochs_in_name(name)} | {100 * published.box_ap:.1f} |"
        for name, published in PUBLISHED.items()
    ]
    return "\n".join(
        [
            "| file | backbone | feature levels | epochs | COCO AP |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "Epochs of training when the file was saved; the full schedules are 12, 24 or 36 epochs. "
            "Box AP on COCO val2017: published by the authors, not measured here.",
        ]
    )
