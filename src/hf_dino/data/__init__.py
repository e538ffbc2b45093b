"""Data sets in COCO's format, augmentation, batches, and the generated `shapes` data set."""

from .augmentation import AUGMENTATIONS, Augmentation, make_augmentation
from .batching import (
    EvaluationCollator,
    SameSizeBatchSampler,
    TrainingBatchSampler,
    TrainingCollator,
    evaluation_loader,
    processed_shape,
    steps_per_epoch,
    training_loader,
)
from .coco import read_coco
from .dataset import (
    AnnotatedPicture,
    DetectionData,
    DetectionDataset,
    clip_boxes,
    contiguous_id2label,
    label_of_category,
)
from .errors import InputError
from .images import list_pictures, read_image


__all__ = [
    "AUGMENTATIONS",
    "AnnotatedPicture",
    "Augmentation",
    "DetectionData",
    "DetectionDataset",
    "EvaluationCollator",
    "InputError",
    "SameSizeBatchSampler",
    "TrainingBatchSampler",
    "TrainingCollator",
    "clip_boxes",
    "contiguous_id2label",
    "evaluation_loader",
    "label_of_category",
    "list_pictures",
    "make_augmentation",
    "processed_shape",
    "read_coco",
    "read_image",
    "steps_per_epoch",
    "training_loader",
]
