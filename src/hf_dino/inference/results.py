"""Save detections while they are made, in a directory whose journal lets an interrupted run resume.

| format | in the directory | content |
|---|---|---|
| `images` | `NAME.png` | the image with its boxes |
| `crops` | `crops/CLASS/NAME-1.png` | the part of the image inside each box |
| `jsonl` | `results.jsonl` | a JSON object per image, appended when the image is done |
| `json` | `results.json` | image → list of `label`, `name`, `score`, `box` (x0, y0, x1, y1 in pixels) |
| `csv` | `results.csv` | a row per detection |
| `coco` | `coco.json` | a COCO annotation file with scores |
| `labelstudio` | `labelstudio.json` | predictions of Label Studio, in percent |
| `yolo` | `yolo/data.yaml`, `yolo/labels/NAME.txt` | classes from 0; center and size as fractions; no scores |
| `voc` | `voc/Annotations/NAME.xml` | Pascal VOC, whole pixels; no scores |

Of a video, `images` is `NAME.mp4`, and `mot` is `NAME.mot.txt`; in the files of all images, its frames have the names
`NAME/000000`, `NAME/000001` and so on.

Boxes are those of the model, which may extend beyond the image. In `crops`, `labelstudio`, `yolo` and `voc` they are
cut at its border, and those without any area inside are left out, with a warning that counts both.
"""

import csv
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import numpy as np
from PIL import Image

from ..data.readers.voc import VOC_SOURCE
from ..utils.errors import InputError, import_extra, summarize_list
from ..utils.io import atomic_write, fsync, read_text, write_json
from ..visualization import check_drawing_dependencies, draw_detections, save_image
from .detector import ImageResult
from .sources import ImageInput, Video


logger = logging.getLogger(__name__)

Record = dict[str, Any]
"""What the journal has of an image: `image`, `file_name`, `width`, `height`, `detections`. A frame of a video also has
`frame` and `seconds`, the last one of a complete video `last`, and tracked detections `track`."""

SETTINGS = ".predict.json"
JOURNAL = "results.jsonl"
HIDDEN_JOURNAL = ".results.jsonl"  # where it is not asked for


def to_record(result: ImageResult) -> Record:
    """Return what is saved of a result; needs its image."""
    assert result.image is not None
    width, height = result.image.size
    item = result.input
    return {
        "image": str(item.source),
        "file_name": item.name,
        "width": width,
        "height": height,
        "detections": result.detections,
    }


def _clip(record: Record) -> tuple[np.ndarray, list[Record]]:
    """Return the boxes inside the image (x0, y0, x1, y1 in pixels) that have an area, and their detections."""
    boxes = np.array([each["box"] for each in record["detections"]], dtype=np.float64).reshape(-1, 4)
    size = np.array([record["width"], record["height"]] * 2, dtype=np.float64)
    clipped = np.clip(boxes, 0, size)
    kept = np.flatnonzero((clipped[:, 2:] > clipped[:, :2]).all(axis=1))
    return clipped[kept], [record["detections"][index] for index in kept]


