"""Training augmentation, by name or a user's own, as an image with its boxes going in and coming out.

The original's recipe, DINO `datasets/coco.py` (https://github.com/IDEA-Research/DINO), inherited from DETR: flip, then
either resize to one of eleven sizes, or resize, crop a part and resize that.
"""

import importlib
import importlib.util
import logging
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvF

from ..image_processing_dino_detr import SHORTEST_EDGE, get_size_with_aspect_ratio
from ..utils.errors import InputError


logger = logging.getLogger(__name__)

# pixels, for images whose short side the processor makes SHORTEST_EDGE long; other sizes scale them all
_SCALES = range(480, 801, 32)
_SCALES_BEFORE_CROP = (400, 500, 600)
_CROP = (384, 600)
# The original's data_aug_scale_overlap for its best results. It makes 1333 1999, where people (and we) say 2000.
_LARGE = 1.5
# in pixels; less than this is left of a box where a crop ends just beside it, and rounding would make it nothing
_SMALLEST_SIDE = 1e-2


class Augmented(NamedTuple):
    """An image after augmentation.

    Attributes:
        image (`PIL.Image.Image`): The new image.
        boxes (`torch.Tensor` of shape `(num_boxes, 4)`): x, y, width, height in its pixels, inside the image.
        areas (`torch.Tensor` of shape `(num_boxes,)`): In its square pixels, of what each box stands for.
        objects (`torch.Tensor` of shape `(num_boxes,)`): Which of the objects that went in each box belongs to.
    """

    image: Image.Image
    boxes: torch.Tensor
    areas: torch.Tensor
    objects: torch.Tensor


class Augmentation:
    """Applies a torchvision v2 transform to an image and its boxes, and drops the boxes that it cut away.

    Draws from torch's global random numbers, so a caller that seeds them gets the same image again.

    Args:
        transform (`v2.Transform`): Takes and returns a dict of `image`, a PIL image, `boxes`,
            `tv_tensors.BoundingBoxes` in pixels, and `labels` of shape `(num_boxes,)`, which number the objects.
        resizes (`bool`): Whether its images have their final size, so that the image processor must not resize.
        evaluation_size (`Mapping[str, int]`, *optional*): At what size, in the words of the image processor, to
            evaluate a model that is trained with it: the largest that it shows. [`make_augmentation`] puts the size
            that it was asked for where a user's function leaves this out.
    """

    def __init__(self, transform: v2.Transform, resizes: bool, evaluation_size: Mapping[str, int] | None = None):
        self.transform = transform
        self.resizes = resizes
        self.evaluation_size = dict(evaluation_size or {})

    def __call__(self, image: Image.Image, boxes: torch.Tensor, areas: torch.Tensor) -> Augmented:
        """Augment an image.

        Args:
            image (`PIL.Image.Image`): RGB.
            boxes (`torch.Tensor` of shape `(num_boxes, 4)`): x, y, width, height in pixels.
            areas (`torch.Tensor` of shape `(num_boxes,)`): In square pixels, as annotated, which may be of masks. What
                a transform leaves of a mask is not known: the result has the areas of its boxes.

        Raises:
            InputError: If the transform returns no PIL image, or boxes that do not belong to it.
        """
        sample = _sample(image, (image.height, image.width), boxes)
        image, boxes, objects = _checked(self.transform(sample))
        boxes = tvF.clamp_bounding_boxes(tvF.convert_bounding_box_format(boxes, new_format="XYWH"))
        boxes = boxes.as_subclass(torch.Tensor)
        visible = (boxes[:, 2:] > _SMALLEST_SIDE).all(dim=1)
        boxes = boxes[visible]
        return Augmented(image, boxes, boxes[:, 2] * boxes[:, 3], objects[visible])

    def shape(self, height: int, width: int, boxes: torch.Tensor) -> tuple[int, int]:
        """Say what `(height, width)` an image of `height` x `width` pixels would get from the same random numbers."""
        no_pixels = tv_tensors.Image(torch.empty(3, height, width, dtype=torch.uint8, device="meta"))
        image = self.transform(_sample(no_pixels, (height, width), boxes))["image"]
        return image.shape[-2], image.shape[-1]

    def smallest_shape(self, height: int, width: int) -> tuple[int, int]:
        """Say what `(height, width)` an image of `height` x `width` pixels may have at the least in training.

        Here that is the image resized, and no part of it: what a user's own transform cuts away is not known.

        Example:

        ```python
        >>> coco = {"shortest_edge": 800, "longest_edge": 1333}
        >>> [make_augmentation(name, coco).smallest_shape(480, 640) for name in ("flip", "dino", "dino-large")]
        [(800, 1066), (480, 480), (720, 720)]

        ```
        """
        return shape_of_size(self.evaluation_size, height, width)


