"""Detect objects in images and videos, of any number, and save the detections."""

from .detector import DetectionOptions, Detector, ImageResult, detect_objects
from .preparation import prepare_for_inference
from .processes import join_processes
from .results import SAVE_FORMATS, VIDEO_FORMATS, ResultsDirectory, draw_rows
from .run import PredictionRun
from .sources import ImageInput, Video, find_inputs
from .tiles import TILE_OVERLAP
from .tracking import ObjectTracker
from .video import VideoFrame, VideoReader, VideoWriter, read_video, write_video
from .video_run import VideoOptions


__all__ = [
    "SAVE_FORMATS",
    "TILE_OVERLAP",
    "VIDEO_FORMATS",
    "DetectionOptions",
    "Detector",
    "ImageInput",
    "ImageResult",
    "ObjectTracker",
    "PredictionRun",
    "ResultsDirectory",
    "Video",
    "VideoFrame",
    "VideoOptions",
    "VideoReader",
    "VideoWriter",
    "detect_objects",
    "draw_rows",
    "find_inputs",
    "join_processes",
    "prepare_for_inference",
    "read_video",
    "write_video",
]
