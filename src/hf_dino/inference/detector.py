"""Detect objects in a stream of images: read ahead, batched by size, in the order of the images."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from transformers import BaseImageProcessor

from ..data.images import read_image
from ..registration import DinoDetrForObjectDetection
from ..utils.errors import InputError
from ..utils.names import named_classes
from .sources import ImageInput


Item = TypeVar("Item")
Result = TypeVar("Result")
Detections = dict[str, torch.Tensor]  # scores, labels and boxes, as the image processor returns them

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
            by default none is, and DINO needs no non-maximum suppression.
    """

    threshold: float = 0.3
    labels: frozenset[int] | None = None
    top_k: int | None = None
    nms_iou: float | None = None


@dataclass
class ImageResult:
    """An image and the objects detected in it.

    Attributes:
        input (`ImageInput`): The image's source and name.
        image (`PIL.Image.Image`, *optional*): The pixels; `None` if they cannot be read.
        error (`str`): Why they cannot be read.
        detections (`list[dict[str, Any]]`): `label`, `name`, `score` and `box` (x0, y0, x1, y1 in pixels) of each,
            sorted by descending score.
    """

    input: ImageInput
    image: Image.Image | None = None
    error: str = ""
    detections: list[dict[str, Any]] = field(default_factory=list)


class View(NamedTuple):
    """An image as the model takes it.

    Attributes:
        number (`int`): Of the image in the stream.
        size (`tuple[int, int]`): Height and width of the image in pixels.
        inputs (`dict[str, torch.Tensor]`): From the image processor; empty if there is no image.
    """

    number: int
    size: tuple[int, int]
    inputs: dict[str, torch.Tensor]


class Detector:
    """Detect objects in any number of images with bounded memory.

    Images are batched only with those of the same size once resized, so none is padded and the detections do not
    depend on the batch.

    Args:
        model (`DinoDetrForObjectDetection`): In evaluation mode, on any device.
        processor (`BaseImageProcessor`): The model's image processor.
        options (`DetectionOptions`, *optional*): Which detections are kept.
        batch_size (`int`, *optional*, defaults to 1): Maximum number of images in a batch.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Precision of the computations; the weights stay
            as they are.

    Example:

    ```python
    detector = Detector(*load_model_and_processor("runs/mine"), batch_size=8)
    for result in detector.stream(find_inputs(["images"]), num_workers=2):
        print(result.input.source, result.error or result.detections)
    ```
    """

    def __init__(
        self,
        model: DinoDetrForObjectDetection,
        processor: BaseImageProcessor,
        options: DetectionOptions = DetectionOptions(),
        *,
        batch_size: int = 1,
        dtype: torch.dtype = torch.float32,
    ):
        self.model, self.processor, self.options = model, processor, options
        self.batch_size, self.dtype = batch_size, dtype
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
        pending: dict[int, ImageResult] = {}  # from the first image that waits to the last that was read
        waiting: set[int] = set()
        groups: dict[Any, list[View]] = defaultdict(list)

        def numbered() -> Iterator[tuple[int, ImageResult]]:
            for number, result in enumerate(map_ahead(_read, inputs, pool, ahead)):
                pending[number] = result
                waiting.add(number)
                yield number, result

        def finish(views: list[View]) -> None:
            results = self._results(views, [pending[view.number] for view in views])
            for view, result in zip(views, results, strict=True):
                pending[view.number] = result
                waiting.remove(view.number)

        def finished() -> Iterator[ImageResult]:
            while pending and (first := next(iter(pending))) not in waiting:
                yield pending.pop(first)

        for view in map_ahead(self._preprocess, numbered(), pool, ahead):
            if not view.inputs:
                waiting.remove(view.number)
            else:
                shape = view.inputs["pixel_values"].shape
                groups[shape].append(view)
                if len(groups[shape]) == self.batch_size:
                    finish(groups.pop(shape))
            while groups and self._too_many(pending):
                finish(groups.pop(min(groups, key=lambda shape: groups[shape][0].number)))
                yield from finished()
            yield from finished()
        for views in groups.values():
            finish(views)
        yield from finished()

    def _too_many(self, pending: dict[int, ImageResult]) -> bool:
        pixels = sum(result.image.width * result.image.height for result in pending.values() if result.image)
        return len(pending) > MAX_PENDING_BATCHES * self.batch_size or pixels > MAX_PENDING_PIXELS

    def _preprocess(self, numbered: tuple[int, ImageResult]) -> View:
        number, result = numbered
        if result.image is None:
            return View(number, (0, 0), {})
        inputs = self.processor(images=result.image, return_tensors="pt")
        return View(number, (result.image.height, result.image.width), dict(inputs))

    def _results(self, views: list[View], results: list[ImageResult]) -> list[ImageResult]:
        try:
            found = self._detect(views)
        except ValueError as error:  # the smallest feature level has too few cells, such as those of a very long image
            height, width = views[0].inputs["pixel_values"].shape[-2:]
            reason = f"cannot be used at its resized size of {width} x {height} pixels ({error})"
            return [ImageResult(result.input, error=f"{result.input.source}: {reason}") for result in results]
        return [replace(result, detections=detections) for result, detections in zip(results, found, strict=True)]

    @torch.inference_mode()
    def _detect(self, views: list[View]) -> list[list[dict[str, Any]]]:
        device = self.model.device
        inputs = {
            name: torch.cat([view.inputs[name] for view in views]).to(device)
            for name in ("pixel_values", "pixel_mask")
        }
        lower = self.dtype != torch.float32
        with torch.autocast(device.type, self.dtype) if lower else nullcontext():
            outputs = self.model(**inputs)
        outputs.logits = outputs.logits.float().masked_fill(self.unwanted, -torch.inf)
        outputs.pred_boxes = outputs.pred_boxes.float()
        results = self.processor.post_process_object_detection(
            outputs,
            threshold=self.options.threshold,
            target_sizes=[view.size for view in views],
            top_k=self.options.top_k or self.model.config.num_select,
            nms_iou_threshold=self.options.nms_iou,
        )
        return [self._to_rows(result) for result in results]

    def _to_rows(self, result: Detections) -> list[dict[str, Any]]:
        columns = (result[name].tolist() for name in ("labels", "scores", "boxes"))
        return [
            {"label": label, "name": self.names[label], "score": score, "box": box}
            for label, score, box in zip(*columns, strict=True)
        ]


def detect_objects(
    model: DinoDetrForObjectDetection, processor: BaseImageProcessor, image: Image.Image, threshold: float
) -> list[dict[str, Any]]:
    """Detect the objects in an image.

    Args:
        model (`DinoDetrForObjectDetection`): In evaluation mode, on any device.
        processor (`BaseImageProcessor`): The model's image processor.
        image (`PIL.Image.Image`): The image.
        threshold (`float`): Lowest score of a detection.

    Returns:
        `list[dict[str, Any]]`: As `detections` of [`ImageResult`].
    """
    detector = Detector(model, processor, DetectionOptions(threshold))
    (detections,) = detector._detect([detector._preprocess((0, ImageResult(ImageInput(None, ""), image)))])
    return detections


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


def worker_threads(num_workers: int) -> Any:
    """Return a context of a pool of threads, of `None` for none."""
    return ThreadPoolExecutor(num_workers) if num_workers else nullcontext()


def _read(item: ImageInput) -> ImageResult:
    try:
        return ImageResult(item, read_image(item.source))
    except InputError as error:
        return ImageResult(item, error=str(error))