class NoAugmentation(Augmentation):
    """Leaves images, boxes and annotated areas as they are.

    Args:
        evaluation_size (`Mapping[str, int]`, *optional*): As for [`Augmentation`].
    """

    def __init__(self, evaluation_size: Mapping[str, int] | None = None):
        super().__init__(v2.Identity(), resizes=False, evaluation_size=evaluation_size)

    def __call__(self, image: Image.Image, boxes: torch.Tensor, areas: torch.Tensor) -> Augmented:
        """Return what is given, bit by bit."""
        return Augmented(image, boxes, areas, torch.arange(len(boxes)))


@contextmanager
def seed_per_image(seed: int, epoch: int, image_id: int) -> Iterator[None]:
    """Draw torch's random numbers on the CPU from a sequence that belongs to one image in one epoch of one run."""
    with torch.random.fork_rng(devices=[]):
        # crc32 rather than hash(): the same number in every process. Not torch.manual_seed: it would seed accelerators
        # too, which draw the noise of the training
        torch.default_generator.manual_seed(zlib.crc32(f"{seed} {epoch} {image_id}".encode()))
        yield


def shape_of_size(size: Mapping[str, int], height: int, width: int) -> tuple[int, int]:
    """Say what `(height, width)` an image of `height` x `width` pixels is resized to.

    Args:
        size (`Mapping[str, int]`): An image processor's: `shortest_edge` and `longest_edge`, or `height` and `width`,
            in pixels.

    Raises:
        InputError: If `size` has other keys.
    """
    if {"shortest_edge", "longest_edge"} <= size.keys():
        return get_size_with_aspect_ratio(height, width, size["shortest_edge"], size["longest_edge"])
    if {"height", "width"} <= size.keys():
        return size["height"], size["width"]
    raise InputError(f"a size must be shortest_edge and longest_edge, or height and width; it is {dict(size)}")


def make_augmentation(name: str, size: Mapping[str, int]) -> Augmentation:
    """Build an augmentation for the image size that a model is trained at.

    Args:
        name (`str`): A preset:

            - `"dino"`: the original's recipe, its sizes scaled to `size`.
            - `"dino-large"`: the same with all sizes 1.5 times larger, its `evaluation_size` too.
            - `"photometric"`: `"dino"`, and brightness, contrast, saturation, hue and channels distorted as in SSD.
            - `"flip"`: a mirror image half of the time.
            - `"none"`: [`NoAugmentation`].

            Or a function of one's own, `path/to/file.py:function` or `package.module:function`. It gets `size` and
            returns a `v2.Transform`, whose images the image processor resizes, or an [`Augmentation`], also of a
            class of one's own that replaces methods. Random numbers must come from torch.
        size (`Mapping[str, int]`): The image processor's: `shortest_edge` and `longest_edge`, or `height` and `width`,
            in pixels. With the latter every image gets exactly that size.

    Returns:
        `Augmentation`: With an `evaluation_size`.

    Raises:
        InputError: If the name is unknown, or there is no such function, or what it returns cannot be used.
    """
    if ":" in name:
        return _OfUser(name, size)
    if name not in _PRESETS:
        raise InputError(
            f"unknown augmentation {name!r}; choose one of {', '.join(_PRESETS)}, or name a function of yours, "
            f"path/to/file.py:function or package.module:function"
        )
    return _PRESETS[name](size)


def _scaled(lengths: Sequence[int], short: int) -> list[int]:
    return [max(1, round(length * short / SHORTEST_EDGE)) for length in lengths]


