"""Time and memory of scoring detections: all that we do from the file on, against pycocotools' two steps alone.

    python benchmarks/evaluation.py [--images 5000] [--detections 300] [--rounds 2]

Objects and detections are random, of 80 classes as unequally frequent as COCO's. `hf_dino` starts from a file of
records as a model writes it: grouped by image, evaluated, accumulated and summarized. `pycocotools` has everything in
its own datasets already and only evaluates and accumulates. Each runs in a separate process, and their runs are
interleaved. At full size a round takes several minutes.
"""

import argparse
import contextlib
import io
import json
import pickle
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common.interleave import Candidate, interleave
from common.machine import write_result
from evaluation_inputs import generate
from hf_dino.data import DetectionSplit, to_annotation_array
from hf_dino.evaluation import DETECTION_DTYPE, ENGINES, METRICS, evaluate_coco
from hf_dino.evaluation.predictions import sort_by_image


def make_ours(folder: Path, engine: str) -> Callable[[], None]:
    """Read both from disk, so that they count as memory of the run."""

    def run() -> None:
        data = pickle.loads((folder / "data.pickle").read_bytes())
        detections = sort_by_image(np.fromfile(folder / "detections", DETECTION_DTYPE))
        scores = evaluate_coco(data, detections, engine)
        (folder / f"{engine}.json").write_text(json.dumps(list(scores.metrics.values())))

    return run


def as_dicts(records: np.ndarray) -> list[dict[str, Any]]:
    """Return plain numbers, as read from JSON. Those of numpy would make pycocotools slower."""
    names = records.dtype.names or ()
    return [dict(zip(names, values)) for values in zip(*(records[name].tolist() for name in names))]


def make_pycocotools(folder: Path) -> Callable[[], None]:
    data: DetectionSplit = pickle.loads((folder / "data.pickle").read_bytes())
    objects, detections = to_annotation_array(data), np.fromfile(folder / "detections", DETECTION_DTYPE)
    truth = COCO()
    truth.dataset = {
        "images": [{"id": image.image_id} for image in data.images],
        "categories": [{"id": category_id} for category_id in data.categories],
        "annotations": [{"id": number, **record} for number, record in enumerate(as_dicts(objects), start=1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = truth.loadRes(as_dicts(detections))

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(truth, found, "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        (folder / "direct.json").write_text(json.dumps(evaluation.stats.tolist()))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="number of images (default: 5000)")
    parser.add_argument("--detections", type=int, default=300, help="detections per image (default: 300)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds after one to warm up (default: 2)")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data, detections = generate(args.images, args.detections)
        detections.tofile(folder / "detections")
        (folder / "data.pickle").write_bytes(pickle.dumps(data))
        candidates: dict[str, Candidate] = {
            f"hf_dino, {engine}": (partial(make_ours, folder, engine), {}) for engine in ENGINES
        }
        candidates |= {"pycocotools, evaluate and accumulate": (partial(make_pycocotools, folder), {})}
        measured = interleave(candidates, args.rounds)
        numbers = {name: json.loads((folder / f"{name}.json").read_text()) for name in (*ENGINES, "direct")}

    command = f"python benchmarks/evaluation.py --images {args.images} --detections {args.detections}"
    content = {
        "num_images": args.images,
        "detections": len(detections),
        "objects": len(to_annotation_array(data)),
        **measured,
        "numbers": {name: round(value, 4) for name, value in zip(METRICS, numbers["direct"])},
        "largest_difference_of_a_number": {
            engine: max(abs(a - b) for a, b in zip(numbers[engine], numbers["direct"])) for engine in ENGINES
        },
    }
    write_result("evaluation", f"{command} --rounds {args.rounds}", content)


if __name__ == "__main__":
    main()
