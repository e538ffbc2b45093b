"""Augment training images and their boxes, with a preset or a user's own function.

The presets follow the official implementation, DINO `datasets/coco.py` (https://github.com/IDEA-Research/DINO), which
inherits them from DETR: flip, then either resize to one of eleven sizes, or resize, crop and resize again.
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

# pixels, for a processor whose shortest edge is SHORTEST_EDGE; scaled for other sizes
_SCALES = range(480, 801, 32)
_SCALES_BEFORE_CROP = (400, 500, 600)
_CROP = (384, 600)
# `data_aug_scale_overlap` of the official implementation's best results. It gives 1999 for 1333, published as 2000.
_LARGE = 1.5
# pixels; a crop that ends next to a box can leave a sliver that rounding would make empty
_MIN_SIDE = 1e-2


class Augmented(NamedTuple):
    """An augmented image.

    Attributes:
        image (`PIL.Image.Image`): The new image.
        boxes (`torch.Tensor` of shape `(num_boxes, 4)`): x, y, width, height in pixels of the new image, inside it.
        areas (`torch.Tensor` of shape `(num_boxes,)`): In square pixels of the new image.
        objects (`torch.Tensor` of shape `(num_boxes,)`): Index of each box's object among those passed in.
    """

    image: Image.Image
    boxes: torch.Tensor
    areas: torch.Tensor
    objects: torch.Tensor


class Augmentation:
    """Apply a torchvision v2 transform to an image and its boxes, and drop the boxes that it removes.

    Uses torch's global random state on the CPU, so the same seed gives the same result.

    Args:
        transform (`v2.Transform`): Takes and returns a dict of `image`, a PIL image, `boxes`,
            `tv_tensors.BoundingBoxes` in pixels, and `labels` of shape `(num_boxes,)`, the indices of the objects.
        resizes (`bool`): Whether its images have their final size, so that the image processor must not resize them.
        evaluation_size (`Mapping[str, int]`, *optional*): `size` of the image processor for evaluating a model that is
            trained with this augmentation, usually its largest size. [`make_augmentation`] fills it in for a user's
            function.
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
            areas (`torch.Tensor` of shape `(num_boxes,)`): In square pixels, possibly of masks. The transform's effect
                on a mask is unknown, so the areas of the result are those of its boxes.

        Raises:
            InputError: If the transform does not return a PIL image with boxes that belong to it.
        """
        sample = self.transform(_to_sample(image, (image.height, image.width), boxes))
        _check_sample(sample)
        boxes = tvF.clamp_bounding_boxes(tvF.convert_bounding_box_format(sample["boxes"], new_format="XYWH"))
        boxes = boxes.as_subclass(torch.Tensor)
        visible = (boxes[:, 2:] > _MIN_SIDE).all(dim=1)
        boxes = boxes[visible]
        return Augmented(sample["image"], boxes, boxes[:, 2] * boxes[:, 3], sample["labels"][visible])

    def output_shape(self, height: int, width: int, boxes: torch.Tensor) -> tuple[int, int]:
        """Return the `(height, width)` that an image of `height` x `width` pixels gets from the same random state."""
        no_pixels = tv_tensors.Image(torch.empty(3, height, width, dtype=torch.uint8, device="meta"))
        image = self.transform(_to_sample(no_pixels, (height, width), boxes))["image"]
        return image.shape[-2], image.shape[-1]

    def min_output_shape(self, height: int, width: int) -> tuple[int, int]:
        """Return the smallest `(height, width)` that an image of `height` x `width` pixels can get in training.

        This base class assumes that the image is resized and not cropped.

        Example:

        ```python
        >>> coco = {"shortest_edge": 800, "longest_edge": 1333}
        >>> [make_augmentation(name, coco).min_output_shape(480, 640) for name in ("flip", "dino", "dino-large")]
        [(800, 1066), (480, 480), (720, 720)]

        ```
        """
        return get_resized_shape(self.evaluation_size, height, width)


class NoAugmentation(Augmentation):
    """Return images, boxes and annotated areas unchanged.

    Args:
        evaluation_size (`Mapping[str, int]`, *optional*): As for [`Augmentation`].
    """

    def __init__(self, evaluation_size: Mapping[str, int] | None = None):
        super().__init__(v2.Identity(), resizes=False, evaluation_size=evaluation_size)

    def __call__(self, image: Image.Image, boxes: torch.Tensor, areas: torch.Tensor) -> Augmented:
        """Return the arguments themselves."""
        return Augmented(image, boxes, areas, torch.arange(len(boxes)))


@contextmanager
def seed_per_image(seed: int, epoch: int, image_id: int) -> Iterator[None]:
    """Seed torch's random state on the CPU for one image in one epoch, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        # crc32 instead of hash(), which differs between processes. torch.manual_seed would also seed accelerators,
        # which sample the noise of the denoising queries
        torch.default_generator.manual_seed(zlib.crc32(f"{seed} {epoch} {image_id}".encode()))
        yield


