"""Measure a DINO model on a data set in COCO's format: the table that pycocotools prints, and every number as JSON.

    python examples/evaluate_coco.py --model runs/mine --images data/val --annotations data/val.json --json val.json

Categories are matched to the model's classes by name. Pictures are batched with others of the same resized size only,
so the result does not depend on the batch size. `accelerate launch` shares the pictures out to several processes.
"""

import argparse
import logging
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.logging import RichHandler
from rich.progress import Progress

from hf_dino.data import InputError, read_coco
from hf_dino.evaluation import evaluate_model
from hf_dino.loading import load_detector
from hf_dino.training import at_least, check_new_files, write_json


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of the model")
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--annotations", type=Path, required=True, help="COCO annotation file")
    parser.add_argument("--json", type=Path, help="file for the numbers; must not exist yet")
    parser.add_argument("--detections", type=Path, help="file for the detections, as COCO results; must not exist yet")
    parser.add_argument(
        "--backend", choices=("torchvision", "pil"), help="what resizes; pil does exactly as the original"
    )
    parser.add_argument("--batch-size", type=at_least(1), default=8, help="pictures of one size, for each process")
    parser.add_argument("--num-workers", type=at_least(0), default=2, help="processes that read, for each process")
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), help="default: what accelerate is set to")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False)])
    check_new_files(args.json, args.detections)
    data = read_coco(args.images, args.annotations)
    model, processor = load_detector(args.model, backend=args.backend)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=args.mixed_precision)
    model = accelerator.prepare(model)

    with Progress(disable=not accelerator.is_main_process) as progress:
        task = progress.add_task("detecting", total=len(data.pictures) / accelerator.num_processes)
        scores, detections = evaluate_model(
            model,
            processor,
            data,
            accelerator,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            on_batch=lambda count: progress.advance(task, count),
        )

    if accelerator.is_main_process:
        print(scores.table)
        if args.json is not None:
            write_json(args.json, {**scores.metrics, "ap_per_category": scores.ap_per_category})
        if args.detections is not None:
            write_json(args.detections, detections)
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
