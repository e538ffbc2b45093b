"""Data sets in any of the usual formats, their check, augmentation, batches, and the generated `shapes` data set."""

from ..errors import InputError
from .augmentation import AUGMENTATIONS, Augmentation, NoAugmentation, make_augmentation
from .batching import (
    EvaluationCollator,
    SameSizeBatchSampler,
    TrainingBatchSampler,
    TrainingCollator,
    evaluation_loader,
    pictures_per_batch,
    processed_shape,
    steps_per_epoch,
    training_loader,
    training_shapes,
)
from .check import DataReport, SplitCounts, check_data
from .coco import read_coco
from .convert import convert_data
from .dataset import (
    AnnotatedPicture,
    DetectionData,
    DetectionDataset,
    clip_boxes,
    contiguous_id2label,
    label_of_category,
)
from .formats import read_data
from .images import list_pictures, read_image
from .splits import SPLITS


__all__ = [
    "AUGMENTATIONS",
    "SPLITS",
    "AnnotatedPicture",
    "Augmentation",
    "DataReport",
    "DetectionData",
    "DetectionDataset",
    "EvaluationCollator",
    "InputError",
    "NoAugmentation",
    "SameSizeBatchSampler",
    "SplitCounts",
    "TrainingBatchSampler",
    "TrainingCollator",
    "check_data",
    "clip_boxes",
    "contiguous_id2label",
    "convert_data",
    "evaluation_loader",
    "label_of_category",
    "list_pictures",
    "make_augmentation",
    "pictures_per_batch",
    "processed_shape",
    "read_coco",
    "read_data",
    "read_image",
    "steps_per_epoch",
    "training_loader",
    "training_shapes",
]
