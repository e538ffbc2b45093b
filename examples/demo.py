"""The whole way in a few minutes on a CPU: make a dataset, train a small DINO on it, measure it, use it.

    python examples/demo.py [--output runs/demo]

1. Draws the `shapes` dataset: circles, squares, triangles, stars and crosses among clutter, in COCO's format.
2. Trains a small DINO from scratch through `examples/finetune_coco.py`, exactly as a user would on their own images.
3. Loads the saved model again and draws what it finds in a test image, beside the truth.

Started again after being stopped, it goes on where it was.
"""

import argparse
import json
import time
from pathlib import Path

import finetune_coco
from hf_dino.data import read_coco, read_image, xywh_to_xyxy
from hf_dino.data.shapes import generate_shapes
from hf_dino.hub import load_model_and_processor
from hf_dino.inference import detect_objects
from hf_dino.training import get_last_checkpoint
from hf_dino.utils.arguments import HelpFormatter
from hf_dino.utils.errors import run_cli
from hf_dino.visualization import check_drawing_dependencies, draw_detections, hstack_images, save_image


CONFIG = Path(__file__).parent / "configs" / "tiny.json"
# Chosen once on the validation images; the test images were never looked at for it.
RECIPE = [
    "--image-size=160x160",
    "--augmentation=flip",
    "--batch-size=8",
    "--epochs=1000",
    "--max-steps=1100",
    "--learning-rate=4e-4",
    "--backbone-lr-factor=1",
    "--lr-drop=0.82",
    "--eval-every=1",
    "--num-workers=1",
]
EXPECTED_AP = 0.60


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for data, model and images")
    output = parser.parse_args(argv).output
    data, model = output / "shapes", output / "model"
    check_drawing_dependencies()

    started = time.monotonic()
    print(f"1. The shapes dataset, in {data}")
    generate_shapes(data)

    print(f"2. Training a small DINO from scratch, into {model}")
    if not (model / "config.json").is_file():
        finetune_coco.main([*training_arguments(data, model), *RECIPE])
    ap = json.loads((model / "metrics.json").read_text())["test"]["ap"]

    print("3. The saved model, on a test image that it has never seen")
    drawn = output / "detections.png"
    draw_test_image(data, model, drawn)
    minutes = (time.monotonic() - started) / 60
    print(f"test AP {ap:.3f} after {minutes:.1f} minutes; model card {model / 'README.md'}, detections {drawn}")
    if ap < EXPECTED_AP:
        raise SystemExit(f"error: AP on the test images is {ap:.3f}, but {EXPECTED_AP:.2f} was expected")


def training_arguments(data: Path, model: Path) -> list[str]:
    """What a user would write to train on their own images."""
    arguments = ["--config", str(CONFIG), "--output", str(model)]
    for split in ("train", "val", "test"):
        arguments += [f"--{split}-images", str(data / split), f"--{split}-annotations", str(data / f"{split}.json")]
    return arguments + (["--resume"] if get_last_checkpoint(model / "checkpoints") else [])


def draw_test_image(data: Path, model: Path, target: Path) -> None:
    """Draw the test image with most objects: what the model finds, beside what is there."""
    test = read_coco(data / "test", data / "test.json")
    fullest = max(test.images, key=lambda image: len(image.boxes))
    image = read_image(fullest.path)
    found = detect_objects(*load_model_and_processor(str(model)), image, threshold=0.3)
    boxes, names, scores = ([detection[key] for detection in found] for key in ("box", "name", "score"))
    left = draw_detections(image, boxes, names, scores, test.categories.values())
    names = [test.categories[category_id] for category_id in fullest.category_ids]
    right = draw_detections(image, xywh_to_xyxy(fullest.boxes), names, classes=test.categories.values())
    save_image(hstack_images(left, right, ("found", "truth")), target)


if __name__ == "__main__":
    run_cli(main)