class ResultsDirectory:
    """A directory of detections in several formats.

    Files of a single image are written before its line of the journal, and files of all images are made from the
    journal. So whenever the process ends, each image of the journal is complete, and the others are missing from it.

    Args:
        folder (`Path`): The directory.
        formats (`Iterable[str]`): Some of [`SAVE_FORMATS`].
        settings (`Mapping[str, Any]`): What the detections depend on: a resumed run must have the same.
        classes (`Mapping[int, str]`, *optional*): Label to name, without unused labels; needed from `open` on.
    """

    def __init__(
        self, folder: Path, formats: Iterable[str], settings: Mapping[str, Any], classes: Mapping[int, str] = {}
    ):
        self.folder, self.classes = folder, classes
        self.formats = [name for name in (*SAVE_FORMATS, "mot") if name in set(formats)]
        self.settings = {**settings, "save": self.formats}
        self.journal = folder / (JOURNAL if "jsonl" in self.formats else HIDDEN_JOURNAL)
        self.changed_boxes: Counter[str] = Counter()
        self._file: Any = None
        self._rows: Any = None
        self._csv: Any = None
        self.has_videos = False  # so that tables get columns for them

    def check_inputs(self, inputs: Sequence[ImageInput]) -> None:
        """Check that outputs can be written, and that no two of them have the same name.

        Raises:
            InputError: If two images have the same name.
            ImportError: If a library is missing.
        """
        per_image = [name for name in self.formats if name in _FILE_WRITERS]
        names = [str(self.path_of(item)).casefold() if per_image or _is_video(item) else item.name for item in inputs]
        if "images" in self.formats:
            check_drawing_dependencies(Path("drawn.png"))
        if "voc" in self.formats:
            import_extra("supervision", "train", "writing Pascal VOC")
        counts = Counter(names)
        for item, name in zip(inputs, names):
            if counts[name] > 1:
                verb, target = ("drawn into", self.path_of(item)) if per_image else ("saved as", item.name)
                raise InputError(f"several images would be {verb} {target}; rename one, or draw them one by one")

    def check_new(self, inputs: Iterable[ImageInput]) -> None:
        """Check that nothing would be overwritten.

        Raises:
            InputError: If an output exists.
        """
        targets = [self.folder / name for name in (SETTINGS, JOURNAL, HIDDEN_JOURNAL)]
        targets += [self.folder / name for format in self.formats for name in _OWN_PATHS.get(format, ())]
        targets += [self.path_of(item) for item in inputs] if "images" in self.formats else []
        targets += [self.path_of(item, ".mot.txt") for item in inputs] if "mot" in self.formats else []
        for target in targets:
            if target.exists():
                raise InputError(
                    f"{target}: already exists; add --resume to continue that run, --overwrite to replace it, or use "
                    f"a different path"
                )

    def remove_previous(self) -> None:
        """Delete what an earlier run saved, apart from drawings, which are replaced.

        Raises:
            InputError: If there are outputs of another origin.
        """
        previous = self._previous_settings()
        for name in dict.fromkeys(name for format in self.formats for name in _OWN_PATHS.get(format, ())):
            if (self.folder / name).exists() and previous is None:
                raise InputError(f"{self.folder / name}: was not made by this command; use a different --output")
        saved = (previous or {}).get("save", [])
        for name in dict.fromkeys(name for format in saved for name in _OWN_PATHS.get(format, ())):
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for name in (HIDDEN_JOURNAL, JOURNAL, SETTINGS) if previous else ():
            (self.folder / name).unlink(missing_ok=True)

    def check_resumed(self, inputs: Iterable[ImageInput]) -> set[str]:
        """Return the images that an earlier run has saved, and remove the line that it was writing when it ended.

        Raises:
            InputError: If the earlier run had other settings, or there was none but something would be overwritten.
        """
        previous = self._previous_settings()
        if previous is None:
            self.check_new(inputs)
            return set()
        differing = [name for name in self.settings if previous.get(name) != self.settings[name]]
        if differing:
            changes = [f"{name} {previous.get(name)!r} (now {self.settings[name]!r})" for name in differing]
            raise InputError(
                f"{self.folder}: cannot be resumed, it was made with {summarize_list(changes)}; use the same options, "
                f"or --overwrite"
            )
        self._drop_partial_line()
        self._drop_partial_videos()
        done = {_name_of_input(record): record["image"] for record in self.records()}
        for item in inputs:
            name = _stem(item.name) if _is_video(item) else item.name
            if done.get(name, str(item.source)) != str(item.source):
                raise InputError(
                    f"{item.source}: has the same name as {done[name]}, which is saved in {self.folder}; give "
                    f"images by the same paths as before, or use a different --output"
                )
        return {*done.values()}

    def _previous_settings(self) -> dict[str, Any] | None:
        path = self.folder / SETTINGS
        try:
            return json.loads(read_text(path)) if path.exists() else None
        except json.JSONDecodeError:
            raise InputError(f"{path}: is not valid JSON; use a different --output") from None

    def _drop_partial_line(self) -> None:
        """Remove a line that does not end, because the process was killed while it was written."""
        if not self.journal.exists():
            return
        with self.journal.open("rb+") as file:
            end = 0
            for line in file:
                end += len(line) * line.endswith(b"\n")
            file.truncate(end)

    def _drop_partial_videos(self) -> None:
        """Remove the frames of videos whose last frame is missing: these begin again from their first one."""
        complete = {each["image"] for each in self.records() if each.get("last", "frame" not in each)}
        if all(each["image"] in complete for each in self.records()):
            return
        with atomic_write(self.journal) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(each) + "\n" for each in self.records() if each["image"] in complete)

    def records(self) -> Iterator[Record]:
        """Read the journal, one record at a time."""
        if self.journal.exists():
            with self.journal.open(encoding="utf-8") as file:
                yield from map(json.loads, file)

    def open(self) -> None:
        """Begin to write, after what the journal contains already."""
        write_json(self.folder / SETTINGS, self.settings)
        self._file = self.journal.open("ab")
        if "yolo" in self.formats:
            _write_yolo_classes(self.folder / "yolo", self.classes)
        if "csv" in self.formats:
            self._rows = (self.folder / "results.csv").open("w", encoding="utf-8", newline="")
            has_frames = self.has_videos or any("frame" in record for record in self.records())
            columns = _CSV_COLUMNS + _VIDEO_COLUMNS * has_frames
            self._csv = csv.DictWriter(self._rows, columns, extrasaction="ignore")
            self._csv.writeheader()
            for record in self.records():
                self._append_rows(record)

    def save_files(self, result: ImageResult) -> ImageResult:
        """Write the files of one image. May be called from any thread, and before or after other images."""
        if result.image is not None:
            record = to_record(result)
            for name in self.formats:
                if name in _FILE_WRITERS:
                    _FILE_WRITERS[name](self, record, result.image)
        return result

    def append(self, record: Record) -> None:
        """Add an image, whose files are written, to the journal."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        self._count_changed_boxes(record)
        if self._rows is not None:
            self._append_rows(record)

    def _append_rows(self, record: Record) -> None:
        boxes = (zip(("x0", "y0", "x1", "y1"), each["box"]) for each in record["detections"])
        self._csv.writerows({**record, **each, **dict(box)} for each, box in zip(record["detections"], boxes))
        self._rows.flush()

    def _count_changed_boxes(self, record: Record) -> None:
        if {"crops", "labelstudio", "yolo", "voc"}.isdisjoint(self.formats):
            return
        clipped, kept = _clip(record)
        self.changed_boxes["left out"] += len(record["detections"]) - len(kept)
        self.changed_boxes["cut"] += sum(box.tolist() != each["box"] for box, each in zip(clipped, kept))

    def close(self, complete: bool) -> None:
        """Write the files of all images from the journal.

        Args:
            complete (`bool`): Whether the run came to its end, so that a journal that was not asked for can go.
        """
        self._file.close()
        fsync(self.journal)
        if self._rows is not None:
            self._rows.close()
        for name in self.formats:
            if name in _DOCUMENT_WRITERS:
                file_name, write = _DOCUMENT_WRITERS[name]
                with atomic_write(self.folder / file_name) as temporary, temporary.open("w", encoding="utf-8") as file:
                    write(self, file)
        if complete and self.formats == ["images"]:
            self.journal.unlink()
            (self.folder / SETTINGS).unlink()
        if self.changed_boxes.total():
            cut = [f"{count} {what}" for what, count in self.changed_boxes.items() if count]
            logger.warning("boxes beyond their image in crops, labelstudio, yolo and voc: %s", " and ".join(cut))

    def path_of(self, item: ImageInput, suffix: str = "") -> Path:
        """Return the file of an image or a video with a suffix; by default, that of its drawing."""
        return self.folder / (_stem(item.name) + (suffix or (".mp4" if _is_video(item) else ".png")))

    def _draw(self, record: Record, image: Image.Image) -> None:
        path = self.folder / f"{_stem(record['file_name'])}.png"
        save_image(draw_rows(image, record["detections"], self.classes), path)

    def _crop(self, record: Record, image: Image.Image) -> None:
        for number, (box, each) in enumerate(zip(*_clip(record)), start=1):
            x0, y0 = np.floor(box[:2]).astype(int)
            x1, y1 = np.ceil(box[2:]).astype(int)
            folder = self.folder / "crops" / re.sub(r"[^\w .-]|^\.+", "_", each["name"])
            save_image(image.crop((x0, y0, x1, y1)), folder / f"{_stem(record['file_name'])}-{number}.png")

    def _write_yolo(self, record: Record, image: Image.Image) -> None:
        numbers = {label: number for number, label in enumerate(sorted(self.classes))}
        boxes, kept = _clip(record)
        fractions = np.hstack([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]])
        fractions /= [record["width"], record["height"]] * 2
        lines = (
            f"{numbers[each['label']]} " + " ".join(f"{value:.8f}" for value in box) + "\n"
            for box, each in zip(fractions, kept)
        )
        _write_text(self.folder / "yolo" / "labels" / f"{_stem(record['file_name'])}.txt", "".join(lines))

    def _write_voc(self, record: Record, image: Image.Image) -> None:
        supervision = import_extra("supervision", "train", "writing Pascal VOC")
        to_xml = import_extra("supervision.dataset.formats.pascal_voc", "train", "writing Pascal VOC")
        boxes, kept = _clip(record)
        detections = supervision.Detections(xyxy=boxes, class_id=np.array([each["label"] for each in kept], dtype=int))
        text = to_xml.detections_to_pascal_voc(
            detections, self.classes, record["file_name"], (record["height"], record["width"], 3)
        )
        text = re.sub("(?<=<database>).*?(?=</database>)", VOC_SOURCE, text, count=1)  # it names Roboflow
        _write_text(self.folder / "voc" / "Annotations" / f"{_stem(record['file_name'])}.xml", text)

    def _write_json(self, file: TextIO) -> None:
        items = (
            f"{json.dumps(each['file_name' if 'frame' in each else 'image'])}: {json.dumps(each['detections'])}"
            for each in self.records()
        )
        _write_items(file, "{", items, "}\n")

    def _write_coco(self, file: TextIO) -> None:
        images = (
            {"id": number, **{name: record[name] for name in _COCO_IMAGE if name in record}}
            for number, record in enumerate(self.records(), start=1)
        )
        categories = [{"id": label, "name": name} for label, name in sorted(self.classes.items())]
        _write_items(file, '{"images": [', map(json.dumps, images), "],\n")
        _write_items(file, '"annotations": [', map(json.dumps, self._annotations()), "],\n")
        file.write(f'"categories": {json.dumps(categories)}}}\n')

    def _annotations(self) -> Iterator[Record]:
        rows = ((number, each) for number, record in enumerate(self.records(), 1) for each in record["detections"])
        for id_, (number, each) in enumerate(rows, start=1):
            x0, y0, x1, y1 = each["box"]
            yield {
                "id": id_, "image_id": number, "category_id": each["label"], "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0), "iscrowd": 0, "score": each["score"],
                **({"track_id": each["track"]} if "track" in each else {}),
            }  # fmt: skip

    def _write_labelstudio(self, file: TextIO) -> None:
        _write_items(file, "[", (json.dumps(_to_task(record)) for record in self.records()), "]\n")


def draw_rows(
    image: Image.Image, detections: Sequence[Record], classes: Mapping[int, str], **options: Any
) -> Image.Image:
    """Draw the detections of an [`ImageResult`] into a copy of its image, with options of [`draw_detections`]."""
    boxes, names, scores = ([each[key] for each in detections] for key in ("box", "name", "score"))
    tracks = [each.get("track") for each in detections]
    return draw_detections(image, boxes, names, scores, classes.values(), tracks, **options)


def _to_task(record: Record) -> Record:
    size = np.array([record["width"], record["height"]])
    regions = []
    for number, (box, each) in enumerate(zip(*_clip(record)), start=1):
        x, y = (100 * box[:2] / size).tolist()
        width, height = (100 * (box[2:] - box[:2]) / size).tolist()
        value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": [each["name"]]}
        regions.append(
            {
                "id": str(number), "type": "rectanglelabels", "from_name": "label", "to_name": "image",
                "original_width": record["width"], "original_height": record["height"], "image_rotation": 0,
                "score": each["score"], "value": value,
            }
        )  # fmt: skip
    scores = [each["score"] for each in record["detections"]]
    prediction = {"model_version": "hf-dino", "score": min(scores, default=0.0), "result": regions}
    return {"data": {"image": record["image"]}, "predictions": [prediction]}


def _is_video(item: ImageInput) -> bool:
    return isinstance(item.source, Video)


def _name_of_input(record: Record) -> str:
    """Return what distinguishes the image, or the video of a frame, from other inputs."""
    name = record["file_name"]
    return name.rpartition("/")[0] if "frame" in record else name


def _stem(name: str) -> str:
    """Return a name without its extension, and without parts that lead out of the directory."""
    path = PurePosixPath(name).with_suffix("")
    return str(PurePosixPath(*(part for part in path.parts if part not in ("..", "/"))))


def _write_items(file: TextIO, start: str, items: Iterable[str], end: str) -> None:
    file.write(start)
    for number, item in enumerate(items):
        file.write(("," if number else "") + "\n" + item)
    file.write("\n" + end)


def _write_text(path: Path, text: str) -> None:
    """Write a file of an image; it is replaced if the image is not in the journal, so it need not be flushed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _write_yolo_classes(folder: Path, classes: Mapping[int, str]) -> None:
    names = [json.dumps(classes[label], ensure_ascii=False) for label in sorted(classes)]  # JSON strings are YAML
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    lines = [f"  {number}: {name}\n" for number, name in enumerate(names)]
    _write_text(folder / "data.yaml", "path: .\ntrain: images\nval: images\nnames:\n" + "".join(lines))