class _Dino(Augmentation):
    """The original's recipe, after transforms that leave shapes as they are."""

    def __init__(self, size: Mapping[str, int], *before: v2.Transform):
        short = size.get("shortest_edge") or min(size["height"], size["width"])
        final: v2.Transform
        if "shortest_edge" in size:
            scales = _scaled(_SCALES, short)
            final, self._square = ResizeShortestEdge(scales, size["longest_edge"]), (scales[0], scales[0])
        else:
            shape = size["height"], size["width"]
            final, self._square = v2.Resize(shape), shape
        before_crop = ResizeShortestEdge(_scaled(_SCALES_BEFORE_CROP, short), longest_edge=None)
        crop = v2.Compose([before_crop, RandomSizeCrop(*_scaled(_CROP, short)), final])
        recipe = v2.RandomHorizontalFlip(0.5), v2.RandomChoice([final, crop])
        super().__init__(v2.Compose([*before, *recipe]), resizes=True, evaluation_size=size)

    def smallest_shape(self, height: int, width: int) -> tuple[int, int]:
        """A crop may be a square: less than the image unless that is so long that its longer side is the limit."""
        return min(self._square, super().smallest_shape(height, width), key=math.prod)


def _dino_large(size: Mapping[str, int]) -> Augmentation:
    large = {side: round(length * _LARGE) for side, length in size.items()}
    if min(size.values()) > SHORTEST_EDGE:
        logger.warning(
            "dino-large makes images %s pixels, 1.5 times the model's %s; `dino` would stay at the model's size",
            *("/".join(map(str, sorted(each.values()))) for each in (large, size)),
        )
    return _Dino(large)


_PRESETS: dict[str, Callable[[Mapping[str, int]], Augmentation]] = {
    "dino": _Dino,
    "dino-large": _dino_large,
    "photometric": lambda size: _Dino(size, v2.RandomPhotometricDistort()),
    "flip": lambda size: Augmentation(v2.RandomHorizontalFlip(0.5), resizes=False, evaluation_size=size),
    "none": NoAugmentation,
}
AUGMENTATIONS = tuple(_PRESETS)


class _OfUser(Augmentation):
    """What a user's function returns, tried once before it meets data."""

    def __init__(self, name: str, size: Mapping[str, int]):
        try:
            made = _user_function(name)(dict(size))
        except InputError:
            raise
        except Exception as error:  # whatever is wrong with a user's function
            raise InputError(f"{name}: fails when it is called ({type(error).__name__}: {error})") from error
        if isinstance(made, v2.Transform):
            made = Augmentation(made, resizes=False)
        if not isinstance(made, Augmentation):
            raise InputError(f"{name}: must return a torchvision v2.Transform or an Augmentation, got {made!r}")
        super().__init__(made.transform, made.resizes, made.evaluation_size or size)
        made.evaluation_size = self.evaluation_size
        self.made = made
        self.origin = name, dict(size)
        self._try(name, (max(size.values()), min(size.values())))

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process calls the function again: it could not import a class from a file that has no module."""
        return type(self), self.origin

    def __call__(self, image: Image.Image, boxes: torch.Tensor, areas: torch.Tensor) -> Augmented:
        """As the user's class does it."""
        return Augmented(*self.made(image, boxes, areas))

    def shape(self, height: int, width: int, boxes: torch.Tensor) -> tuple[int, int]:
        """What the user's class says, otherwise the shape before, as not every transform can do without pixels."""
        foretold = type(self.made).shape is not Augmentation.shape
        return self.made.shape(height, width, boxes) if foretold else (height, width)

    def smallest_shape(self, height: int, width: int) -> tuple[int, int]:
        """As the user's class says."""
        return self.made.smallest_shape(height, width)

    def _try(self, name: str, image_size: tuple[int, int]) -> None:
        width, height = image_size
        boxes = torch.tensor([[0.1, 0.1, 0.3, 0.3], [0.2, 0.3, 0.7, 0.6]]) * torch.tensor([width, height] * 2)
        with torch.random.fork_rng(devices=[]):
            noise = tvF.to_pil_image(torch.randint(256, (3, height, width), dtype=torch.uint8))
            for seed in range(4):
                once, again = (self._seeded(seed, noise, boxes) for _ in range(2))
                if once != again:
                    raise InputError(
                        f"{name}: gives another image or other boxes each time; draw all random numbers from "
                        f"torch, whose seed is set for each image, so that a run can be repeated and resumed"
                    )

    def _seeded(self, seed: int, image: Image.Image, boxes: torch.Tensor) -> tuple[bytes, list[list[float]]]:
        torch.default_generator.manual_seed(seed)
        augmented = self(image.copy(), boxes.clone(), boxes[:, 2] * boxes[:, 3])
        return augmented.image.tobytes(), augmented.boxes.tolist()


