"""Detect objects in images, in files of any number, and save the detections."""

from .detector import DetectionOptions, Detector, ImageResult, detect_objects
from .processes import join_processes
from .results import SAVE_FORMATS, ResultsDirectory
from .run import PredictionRun
from .sources import ImageInput, find_inputs
from .tiles import TILE_OVERLAP


__all__ = [
    "SAVE_FORMATS",
    "TILE_OVERLAP",
    "DetectionOptions",
    "Detector",
    "ImageInput",
    "ImageResult",
    "PredictionRun",
    "ResultsDirectory",
    "detect_objects",
    "find_inputs",
    "join_processes",
]
