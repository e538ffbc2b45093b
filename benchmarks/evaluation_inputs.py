"""Random images full of objects and crowds, with detections that are right, nearly right and wrong."""

from pathlib import Path

import numpy as np

from hf_dino.data import AnnotatedImage, DetectionSplit
from hf_dino.evaluation import DETECTION_DTYPE


def generate(
    num_images: int,
    num_detections: int,
    *,
    num_categories: int = 80,
    objects_per_image: float = 7.2,
    crowd_share: float = 0.01,
    decimals: int = 16,
    seed: int = 0,
) -> tuple[DetectionSplit, np.ndarray]:
    """Make a dataset without image files, and `num_detections` of each image, sorted by descending score.

    Scores are rounded to `decimals`; few make ties. Categories are as unequally frequent as COCO's, the last one has
    no object, and every seventh image has none.
    """
    rng = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, num_categories + 1)
    frequency[-1] = 0
    frequency /= frequency.sum()
    images, detections = [], np.empty(num_images * num_detections, DETECTION_DTYPE)
    for number, found in enumerate(np.split(detections, num_images)):
        image_id = 3 * num_images - 2 * number  # neither from 0, nor without gaps, nor rising
        count = rng.poisson(objects_per_image) if number % 7 else 0
        boxes, classes = _boxes(rng, count), rng.choice(num_categories, count, p=frequency)
        areas = boxes[:, 2] * boxes[:, 3] * rng.uniform(0.5, 1, count)  # as of masks
        crowds = (rng.random(count) < crowd_share).astype(np.int64)
        path = Path(f"{image_id}.jpg")
        images.append(AnnotatedImage(image_id, path, 480, 640, boxes, 10 + 2 * classes, areas, crowds))

        found["image_id"] = image_id
        found["category_id"] = 10 + 2 * rng.choice(num_categories, num_detections)
        found["bbox"], found["score"] = _boxes(rng, num_detections), rng.beta(1, 8, num_detections)
        # two for each object, most of them near it and of its class
        about = rng.permutation(np.tile(np.arange(count), 2))[:num_detections]
        found["bbox"][: len(about)] = (
            boxes[about] + rng.normal(0, 0.12, (len(about), 4)) * boxes[about][:, [2, 3, 2, 3]]
        )
        of_its_class = np.flatnonzero(rng.random(len(about)) < 0.8)
        found["category_id"][of_its_class] = 10 + 2 * classes[about[of_its_class]]
        found["score"][: len(about)] = rng.beta(4, 3, len(about))
        found["bbox"][:, 2:] = np.abs(found["bbox"][:, 2:])
        found["score"] = found["score"].round(decimals)
        found[:] = found[np.argsort(-found["score"], kind="stable")]
    categories = {10 + 2 * number: f"class {number}" for number in range(num_categories)}
    return DetectionSplit(Path("generated.json"), images, categories), detections


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return x, y, width, height in pixels of an image of 640 x 480, of all sizes."""
    size = np.exp(rng.uniform(np.log(8), np.log(400), (count, 2)))
    return np.concatenate([rng.uniform(0, 1, (count, 2)) * (np.array([640, 480]) - size.clip(max=470)), size], axis=1)
