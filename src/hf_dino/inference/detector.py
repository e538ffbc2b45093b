"""Detect objects in a stream of images: read ahead, batched by size, in the order of the images."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.images import read_image, warn_once
from ..data.large_images import LargeImage, open_image
from ..detectors import detect, num_selected
from ..utils.errors import InputError
from ..utils.names import named_classes
from .sources import DecodedImage, ImageInput, Video
from .tiles import TILE_OVERLAP, Box, Detections, merge_tiles, tile_boxes


Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_PENDING_BATCHES = 8  # of images that wait for others of their size
MAX_PENDING_PIXELS = 100_000_000  # of decoded images: 300 MB


@dataclass(frozen=True)
class DetectionOptions:
    """Which detections are kept.

    Attributes:
        threshold (`float`): Lowest score.
        labels (`frozenset[int]`, *optional*): Labels that are detected; by default, all that have a name.
        top_k (`int`, *optional*): Most detections of an image; by default, the model's `num_select`.
        nms_iou (`float`, *optional*): IoU above which the detection with the lower score of two of a class is dropped;
            by default none is, and DINO needs no non-maximum suppression. With tiles, by default 0.5.
        tile (`int`, *optional*): Side in pixels of the tiles that images are cut into; by default they are not cut.
        tile_overlap (`float`): Smallest part of its side that a tile has in common with the next one; should exceed
            the objects.
    """

    threshold: float = 0.3
    labels: frozenset[int] | None = None
    top_k: int | None = None
    nms_iou: float | None = None
    tile: int | None = None
    tile_overlap: float = TILE_OVERLAP


@dataclass
class ImageResult:
    """An image and the objects detected in it.

    Attributes:
        input (`ImageInput`): The image's source and name.
        image (`PIL.Image.Image` or `LargeImage`, *optional*): The pixels; `None` if they cannot be read. A large image
            that was cut into tiles is a [`LargeImage`](../data/large_images.py), which has the methods `crop` and
            `reduce` of Pillow's.
        error (`str`): Why they cannot be read.
        detections (`list[dict[str, Any]]`): `label`, `name`, `score` and `box` (x0, y0, x1, y1 in pixels) of each,
            sorted by descending score.
    """

    input: ImageInput
    image: Image.Image | LargeImage | None = None
    error: str = ""
    detections: list[dict[str, Any]] = field(default_factory=list)


class View(NamedTuple):
    """An image, or a tile of it, as the model takes it.

    Attributes:
        number (`int`): Of the image in the stream.
        box (`Box`): The part of the image: x0, y0, x1, y1 in pixels.
        inputs (`dict[str, torch.Tensor]`): From the image processor; empty if there is no image.
    """

    number: int
    box: Box
    inputs: dict[str, torch.Tensor]


Part = tuple[int, Box, Image.Image | None]  # of an image: its number in the stream, where, and its pixels


@dataclass
class _Pending:
    """An image that was read, of which `num_waiting` views of `num_views` have not been detected in."""

    result: ImageResult
    num_views: int
    num_waiting: int
    found: list[tuple[Box, Detections]] = field(default_factory=list)


class Detector:
    """Detect objects in any number of images with bounded memory.

    Images are batched only with those of the same size once resized, so none is padded and the detections do not
    depend on the batch.

    Args:
        model (`PreTrainedModel`): In evaluation mode, on any device.
        processor (`BaseImageProcessor`): The model's image processor.
        options (`DetectionOptions`, *optional*): Which detections are kept.
        batch_size (`int`, *optional*, defaults to 1): Maximum number of images in a batch.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Precision of the computations; the weights stay
            as they are.
        on_tiles (`Callable[[int, int], None]`, *optional*): Called after each batch with the tiles of the first
            unfinished image that are done, and their number.

    Example:

    ```python
    detector = Detector(*load_model_and_processor("runs/mine"), batch_size=8)
    for result in detector.stream(find_inputs(["images"])):
        print(result.input.source, result.error or result.detections)
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: BaseImageProcessor,
        options: DetectionOptions = DetectionOptions(),
        *,
        batch_size: int = 1,
        dtype: torch.dtype = torch.float32,
        on_tiles: Callable[[int, int], None] = lambda num_done, num_tiles: None,
    ):
        self.model, self.processor, self.options = model, processor, options
        self.batch_size, self.dtype, self.on_tiles = batch_size, dtype, on_tiles
        self.names = named_classes(model.config.id2label)
        wanted = self.names.keys() if options.labels is None else options.labels
        unwanted = [label not in wanted for label in range(model.config.num_labels)]
        self.unwanted = torch.tensor(unwanted, device=model.device)

    def stream(
        self, inputs: Iterable[ImageInput], pool: Executor | None = None, ahead: int = 4
    ) -> Iterator[ImageResult]:
        """Yield the result of each image, in order. An image that cannot be read has an error instead of detections.

        Args:
            inputs (`Iterable[ImageInput]`): Images; may be endless, since only a few are read ahead.
            pool (`Executor`, *optional*): Threads that read and resize images while the model runs.
            ahead (`int`, *optional*, defaults to 4): Number of images that the threads are ahead of the model.
        """
        pending: dict[int, _Pending] = {}  # from the first image that waits to the last that was read
        groups: dict[Any, list[View]] = defaultdict(list)

        def parts() -> Iterator[Part]:
            for number, result in enumerate(map_ahead(self._read, inputs, pool, ahead)):
                size = result.image.size if result.image else (0, 0)
                boxes = tile_boxes(size, self.options.tile, self.options.tile_overlap)
                pending[number] = _Pending(result, len(boxes), len(boxes))
                # in this thread, because a large image has to be read from top to bottom
                yield from ((number, box, _crop(result, box)) for box in boxes)
                if isinstance(result.image, LargeImage):
                    result.image.release()

        for view in map_ahead(self._preprocess, parts(), pool, ahead):
            shape = view.inputs["pixel_values"].shape if view.inputs else None
            groups[shape].append(view)
            if shape is None or len(groups[shape]) == self.batch_size:
                self._finish(groups.pop(shape), pending)
            yield from self._finished(pending)
            while groups and self._too_many(pending):
                self._finish(groups.pop(min(groups, key=lambda shape: groups[shape][0].number)), pending)
                yield from self._finished(pending)
        for views in groups.values():
            self._finish(views, pending)
        yield from self._finished(pending)

    def _too_many(self, pending: dict[int, _Pending]) -> bool:
        sizes = [each.result.image.size for each in pending.values() if each.result.image]
        num_pixels = sum(width * height for width, height in sizes)
        return len(pending) > MAX_PENDING_BATCHES * self.batch_size or (
            len(sizes) > 1 and num_pixels > MAX_PENDING_PIXELS
        )

    def _read(self, item: ImageInput) -> ImageResult:
        source = item.source
        if isinstance(source, Video):
            return ImageResult(item, error=f"{source}: is a video; its frames are the inputs that read_video yields")
        read = read_image if self.options.tile is None else open_image
        try:
            return ImageResult(item, source.to_image() if isinstance(source, DecodedImage) else read(source))
        except InputError as error:
            return ImageResult(item, error=str(error))

    def _preprocess(self, part: Part) -> View:
        number, box, image = part
        inputs = {} if image is None else dict(self.processor(images=image, return_tensors="pt"))
        return View(number, box, inputs)

    def _finish(self, views: list[View], pending: dict[int, _Pending]) -> None:
        """Detect in views of one size, and add what is found to their images."""
        images = [pending[view.number] for view in views]
        for image in images:
            image.num_waiting -= 1
        first = next(iter(pending.values()))
        self.on_tiles(first.num_views - first.num_waiting, first.num_views)
        if not views[0].inputs:
            return
        try:
            found = self._detect(views)
        except ValueError as error:  # the smallest feature level has too few cells, such as those of a very long image
            height, width = views[0].inputs["pixel_values"].shape[-2:]
            reason = f"cannot be used at its resized size of {width} x {height} pixels ({error})"
            for image in images:
                image.result.error = f"{image.result.input.source}: {reason}"
            return
        for view, image, detections in zip(views, images, found, strict=True):
            image.found.append((view.box, {name: values.cpu() for name, values in detections.items()}))

    def _finished(self, pending: dict[int, _Pending]) -> Iterator[ImageResult]:
        """Remove and yield the first images, as far as none of them waits."""
        while pending and not pending[first := next(iter(pending))].num_waiting:
            image = pending.pop(first)
            if image.result.error:
                yield ImageResult(image.result.input, error=image.result.error)
            else:
                yield replace(image.result, detections=self._to_rows(self._merge(image)))

    def _merge(self, image: _Pending) -> Detections:
        (tiles, found), options = zip(*image.found), self.options
        if len(tiles) == 1:
            return found[0]
        assert image.result.image is not None
        overlap = (options.tile or 0) * options.tile_overlap
        merged = merge_tiles(tiles, found, image.result.image.size, overlap, options.threshold, options.nms_iou)
        best = {name: values[: self._top_k] for name, values in merged.items()}
        self._warn_about_long_objects(best["boxes"], image.result.input.source)
        return best

    def _warn_about_long_objects(self, boxes: torch.Tensor, source: object) -> None:
        overlap = (self.options.tile or 0) * self.options.tile_overlap
        sides = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1)
        longer = sides[sides > overlap]
        if len(longer):
            warn_once(
                "overlap",
                f"{source}: {len(longer)} detections are longer than the {overlap:.0f} pixels that tiles overlap, up "
                f"to {longer.max():.0f}: others may be cut in every tile; raise --tile or --tile_overlap",
            )

    @property
    def _top_k(self) -> int:
        return self.options.top_k or num_selected(self.model.config)

    @torch.inference_mode()
    def _detect(self, views: list[View]) -> list[Detections]:
        device = self.model.device
        inputs = {
            name: torch.cat([view.inputs[name] for view in views]).to(device)
            for name in ("pixel_values", "pixel_mask")
        }
        lower = self.dtype != torch.float32
        with torch.autocast(device.type, self.dtype) if lower else nullcontext():
            outputs = detect(self.model, self.model.config, inputs)
        outputs.logits = outputs.logits.float().masked_fill(self.unwanted, -torch.inf)
        outputs.pred_boxes = outputs.pred_boxes.float()
        return self.processor.post_process_object_detection(
            outputs,
            threshold=self.options.threshold,
            target_sizes=[(y1 - y0, x1 - x0) for x0, y0, x1, y1 in (view.box for view in views)],
            top_k=self._top_k,
            nms_iou_threshold=self.options.nms_iou,
        )

    def _to_rows(self, result: Detections) -> list[dict[str, Any]]:
        columns = (result[name].tolist() for name in ("labels", "scores", "boxes"))
        return [
            {"label": label, "name": self.names[label], "score": score, "box": box}
            for label, score, box in zip(*columns, strict=True)
        ]


def detect_objects(
    model: PreTrainedModel, processor: BaseImageProcessor, image: Image.Image, threshold: float
) -> list[dict[str, Any]]:
    """Detect the objects in an image.

    Args:
        model (`PreTrainedModel`): In evaluation mode, on any device.
        processor (`BaseImageProcessor`): The model's image processor.
        image (`PIL.Image.Image`): The image.
        threshold (`float`): Lowest score of a detection.

    Returns:
        `list[dict[str, Any]]`: As `detections` of [`ImageResult`].
    """
    detector = Detector(model, processor, DetectionOptions(threshold))
    (detections,) = detector._detect([detector._preprocess((0, (0, 0, *image.size), image))])
    return detector._to_rows(detections)


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], pool: Executor | None, ahead: int
) -> Iterator[Result]:
    """Apply a function in other threads to a few items more than are consumed, and yield the results in order."""
    if pool is None:
        yield from map(function, items)
        return
    futures: deque[Any] = deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


@contextmanager
def worker_threads(num_workers: int) -> Iterator[Executor | None]:
    """Make a pool of threads for a context, `None` for none. At its end, also by an error, nothing more is begun."""
    pool = ThreadPoolExecutor(num_workers) if num_workers else None
    try:
        yield pool
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def _crop(result: ImageResult, box: Box) -> Image.Image | None:
    """Return a part of an image, `None` if it cannot be read."""
    if result.image is None or result.error:
        return None
    if isinstance(result.image, Image.Image) and box == (0, 0, *result.image.size):
        return result.image
    try:
        return result.image.crop(box)
    except InputError as error:
        result.error = str(error)
        return None
