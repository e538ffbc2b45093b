"""Detect objects in images, in files of any number, and save the detections."""

from .detector import DetectionOptions, Detector, ImageResult, detect_objects
from .results import SAVE_FORMATS, ResultsDirectory
from .sources import ImageInput, find_inputs
from .tiles import TILE_OVERLAP


__all__ = [
    "SAVE_FORMATS",
    "TILE_OVERLAP",
    "DetectionOptions",
    "Detector",
    "ImageInput",
    "ImageResult",
    "ResultsDirectory",
    "detect_objects",
    "find_inputs",
]
