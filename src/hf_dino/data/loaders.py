"""Batches for training and evaluation: samplers, collators and data loaders."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Sampler
from transformers import BaseImageProcessor

from ..loss_dino_detr import check_labels
from ..utils.errors import InputError
from .augmentation import get_resized_shape, seed_per_image
from .dataset import DetectionDataset, DetectionSplit


STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
"""Sent by Ctrl-C, by job schedulers and preempted machines, and by Slurm's `--signal`."""


class TrainingBatchSampler(Sampler[list[int]]):
    """Sample the batches of one epoch for one process, in an order that depends on `seed` and `epoch` only.

    Every optimizer step sees exactly `global_batch_size` images, however many processes and accumulated batches it is
    split into. The last step of an epoch is filled with the first images of the epoch. With `get_shape`, images of
    similar shapes share a batch, which reduces padding. Only the order within a step changes, so this has no effect
    if a step is a single batch.

    Args:
        length (`int`): Number of images.
        global_batch_size (`int`): Images per optimizer step, over all processes and accumulated batches.
        seed (`int`): Seed of the order.
        epoch (`int`): Counted from 0.
        rank (`int`, *optional*, defaults to 0): Rank of this process.
        world_size (`int`, *optional*, defaults to 1): Number of processes.
        gradient_accumulation_steps (`int`, *optional*, defaults to 1): Batches per optimizer step and process.
        first_step (`int`, *optional*, defaults to 0): Optimizer steps of this epoch to skip, for a resumed run.
        get_shape (`Callable[[int], tuple[int, int]]`, *optional*): Returns the `(height, width)` in pixels that an
            image has in its batch, as [`predict_batch_shapes`] does. Called for the images of a step when the step is
            due.

    Raises:
        InputError: If `global_batch_size` cannot be split evenly.

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
        global_batch_size: int,
        *,
        seed: int,
        epoch: int,
        rank: int = 0,
        world_size: int = 1,
        gradient_accumulation_steps: int = 1,
        first_step: int = 0,
        get_shape: Callable[[int], tuple[int, int]] | None = None,
    ):
        per_device_batch_size(global_batch_size, world_size, gradient_accumulation_steps)
        steps = steps_per_epoch(length, global_batch_size)
        order = torch.randperm(length, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        order = order.repeat(-(-steps * global_batch_size // length))[: steps * global_batch_size]
        self.steps: list[list[int]] = order.view(steps, global_batch_size)[first_step:].tolist()
        self.rank, self.world_size = rank, world_size
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.get_shape = get_shape or (lambda index: (0, 0))  # the stable sort keeps the order of equal shapes

    def __len__(self) -> int:
        return len(self.steps) * self.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            indices = torch.tensor(sorted(step, key=self._sort_key))
            # neighbors go to different processes at the same time, so that none waits long for another
            batches = indices.view(self.gradient_accumulation_steps, self.world_size, -1)
            yield from batches[:, self.rank].tolist()

    def _sort_key(self, index: int) -> int:
        """Sort tall images by descending height, then wide ones by ascending width."""
        height, width = self.get_shape(index)
        return width if width >= height else -height


class SameSizeBatchSampler(Sampler[list[int]]):
    """Sample batches of images that have the same size once resized, so that none of them is padded.

    Padding influences a backbone's features near the border. Without it, the detections in an image do not depend on
    the batch. Each image is in exactly one batch of one process, and the largest images come first.

    Args:
        shapes (`Sequence[tuple[int, int]]`): `(height, width)` of each image once resized.
        batch_size (`int`): Maximum number of images in a batch.
        rank (`int`, *optional*, defaults to 0): Rank of this process.
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
        # the largest first: running out of memory shows at once, and the processes finish at about the same time
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
    """Collate items of [`DetectionDataset`] into a training batch, padded to its largest image.

    Attributes:
        processor (`BaseImageProcessor`): A DINO image processor.
        category_id_to_label (`Mapping[int, int]`): From [`label_of_category`].
        num_labels (`int`): Number of labels of the model.
        do_resize (`bool`): False if the augmentation resizes already.
    """

    processor: BaseImageProcessor
    category_id_to_label: Mapping[int, int]
    num_labels: int
    do_resize: bool

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Return `pixel_values`, `pixel_mask` and `labels`.

        Raises:
            InputError: If the model cannot be trained on a label. The message names the image.
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
    """Collate items of [`DetectionDataset`] into an evaluation batch.

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


def per_device_batch_size(global_batch_size: int, world_size: int, gradient_accumulation_steps: int) -> int:
    """Return the number of images per process and accumulated batch.

    Raises:
        InputError: If the global batch cannot be split evenly.
    """
    batches = world_size * gradient_accumulation_steps
    if global_batch_size % batches:
        raise InputError(
            f"a global batch of {global_batch_size} images cannot be split evenly into {world_size} processes x "
            f"{gradient_accumulation_steps} accumulated batches. Choose a multiple of {batches}"
        )
    return global_batch_size // batches


def steps_per_epoch(num_images: int, global_batch_size: int) -> int:
    """Return the number of optimizer steps that see every image at least once."""
    return -(-num_images // global_batch_size)


def predict_batch_shapes(dataset: DetectionDataset, collate: TrainingCollator) -> Callable[[int], tuple[int, int]]:
    """Predict the `(height, width)` in pixels of each item in its batch, without reading the image.

    The official implementation's augmentation samples a new size and crop for every image, so the aspect ratio on
    disk is not enough. Sampling them again from the image's own seed gives the same values.

    Args:
        dataset (`DetectionDataset`): The dataset of the epoch. A user's own augmentation is assumed to keep the shape,
            unless it overrides `output_shape`.
        collate (`TrainingCollator`): Collates the items of `dataset`.
    """

    def get_shape(index: int) -> tuple[int, int]:
        record = dataset.split.images[index]
        boxes = torch.from_numpy(record.clipped_boxes)
        with seed_per_image(dataset.seed, dataset.epoch, record.image_id):
            shape = dataset.augmentation.output_shape(record.height, record.width, boxes)
        return get_processed_shape(collate.processor, *shape) if collate.do_resize else shape

    return get_shape


def get_processed_shape(processor: BaseImageProcessor, height: int, width: int) -> tuple[int, int]:
    """Return the `(height, width)` to which the processor resizes an image of `height` x `width` pixels.

    Raises:
        InputError: If the processor's `size` is of a kind that DINO's does not support.
    """
    return get_resized_shape(dict(processor.size), height, width)


def evaluation_loader(
    split: DetectionSplit,
    processor: BaseImageProcessor,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
) -> DataLoader:
    """Load the images of a split in batches of one size, each image in exactly one process.

    Args:
        split (`DetectionSplit`): From [`read_data`] or [`read_coco`].
        processor (`BaseImageProcessor`): A DINO image processor.
        batch_size (`int`): Maximum number of images in a batch of this process.
        rank (`int`, *optional*, defaults to 0): Rank of this process.
        world_size (`int`, *optional*, defaults to 1): Number of processes.
        num_workers (`int`, *optional*, defaults to 0): Number of DataLoader workers.
        collate (`Callable`, *optional*): Makes batches of items; by default, an [`EvaluationCollator`].
    """
    shapes = [get_processed_shape(processor, image.height, image.width) for image in split.images]
    return DataLoader(
        DetectionDataset(split),
        batch_sampler=SameSizeBatchSampler(shapes, batch_size, rank, world_size),
        collate_fn=collate or EvaluationCollator(processor),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=partial(start_worker, Image.MAX_IMAGE_PIXELS),
    )


def training_loader(
    dataset: DetectionDataset,
    collate: TrainingCollator,
    batches: TrainingBatchSampler,
    *,
    num_workers: int = 0,
) -> DataLoader:
    """Load one epoch. Dataset and sampler belong to an epoch, so make a new loader for each."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        # all batches of a step: their objects are counted before the first forward
        prefetch_factor=max(2, -(-batches.gradient_accumulation_steps // num_workers)) if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=partial(start_worker, Image.MAX_IMAGE_PIXELS),
        # a separate generator, so that starting a loader does not advance the random numbers of the denoising queries
        generator=torch.Generator(),
    )


def start_worker(max_image_pixels: int | None, worker_id: int) -> None:
    """Prepare a DataLoader worker: `worker_init_fn`, once the first argument is bound.

    Args:
        max_image_pixels (`int`, *optional*): Pillow's limit in the parent process, which a spawned worker lacks.
        worker_id (`int`): Not used.
    """
    Image.MAX_IMAGE_PIXELS = max_image_pixels
    ignore_stop_signals()


def ignore_stop_signals() -> None:
    """Let a DataLoader worker outlive stop signals, which often go to all processes of a job.

    The parent process still needs batches to finish its step. Only a SIGTERM from the parent ends the worker: torch
    and `multiprocessing` would wait forever for one that ignores it. Where the sender cannot be determined (macOS,
    Windows), and in workers that are spawned rather than forked, SIGTERM may keep its effect.
    """
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_from, args=(os.getppid(),), daemon=True).start()


def _exit_on_sigterm_from(sender: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != sender:
        pass
    os._exit(0)  # as torch's own handler: any other status would be reported as a crash
