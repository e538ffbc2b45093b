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
import io
import json
import logging
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from ..data.images import warn_once
from ..data.large_images import LargeImage
from ..data.readers.voc import VOC_SOURCE
from ..utils.errors import InputError, count_of, import_extra, summarize_list
from ..utils.io import annotate_oserror, atomic_write, fsync, read_text, write_json
from ..visualization import check_drawing_dependencies, draw_detections, save_image
from .detector import ImageResult
from .sources import ImageInput


logger = logging.getLogger(__name__)

Pixels = Image.Image | LargeImage
Record = dict[str, Any]
"""What the journal has of an image: `image`, `file_name`, `width`, `height`, `detections`. A frame of a video also has
`frame` and `seconds`, the last one of a complete video `last`, and its detections `track` if objects are tracked."""

SETTINGS = ".predict.json"
JOURNAL = "results.jsonl"
HIDDEN_JOURNAL = ".results.jsonl"  # where it is not asked for
OTHER_JOURNALS = ".results-*.jsonl"  # of processes beside the main process, until it merges them
LOCK = ".predict.lock"

_NOT_XML = re.compile("[\\x00-\\x1f\\ud800-\\udfff\\ufffe\\uffff]")
_UTF8: Any = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # file names may be any bytes
MAX_DRAWN_PIXELS = 50_000_000  # of a drawing, which is copied several times


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


class _Log:
    """A text file that grows by whole texts: after a full disk or Ctrl-C, none is there in part."""

    def __init__(self, path: Path, mode: str):
        self.path, self.file = path, path.open(mode, buffering=0)

    def append(self, text: str) -> None:
        end, left = self.file.seek(0, os.SEEK_END), memoryview(text.encode(errors="surrogateescape"))
        whole = end + len(left)
        try:
            with annotate_oserror(self.path):
                while left:
                    left = left[self.file.write(left) :]
        except BaseException:
            if self.file.seek(0, os.SEEK_END) < whole:  # what is there as a whole, others may have read
                self.file.truncate(end)
            raise


