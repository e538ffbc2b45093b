"""Detect in tiles of mosaics: AP of our rule at several overlaps, and of supervision's `InferenceSlicer`.

    make demo
    python benchmarks/tiles.py [--demo runs/demo] [--split test] [--mosaics 10]

A mosaic is 4 x 4 images of the `shapes` dataset, so its objects are known, and are of the kind that the model of
`make demo` was trained on; tiles are as large as one of the images. In `aligned` mosaics tiles can coincide with
images, `shifted` ones have a random margin. Our rule was chosen on mosaics of validation images, and is reported on
those of test images. All use the same detector, with a lowest score of 0.02.
"""

import argparse
import io
import random
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import supervision
from PIL import Image

from common.machine import write_result
from hf_dino.data import AnnotatedImage, DetectionSplit, read_coco
from hf_dino.evaluation import DETECTION_DTYPE, evaluate_coco
from hf_dino.hub import load_model_and_processor
from hf_dino.inference import TILE_OVERLAP, DetectionOptions, Detector, ImageInput
from hf_dino.utils.names import match_names


SIDE, CELLS = 160, 4  # pixels of an image, and of a tile; images along a side of a mosaic
THRESHOLD = 0.02
NMS, NMM = supervision.OverlapFilter.NON_MAX_SUPPRESSION, supervision.OverlapFilter.NON_MAX_MERGE
IOU, IOS = supervision.OverlapMetric.IOU, supervision.OverlapMetric.IOS
OVERLAPS = (0.5, 0.25, 2 / 3)  # of aligned mosaics; of the others only the default
SLICERS = {
    "NMS, IoU 0.5": (NMS, 0.5, IOU, OVERLAPS),
    "NMS, IoU 0.3": (NMS, 0.3, IOU, (0.5,)),
    "NMS, IoU 0.7": (NMS, 0.7, IOU, (0.5,)),
    "NMS, IoS 0.5": (NMS, 0.5, IOS, (0.5,)),
    "NMM, IoU 0.5": (NMM, 0.5, IOU, (0.5,)),
    "NMM, IoS 0.5": (NMM, 0.5, IOS, (0.5,)),
}

Row = dict[str, Any]  # of a detection: label, score, box
Model = tuple[Any, Any]  # and its image processor


def make_mosaics(data: DetectionSplit, count: int, margin: int, folder: Path) -> DetectionSplit:
    """Write mosaics of random images. The margin at the left and above is a random part of `margin` pixels."""
    generator, images = random.Random(0), []
    records = generator.sample(data.images, count * CELLS**2)
    for number in range(count):
        group = records[number * CELLS**2 : (number + 1) * CELLS**2]
        offset = [generator.randrange(margin + 1) for _ in "xy"]
        corners = [(offset[0] + x * SIDE, offset[1] + y * SIDE) for y in range(CELLS) for x in range(CELLS)]
        side = CELLS * SIDE + margin
        canvas = Image.new("RGB", (side, side), "gray")
        for record, corner in zip(group, corners):
            canvas.paste(record.read(), corner)
        boxes = np.vstack([record.boxes + [*corner, 0, 0] for record, corner in zip(group, corners)])
        path = folder / f"{margin}_{number}.png"
        canvas.save(path)
        columns = {
            name: np.hstack([getattr(each, name) for each in group]) for name in ("category_ids", "areas", "iscrowd")
        }
        images.append(AnnotatedImage(number, path, side, side, boxes, **columns))
    return DetectionSplit("mosaics", images, data.categories)


def detect_ours(detector: Model, split: DetectionSplit, overlap: float | None) -> Iterator[list[Row]]:
    options = DetectionOptions(THRESHOLD, tile=SIDE, tile_overlap=overlap) if overlap else DetectionOptions(THRESHOLD)
    inputs = [ImageInput(image.path, str(image.path)) for image in split.images]
    model, processor = detector
    for result in Detector(model, processor, options, batch_size=8).stream(inputs):
        yield result.detections


def make_callback(detector: Model) -> Callable[[list[np.ndarray]], list[supervision.Detections]]:
    """Return the detector as the slicer calls it. Slicers with the same overlap have the same tiles."""
    model, processor = detector
    found: dict[bytes, list[Row]] = {}

    def callback(tiles: list[np.ndarray]) -> list[supervision.Detections]:
        keys = [tile.tobytes() for tile in tiles]
        new = {key: tile for key, tile in zip(keys, tiles) if key not in found}
        inputs = [ImageInput(_Tile(tile), "tile") for tile in new.values()]
        results = Detector(model, processor, DetectionOptions(THRESHOLD), batch_size=8).stream(inputs)
        found.update((key, result.detections) for key, result in zip(new, results))
        return [to_supervision(found[key]) for key in keys]

    return callback


