"""Draw the images of the docs, with the commands that the pages show: `make docs-figures`, after `make demo`.

They show the dataset and the model of the demo, which every checkout can make. Those that compare models of the family
need a run of `examples/compare_family.py`, and are left as they are without one.
"""

import base64
import io
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from torchvision.ops import box_convert
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from hf_dino.cli import app
from hf_dino.data import read_coco, read_image, xywh_to_xyxy
from hf_dino.inspection import (
    draw_anchors,
    draw_box_noise,
    draw_denoising_mask,
    draw_positional_attention,
    draw_query_selections,
    draw_sampling_heads,
    inspect_image,
    inspect_positional_attention,
)
from hf_dino.visualization import hstack_images


ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
DEMO, FAMILY = ROOT / "runs" / "demo", ROOT / "runs" / "family"
MAX_WIDTH, COLORS, QUALITY = 960, 64, 80
OBJECTS, OBJECT = 27, 28  # test images with several objects, and with one in the middle
DENSE = {"DETR": "detr", "Conditional DETR": "conditional_detr", "DAB-DETR": "dab_detr"}
REPORT = {"report": "ap", "instability": "instability", "recall": "recall", "denoising": "denoising"}
SELECTIONS = {"static": "dn_deformable_detr", "pure": "dino_pure", "mixed": "dino_mixed"}


def main(
    demo: Annotated[Path, typer.Option(help="Directory that `make demo` wrote.")] = DEMO,
    family: Annotated[Path, typer.Option(help="Directory that `examples/compare_family.py` wrote.")] = FAMILY,
) -> None:
    """Draw all images of docs/images."""
    shapes, model = demo / "shapes", demo / "model"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hf_dino("data", "check", shapes, "--preview", folder / "preview.png", "--num_images", 4, "--headers_only")
        hf_dino("data", "augment", shapes, "--output", folder / "augment.png", "--num_images", 2)
        test = (shapes / "test", "--annotations", shapes / "test.json")
        image = sorted((shapes / "test").iterdir())[1]
        hf_dino("predict", "--model", model, image, "--output", folder / "drawn.png")
        report = folder / "report.html"
        hf_dino("evaluate", "--model", model, "--images", *test, "--report_html", report)
        curves, confusion = re.findall(r"data:image/png;base64,([\w+/=]+)", report.read_text(encoding="utf-8"))[:2]
        for path in (*folder.glob("*.png"), demo / "detections.png", model / "curves.png"):
            save(Image.open(path), path.name)
        save(decode(curves), "precision_recall.png")
        save(decode(confusion), "confusion.png")
    draw_inspections(demo)
    draw_family(demo, family / "rows")
    for name, image_name in REPORT.items():
        if (family / f"{name}.png").is_file():
            save(Image.open(family / f"{name}.png"), f"compare_{image_name}.png")


def draw_inspections(demo: Path) -> None:
    """Draw how the model of the demo works."""
    model, processor = load(demo / "model")
    image, boxes = test_image(demo, OBJECTS)
    save(draw_anchors(image, inspect_image(model, processor, image)), "anchors.jpg")
    save(draw_masks(model, image, boxes), "mask.png")
    image, boxes = test_image(demo, OBJECT)
    inspection = inspect_image(model, processor, image)
    query = int(inspection.scores[-1].max(axis=1).argmax())
    save(draw_sampling_heads(image, inspection, query, layer=0, close_up=True), "heads.jpg")
    save(draw_box_noise(image, boxes[-1]), "noise.jpg")


def draw_masks(model: Any, image: Image.Image, boxes: Any) -> Image.Image:
    """Draw the mask of DN-DETR, whose groups have no negative copies, beside that of DINO."""
    size = torch.tensor([*image.size, *image.size])
    labels = [{"boxes": box_convert(torch.tensor(boxes), "xyxy", "cxcywh") / size}]
    labels[0]["class_labels"] = torch.zeros(len(boxes), dtype=torch.int64)
    settings = {**model.config.to_dict(), "denoising": "plain"}  # the mask does not depend on weights
    plain = draw_denoising_mask(type(model)(type(model.config)(**settings)), labels)
    return hstack_images(plain, draw_denoising_mask(model, labels), ("DN-DETR", "DINO"))


def draw_family(demo: Path, rows: Path) -> None:
    """Draw what tells the trained models of the family apart."""
    image, boxes = test_image(demo, OBJECTS)

    def inspect(keys: Mapping[str, str], how: Callable[..., Any]) -> dict[str, Any]:
        models = {name: rows / key / "seed_0" for name, key in keys.items()}
        found = {name: path for name, path in models.items() if (path / "config.json").is_file()}
        return {name: how(*load(path), image) for name, path in found.items()}

    dense = inspect(DENSE, inspect_positional_attention)
    if len(dense) == len(DENSE):
        save(draw_positional_attention(image, dense, boxes[:2]), "attention.jpg")
    selected = inspect(SELECTIONS, inspect_image)
    if len(selected) == len(SELECTIONS):
        save(draw_query_selections(image, selected), "selections.jpg")


def load(model: Path) -> tuple[Any, Any]:
    """Return a detection model of any type and its image processor."""
    return AutoModelForObjectDetection.from_pretrained(model), AutoImageProcessor.from_pretrained(model)


def test_image(demo: Path, index: int) -> tuple[Image.Image, Any]:
    """Return a test image and the boxes of its objects, x0, y0, x1, y1 in pixels."""
    test = read_coco(demo / "shapes" / "test", demo / "shapes" / "test.json")
    record = sorted(test.images, key=lambda each: each.path)[index]
    return read_image(record.path), xywh_to_xyxy(record.boxes)


def hf_dino(*arguments: object) -> None:
    """Run a command in this process."""
    try:
        app([str(argument) for argument in arguments], prog_name="hf-dino")
    except SystemExit as end:
        if end.code:
            raise


def decode(data: str) -> Image.Image:
    """Read an image of the report."""
    return Image.open(io.BytesIO(base64.b64decode(data)))


def save(image: Image.Image, name: str) -> None:
    """Save a small image: a PNG in few colors, of which thin lines may lose theirs, or a JPEG."""
    image = image.convert("RGB")
    if image.width > MAX_WIDTH:
        image = image.resize((MAX_WIDTH, round(image.height * MAX_WIDTH / image.width)), Image.Resampling.LANCZOS)
    if name.endswith(".png"):
        image = image.quantize(COLORS, dither=Image.Dither.NONE)
    image.save(IMAGES / name, optimize=True, quality=QUALITY, subsampling=0)


if __name__ == "__main__":
    typer.run(main)
