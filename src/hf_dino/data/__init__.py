"""Read, check, convert, augment and batch detection datasets, and generate the `shapes` dataset."""

from ..utils.errors import InputError
from .augmentation import AUGMENTATIONS, Augmentation, NoAugmentation, get_resized_shape, make_augmentation
from .check import DataReport, SplitCounts, check_data
from .convert import convert_data
from .dataset import (
    ANNOTATION_DTYPE,
    SPLITS,
    AnnotatedImage,
    DetectionDataset,
    DetectionSplit,
    clip_boxes,
    label_of_category,
    to_annotation_array,
    xywh_to_xyxy,
    xyxy_to_xywh,
)
from .images import list_images, read_image
from .loaders import (
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
from .readers import read_coco, read_data


__all__ = [
    "ANNOTATION_DTYPE",
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
    "get_resized_shape",
    "label_of_category",
    "list_images",
    "make_augmentation",
    "per_device_batch_size",
    "predict_batch_shapes",
    "read_coco",
    "read_data",
    "read_image",
    "steps_per_epoch",
    "to_annotation_array",
    "training_loader",
    "xywh_to_xyxy",
    "xyxy_to_xywh",
]