def _user_function(name: str) -> Callable[[dict[str, int]], Any]:
    place, _, function = name.rpartition(":")
    module = _module_of_file(Path(place)) if place.endswith(".py") else _installed_module(place)
    if not callable(found := getattr(module, function, None)):
        functions = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise InputError(f"{name}: {place} has no function {function!r}; it has {', '.join(functions) or 'none'}")
    return found


def _module_of_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"augmentation_of_user_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise InputError(f"{path}: there is no such Python file, which --augmentation names")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever is wrong with a user's file
        raise InputError(f"{path}: cannot be imported ({type(error).__name__}: {error})") from error
    return module


def _installed_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ModuleNotFoundError, ValueError) as error:
        raise InputError(
            f"{name}: cannot be imported ({error}); install it, add its folder to PYTHONPATH, or name the file, "
            f"path/to/file.py:function"
        ) from None


def _sample(image: Any, canvas: tuple[int, int], boxes: torch.Tensor) -> dict[str, Any]:
    """What a transform gets. Torchvision takes a tensor named "labels" to be one value per box."""
    boxes = tv_tensors.BoundingBoxes(boxes, format="XYWH", canvas_size=canvas)
    return {"image": image, "boxes": boxes, "labels": torch.arange(len(boxes))}


def _checked(sample: Any) -> tuple[Image.Image, tv_tensors.BoundingBoxes, torch.Tensor]:
    if not isinstance(sample, dict) or not {"image", "boxes", "labels"} <= sample.keys():
        raise InputError(f"the augmentation must return the dict that it gets, got {type(sample).__name__}")
    image, boxes, objects = sample["image"], sample["boxes"], sample["labels"]
    if not isinstance(image, Image.Image):
        raise InputError(
            f"the augmentation must return a PIL image, got {type(image).__name__}; leave tensors and normalization "
            f"to the image processor, or end with v2.ToPILImage()"
        )
    if not isinstance(boxes, tv_tensors.BoundingBoxes):
        raise InputError(f"the augmentation must return boxes as tv_tensors.BoundingBoxes, got {type(boxes).__name__}")
    if boxes.canvas_size != (image.height, image.width):
        raise InputError(
            f"the augmentation's image is {image.height} x {image.width} pixels (height x width), but its boxes "
            f"belong to one of {boxes.canvas_size[0]} x {boxes.canvas_size[1]}: it must resize and crop both"
        )
    if len(boxes) != len(objects):
        raise InputError(
            f"the augmentation returned {len(boxes)} boxes for {len(objects)} objects: what removes boxes must remove "
            f"their entries of 'labels' too, as v2.SanitizeBoundingBoxes does"
        )
    return image, boxes, objects


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
        # no limit is the limit that a resized image cannot reach
        longest_edge = self.longest_edge or shortest_edge * max(height, width)
        return {"size": get_size_with_aspect_ratio(height, width, shortest_edge, longest_edge)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize an image or its boxes."""
        return tvF.resize(inpt, size=list(params["size"]), antialias=True)


class RandomSizeCrop(v2.Transform):
    """Cut out a rectangle with sides drawn between `shortest` and `longest` pixels, or the image's if shorter."""

    def __init__(self, shortest: int, longest: int):
        super().__init__()
        self.shortest = shortest
        self.longest = longest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw size and place."""
        (top, height), (left, width) = (self._draw(side) for side in tvF.get_size(flat_inputs[0]))
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop an image or its boxes."""
        return tvF.crop(inpt, **params)

    def _draw(self, side: int) -> tuple[int, int]:
        longest = min(side, self.longest)
        length = int(torch.randint(min(self.shortest, longest), longest + 1, ()))
        return int(torch.randint(side - length + 1, ())), length
