"""Read, check, convert, split, augment and batch detection datasets, and generate the `shapes` dataset."""

from ..utils.errors import InputError
from .augmentation import Augmentation, NoAugmentation, make_augmentation
from .check import DataReport, check_data
from .convert import convert_data
from .dataset import (
    SPLITS,
    AnnotatedImage,
    DetectionDataset,
    DetectionSplit,
    label_of_category,
    to_annotation_array,
    xywh_to_xyxy,
)
from .images import list_images, read_image
from .loaders import (
    TrainingBatchSampler,
    TrainingCollator,
    evaluation_loader,
    per_device_batch_size,
    predict_batch_shapes,
    steps_per_epoch,
    training_loader,
)
from .readers import ReadOptions, read_coco, read_data
from .split import DataParts, split_data


__all__ = [
    "SPLITS",
    "AnnotatedImage",
    "Augmentation",
    "DataParts",
    "DataReport",
    "DetectionDataset",
    "DetectionSplit",
    "InputError",
    "NoAugmentation",
    "ReadOptions",
    "TrainingBatchSampler",
    "TrainingCollator",
    "check_data",
    "convert_data",
    "evaluation_loader",
    "label_of_category",
    "list_images",
    "make_augmentation",
    "per_device_batch_size",
    "predict_batch_shapes",
    "read_coco",
    "read_data",
    "read_image",
    "split_data",
    "steps_per_epoch",
    "to_annotation_array",
    "training_loader",
    "xywh_to_xyxy",
]
