"""All objects of a data set in one array, for those who count or compare them."""

import numpy as np

from .dataset import DetectionData


OBJECT = np.dtype(
    [("image_id", "<i8"), ("category_id", "<i8"), ("bbox", "<f8", 4), ("area", "<f8"), ("iscrowd", "<i8")]
)
"""One annotated object: raw ids, box as x, y, width, height in pixels, area in square pixels, 1 for a crowd region."""


def objects_of(data: DetectionData) -> np.ndarray:
    """All objects of a data set, crowd regions included, in the order of the pictures; of dtype [`OBJECT`]."""
    objects = np.empty(sum(len(picture.boxes) for picture in data.pictures), OBJECT)
    parts = np.split(objects, np.cumsum([len(picture.boxes) for picture in data.pictures])[:-1])
    for part, picture in zip(parts, data.pictures):
        part["image_id"] = picture.image_id
        part["category_id"], part["bbox"] = picture.category_ids, picture.boxes
        part["area"], part["iscrowd"] = picture.areas, picture.iscrowd
    return objects
