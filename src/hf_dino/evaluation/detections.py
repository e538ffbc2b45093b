"""Detections of fixed size on the disk: written while the model runs, gathered from all processes, read as an array.

Memory does not grow with the number of images: what a process holds is a batch, and later one block of records.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from transformers import BaseImageProcessor

from ..data.dataset import xyxy_to_xywh
from ..utils.distributed import summon_full_params
from ..utils.io import annotate_oserror, open_new_text_file
from .records import DETECTION_DTYPE


_BLOCK = 1 << 16  # records that are gathered or copied at once: 3.5 MiB of each process


@torch.no_grad()
def collect_detections(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    processor: BaseImageProcessor,
    label_to_category_id: Mapping[int, int],
    accelerator: Accelerator,
    on_batch: Callable[[int], None] = lambda num_images: None,
) -> np.ndarray:
    """Run a model over a dataset and return its detections, which lie on the disk.

    The model is put back into the mode that it was in. Each process reads its own share, so none of its calls waits
    for another process: the shares need not have the same length, and no image is counted twice. Each process
    writes to a temporary file of its own, and the files are exchanged through `accelerator`, so the processes need
    not share a folder. `TMPDIR` says where the files are; they have no name and vanish with their process.

    Args:
        model (`nn.Module`): A detection model, prepared by `accelerator` or not.
        loader (`Iterable[dict]`): From [`evaluation_loader`], this process's share; not prepared by `accelerator`.
        processor (`BaseImageProcessor`): The model's image processor.
        label_to_category_id (`Mapping[int, int]`): The model's labels to raw category ids. Detections of labels that
            it lacks are left out.
        accelerator (`Accelerator`): Gives the device and gathers the results.
        on_batch (`Callable[[int], None]`, *optional*): Called after each batch with its number of images.

    Returns:
        `np.ndarray` of shape `(num_detections,)` and dtype [`DETECTION`]: The best `config.num_select` of each image
        of every process, by rising image id, the best of an image first; read from the disk as it is used.
    """
    # without the wrapper of DistributedDataParallel, whose forward waits for the other processes
    network = accelerator.unwrap_model(model)
    with _temporary_file() as own:
        with eval_mode(network), summon_full_params(network):
            for batch in loader:
                tensors = {name: batch[name] for name in ("pixel_values", "pixel_mask")}
                outputs = network(**send_to_device(tensors, accelerator.device, non_blocking=True))
                found = processor.post_process_object_detection(
                    outputs, threshold=0.0, target_sizes=batch["target_sizes"], top_k=network.config.num_select
                )
                for image_id, detection in zip(batch["image_ids"], found, strict=True):
                    own.write(_records(image_id, detection, label_to_category_id).tobytes())
                on_batch(len(batch["image_ids"]))
        return sort_by_image(_gather(_map(own), accelerator))


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Have a model in evaluation mode, and then in the mode that it was in, whatever happens."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def sort_by_image(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Write records into a temporary file by rising image id, those of one image in the order in which they came.

    Args:
        parts (`Iterable[np.ndarray]`): Arrays of dtype [`DETECTION`], of any length, an image's detections all in
            the same process's parts.

    Returns:
        `np.ndarray` of shape `(num_detections,)` and dtype [`DETECTION`]: All records, read from the disk when used.
    """
    with _temporary_file() as unsorted, _temporary_file() as result:
        for part in parts:
            unsorted.write(part.tobytes())
        records = _map(unsorted)
        order = np.argsort(records["image_id"], kind="stable")
        for start in range(0, len(order), _BLOCK):
            result.write(records[order[start : start + _BLOCK]].tobytes())
        return _map(result)


def write_coco_results(path: Path, detections: np.ndarray) -> None:
    """Write detections as COCO results, a JSON list of `image_id`, `category_id`, `bbox` and `score`, bit by bit.

    Args:
        path (`Path`): A new file, which appears once it is whole.
        detections (`np.ndarray`): Of dtype [`DETECTION`].

    Raises:
        InputError: If the file exists.
    """
    with open_new_text_file(path) as file:
        separator = "[\n"
        for result in _coco_results(detections):
            file.write(separator + json.dumps(result))
            separator = ",\n"
        file.write("\n]\n" if len(detections) else "[]\n")


def _coco_results(detections: np.ndarray) -> Iterator[dict[str, Any]]:
    for start in range(0, len(detections), _BLOCK):
        for record in detections[start : start + _BLOCK].tolist():
            result = dict(zip(detections.dtype.names or (), record))
            yield {**result, "bbox": result["bbox"].tolist()}


def _records(
    image_id: int, detection: Mapping[str, torch.Tensor], label_to_category_id: Mapping[int, int]
) -> np.ndarray:
    """One image's detections, boxes given as corners."""
    labels = detection["labels"].tolist()
    kept = [index for index, label in enumerate(labels) if label in label_to_category_id]
    records = np.empty(len(kept), DETECTION_DTYPE)
    records["image_id"] = image_id
    records["category_id"] = [label_to_category_id[labels[index]] for index in kept]
    records["bbox"] = xyxy_to_xywh(detection["boxes"].float().cpu()[kept].numpy())
    records["score"] = detection["scores"].float().cpu()[kept].numpy()
    return records


def _gather(own: np.ndarray, accelerator: Accelerator) -> Iterator[np.ndarray]:
    """Every process's records, to every process, block by block: plain bytes, since gathered tensors must be alike."""
    counts = accelerator.gather(torch.tensor([len(own)], device=accelerator.device)).tolist()
    for start in range(0, max(counts), _BLOCK):
        block = np.zeros(min(_BLOCK, max(counts) - start), DETECTION_DTYPE)
        part = own[start : start + _BLOCK]
        block[: len(part)] = part
        blocks = accelerator.gather(torch.from_numpy(block.view(np.uint8)).to(accelerator.device))
        for records, count in zip(
            blocks.cpu().numpy().view(DETECTION_DTYPE).reshape(len(counts), -1), counts, strict=True
        ):
            yield records[: max(0, count - start)]


@contextmanager
def _temporary_file() -> Iterator[IO[bytes]]:
    with annotate_oserror(Path(tempfile.gettempdir())), tempfile.TemporaryFile() as file:
        yield file


def _map(file: IO[bytes]) -> np.ndarray:
    """The records in a file, which stay readable after it is closed and are read when they are used."""
    file.flush()
    num_records = file.tell() // DETECTION_DTYPE.itemsize
    # an empty file cannot be mapped
    return (
        np.memmap(file, DETECTION_DTYPE, mode="r", shape=num_records) if num_records else np.empty(0, DETECTION_DTYPE)
    )
