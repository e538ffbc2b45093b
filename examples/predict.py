"""Detect objects in images, draw them, and write down what was found.

    python examples/predict.py --model runs/mine image.jpg --output drawn.png
    python examples/predict.py --model runs/mine folder more.jpg --output drawn_images --json found.json

With one image `--output` is an image file; with several, or with a folder of images, it is a folder in which each
drawn image is a PNG of the same name. Nothing that exists is overwritten. Images that cannot be read are named in
the end, and cost none of the others.
"""

import argparse
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.logging import RichHandler
from rich.progress import track
from transformers import BaseImageProcessor

from hf_dino import DinoDetrForObjectDetection
from hf_dino.data import InputError, list_images, read_image
from hf_dino.hub import load_model_and_processor
from hf_dino.utils.arguments import HelpFormatter, number_between
from hf_dino.utils.errors import run_cli
from hf_dino.utils.io import ensure_new_files, write_json
from hf_dino.visualization import check_drawing_dependencies, draw_detections, save_image


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    parser.add_argument("--model", required=True, help="folder or Hub name of the model")
    parser.add_argument("--output", type=Path, required=True, help="image file, or folder for several images")
    parser.add_argument("--json", type=Path, help="file for the detections: boxes as x0, y0, x1, y1 in pixels")
    score = number_between(0, 1)
    parser.add_argument("--threshold", type=score, default=0.3, help="lowest score that counts")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="such as cpu, cuda, cuda:1 or mps")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False)])
    outputs = plan_outputs(args.images, args.output)
    ensure_new_files(*outputs.values(), args.json)
    check_drawing_dependencies(*outputs.values())
    model, processor = load_model_and_processor(args.model)
    try:
        model.to(args.device)
    except (RuntimeError, AssertionError) as error:  # torch has no error of its own for this
        raise InputError(f"--device {args.device}: cannot be used ({str(error).partition(chr(10))[0]})") from error
    found: dict[str, list[dict[str, Any]]] = {}
    problems: list[str] = []
    for source, target in track(outputs.items(), "detecting", disable=len(outputs) == 1):
        try:
            image = read_image(source)
        except InputError as error:
            problems.append(str(error))
            continue
        detections = detect(model, processor, image, args.threshold)
        found[str(source)] = detections
        boxes, names, scores = ([detection[key] for detection in detections] for key in ("box", "name", "score"))
        save_image(draw_detections(image, boxes, names, scores, model.config.id2label.values()), target)
        counts = ", ".join(f"{count} {name}" for name, count in Counter(names).most_common())
        print(f"{source}: {counts or f'nothing above {args.threshold}'} -> {target}")
    if args.json and found:
        write_json(args.json, found)
    if problems:
        raise InputError("\n".join([f"{len(problems)} of {len(outputs)} images cannot be read:", *problems]))


@torch.no_grad()
def detect(
    model: DinoDetrForObjectDetection, processor: BaseImageProcessor, image: Image.Image, threshold: float
) -> list[dict[str, Any]]:
    """Name, score and box (x0, y0, x1, y1 in pixels) of each object found, the surest first."""
    inputs = processor(images=image, return_tensors="pt").to(model.device)
    (result,) = processor.post_process_object_detection(
        model(**inputs),
        threshold=threshold,
        target_sizes=[(image.height, image.width)],
        top_k=model.config.num_select,
    )
    rows = zip(result["labels"].tolist(), result["scores"].tolist(), result["boxes"].tolist(), strict=True)
    return [{"name": model.config.id2label[label], "score": score, "box": box} for label, score, box in rows]


def plan_outputs(images: list[Path], output: Path) -> dict[Path, Path]:
    """Where the drawing of each image goes."""
    sources = list_images(images)
    if len(images) == 1 and images[0].is_file() and not output.is_dir() and output.suffix:
        return {sources[0]: output}
    if output.suffix.lower() in Image.registered_extensions() and not output.is_dir():
        raise InputError(f"{output}: is the name of one image, but {len(sources)} are to be drawn; name a folder")
    targets = {source: output / f"{source.stem}.png" for source in sources}
    doubled = [str(target) for target, count in Counter(targets.values()).items() if count > 1]
    if doubled:
        raise InputError(f"several images would be drawn into {doubled[0]}; rename one, or draw them one by one")
    return targets


if __name__ == "__main__":
    run_cli(main)