def get_resized_shape(size: Mapping[str, int], height: int, width: int) -> tuple[int, int]:
    """Return the `(height, width)` to which an image of `height` x `width` pixels is resized.

    Args:
        size (`Mapping[str, int]`): `size` of an image processor: `shortest_edge` and `longest_edge`, or `height` and
            `width`, in pixels.
        height (`int`): In pixels.
        width (`int`): In pixels.

    Raises:
        InputError: If `size` has other keys.
    """
    if {"shortest_edge", "longest_edge"} <= size.keys():
        return get_size_with_aspect_ratio(height, width, size["shortest_edge"], size["longest_edge"])
    if {"height", "width"} <= size.keys():
        return size["height"], size["width"]
    raise InputError(f"size must have shortest_edge and longest_edge, or height and width, got {dict(size)}")


def make_augmentation(name: str, size: Mapping[str, int]) -> Augmentation:
    """Build an augmentation for the image size that a model is trained at.

    Args:
        name (`str`): A preset:

            - `"dino"`: the recipe of the official implementation, its sizes scaled to `size`.
            - `"dino-large"`: the same with all sizes, including `evaluation_size`, 1.5 times larger.
            - `"photometric"`: `"dino"` after distorting brightness, contrast, saturation, hue and channels as in SSD.
            - `"flip"`: a horizontal flip with probability 0.5.
            - `"none"`: [`NoAugmentation`].

            Or a function of your own, `path/to/file.py:function` or `package.module:function`. It takes `size` and
            returns a `v2.Transform`, whose images are then resized by the image processor, or an [`Augmentation`],
            possibly of a subclass. It must use torch's random state only.
        size (`Mapping[str, int]`): `size` of the image processor: `shortest_edge` and `longest_edge`, or `height` and
            `width`, in pixels. With the latter every image gets exactly that size.

    Returns:
        `Augmentation`: With an `evaluation_size`.

    Raises:
        InputError: If the name is unknown, the function is not found, or its result cannot be used.
    """
    if ":" in name:
        return _UserAugmentation(name, size)
    if name not in _PRESETS:
        raise InputError(
            f"unknown augmentation {name!r}. Choose from {', '.join(_PRESETS)}, or name a function of your own, "
            "path/to/file.py:function or package.module:function"
        )
    return _PRESETS[name](size)


def _scale(lengths: Sequence[int], shortest_edge: int) -> list[int]:
    return [max(1, round(length * shortest_edge / SHORTEST_EDGE)) for length in lengths]


