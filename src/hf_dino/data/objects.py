"""All objects of a dataset in one array, for those who count or compare them."""

import numpy as np

from .dataset import DetectionSplit


ANNOTATION_DTYPE = np.dtype(
    [("image_id", "<i8"), ("category_id", "<i8"), ("bbox", "<f8", 4), ("area", "<f8"), ("iscrowd", "<i8")]
)
"""One annotated object: raw ids, box as x, y, width, height in pixels, area in square pixels, 1 for a crowd region."""


def to_annotation_array(data: DetectionSplit) -> np.ndarray:
    """All objects of a dataset, crowd regions included, in the order of the images; of dtype [`OBJECT`]."""
    objects = np.empty(sum(len(image.boxes) for image in data.images), ANNOTATION_DTYPE)
    parts = np.split(objects, np.cumsum([len(image.boxes) for image in data.images])[:-1])
    for part, image in zip(parts, data.images):
        part["image_id"] = image.image_id
        part["category_id"], part["bbox"] = image.category_ids, image.boxes
        part["area"], part["iscrowd"] = image.areas, image.iscrowd
    return objects
