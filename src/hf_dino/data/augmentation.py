"""Training augmentation by name, as a picture with its boxes going in and coming out.

The original's recipe, DINO `datasets/coco.py` (https://github.com/IDEA-Research/DINO), inherited from DETR: flip, then
either resize to one of eleven sizes, or resize, crop a part and resize that.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvF

from ..image_processing_dino_detr import SHORTEST_EDGE, resized_shape
from .errors import InputError


# pixels, for pictures whose short side the processor makes SHORTEST_EDGE long; other sizes scale them all
_SCALES = range(480, 801, 32)
_SCALES_BEFORE_CROP = (400, 500, 600)
_CROP = (384, 600)
# in pixels; less than this is left of a box where a crop ends just beside it, and rounding would make it nothing
_SMALLEST_SIDE = 1e-2


class Augmented(NamedTuple):
    """A picture after augmentation.

    Attributes:
        image (`PIL.Image.Image`): The new picture.
        boxes (`torch.Tensor` of shape `(num_boxes, 4)`): x, y, width, height in its pixels, inside the picture.
        objects (`torch.Tensor` of shape `(num_boxes,)`): Which of the objects that went in each box belongs to.
    """

    image: Image.Image
    boxes: torch.Tensor
    objects: torch.Tensor


class Augmentation:
    """Applies a torchvision v2 transform to a picture and its boxes, and drops the boxes that it cut away.

    Draws from torch's global random numbers, so a caller that seeds them gets the same picture again.

    Args:
        transform (`v2.Transform`): Takes and returns a PIL picture and `tv_tensors.BoundingBoxes`.
        resizes (`bool`): Whether its pictures have their final size, so that the image processor must not resize.
    """

    def __init__(self, transform: v2.Transform, resizes: bool):
        self.transform = transform
        self.resizes = resizes

    def __call__(self, image: Image.Image, boxes: torch.Tensor, objects: torch.Tensor) -> Augmented:
        """Augment `image` and its `boxes` (x, y, width, height in pixels); `objects` numbers them."""
        canvas = (image.height, image.width)
        image, boxes = self.transform(image, tv_tensors.BoundingBoxes(boxes, format="XYWH", canvas_size=canvas))
        boxes = tvF.clamp_bounding_boxes(boxes).as_subclass(torch.Tensor)
        visible = (boxes[:, 2:] > _SMALLEST_SIDE).all(dim=1)
        return Augmented(image, boxes[visible], objects[visible])


def make_augmentation(name: str, size: Mapping[str, int]) -> Augmentation | None:
    """Build an augmentation for the picture size that a model is trained at.

    Args:
        name (`str`): `"dino"` for the original's recipe, its sizes scaled to `size`; `"flip"` for a mirror image half
            of the time; `"none"`.
        size (`Mapping[str, int]`): The image processor's: `shortest_edge` and `longest_edge`, or `height` and `width`,
            in pixels. With the latter every picture gets exactly that size.

    Returns:
        `Augmentation` or `None`.

    Raises:
        InputError: If the name is unknown.
    """
    if name not in _PRESETS:
        raise InputError(f"unknown augmentation {name!r}; choose one of {', '.join(_PRESETS)}")
    return _PRESETS[name](size)


def _dino(size: Mapping[str, int]) -> Augmentation:
    short = size.get("shortest_edge") or min(size["height"], size["width"])
    final: v2.Transform

    def scaled(lengths: Sequence[int]) -> list[int]:
        return [max(1, round(length * short / SHORTEST_EDGE)) for length in lengths]

    if "shortest_edge" in size:
        final = ResizeShortestEdge(scaled(_SCALES), size["longest_edge"])
    else:
        final = v2.Resize((size["height"], size["width"]))
    before_crop = ResizeShortestEdge(scaled(_SCALES_BEFORE_CROP), longest_edge=None)
    crop = v2.Compose([before_crop, RandomSizeCrop(*scaled(_CROP)), final])
    return Augmentation(v2.Compose([v2.RandomHorizontalFlip(0.5), v2.RandomChoice([final, crop])]), resizes=True)


def _flip(size: Mapping[str, int]) -> Augmentation:
    return Augmentation(v2.RandomHorizontalFlip(0.5), resizes=False)


_PRESETS = {"dino": _dino, "flip": _flip, "none": lambda size: None}
AUGMENTATIONS = tuple(_PRESETS)


class ResizeShortestEdge(v2.Transform):
    """Resize the short side to one of `shortest_edges`, drawn evenly, but the long side to at most `longest_edge`.

    Unlike `v2.RandomShortestSize` it rounds as the original and the image processor do.
    """

    def __init__(self, shortest_edges: Sequence[int], longest_edge: int | None):
        super().__init__()
        self.shortest_edges = list(shortest_edges)
        self.longest_edge = longest_edge

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the new `(height, width)`."""
        height, width = tvF.get_size(flat_inputs[0])
        shortest_edge = self.shortest_edges[int(torch.randint(len(self.shortest_edges), ()))]
        # no limit is the limit that a resized picture cannot reach
        longest_edge = self.longest_edge or shortest_edge * max(height, width)
        return {"size": resized_shape(height, width, shortest_edge, longest_edge)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize a picture or its boxes."""
        return tvF.resize(inpt, size=list(params["size"]), antialias=True)


class RandomSizeCrop(v2.Transform):
    """Cut out a rectangle with sides drawn between `shortest` and `longest` pixels, or the picture's if shorter."""

    def __init__(self, shortest: int, longest: int):
        super().__init__()
        self.shortest = shortest
        self.longest = longest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw size and place."""
        (top, height), (left, width) = (self._draw(side) for side in tvF.get_size(flat_inputs[0]))
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop a picture or its boxes."""
        return tvF.crop(inpt, **params)

    def _draw(self, side: int) -> tuple[int, int]:
        longest = min(side, self.longest)
        length = int(torch.randint(min(self.shortest, longest), longest + 1, ()))
        return int(torch.randint(side - length + 1, ())), length