class _Dino(Augmentation):
    """The recipe of the official implementation, preceded by transforms that keep the shape."""

    def __init__(self, size: Mapping[str, int], *before: v2.Transform):
        shortest_edge = size.get("shortest_edge") or min(size["height"], size["width"])
        final: v2.Transform
        if "shortest_edge" in size:
            scales = _scale(_SCALES, shortest_edge)
            final, self._min_shape = ResizeShortestEdge(scales, size["longest_edge"]), (scales[0], scales[0])
        else:
            shape = size["height"], size["width"]
            final, self._min_shape = v2.Resize(shape), shape
        before_crop = ResizeShortestEdge(_scale(_SCALES_BEFORE_CROP, shortest_edge), longest_edge=None)
        crop = v2.Compose([before_crop, RandomSizeCrop(*_scale(_CROP, shortest_edge)), final])
        recipe = v2.RandomHorizontalFlip(0.5), v2.RandomChoice([final, crop])
        super().__init__(v2.Compose([*before, *recipe]), resizes=True, evaluation_size=size)

    def min_output_shape(self, height: int, width: int) -> tuple[int, int]:
        """Return the shape of a square crop, or that of the image if its longer side is limited to even less."""
        return min(self._min_shape, super().min_output_shape(height, width), key=math.prod)


def _dino_large(size: Mapping[str, int]) -> Augmentation:
    large = {side: round(length * _LARGE) for side, length in size.items()}
    if min(size.values()) > SHORTEST_EDGE:
        logger.warning(
            "dino-large makes images of %s pixels, 1.5 times the model's %s. `dino` would keep the model's size",
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


class _UserAugmentation(Augmentation):
    """Wrap the result of a user's function, after trying it once so that errors show before training."""

    def __init__(self, name: str, size: Mapping[str, int]):
        try:
            made = _import_user_function(name)(dict(size))
        except InputError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise InputError(f"{name}: raised {type(error).__name__}: {error}") from error
        if isinstance(made, v2.Transform):
            made = Augmentation(made, resizes=False)
        if not isinstance(made, Augmentation):
            raise InputError(f"{name}: must return a torchvision v2.Transform or an Augmentation, got {made!r}")
        super().__init__(made.transform, made.resizes, made.evaluation_size or size)
        made.evaluation_size = self.evaluation_size
        self.made = made
        self.arguments = name, dict(size)
        _check_determinism(self, name, max(size.values()), min(size.values()))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments: another process could not import a class from a file that is not on its path."""
        return type(self), self.arguments

    def __call__(self, image: Image.Image, boxes: torch.Tensor, areas: torch.Tensor) -> Augmented:
        """Call the user's augmentation."""
        return Augmented(*self.made(image, boxes, areas))

    def output_shape(self, height: int, width: int, boxes: torch.Tensor) -> tuple[int, int]:
        """Return the shape itself unless the user's class overrides this: not every transform works without pixels."""
        is_overridden = type(self.made).output_shape is not Augmentation.output_shape
        return self.made.output_shape(height, width, boxes) if is_overridden else (height, width)

    def min_output_shape(self, height: int, width: int) -> tuple[int, int]:
        """Call the user's augmentation."""
        return self.made.min_output_shape(height, width)


def _check_determinism(augmentation: Augmentation, name: str, width: int, height: int) -> None:
    """Augment an image twice with one seed, and require equal results: a resumed run must see the same images."""
    boxes = torch.tensor([[0.1, 0.1, 0.3, 0.3], [0.2, 0.3, 0.7, 0.6]]) * torch.tensor([width, height] * 2)
    results = []
    for _ in range(2):
        with seed_per_image(0, 0, 0):
            image = tvF.to_pil_image(torch.randint(256, (3, height, width), dtype=torch.uint8))
            augmented = augmentation(image, boxes.clone(), boxes[:, 2] * boxes[:, 3])
            results.append((augmented.image.tobytes(), augmented.boxes.tolist()))
    if results[0] != results[1]:
        raise InputError(
            f"{name}: returned another image or other boxes for the same seed. Use only torch's random state, which "
            "is seeded for each image, so that a run can be repeated and resumed"
        )


def _import_user_function(name: str) -> Callable[[dict[str, int]], Any]:
    module_name, _, function = name.rpartition(":")
    module = _import_file(Path(module_name)) if module_name.endswith(".py") else _import_module(module_name)
    if not callable(found := getattr(module, function, None)):
        functions = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise InputError(f"{name}: function not found. {module_name} has {', '.join(functions) or 'no functions'}")
    return found


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"augmentation_of_user_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise InputError(f"{path}: Python file not found. Check --augmentation")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything
        raise InputError(f"{path}: cannot be imported ({type(error).__name__}: {error})") from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ModuleNotFoundError, ValueError) as error:
        raise InputError(
            f"{name}: cannot be imported ({error}). Install it, add its directory to PYTHONPATH, or name the file, "
            "path/to/file.py:function"
        ) from None


