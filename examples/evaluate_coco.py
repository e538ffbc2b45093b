"""Measure a DINO model on a dataset: the table that pycocotools prints, every number as JSON, and a report.

    python examples/evaluate_coco.py --model runs/mine --data mine --report report.html
    python examples/evaluate_coco.py --model runs/mine --images data/val --annotations data/val.json

The report is one HTML file that says what is wrong with a model: average precision and best score threshold of each
class, precision over recall, kinds of mistakes, which classes are taken for which, and the worst images.

Categories are matched to the model's classes by name. Images are batched with others of the same resized size only,
so the result does not depend on the batch size. `accelerate launch` shares the images out to several processes.
"""

import argparse
import logging
import shlex
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.logging import RichHandler
from rich.progress import Progress

from hf_dino.data import SPLITS, DetectionSplit, read_coco, read_data
from hf_dino.evaluation import ENGINES, analyze_errors, check_engine, evaluate_model, write_coco_results
from hf_dino.evaluation.report import write_report
from hf_dino.hub import load_model_and_processor
from hf_dino.training import PROCESS_GROUP_TIMEOUT, read_and_check
from hf_dino.utils.arguments import HelpFormatter, at_least
from hf_dino.utils.errors import run_cli
from hf_dino.utils.io import ensure_new_files, write_json
from hf_dino.visualization import check_drawing_dependencies


def parse_arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of the model")
    parser.add_argument("--data", help="folder, or OWNER/NAME on the Hub; instead of --images and --annotations")
    parser.add_argument("--split", choices=SPLITS, default="validation", help="the part of --data")
    parser.add_argument("--images", type=Path, help="folder of images")
    parser.add_argument("--annotations", type=Path, help="COCO annotation file")
    parser.add_argument("--json", type=Path, help="file for the numbers; must not exist yet")
    parser.add_argument("--detections", type=Path, help="file for the detections, as COCO results; must not exist yet")
    parser.add_argument("--report", type=Path, help="HTML file for what is right and wrong; must not exist yet")
    parser.add_argument(
        "--engine", choices=ENGINES, default="pycocotools", help="what scores; the other one is faster and as exact"
    )
    parser.add_argument(
        "--backend", choices=("torchvision", "pil"), help="what resizes; pil does exactly as the original"
    )
    parser.add_argument("--batch-size", type=at_least(1), default=8, help="images of one size, for each process")
    parser.add_argument("--num-workers", type=at_least(0), default=2, help="processes that read, for each process")
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), help="default: what accelerate is set to")
    args = parser.parse_args(words)
    if [args.data is None, args.images is None, args.annotations is None] not in ([0, 1, 1], [1, 0, 0]):
        parser.error("give either --data, or --images and --annotations")
    return args


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    args = parse_arguments(words)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False)])
    ensure_new_files(args.json, args.detections, args.report)
    check_engine(args.engine)
    if args.report:
        check_drawing_dependencies()
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=args.mixed_precision,
        kwargs_handlers=[PROCESS_GROUP_TIMEOUT],
    )
    (data,) = read_and_check(partial(read_split, args)).values()
    model, processor = load_model_and_processor(args.model, backend=args.backend)
    model = accelerator.prepare(model)

    with Progress(disable=not accelerator.is_main_process) as progress:
        task = progress.add_task("detecting", total=len(data.images) / accelerator.num_processes)
        scores, detections = evaluate_model(
            model,
            processor,
            data,
            accelerator,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            on_batch=lambda count: progress.advance(task, count),
            engine=args.engine,
        )

    if accelerator.is_main_process:
        print(f"{args.split if args.data else data.name}, {len(data.images)} images:\n{scores.table}")
        if args.json is not None:
            write_json(args.json, {**scores.metrics, "ap_per_category": scores.ap_per_category})
        if args.detections is not None:
            write_coco_results(args.detections, detections)
        if args.report is not None:
            command = shlex.join(["python", "examples/evaluate_coco.py", *words])
            details = {"model": args.model, "data": str(data.source), "scored by": args.engine, "command": command}
            title = f"{args.model} on {data.name}"
            write_report(args.report, data, scores, analyze_errors(data, detections), title=title, details=details)
        for name in filter(None, (args.json, args.detections, args.report)):
            print(f"written: {name}")
    accelerator.end_training()


def read_split(args: argparse.Namespace) -> dict[str, DetectionSplit]:
    if args.data:
        return read_data(args.data, splits=[args.split])
    data = read_coco(args.images, args.annotations)
    return {data.name: data}


if __name__ == "__main__":
    run_cli(main)
