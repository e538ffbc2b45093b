"""Give the objects in a video ids that they keep from frame to frame: ByteTrack of the library `trackers`."""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from ..utils.errors import import_extra


LOW_SCORE = 0.1  # from which on a detection can continue a track, as in ByteTrack
TRAIL_SECONDS = 1.0

Point = tuple[float, float]  # x, y in pixels


def import_trackers() -> ModuleType:
    """Import the library of trackers.

    Raises:
        ImportError: If it is not installed.
    """
    return import_extra("trackers", "tracking", "tracking")


class ObjectTracker:
    """Track the objects of one video.

    Detections from `threshold` on begin tracks. Those below, from 0.1 on, only continue them: they are no results, but
    help a partly hidden object to keep its id. Classes are not compared.

    Args:
        threshold (`float`): Lowest score of a detection that is a result.
        frame_rate (`float`): Tracked frames per second.

    Raises:
        ImportError: If trackers is not installed.
    """

    def __init__(self, threshold: float, frame_rate: float):
        trackers = import_trackers()
        self._supervision = import_extra("supervision", "train", "tracking")
        self._tracker = trackers.ByteTrackTracker(
            frame_rate=frame_rate, track_activation_threshold=threshold, high_conf_det_threshold=threshold
        )
        self.threshold = threshold
        self._points: dict[int, deque[tuple[float, Point]]] = defaultdict(deque)  # by id, with seconds

    def update(self, detections: Sequence[Mapping[str, Any]], seconds: float) -> list[dict[str, Any]]:
        """Add `track` to the detections of the next frame: an id from 1, or `None` when an object is first seen.

        Args:
            detections (`list[dict]`): As in [`ImageResult`], with scores from `LOW_SCORE` on.
            seconds (`float`): Time stamp of the frame, later than that of the one before.

        Returns:
            `list[dict]`: The detections with scores from `threshold` on.
        """
        tracked = self._tracker.update(
            self._supervision.Detections(
                xyxy=np.array([each["box"] for each in detections], dtype=np.float32).reshape(-1, 4),
                confidence=np.array([each["score"] for each in detections], dtype=np.float32),
                class_id=np.array([each["label"] for each in detections], dtype=int),
                data={"index": np.arange(len(detections))},
            ),
            timestamp=seconds,
        )
        ids = dict(zip(tracked.data.get("index", ()), tracked.tracker_id + 1))
        rows = [{**each, "track": int(ids.get(index, 0)) or None} for index, each in enumerate(detections)]
        self._extend_trails(rows, seconds)
        return [each for each in rows if each["score"] >= self.threshold]

    def _extend_trails(self, rows: Sequence[Mapping[str, Any]], seconds: float) -> None:
        for each in (row for row in rows if row["track"]):
            x0, y0, x1, y1 = each["box"]
            self._points[each["track"]].append((seconds, ((x0 + x1) / 2, (y0 + y1) / 2)))
        for track, points in [*self._points.items()]:
            while points and points[0][0] < seconds - TRAIL_SECONDS:
                points.popleft()
            if not points:
                del self._points[track]

    def trails(self) -> dict[int, list[Point]]:
        """Return where the centers of the objects were in the last second, by id."""
        return {track: [point for _, point in points] for track, points in self._points.items()}


def to_mot(frame: int, detections: Sequence[Mapping[str, Any]]) -> str:
    """Return the lines of the MOT challenge for a frame: frame and id from 1, left, top, width, height, score.

    Detections without an id are left out.
    """
    lines = []
    for each in detections:
        x0, y0, x1, y1 = each["box"]
        if each["track"] is not None:
            box = f"{x0:.2f},{y0:.2f},{x1 - x0:.2f},{y1 - y0:.2f}"
            lines.append(f"{frame + 1},{each['track']},{box},{each['score']:.6f},-1,-1,-1\n")
    return "".join(lines)
