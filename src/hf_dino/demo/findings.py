"""Detect once per image, above a low score; filter, draw, list and save what was found as often as one likes."""

import io
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..data.images import read_image
from ..inference import DetectionOptions, Detector, ImageInput, ResultsDirectory
from ..inference.results import draw_rows
from ..inspection import Inspection, Recorder
from ..registration import DinoDetrForObjectDetection
from ..visualization import save_image


LOWEST_SCORE = 0.05  # of the detections that are kept for the slider
SHORTEST_PREVIEW, LONGEST_PREVIEW = 480, 1280  # pixels of the longest edge of an image that is shown

FILES = {"JSON": "results.json", "CSV": "results.csv", "COCO": "coco.json", "PNG": "drawn.png"}
"""What can be downloaded, and the end of the file's name; all but PNG are formats of [`ResultsDirectory`]."""


@dataclass(frozen=True)
class Finding:
    """What the model found in an image, small enough to be kept for each visitor.

    Attributes:
        path (`Path`): The image file.
        text (`str`): Time and device, or why there is no result.
        size (`tuple[int, int]`): Width and height of the image in pixels; (0, 0) if there is no result.
        preview (`bytes`): The image as a JPEG file of a size to look at.
        classes (`Mapping[int, str]`): Label to name, of the model.
        detections (`list[dict[str, Any]]`): `label`, `name`, `score` and `box` (x0, y0, x1, y1 in pixels) of each,
            sorted by descending score.
        inspection (`Inspection`, *optional*): Where the model looked; its queries are the detections. `None` for an
            exported model.
    """

    path: Path = Path()
    text: str = ""
    size: tuple[int, int] = (0, 0)
    preview: bytes = b""
    classes: Mapping[int, str] = field(default_factory=dict)
    detections: Sequence[dict[str, Any]] = ()
    inspection: Inspection | None = None

    def keep(self, threshold: float, names: Sequence[str] = ()) -> list[int]:
        """Return the indices of the detections of some classes, all if none is given, with at least a score."""
        return [
            index
            for index, each in enumerate(self.detections)
            if each["score"] >= threshold and (not names or each["name"] in names)
        ]

    def open_image(self) -> Image.Image:
        """Read the image in full size."""
        return read_image(self.path)

    def open_preview(self) -> Image.Image:
        """Return the image at the size at which it is shown."""
        return Image.open(io.BytesIO(self.preview))

    def scaled(self, kept: Sequence[int], width: int) -> list[dict[str, Any]]:
        """Return detections with their boxes in an image of another width."""
        scale = width / self.size[0]
        rows = [self.detections[index] for index in kept]
        return [{**each, "box": [scale * value for value in each["box"]]} for each in rows]

    def draw(self, kept: Sequence[int]) -> Image.Image:
        """Draw detections in the preview."""
        preview = self.open_preview()
        return draw_rows(preview, self.scaled(kept, preview.width), self.classes)

    def rows(self, kept: Sequence[int]) -> list[list[Any]]:
        """Return a row per detection: its number from 1, class, score, and box in whole pixels."""
        rows = ((index + 1, self.detections[index]) for index in kept)
        return [[number, each["name"], round(each["score"], 3), *map(round, each["box"])] for number, each in rows]

    def detection_at(self, kept: Sequence[int], point: tuple[float, float]) -> int | None:
        """Return the smallest detection whose box has a point of the preview inside, `None` if there is none."""
        width = self.open_preview().width
        x, y = (value * self.size[0] / width for value in point)
        areas = {}
        for index in kept:
            x0, y0, x1, y1 = self.detections[index]["box"]
            if x0 <= x <= x1 and y0 <= y <= y1:
                areas[index] = (x1 - x0) * (y1 - y0)
        return min(areas, key=areas.__getitem__, default=None)

    def save(self, kept: Sequence[int], kind: str, folder: Path) -> Path:
        """Write detections to a new file named after the image.

        Args:
            kept (`Sequence[int]`): Indices of the detections.
            kind (`str`): A key of [`FILES`].
            folder (`Path`): The directory of the file.

        Raises:
            InputError: If the image is to be drawn, and its file is gone.
        """
        target, rows = folder / f"{self.path.stem}.{FILES[kind]}", [self.detections[index] for index in kept]
        if kind == "PNG":
            save_image(draw_rows(self.open_image(), rows, self.classes), target)
            return target
        width, height = self.size
        image = {"image": self.path.name, "file_name": self.path.name, "width": width, "height": height}
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            results = ResultsDirectory(Path(temporary), [kind.lower()], {}, self.classes)
            results.open()
            results.append({**image, "detections": rows})
            results.close(complete=True)
            return Path(temporary, FILES[kind]).replace(target)


def find_objects(model: Any, processor: Any, path: Path) -> Finding:
    """Detect objects in an image file, in one forward pass. A reason why that is impossible is in `text`.

    Args:
        model (`DinoDetrForObjectDetection` or `ExportedDetector`): In evaluation mode.
        processor (`BaseImageProcessor`): The model's image processor.
        path (`Path`): The image file.
    """
    start = time.perf_counter()
    recorder = Recorder(model) if isinstance(model, DinoDetrForObjectDetection) else nullcontext()
    detector = Detector(model, processor, DetectionOptions(LOWEST_SCORE))
    try:
        with recorder:
            (result,) = detector.stream([ImageInput(path, path.name)])
    except (FloatingPointError, torch.OutOfMemoryError) as error:
        return Finding(text=str(error).partition("\n")[0])
    if result.image is None:
        return Finding(text=result.error.replace(str(path), path.name))
    image, detections = result.image, result.detections
    assert isinstance(image, Image.Image)  # only tiles are read from a file in parts
    text = f"{time.perf_counter() - start:.2f} s on {model.device}, {image.width} x {image.height} pixels"
    inspection = None
    if isinstance(recorder, Recorder):
        inspection = recorder.inspection(image.size)
        queries = [inspection.find_query(each["box"], each["label"], each["score"]) for each in detections]
        inspection = inspection.keep_queries(queries)
    return Finding(path, text, image.size, _make_preview(image), detector.names, detections, inspection)


def _make_preview(image: Image.Image) -> bytes:
    edge = max(image.size)
    scale = -(-SHORTEST_PREVIEW // edge) if edge < SHORTEST_PREVIEW else min(1.0, LONGEST_PREVIEW / edge)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    file = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
    return file.getvalue()
