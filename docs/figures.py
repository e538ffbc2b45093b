"""Draw the images of the docs, with the commands that the pages show: `make docs-figures`, after `make demo`.

They show the dataset and the model of the demo, which every checkout can make.
"""

import base64
import io
import re
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from hf_dino.cli import app


ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
DEMO = ROOT / "runs" / "demo"
MAX_WIDTH, COLORS = 960, 64


def main(
    demo: Annotated[Path, typer.Option(help="Directory that `make demo` wrote.")] = DEMO,
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
    """Save a small image in few colors."""
    image = image.convert("RGB")
    if image.width > MAX_WIDTH:
        image = image.resize((MAX_WIDTH, round(image.height * MAX_WIDTH / image.width)), Image.Resampling.LANCZOS)
    image.quantize(COLORS, dither=Image.Dither.NONE).save(IMAGES / name, optimize=True)


if __name__ == "__main__":
    typer.run(main)