class _Tile:
    """An array as an image file."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def open(self, mode: str = "rb", /) -> io.BytesIO:
        file = io.BytesIO()
        Image.fromarray(self.pixels).save(file, "PNG", compress_level=1)
        file.seek(0)
        return file


def to_supervision(rows: list[Row]) -> supervision.Detections:
    boxes, scores, labels = (np.array([row[name] for row in rows]) for name in ("box", "score", "label"))
    return supervision.Detections(boxes.reshape(-1, 4), confidence=scores, class_id=labels.astype(int))


def detect_slices(callback: Any, split: DetectionSplit, overlap: float, settings: tuple) -> Iterator[list[Row]]:
    overlap_filter, iou, metric, _ = settings
    slicer = supervision.InferenceSlicer(
        callback, slice_wh=SIDE, overlap_wh=round(overlap * SIDE), overlap_filter=overlap_filter,
        iou_threshold=iou, overlap_metric=metric, thread_workers=1, batch_size=8,
    )  # fmt: skip
    for image in split.images:
        found = slicer(np.asarray(image.read()))
        rows = zip(*(np.asarray(column).tolist() for column in (found.xyxy, found.confidence, found.class_id)))
        yield [{"box": box, "score": score, "label": label} for box, score, label in rows]


def score(split: DetectionSplit, found: Iterable[list[Row]], categories: dict[int, int]) -> dict[str, float]:
    records = [
        (image.image_id, categories[row["label"]], (x0, y0, x1 - x0, y1 - y0), row["score"])
        for image, rows in zip(split.images, found, strict=True)
        for row in rows
        for x0, y0, x1, y1 in [row["box"]]
    ]
    metrics = evaluate_coco(split, np.array(records, DETECTION_DTYPE)).metrics
    return {name: round(metrics[name], 4) for name in ("ap", "ap50")}


def measure(
    detector: Model, split: DetectionSplit, overlaps: Iterable[float]
) -> Iterator[tuple[str, dict[str, float]]]:
    labels = match_names(split.categories, detector[0].config.id2label)
    categories = {label: id_ for id_, label in labels.items()}
    callback = make_callback(detector)
    for overlap in overlaps:
        yield f"hf_dino, overlap {overlap:.2f}", score(split, detect_ours(detector, split, overlap), categories)
        for name, settings in SLICERS.items():
            if overlap in settings[-1]:
                found = detect_slices(callback, split, overlap, settings)
                yield f"supervision, {name}, overlap {overlap:.2f}", score(split, found, categories)
    yield "no tiles", score(split, detect_ours(detector, split, None), categories)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--demo", type=Path, default=Path("runs/demo"), help="output of make demo (default: runs/demo)"
    )
    parser.add_argument("--split", default="test", choices=["val", "test"], help="images to use (default: test)")
    parser.add_argument("--mosaics", type=int, default=10, help="mosaics of each kind (default: 10)")
    args = parser.parse_args()

    detector, shapes = load_model_and_processor(str(args.demo / "model")), args.demo / "shapes"
    data = read_coco(shapes / args.split, shapes / f"{args.split}.json")
    content: dict[str, Any] = {"supervision": supervision.__version__, "split": args.split, "mosaics": args.mosaics}
    command = f"python benchmarks/tiles.py --split {args.split} --mosaics {args.mosaics}"
    # slicers warn of each box that extends beyond its tile
    warnings.filterwarnings("ignore", message="Detections returned by the callback")
    for kind, margin, overlaps in (("aligned", 0, OVERLAPS), ("shifted", SIDE // 2, (TILE_OVERLAP,))):
        with tempfile.TemporaryDirectory() as folder:
            mosaics = make_mosaics(data, args.mosaics, margin, Path(folder))
            content[kind] = {}
            for name, metrics in measure(detector, mosaics, overlaps):
                content[kind][name] = metrics
                write_result("tiles" if args.split == "test" else f"tiles_{args.split}", command, content)


if __name__ == "__main__":
    main()
