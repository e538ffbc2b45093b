"""Which images share a batch, and how items become one: shuffled for training, of equal size for evaluation."""

import atexit
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import active_children
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import BaseImageProcessor

from ..loss_dino_detr import check_labels
from ..utils.errors import InputError
from .augmentation import seed_per_image, shape_of_size
from .dataset import DetectionDataset, DetectionSplit


# Ctrl-C, what job schedulers and machines that are about to be taken away send, and what Slurm's `--signal` is for.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class TrainingBatchSampler(Sampler[list[int]]):
    """One epoch's batches of one process: every image in an order that only `seed` and `epoch` decide.

    Every optimizer step sees exactly `step_size` images, whatever the number of processes and accumulated batches:
    the last step of an epoch is filled up from the epoch's first images. With `shape_of`, batches get images of
    like shapes, so that fewer pixels are padding; what is in a step stays as it is, only who takes which part of it
    changes. A step that is one batch is therefore not helped.

    Args:
        length (`int`): Number of images.
        step_size (`int`): Images per optimizer step, over all processes and accumulated batches.
        seed (`int`): With `epoch`, decides the order.
        epoch (`int`): Counted from 0.
        rank (`int`, *optional*, defaults to 0): This process.
        world_size (`int`, *optional*, defaults to 1): Number of processes.
        accumulation (`int`, *optional*, defaults to 1): Batches per optimizer step and process.
        first_step (`int`, *optional*, defaults to 0): Optimizer steps of this epoch that are done already.
        shape_of (`Callable[[int], tuple[int, int]]`, *optional*): From [`predict_batch_shapes`]: `(height, width)` in
            pixels of an image in its batch. Asked for a step's images when the step comes.

    Raises:
        InputError: If `step_size` cannot be shared out evenly.

    Example:

    ```python
    >>> batches = [list(TrainingBatchSampler(5, 4, seed=0, epoch=0, rank=rank, world_size=2)) for rank in (0, 1)]
    >>> [len(batch) for batch in batches[0]], sorted(set(sum(batches[0] + batches[1], [])))
    ([2, 2], [0, 1, 2, 3, 4])

    ```
    """

    def __init__(
        self,
        length: int,
        step_size: int,
        *,
        seed: int,
        epoch: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        first_step: int = 0,
        shape_of: Callable[[int], tuple[int, int]] | None = None,
    ):
        per_device_batch_size(step_size, world_size, accumulation)
        steps = steps_per_epoch(length, step_size)
        order = torch.randperm(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        order = order.repeat(-(-steps * step_size // length))[: steps * step_size]
        self.steps: list[list[int]] = order.view(steps, step_size)[first_step:].tolist()
        self.rank, self.world_size, self.accumulation = rank, world_size, accumulation
        self.shape_of = shape_of or (lambda index: (0, 0))  # all alike: sorting leaves the order as it is

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            images = torch.tensor(sorted(step, key=self._place))
            # neighbors go to the processes at the same time, so that none waits long for another
            yield from images.view(self.accumulation, self.world_size, -1)[:, self.rank].tolist()

    def _place(self, index: int) -> int:
        """Where an image comes in its step: tall ones from large to small, then wide ones from small to large."""
        height, width = self.shape_of(index)
        return width if width >= height else -height


class SameSizeBatchSampler(Sampler[list[int]]):
    """Batches of images that have the same size once resized, so that no image is padded because of another.

    Padding reaches the borders of a backbone's features; without it an image's detections do not depend on the batch
    that it is in. The processes get every image exactly once between them, the largest images first.

    Args:
        shapes (`Sequence[tuple[int, int]]`): `(height, width)` of each image once resized.
        batch_size (`int`): The most images in a batch.
        rank (`int`, *optional*, defaults to 0): This process.
        world_size (`int`, *optional*, defaults to 1): Number of processes.

    Example:

    ```python
    >>> list(SameSizeBatchSampler([(4, 6), (6, 4), (4, 6), (4, 6)], batch_size=2))
    [[1], [0, 2], [3]]

    ```
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], batch_size: int, rank: int = 0, world_size: int = 1):
        groups: dict[tuple[int, int], list[int]] = {}
        for index, shape in enumerate(shapes):
            groups.setdefault(shape, []).append(index)
        # the largest first: too little memory shows at once, and the processes end together
        largest_first = sorted(groups, key=lambda shape: (shape[0] * shape[1], shape), reverse=True)
        batches = [
            groups[shape][start : start + batch_size]
            for shape in largest_first
            for start in range(0, len(groups[shape]), batch_size)
        ]
        self.batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


@dataclass(frozen=True)
class TrainingCollator:
    """Turns items of [`DetectionDataset`] into the arguments of the model, padded to the largest image of the batch.

    Attributes:
        processor (`BaseImageProcessor`): A DINO image processor.
        category_id_to_label (`Mapping[int, int]`): From [`label_of_category`].
        num_labels (`int`): Of the model.
        do_resize (`bool`): False where the augmentation resizes already.
    """

    processor: BaseImageProcessor
    category_id_to_label: Mapping[int, int]
    num_labels: int
    do_resize: bool

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Return `pixel_values`, `pixel_mask` and `labels`.

        Raises:
            InputError: If the model could not learn from a label, naming the image, which the model does not know.
        """
        batch = self.processor(
            images=[item["image"] for item in items],
            annotations=[item["annotation"] for item in items],
            category_id_to_label=self.category_id_to_label,
            do_resize=self.do_resize,
            return_tensors="pt",
        )
        labels = [dict(label) for label in batch["labels"]]
        try:
            check_labels(labels, len(items), self.num_labels)
        except ValueError as error:
            raise InputError(str(error)) from None
        return {"pixel_values": batch["pixel_values"], "pixel_mask": batch["pixel_mask"], "labels": labels}


@dataclass(frozen=True)
class EvaluationCollator:
    """Turns items of [`DetectionDataset`] into the arguments of the model and what is needed to read its answer.

    Attributes:
        processor (`BaseImageProcessor`): A DINO image processor.
    """

    processor: BaseImageProcessor

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Return `pixel_values`, `pixel_mask`, `image_ids` and `target_sizes` (height, width in pixels)."""
        images = [item["image"] for item in items]
        batch = self.processor(images=images, return_tensors="pt")
        return {
            "pixel_values": batch["pixel_values"],
            "pixel_mask": batch["pixel_mask"],
            "image_ids": [item["annotation"]["image_id"] for item in items],
            "target_sizes": [(image.height, image.width) for image in images],
        }


def per_device_batch_size(step_size: int, world_size: int, accumulation: int) -> int:
    """Share out the images of an optimizer step to processes and accumulated batches.

    Raises:
        InputError: If that cannot be done evenly.
    """
    batches = world_size * accumulation
    if step_size % batches:
        raise InputError(
            f"a batch of {step_size} images cannot be shared out evenly to {world_size} processes x "
            f"{accumulation} accumulated batches; choose a multiple of {batches}"
        )
    return step_size // batches


def steps_per_epoch(num_images: int, step_size: int) -> int:
    """Optimizer steps that show every image at least once."""
    return -(-num_images // step_size)


def predict_batch_shapes(data: DetectionDataset, collate: TrainingCollator) -> Callable[[int], tuple[int, int]]:
    """Foretell the `(height, width)` in pixels that each item gets in its batch, without reading an image.

    Aspect ratios alone would not do: the original's augmentation draws a new size and crop for every image, which
    are the same again here, since they are drawn from the image's own random numbers.

    Args:
        data (`DetectionDataset`): Of the epoch. A user's own augmentation is not foretold: its images count as they
            are on disk.
        collate (`TrainingCollator`): What makes batches of its items.
    """

    def shape_of(index: int) -> tuple[int, int]:
        image = data.data.images[index]
        boxes = torch.from_numpy(image.clipped_boxes)
        with seed_per_image(data.seed, data.epoch, image.image_id):
            shape = data.augmentation.shape(image.height, image.width, boxes)
        return get_processed_shape(collate.processor, *shape) if collate.do_resize else shape

    return shape_of


def get_processed_shape(processor: BaseImageProcessor, height: int, width: int) -> tuple[int, int]:
    """Say what `(height, width)` the processor gives to an image of `height` x `width` pixels.

    Raises:
        InputError: If the processor's `size` is of a kind that DINO's does not have.
    """
    return shape_of_size(dict(processor.size), height, width)


def evaluation_loader(
    data: DetectionSplit,
    processor: BaseImageProcessor,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> DataLoader:
    """Load the images of `data` in batches of equal size, each image in exactly one process.

    Args:
        data (`DetectionSplit`): From [`read_data`] or [`read_coco`].
        processor (`BaseImageProcessor`): A DINO image processor.
        batch_size (`int`): The most images in a batch of this process.
        rank (`int`, *optional*, defaults to 0): This process.
        world_size (`int`, *optional*, defaults to 1): Number of processes.
        num_workers (`int`, *optional*, defaults to 0): Processes that read ahead.
    """
    shapes = [get_processed_shape(processor, image.height, image.width) for image in data.images]
    return DataLoader(
        DetectionDataset(data),
        batch_sampler=SameSizeBatchSampler(shapes, batch_size, rank, world_size),
        collate_fn=EvaluationCollator(processor),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_parent,
    )


def training_loader(
    data: DetectionDataset,
    collate: TrainingCollator,
    batches: TrainingBatchSampler,
    *,
    num_workers: int = 0,
) -> DataLoader:
    """Load one epoch. Make a new loader for each: dataset and batches belong to an epoch."""
    return DataLoader(
        data,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        # enough for a whole step, of which the number of objects is asked before its first batch is learned from
        prefetch_factor=max(2, -(-batches.accumulation // num_workers)) if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        # a generator of its own, so that starting a loader draws nothing from the numbers that the noise comes from
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_parent,
    )


def _leave_signals_to_parent(worker: int) -> None:
    """Let a process that reads go on when a signal goes to all processes of a job: its parent ends it in time."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_readers() -> None:
    """End what still reads for an iterator that a traceback holds: Python would ask it to end, and wait for ever."""
    traceback.clear_frames(getattr(sys, "last_traceback", None))  # of the error that ends the program: in good order
    for process in active_children():
        if process.daemon:
            process.terminate()
            process.join(1)
            process.kill()
