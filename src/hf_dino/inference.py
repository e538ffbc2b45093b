"""Detect objects in images and draw them."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BaseImageProcessor

from .data import list_images, read_image
from .registration import DinoDetrForObjectDetection
from .utils.errors import InputError
from .visualization import draw_detections, save_image


@torch.no_grad()
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
        `list[dict[str, Any]]`: `name`, `score` and `box` (x0, y0, x1, y1 in pixels) of each detection, sorted by
        descending score.
    """
    inputs = processor(images=image, return_tensors="pt").to(model.device)
    (result,) = processor.post_process_object_detection(
        model(**inputs),
        threshold=threshold,
        target_sizes=[(image.height, image.width)],
        top_k=model.config.num_select,
    )
    rows = zip(result["labels"].tolist(), result["scores"].tolist(), result["boxes"].tolist(), strict=True)
    return [{"name": model.config.id2label[label], "score": score, "box": box} for label, score, box in rows]


def draw_objects(
    model: DinoDetrForObjectDetection, processor: BaseImageProcessor, source: Path, target: Path, threshold: float
) -> list[dict[str, Any]]:
    """Detect the objects in an image file, write a copy with their boxes to `target`, and return the detections.

    Args:
        source (`Path`): The image file to read.
        target (`Path`): The image file to write; its suffix gives the format.

    Raises:
        InputError: If the image cannot be read.
    """
    image = read_image(source)
    detections = detect_objects(model, processor, image, threshold)
    boxes, names, scores = ([detection[key] for detection in detections] for key in ("box", "name", "score"))
    save_image(draw_detections(image, boxes, names, scores, model.config.id2label.values()), target)
    return detections


def plan_outputs(images: list[Path], output: Path) -> dict[Path, Path]:
    """Map each image file to the file that its drawing is written to.

    Args:
        images (`list[Path]`): Image files, and directories of them.
        output (`Path`): An image file for a single image. Otherwise a directory, in which each drawing is a PNG file
            with the name of its image.

    Raises:
        InputError: If an image is not found, `output` is a file but there are several images, or two drawings would
            have the same path.
    """
    sources = list_images(images)
    if len(images) == 1 and images[0].is_file() and not output.is_dir() and output.suffix:
        return {sources[0]: output}
    if output.suffix.lower() in Image.registered_extensions() and not output.is_dir():
        raise InputError(f"{output}: is the name of one image, but {len(sources)} are to be drawn; name a directory")
    targets = {source: output / f"{source.stem}.png" for source in sources}
    duplicates = [str(target) for target, count in Counter(targets.values()).items() if count > 1]
    if duplicates:
        raise InputError(f"several images would be drawn into {duplicates[0]}; rename one, or draw them one by one")
    return targets
