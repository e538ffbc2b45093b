"""Measure the CPU time of `hf-dino predict` over that of the bare model, over many small images, in pairs.

    python benchmarks/predict_throughput.py [--num-images 1000] [--runs 5] [--batch-size 8] [--config tiny]

Each run detects in the same PNG files with a small random model. The bare model is called in a loop on batches that
are resized and in memory already, as it is and prepared for inference; the command, which prepares its model too, also
reads, resizes, batches and writes JSON Lines. CPU time, of all threads together, hardly depends on what else the
machine does.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedModel

from common.machine import write_result
from hf_dino import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrImageProcessor
from hf_dino.data import read_image
from hf_dino.inference import DetectionOptions, Detector, ResultsDirectory, find_inputs, prepare_for_inference
from hf_dino.inference.detector import map_ahead, worker_threads
from hf_dino.inference.results import to_record


SIZE = 160


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=1000, help="images in a run (default: 1000)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each kind, interleaved (default: 5)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--config", choices=("tiny", "small"), default="tiny", help="model of examples/configs")
    parser.add_argument("--num-workers", type=int, default=2, help="threads of the command (default: 2)")
    args = parser.parse_args()

    model, processor = random_detector(args.config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_images(folder / "images", args.num_images)
        prepared = prepare_for_inference(model)
        batches = read_batches(processor, folder / "images", args.batch_size)
        runs = {
            "bare model": bare_model(model, batches),
            "bare model, prepared": bare_model(prepared, batches),
            "predict": command(prepared, processor, folder, args.batch_size, args.num_workers),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.runs + 1):
            for name, run in runs.items():
                seconds[name].append(timed(run))
    seconds = {name: times[1:] for name, times in seconds.items()}  # the first is to warm up
    content = {
        "images": args.num_images,
        "share_of_the_bare_model": share(seconds["bare model"], seconds["predict"]),
        "share_of_the_prepared_bare_model": share(seconds["bare model, prepared"], seconds["predict"]),
        "cpu_seconds": {name: [round(each, 2) for each in times] for name, times in seconds.items()},
    }
    arguments = f"--num-images {args.num_images} --runs {args.runs} --batch-size {args.batch_size}"
    arguments += f" --num-workers {args.num_workers} --config {args.config}"
    write_result("predict_throughput", f"python benchmarks/predict_throughput.py {arguments}", content)


def random_detector(name: str) -> tuple[DinoDetrForObjectDetection, DinoDetrImageProcessor]:
    """Return a model of random weights and its image processor."""
    config = DinoDetrConfig.from_json_file(Path(__file__).parents[1] / "examples" / "configs" / f"{name}.json")
    size = {"shortest_edge": SIZE, "longest_edge": SIZE}
    return DinoDetrForObjectDetection(config).eval(), DinoDetrImageProcessor(size=size)


def draw_images(folder: Path, number: int) -> None:
    """Write PNG files of smooth noise."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(number):
        pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / f"{index:05}.png")


def read_batches(processor: DinoDetrImageProcessor, folder: Path, batch_size: int) -> list[BatchFeature]:
    images = [read_image(path) for path in sorted(folder.iterdir())]
    return [
        processor(images=images[start : start + batch_size], return_tensors="pt")
        for start in range(0, len(images), batch_size)
    ]


def bare_model(model: PreTrainedModel, batches: list[BatchFeature]) -> Callable[[], None]:
    """Return a loop over batches in memory."""

    @torch.inference_mode()
    def run() -> None:
        for batch in batches:
            model(**batch)

    return run


def command(
    model: PreTrainedModel,
    processor: DinoDetrImageProcessor,
    folder: Path,
    batch_size: int,
    num_workers: int,
) -> Callable[[], None]:
    """Return the loop of `hf-dino predict --save jsonl`."""
    detector = Detector(model, processor, DetectionOptions(), batch_size=batch_size)

    def run() -> None:
        shutil.rmtree(folder / "out", ignore_errors=True)
        results = ResultsDirectory(folder / "out", ["jsonl"], {}, detector.names)
        results.open()
        with worker_threads(num_workers) as pool:
            stream = detector.stream(find_inputs([str(folder / "images")]), pool, 2 * num_workers)
            for result in map_ahead(results.save_files, stream, pool, 2 * num_workers):
                results.append(to_record(result))
        results.close(complete=True)

    return run


def share(bare: list[float], whole: list[float]) -> dict[str, Any]:
    """Return the part of the command's time that the bare model takes, in each round and in the median."""
    shares = [one / other for one, other in zip(bare, whole, strict=True)]
    return {"median": round(statistics.median(shares), 3), "runs": [round(each, 3) for each in shares]}


def timed(run: Callable[[], None]) -> float:
    """Return the CPU seconds that a run takes."""
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main()