class ResultsDirectory:
    """A directory of detections in several formats.

    Files of a single image are written before its line of the journal, and files of all images are made from the
    journal. So whenever the process ends, each image of the journal is complete, and the others are missing from it.
    Several processes can write into one directory, each with a journal of its own; the main process, of rank 0, does
    everything else: it prepares the directory before the others `open` it, and merges the journals.

    Args:
        folder (`Path`): The directory.
        formats (`Iterable[str]`): Some of [`SAVE_FORMATS`] and [`VIDEO_FORMATS`].
        settings (`Mapping[str, Any]`): What the detections depend on: a resumed run must have the same.
        classes (`Mapping[int, str]`, *optional*): Label to name, without unused labels; needed from `open` on.
        rank (`int`, *optional*, defaults to 0): Number of this process among several.
    """

    def __init__(
        self,
        folder: Path,
        formats: Iterable[str],
        settings: Mapping[str, Any],
        classes: Mapping[int, str] = {},
        *,
        rank: int = 0,
    ):
        self.folder, self.classes, self.rank = folder, classes, rank
        self.formats = [name for name in dict.fromkeys(SAVE_FORMATS + VIDEO_FORMATS) if name in set(formats)]
        self.settings = {**settings, "save": self.formats}
        self.journal = folder / (JOURNAL if "jsonl" in self.formats else HIDDEN_JOURNAL)
        self.changed_boxes: Counter[str] = Counter()
        self.has_videos = False  # so that tables get columns for them
        self._own_journal = folder / OTHER_JOURNALS.replace("*", f"{rank:05}") if rank else self.journal
        self._logs: dict[str, _Log] = {}
        self._is_resumed = False

    def check_inputs(self, inputs: Sequence[ImageInput]) -> None:
        """Check that outputs can be written, and that no two of them have the same name.

        Raises:
            InputError: If two images or videos have the same name, or one is given twice.
            ImportError: If a library is missing.
        """
        per_image = [name for name in self.formats if name in _FILE_WRITERS]
        names = [str(self.path_of(item)).casefold() if per_image or item.is_video else item.name for item in inputs]
        if "images" in self.formats:
            check_drawing_dependencies(Path("drawn.png"))
        if "voc" in self.formats:
            import_extra("supervision", "train", "writing Pascal VOC")
            if unfit := [item.name for item in inputs if _NOT_XML.search(item.name)]:
                raise InputError(f"{unfit[0]!a}: XML cannot hold this name; rename it, or leave out --save voc")
        sources = Counter(str(item.source) for item in inputs)
        if twice := [source for source, count in sources.items() if count > 1]:
            raise InputError(f"{summarize_list(twice)}: given more than once; give each {inputs[0].kind} once")
        counts = Counter(names)
        for item, name in zip(inputs, names):
            if counts[name] > 1:
                verb, target = ("drawn into", self.path_of(item)) if per_image else ("saved as", item.name)
                raise InputError(f"several {item.kind}s would be {verb} {target}; rename one, or draw them one by one")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory, so that no other run writes into it. A process that dies holds it no longer.

        Raises:
            InputError: If another run holds it.
        """
        lock, settings = FileLock(self.folder / LOCK, timeout=0), self.folder / SETTINGS
        is_ours = settings.exists() or not (self.folder / LOCK).exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise InputError(
                f"{self.folder}: used by another run; wait for it to finish, or use a different --output"
            ) from None
        try:
            yield
        finally:
            if is_ours and not settings.exists():  # nothing is left to resume
                with suppress(OSError):  # Windows deletes no open file
                    (self.folder / LOCK).unlink()
            lock.release()

    def check_previous(self, inputs: Iterable[ImageInput], *, resume: bool, overwrite: bool) -> None:
        """Check what an earlier run left, and change nothing.

        Args:
            inputs (`Iterable[ImageInput]`): The images.
            resume (`bool`): Whether to continue the earlier run, if there was one.
            overwrite (`bool`): Whether to replace its results.

        Raises:
            InputError: If something would be overwritten, the run to resume had other settings, or the directory
                cannot be one.
        """
        if file := next((path for path in (self.folder, *self.folder.absolute().parents) if path.is_file()), None):
            raise InputError(f"{self.folder}: cannot be a directory, since {file} is a file; use a different --output")
        previous = self._previous_settings() if resume else None
        if previous is None and not overwrite:
            self.check_new(inputs, resume)
        differing = [name for name in self.settings if previous and previous.get(name) != self.settings[name]]
        if previous and differing:
            changes = [f"{name} {previous.get(name)!r} (now {self.settings[name]!r})" for name in differing]
            raise InputError(
                f"{self.folder}: cannot be resumed, it was made with {summarize_list(changes)}; use the same options, "
                f"or --overwrite"
            )

    def check_new(self, inputs: Iterable[ImageInput], resume: bool = False) -> None:
        """Check that nothing would be overwritten.

        Raises:
            InputError: If an output exists.
        """
        targets = [self.folder / name for name in (SETTINGS, JOURNAL, HIDDEN_JOURNAL)]
        targets += [self.folder / name for format in self.formats for name in _OWN_PATHS.get(format, ())]
        targets += [self.path_of(item) for item in inputs] if "images" in self.formats else []
        targets += [self.path_of(item, ".mot.txt") for item in inputs] if "mot" in self.formats else []
        advice = "there is no unfinished run to resume" if resume else "add --resume to continue that run"
        if existing := next((target for target in targets if target.exists()), None):
            raise InputError(
                f"{existing}: already exists; {advice}, --overwrite to replace it, or use a different path"
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
        journals = [*self.folder.glob(OTHER_JOURNALS), *(self.folder / name for name in (HIDDEN_JOURNAL, JOURNAL))]
        for path in [*journals, self.folder / SETTINGS] if previous else ():
            path.unlink(missing_ok=True)

    def resume(self, inputs: Sequence[ImageInput]) -> set[str]:
        """Return the images that an earlier run has saved, and merge its journals.

        Raises:
            InputError: If a new image has the name of a saved one.
        """
        self._is_resumed = True
        self._merge_journals(inputs, with_partial_videos=False)
        done = {_name_of_input(record): record["image"] for record in self.records()}
        for item in inputs:
            name = _stem(item.name) if item.is_video else item.name
            if done.get(name, str(item.source)) != str(item.source):
                raise InputError(
                    f"{item.source}: has the same name as {done[name]}, which is saved in {self.folder}; give "
                    f"images by the same paths as before, or use a different --output"
                )
        return {*done.values()}

    def _previous_settings(self) -> dict[str, Any] | None:
        path = self.folder / SETTINGS
        if not path.exists():
            return None
        text = read_text(path)
        with suppress(ValueError, RecursionError):
            if isinstance(settings := json.loads(text), dict) and settings:
                return settings
        raise InputError(f"{path}: does not hold the settings of a run; use a different --output")

    def _merge_journals(self, inputs: Sequence[ImageInput], with_partial_videos: bool = True) -> None:
        """Make one journal of those of all processes: each image once, whole lines only, in the order of the inputs.

        Images that are not among the inputs come first. Killed at any moment, it leaves no image out.

        Args:
            inputs (`Sequence[ImageInput]`): Images and videos in order.
            with_partial_videos (`bool`, *optional*, defaults to `True`): Whether to keep frames of a video whose last
                frame is missing; a resumed run detects in it from its beginning.
        """
        paths = [path for path in (self.journal, *sorted(self.folder.glob(OTHER_JOURNALS))) if path.exists()]
        positions = {str(item.source): number for number, item in enumerate(inputs)}
        lines: dict[tuple[str, int], tuple[int, int, int, int]] = {}  # where: input, frame, journal and offset in it
        complete = set()
        for number, path in enumerate(paths):
            for record, offset in _whole_lines(path):
                image, frame = record["image"], record["frame"]
                lines.setdefault((image, frame), (positions.get(image, -1), frame, number, offset))
                if with_partial_videos or record["last"]:
                    complete.add(image)
        kept = sorted(place for (image, _), place in lines.items() if image in complete)
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("rb")) for path in paths]
            with atomic_write(self.journal) as temporary, temporary.open("wb") as merged:
                for _, _, number, offset in kept:
                    files[number].seek(offset)
                    merged.write(files[number].readline())
        for path in paths:
            if path != self.journal:
                path.unlink()

    def records(self) -> Iterator[Record]:
        """Read the journal, one record at a time."""
        if self.journal.exists():
            with self.journal.open(encoding="utf-8") as file:
                yield from map(json.loads, file)

    def open(self) -> None:
        """Begin to write, after what the journal contains already."""
        if not self.rank:
            write_json(self.folder / SETTINGS, self.settings)
            self._open_formats()
        self._logs["journal"] = _Log(self._own_journal, "ab")

    def _open_formats(self) -> None:
        if "yolo" in self.formats:
            _write_yolo_classes(self.folder / "yolo", self.classes)
        if "csv" in self.formats:
            self.has_videos = self.has_videos or any("frame" in record for record in self.records())
            self._write_document(_CSV, ResultsDirectory._write_csv)
            self._logs["csv"] = _Log(self.folder / _CSV, "ab")

    def save_files(self, result: ImageResult) -> ImageResult:
        """Write the files of one image. May be called from any thread, and before or after other images."""
        writers = [_FILE_WRITERS[name] for name in self.formats if name in _FILE_WRITERS]
        if result.image is not None and writers:
            record = to_record(result)
            with result.image:  # decodes a large one again, without others at the same time
                for write in writers:
                    write(self, record, result.image)
        return result

    def append(self, record: Record) -> None:
        """Add an image, whose files are written, to the journal."""
        self._logs["journal"].append(json.dumps(record) + "\n")
        self._count_changed_boxes(record)
        if "csv" in self._logs:
            self._logs["csv"].append(self._csv_rows(record))

    def _count_changed_boxes(self, record: Record) -> None:
        if {"crops", "labelstudio", "yolo", "voc"}.isdisjoint(self.formats):
            return
        clipped, kept = _clip(record)
        self.changed_boxes["left out"] += len(record["detections"]) - len(kept)
        self.changed_boxes["cut"] += sum(box.tolist() != each["box"] for box, each in zip(clipped, kept))

    def close_journal(self) -> None:
        """End what this process writes, which another run can resume then."""
        for log in self._logs.values():
            log.file.close()
            fsync(log.path)
        self._logs.clear()

    def close(self, complete: bool, inputs: Sequence[ImageInput] = ()) -> None:
        """Write the files of all images from the journals, once all other processes have closed theirs.

        Args:
            complete (`bool`): Whether the run came to its end, so that a journal that was not asked for can go.
            inputs (`Sequence[ImageInput]`, *optional*): Images in the order in which they are written; by default, in
                that of the journal.
        """
        self.close_journal()
        if self._is_resumed or any(self.folder.glob(OTHER_JOURNALS)):  # otherwise it has this order already
            self._merge_journals(inputs)
        for name in self.formats:
            if name in _DOCUMENT_WRITERS:
                self._write_document(*_DOCUMENT_WRITERS[name])
        if complete and self.formats == ["images"]:
            self.journal.unlink()
            (self.folder / SETTINGS).unlink()
        if self.changed_boxes.total():
            cut = [f"{count} {what}" for what, count in self.changed_boxes.items() if count]
            logger.warning("boxes beyond their image in crops, labelstudio, yolo and voc: %s", " and ".join(cut))

    def _write_document(self, file_name: str, write: "Callable[[ResultsDirectory, TextIO], None]") -> None:
        path = self.folder / file_name
        with atomic_write(path) as temporary, temporary.open("w", **_UTF8) as file:
            write(self, file)

    def path_of(self, item: ImageInput, suffix: str = "") -> Path:
        """Return the file of an image or a video with a suffix; by default, that of its drawing."""
        return self.folder / (_stem(item.name) + (suffix or (".mp4" if item.is_video else ".png")))

    def _draw(self, record: Record, image: Pixels) -> None:
        path = self.folder / f"{_stem(record['file_name'])}.png"
        save_image(draw_rows(image, record["detections"], self.classes), path)

    def _crop(self, record: Record, image: Pixels) -> None:
        numbered = enumerate(zip(*_clip(record)), start=1)
        for number, (box, each) in sorted(numbered, key=lambda item: item[1][0][1]):  # from top to bottom
            x0, y0 = np.floor(box[:2]).astype(int)
            x1, y1 = np.ceil(box[2:]).astype(int)
            folder = self.folder / "crops" / re.sub(r"[^\w .-]|^\.+", "_", each["name"])
            save_image(image.crop((x0, y0, x1, y1)), folder / f"{_stem(record['file_name'])}-{number}.png")

    def _write_yolo(self, record: Record, image: Pixels) -> None:
        numbers = {label: number for number, label in enumerate(sorted(self.classes))}
        boxes, kept = _clip(record)
        fractions = np.hstack([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]])
        fractions /= [record["width"], record["height"]] * 2
        lines = (
            f"{numbers[each['label']]} " + " ".join(f"{value:.8f}" for value in box) + "\n"
            for box, each in zip(fractions, kept)
        )
        _write_text(self.folder / "yolo" / "labels" / f"{_stem(record['file_name'])}.txt", "".join(lines))

    def _write_voc(self, record: Record, image: Pixels) -> None:
        supervision = import_extra("supervision", "train", "writing Pascal VOC")
        to_xml = import_extra("supervision.dataset.formats.pascal_voc", "train", "writing Pascal VOC")
        boxes, kept = _clip(record)
        detections = supervision.Detections(xyxy=boxes, class_id=np.array([each["label"] for each in kept], dtype=int))
        text = to_xml.detections_to_pascal_voc(
            detections, self.classes, record["file_name"], (record["height"], record["width"], 3)
        )
        text = re.sub("(?<=<database>).*?(?=</database>)", VOC_SOURCE, text, count=1)  # it names Roboflow
        _write_text(self.folder / "voc" / "Annotations" / f"{_stem(record['file_name'])}.xml", text)

    def _write_csv(self, file: TextIO) -> None:
        csv.writer(file).writerow(self._csv_columns)
        file.writelines(map(self._csv_rows, self.records()))

    def _csv_rows(self, record: Record) -> str:
        text = io.StringIO(newline="")
        boxes = (zip(("x0", "y0", "x1", "y1"), each["box"]) for each in record["detections"])
        rows = ({**record, **each, **dict(box)} for each, box in zip(record["detections"], boxes))
        csv.DictWriter(text, self._csv_columns, extrasaction="ignore").writerows(rows)
        return text.getvalue()

    @property
    def _csv_columns(self) -> tuple[str, ...]:
        return _CSV_COLUMNS + _VIDEO_COLUMNS * self.has_videos

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


def _whole_lines(path: Path) -> Iterator[tuple[Record, int]]:
    """Yield the record of each line of a journal, an image as the only frame of itself, and the offset of the line.

    A line that does not end was being written when the process was killed. Others that cannot be read are damaged.
    """
    offset, damaged = 0, 0
    with path.open("rb") as file:
        for line in file:
            try:
                if line.endswith(b"\n"):
                    record = json.loads(line)
                    if not _is_record(record):
                        raise ValueError(line)
                    yield {"frame": 0, "last": "frame" not in record, **record}, offset
            except (ValueError, KeyError, TypeError, RecursionError):
                damaged += 1
            offset += len(line)
    if damaged:
        lines = count_of(damaged, "line is", "lines are")
        logger.warning("%s: %s damaged and left out; --resume detects in these images again", path, lines)


def _is_record(value: Any) -> bool:
    types = {"image": str, "file_name": str, "width": int, "height": int, "detections": list}
    whole = isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in types.items())
    return whole and isinstance(value.get("frame", 0), int)


def draw_rows(image: Pixels, detections: Sequence[Record], classes: Mapping[int, str], **options: Any) -> Image.Image:
    """Draw the detections of an [`ImageResult`] into a copy of its image, which is reduced if it is very large.

    Further options are those of [`draw_detections`].
    """
    boxes, names, scores = ([each[key] for each in detections] for key in ("box", "name", "score"))
    factor = math.ceil(math.sqrt(image.size[0] * image.size[1] / MAX_DRAWN_PIXELS))
    if factor > 1:
        warn_once(
            "reduced",
            f"an image of {image.size[0]} x {image.size[1]} pixels is drawn at 1/{factor} of its size; boxes in other "
            f"formats, and crops, are of full size",
        )
    drawn = image if isinstance(image, Image.Image) and factor == 1 else image.reduce(factor)
    tracks = [each.get("track") for each in detections]
    reduced = np.array(boxes).reshape(-1, 4) / factor
    return draw_detections(drawn, reduced, names, scores, classes.values(), tracks, **options)


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
    path.write_text(text, **_UTF8)


def _write_yolo_classes(folder: Path, classes: Mapping[int, str]) -> None:
    names = [json.dumps(classes[label], ensure_ascii=False) for label in sorted(classes)]  # JSON strings are YAML
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    lines = [f"  {number}: {name}\n" for number, name in enumerate(names)]
    _write_text(folder / "data.yaml", "path: .\ntrain: images\nval: images\nnames:\n" + "".join(lines))


_CSV = "results.csv"
_CSV_COLUMNS = ("image", "width", "height", "label", "name", "score", "x0", "y0", "x1", "y1")
_COCO_IMAGE = ("file_name", "width", "height", "frame", "seconds")
_VIDEO_COLUMNS = ("frame", "seconds", "track")

_FILE_WRITERS: dict[str, Callable[[ResultsDirectory, Record, Pixels], None]] = {
    "images": ResultsDirectory._draw,
    "crops": ResultsDirectory._crop,
    "yolo": ResultsDirectory._write_yolo,
    "voc": ResultsDirectory._write_voc,
}
_DOCUMENT_WRITERS: dict[str, tuple[str, Callable[[ResultsDirectory, TextIO], None]]] = {
    "csv": (_CSV, ResultsDirectory._write_csv),
    "json": ("results.json", ResultsDirectory._write_json),
    "coco": ("coco.json", ResultsDirectory._write_coco),
    "labelstudio": ("labelstudio.json", ResultsDirectory._write_labelstudio),
}
_OWN_PATHS = {
    "jsonl": [JOURNAL],
    "crops": ["crops"],
    "yolo": ["yolo"],
    "voc": ["voc"],
    **{name: [file] for name, (file, _) in _DOCUMENT_WRITERS.items()},
}

VIDEO_FORMATS = ("images", "json", "jsonl", "csv", "coco", "mot")
"""What can be saved of a video."""

SAVE_FORMATS = ("images", "json", "jsonl", "csv", "coco", "yolo", "voc", "labelstudio", "crops")
"""What can be saved of an image, in the order in which it is listed."""
