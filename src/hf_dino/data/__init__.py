"""Datasets in any of the usual formats, their check, augmentation, batches, and the generated `shapes` dataset."""

from ..utils.errors import InputError
from .augmentation import AUGMENTATIONS, Augmentation, NoAugmentation, make_augmentation
from .batching import (
    EvaluationCollator,
    SameSizeBatchSampler,
    TrainingBatchSampler,
    TrainingCollator,
    evaluation_loader,
    get_processed_shape,
    per_device_batch_size,
    predict_batch_shapes,
    steps_per_epoch,
    training_loader,
)
from .check import DataReport, SplitCounts, check_data
from .coco import read_coco
from .convert import convert_data
from .dataset import (
    AnnotatedImage,
    DetectionDataset,
    DetectionSplit,
    clip_boxes,
    label_of_category,
)
from .formats import read_data
from .images import list_images, read_image
from .splits import SPLITS


__all__ = [
    "AUGMENTATIONS",
    "SPLITS",
    "AnnotatedImage",
    "Augmentation",
    "DataReport",
    "DetectionDataset",
    "DetectionSplit",
    "EvaluationCollator",
    "InputError",
    "NoAugmentation",
    "SameSizeBatchSampler",
    "SplitCounts",
    "TrainingBatchSampler",
    "TrainingCollator",
    "check_data",
    "clip_boxes",
    "convert_data",
    "evaluation_loader",
    "get_processed_shape",
    "label_of_category",
    "list_images",
    "make_augmentation",
    "per_device_batch_size",
    "predict_batch_shapes",
    "read_coco",
    "read_data",
    "read_image",
    "steps_per_epoch",
    "training_loader",
]
