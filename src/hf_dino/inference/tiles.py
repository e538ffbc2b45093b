"""Cut large images into overlapping tiles, and merge the detections of the tiles.

An object at a seam is seen whole in one tile and cut in another. A detection that ends at an inner seam is therefore
likely to be a part of an object, and counts a tenth, unless it is longer than the overlap, so that no tile sees its
object whole. Then non-maximum suppression chooses among all tiles. A box that is kept becomes the mean of those that
other tiles have of the same object. Boxes of parts are never joined, as other libraries do: a detector with queries
finds many weak boxes, which would grow into each other.
"""

import math
from collections.abc import Sequence

import torch
from torchvision.ops import batched_nms, box_iou


# Chosen on 12 mosaics of 4 x 4 validation images of the `shapes` dataset, in tiles of the size of an image, and on 12
# whose images lie across the tiles; AP of both follows. The first of these numbers were chosen with a margin of 2,
# without means, and with a tenth for cut boxes of any length: at an overlap of a quarter, those that no tile can see
# whole raise AP from .510 to .536 and from .526 to .530. benchmarks/tiles.py makes such mosaics.
TILE_OVERLAP = 0.5  # .531 .504 at a quarter, .597 .554 at a half, .607 .577 at two thirds, which takes twice the time
NMS_IOU = 0.5  # .595 .550 at 0.3, .602 .556 at 0.7; .588 .546 for the smaller area, .582 .545 among all classes
SEAM_WEIGHT = 0.1  # .568 .487 at 1; the same from 0 to 0.5, but 0 would drop all objects that are cut in every tile
SEAM_MARGIN = 3.0  # pixels between a box and a seam at which it is cut: .593 .527 at 0, .599 .561 at 3, .592 .561 at 6
SAME_IOU = 0.7  # of boxes of an object: .609 .566, .603 .562 at 0.5; .599 .561 without means

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels
Detections = dict[str, torch.Tensor]  # scores, labels and boxes, as the image processor returns them


def tile_boxes(size: tuple[int, int], tile: int | None, overlap: float) -> list[Box]:
    """Return the tiles of an image: squares that cover it, spread evenly, each inside the image.

    Args:
        size (`tuple[int, int]`): Width and height of the image in pixels.
        tile (`int`, *optional*): Side of a tile in pixels; `None` for a single tile, the image.
        overlap (`float`): Smallest part of its side that a tile has in common with the next one, in [0, 1).

    Example:

    ```python
    >>> tile_boxes((200, 100), 120, 0.2)
    [(0, 0, 120, 100), (80, 0, 200, 100)]

    ```
    """
    if tile is None:
        return [(0, 0, *size)]
    columns, rows = (_positions(length, tile, overlap) for length in size)
    return [(x0, y0, x1, y1) for y0, y1 in rows for x0, x1 in columns]


def _positions(length: int, tile: int, overlap: float) -> list[tuple[int, int]]:
    """Return first and last pixel, exclusive, of each tile along one side."""
    gaps = math.ceil(max(0, length - tile) / max(1.0, tile * (1 - overlap)))
    last = max(0, length - tile)
    starts = [last * index // max(1, gaps) for index in range(gaps + 1)]
    return [(start, min(start + tile, length)) for start in starts]


def merge_tiles(
    tiles: Sequence[Box],
    found: Sequence[Detections],
    size: tuple[int, int],
    overlap: float,
    threshold: float,
    nms_iou: float | None,
) -> Detections:
    """Merge the detections of the tiles of an image.

    Args:
        tiles (`Sequence[Box]`): The tiles.
        found (`Sequence[dict[str, torch.Tensor]]`): Detections in each of them, with boxes in pixels of the tile.
        size (`tuple[int, int]`): Width and height of the image in pixels.
        overlap (`float`): Pixels that a tile has in common with the next one.
        threshold (`float`): Detections with a score up to this, after those at a seam are weighted, are dropped.
        nms_iou (`float`, *optional*): IoU for non-maximum suppression, by default 0.5.

    Returns:
        `dict[str, torch.Tensor]`: By descending score, with boxes in pixels of the image.
    """
    is_cut = torch.cat([_is_cut(each["boxes"], tile, size, overlap) for tile, each in zip(tiles, found, strict=True)])
    boxes = torch.cat([each["boxes"] + each["boxes"].new_tensor(tile[:2] * 2) for tile, each in zip(tiles, found)])
    scores, labels = (torch.cat([each[name] for each in found]) for name in ("scores", "labels"))
    scores = scores * torch.where(is_cut, SEAM_WEIGHT, 1.0)
    above = scores > threshold
    boxes, scores, labels, is_cut = boxes[above], scores[above], labels[above], is_cut[above]
    kept = batched_nms(boxes, scores, labels, NMS_IOU if nms_iou is None else nms_iou)
    return {"scores": scores[kept], "labels": labels[kept], "boxes": _mean_boxes(kept, boxes, scores, labels, is_cut)}


def _mean_boxes(
    kept: torch.Tensor, boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, is_cut: torch.Tensor
) -> torch.Tensor:
    """Return the mean of each kept box and the boxes of its object in other tiles, weighted by their scores."""
    means = boxes[kept]
    order = boxes[:, 0].argsort()
    # of two boxes with this IoU, one begins less than half a width from the other
    reach = 1 + (means[:, 2] - means[:, 0]) / 2
    ends = torch.stack([means[:, 0] - reach, means[:, 0] + reach], dim=1)
    ranges = torch.searchsorted(boxes[order, 0], ends).tolist()
    for row, (index, (first, last)) in enumerate(zip(kept.tolist(), ranges)):
        near = order[first:last]
        is_same = (box_iou(boxes[None, index], boxes[near])[0] > SAME_IOU) & (labels[near] == labels[index])
        same = near[(is_same & ~is_cut[near]) | (near == index)]
        weights = scores[same, None]
        means[row] = (weights * boxes[same]).sum(dim=0) / weights.sum()
    return means


def _is_cut(boxes: torch.Tensor, tile: Box, size: tuple[int, int], overlap: float) -> torch.Tensor:
    """Return which boxes end at a side of their tile that is not the image's, and may be whole in another tile."""
    x0, y0, x1, y1 = tile
    sides = boxes.new_tensor([0, 0, x1 - x0, y1 - y0])
    is_inner = torch.tensor([x0 > 0, y0 > 0, x1 < size[0], y1 < size[1]], device=boxes.device)
    inside = (boxes - sides) * boxes.new_tensor([1, 1, -1, -1])  # distance from each side, negative beyond it
    lengths = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)  # across each side
    return ((inside <= SEAM_MARGIN) & is_inner & (lengths < overlap)).any(dim=1)