def _to_sample(image: Any, canvas_size: tuple[int, int], boxes: torch.Tensor) -> dict[str, Any]:
    """Return the input of a transform. Torchvision expects a tensor called "labels" to have one value per box."""
    boxes = tv_tensors.BoundingBoxes(boxes, format="XYWH", canvas_size=canvas_size)
    return {"image": image, "boxes": boxes, "labels": torch.arange(len(boxes))}


def _check_sample(sample: Any) -> None:
    """Check the output of a transform."""
    if not isinstance(sample, dict) or not {"image", "boxes", "labels"} <= sample.keys():
        raise InputError(f"the augmentation must return a dict like the one it gets, got {type(sample).__name__}")
    image, boxes, objects = sample["image"], sample["boxes"], sample["labels"]
    if not isinstance(image, Image.Image):
        raise InputError(
            f"the augmentation must return a PIL image, got {type(image).__name__}. Leave tensors and normalization "
            "to the image processor, or end with v2.ToPILImage()"
        )
    if not isinstance(boxes, tv_tensors.BoundingBoxes):
        raise InputError(f"the augmentation must return boxes as tv_tensors.BoundingBoxes, got {type(boxes).__name__}")
    if boxes.canvas_size != (image.height, image.width):
        raise InputError(
            f"the augmentation returned an image of {image.height} x {image.width} pixels (height x width) with boxes "
            f"for {boxes.canvas_size[0]} x {boxes.canvas_size[1]}. Resize and crop both"
        )
    if len(boxes) != len(objects):
        raise InputError(
            f"the augmentation returned {len(boxes)} boxes for {len(objects)} objects. A transform that removes boxes "
            "must also remove their 'labels', as v2.SanitizeBoundingBoxes does"
        )


class ResizeShortestEdge(v2.Transform):
    """Resize the shorter side to a random one of `shortest_edges`, the longer side to at most `longest_edge` pixels.

    Unlike `v2.RandomShortestSize`, it rounds as the official implementation and the image processor do.
    """

    def __init__(self, shortest_edges: Sequence[int], longest_edge: int | None):
        super().__init__()
        self.shortest_edges = list(shortest_edges)
        self.longest_edge = longest_edge

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Sample the new `(height, width)`."""
        height, width = tvF.get_size(flat_inputs[0])
        shortest_edge = self.shortest_edges[int(torch.randint(len(self.shortest_edges), ()))]
        # without a limit, one that no resized image can reach
        longest_edge = self.longest_edge or shortest_edge * max(height, width)
        return {"size": get_size_with_aspect_ratio(height, width, shortest_edge, longest_edge)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize an image or its boxes."""
        return tvF.resize(inpt, size=list(params["size"]), antialias=True)


class RandomSizeCrop(v2.Transform):
    """Crop a random rectangle with sides between `shortest` and `longest` pixels, or the image's if shorter."""

    def __init__(self, shortest: int, longest: int):
        super().__init__()
        self.shortest = shortest
        self.longest = longest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Sample size and position."""
        (top, height), (left, width) = (self._sample_interval(side) for side in tvF.get_size(flat_inputs[0]))
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop an image or its boxes."""
        return tvF.crop(inpt, **params)

    def _sample_interval(self, side: int) -> tuple[int, int]:
        """Return start and length, in pixels, of an interval within a side."""
        longest = min(side, self.longest)
        length = int(torch.randint(min(self.shortest, longest), longest + 1, ()))
        return int(torch.randint(side - length + 1, ())), length