_CSV_COLUMNS = ("image", "width", "height", "label", "name", "score", "x0", "y0", "x1", "y1")
_COCO_IMAGE = ("file_name", "width", "height", "frame", "seconds")
_VIDEO_COLUMNS = ("frame", "seconds", "track")

_FILE_WRITERS: dict[str, Callable[[ResultsDirectory, Record, Image.Image], None]] = {
    "images": ResultsDirectory._draw,
    "crops": ResultsDirectory._crop,
    "yolo": ResultsDirectory._write_yolo,
    "voc": ResultsDirectory._write_voc,
}
_DOCUMENT_WRITERS: dict[str, tuple[str, Callable[[ResultsDirectory, TextIO], None]]] = {
    "json": ("results.json", ResultsDirectory._write_json),
    "coco": ("coco.json", ResultsDirectory._write_coco),
    "labelstudio": ("labelstudio.json", ResultsDirectory._write_labelstudio),
}
_OWN_PATHS = {
    "jsonl": [JOURNAL],
    "csv": ["results.csv"],
    "crops": ["crops"],
    "yolo": ["yolo"],
    "voc": ["voc"],
    **{name: [file] for name, (file, _) in _DOCUMENT_WRITERS.items()},
}

VIDEO_FORMATS = ("images", "json", "jsonl", "csv", "coco", "mot")
"""What can be saved of a video."""

SAVE_FORMATS = ("images", "json", "jsonl", "csv", "coco", "yolo", "voc", "labelstudio", "crops")
"""What can be saved, in the order in which it is listed."""
