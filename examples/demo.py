"""Generate a dataset, train a tiny DINO on it, evaluate it and detect objects with it, in minutes on a CPU.

    python examples/demo.py --output_dir runs/demo

1. Generate the `shapes` dataset: circles, squares, triangles, stars and crosses among clutter, in COCO format.
2. Train a tiny DINO from scratch, as `hf-dino train` does.
3. Load the saved model and draw its detections in test images next to the ground truth.

Started again after an interruption, the training resumes.
"""

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

from hf_dino.data import read_coco, read_image, xywh_to_xyxy
from hf_dino.data.shapes import generate_shapes
from hf_dino.hub import load_model_and_processor
from hf_dino.inference import detect_objects
from hf_dino.training import FineTuner, FineTuningArguments, get_last_checkpoint
from hf_dino.utils.errors import run_cli
from hf_dino.visualization import check_drawing_dependencies, draw_detections, hstack_images, save_image


EXPECTED_AP = 0.60
OUTPUT = Path("runs/demo")


def main(output_dir: Annotated[Path, typer.Option("--output_dir", help="Directory to write to.")] = OUTPUT) -> None:
    """Generate a dataset, train a tiny DINO on it, evaluate it and detect objects with it."""
    dataset, model = output_dir / "shapes", output_dir / "model"
    check_drawing_dependencies()

    started = time.monotonic()
    print(f"1. The shapes dataset, in {dataset}")
    generate_shapes(dataset)

    print(f"2. Training a tiny DINO from scratch, into {model}")
    if not (model / "config.json").is_file():
        FineTuner(training_arguments(dataset, model)).train()
    ap = json.loads((model / "metrics.json").read_text())["test"]["ap"]

    print("3. The saved model, on test images")
    drawing = output_dir / "detections.png"
    draw_test_images(dataset, model, drawing)
    minutes = (time.monotonic() - started) / 60
    print(f"test AP {ap:.3f} after {minutes:.1f} minutes; model card {model / 'README.md'}, detections {drawing}")
    if ap < EXPECTED_AP:
        raise SystemExit(f"error: AP on the test images is {ap:.3f}, but {EXPECTED_AP:.2f} was expected")


def training_arguments(dataset: Path, model: Path) -> FineTuningArguments:
    """Return a recipe that was tuned on the validation images alone."""
    return FineTuningArguments(
        config_name=Path(__file__).parent / "configs" / "tiny.json",
        dataset=str(dataset),
        output_dir=model,
        resume_from_checkpoint=get_last_checkpoint(model / "checkpoints") is not None,
        image_size=["160x160"],
        augmentation="flip",
        global_batch_size=8,
        num_train_epochs=1000,
        max_train_steps=1100,
        learning_rate=4e-4,
        backbone_lr_multiplier=1.0,
        lr_milestones=[0.82],
        eval_epochs=1,
        dataloader_num_workers=1,
    )


def draw_test_images(data: Path, model: Path, target: Path) -> None:
    """Draw the first four test images: detections on the left, ground truth on the right."""
    test, detector = read_coco(data / "test", data / "test.json"), load_model_and_processor(str(model))
    detected, annotated = [], []
    for record in test.images[:4]:
        image = read_image(record.path)
        found = detect_objects(*detector, image, threshold=0.3)
        boxes, names, scores = ([detection[key] for detection in found] for key in ("box", "name", "score"))
        detected.append(draw_detections(image, boxes, names, scores, test.categories.values()))
        names = [test.categories[category_id] for category_id in record.category_ids]
        annotated.append(draw_detections(image, xywh_to_xyxy(record.boxes), names, classes=test.categories.values()))
    save_image(hstack_images(as_grid(detected), as_grid(annotated), ("detections", "ground truth")), target)


def as_grid(images: list[Image.Image]) -> Image.Image:
    """Arrange images of the same size in two columns."""
    return to_pil_image(make_grid([pil_to_tensor(image) for image in images], nrow=2, pad_value=255))


if __name__ == "__main__":
    run_cli(lambda: typer.run(main))
