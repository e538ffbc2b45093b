"""Detect objects in images and videos, of any number, and save the detections."""

from .detector import DetectionOptions, Detector, ImageResult, detect_objects
from .results import SAVE_FORMATS, VIDEO_FORMATS, ResultsDirectory, draw_rows
from .sources import ImageInput, Video, find_inputs
from .tracking import ObjectTracker
from .video import VideoFrame, VideoReader, VideoWriter, read_video, write_video


__all__ = [
    "SAVE_FORMATS",
    "VIDEO_FORMATS",
    "DetectionOptions",
    "Detector",
    "ImageInput",
    "ImageResult",
    "ObjectTracker",
    "ResultsDirectory",
    "Video",
    "VideoFrame",
    "VideoReader",
    "VideoWriter",
    "detect_objects",
    "draw_rows",
    "find_inputs",
    "read_video",
    "write_video",
]
