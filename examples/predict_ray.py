"""Detect objects in more images than one machine can take: `Detector` over a cluster of Ray, from and to Parquet.

    python examples/predict_ray.py images detections --model runs/mine --num_workers 2
    python examples/predict_ray.py images.parquet /shared/detections --model runs/mine --address auto \
        --num_workers 16 --gpus_per_worker 1

The images are a directory, a text file with a path per line, or a Parquet file with the paths in the column `image`;
all machines see them, and the output directory, by the same paths. The output has a row per image: its `image`,
`width`, `height`, the `error` if it cannot be read, and its `detections` (label, name, score, box in pixels).

The same command again continues a run that was stopped: it detects in the images that have no row yet. A file of the
output is written under a temporary name first, and named after the images in it, so a worker that dies, and the one
that repeats its work, leave each image in it once.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.dataset as parquet_files
import pyarrow.parquet as parquet
import typer

from hf_dino.hub import load_model_and_processor
from hf_dino.inference import DetectionOptions, Detector, ImageInput, ImageResult, find_inputs
from hf_dino.utils.errors import InputError, run_cli
from hf_dino.utils.io import atomic_write, read_lines, read_text, write_json


os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray is imported, which reports usage otherwise

import ray


DETECTION = pa.struct(
    {"label": pa.int32(), "name": pa.string(), "score": pa.float32(), "box": pa.list_(pa.float32(), 4)}
)
SCHEMA = pa.schema(
    {
        "image": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "error": pa.string(),
        "detections": pa.list_(DETECTION),
    }
)
SETTINGS = "_settings.json"  # readers of Parquet ignore names with an underscore


class DetectInBlock:
    """A worker of the cluster, which loads the model once and writes a file for each block of images."""

    def __init__(self, model: str, threshold: float, batch_size: int, device: str, output: Path):
        network, processor = load_model_and_processor(model)
        self.detector = Detector(
            network.to(device), processor, DetectionOptions(threshold=threshold), batch_size=batch_size
        )
        self.output = output

    def __call__(self, block: dict[str, Any]) -> dict[str, list[int]]:
        images = [str(image) for image in block["image"]]
        results = self.detector.stream(ImageInput(Path(image), image) for image in images)
        rows = [to_row(result) for result in results]
        name = hashlib.sha256("\n".join(images).encode(errors="surrogateescape")).hexdigest()[:32]
        with atomic_write(self.output / f"{name}.parquet") as temporary:
            parquet.write_table(pa.Table.from_pylist(rows, SCHEMA), temporary)
        return {"images": [len(rows)], "errors": [sum(bool(row["error"]) for row in rows)]}


def to_row(result: ImageResult) -> dict[str, Any]:
    width, height = result.image.size if result.image else (None, None)
    return {
        "image": result.input.name,
        "width": width,
        "height": height,
        "error": result.error or None,
        "detections": result.detections,
    }


def list_images(source: Path) -> list[str]:
    if source.is_dir():
        return [str(item.source) for item in find_inputs([str(source)], recursive=True)]
    if source.suffix == ".parquet":
        return parquet.read_table(source, columns=["image"])["image"].to_pylist()
    return read_lines(source)


def finished_images(output: Path) -> set[str]:
    files = [path for path in output.glob("*.parquet") if not path.name.startswith(".")]
    return set(parquet_files.dataset(files, SCHEMA).to_table(["image"])["image"].to_pylist()) if files else set()


def check_settings(output: Path, settings: dict[str, Any]) -> None:
    path = output / SETTINGS
    if path.exists() and (previous := json.loads(read_text(path))) != settings:
        raise InputError(f"{output}: was made with {previous}, not {settings}; use the same, or a new directory")
    if not path.exists() and output.exists() and any(output.iterdir()):
        raise InputError(f"{output}: has other files; use a new directory")
    write_json(path, settings)


def detect(images: Sequence[str], worker: dict[str, Any], num_workers: int, gpus: float, block_size: int) -> None:
    blocks = ray.data.from_items(
        [{"image": image} for image in images], override_num_blocks=math.ceil(len(images) / block_size)
    )
    written = blocks.map_batches(
        DetectInBlock,
        fn_constructor_kwargs=worker,
        batch_size=None,  # a whole block
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_gpus=gpus,
    )
    for _ in written.iter_batches(batch_size=None):  # the workers write; a worker that dies is replaced
        pass


def main(
    images: Annotated[
        Path, typer.Argument(help="Directory of images, text file of paths, or Parquet file with a column `image`.")
    ],
    output: Annotated[Path, typer.Argument(help="Directory of Parquet files to write the detections to.")],
    model: Annotated[str, typer.Option(help="Directory or Hub id (OWNER/NAME) of the model.")],
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Lowest score of a detection.")] = 0.3,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="Images per batch of one resized size.")] = 8,
    block_size: Annotated[
        int,
        typer.Option("--block_size", min=1, help="Images per file of the output; a failure repeats them."),
    ] = 256,
    num_workers: Annotated[int, typer.Option("--num_workers", min=1, help="Number of copies of the model.")] = 2,
    gpus_per_worker: Annotated[
        float, typer.Option("--gpus_per_worker", min=0, help="GPUs of each worker; may be a fraction.")
    ] = 0.0,
    address: Annotated[
        str | None, typer.Option(help="Address of a running cluster, such as auto; by default, this machine.")
    ] = None,
) -> None:
    """Detect objects in images on a cluster of Ray, and write the detections as Parquet."""
    names = [os.path.abspath(name) for name in dict.fromkeys(list_images(images))]  # noqa: PTH100, keeps links
    check_settings(output, {"model": model, "threshold": threshold})
    done = finished_images(output)
    remaining = [name for name in names if name not in done]
    print(f"{len(names)} images, {len(names) - len(remaining)} of them detected in before")

    if remaining:
        ray.init(address=address, include_dashboard=False, log_to_driver=False)
        device = "cuda" if gpus_per_worker else "cpu"
        worker = {"model": model, "threshold": threshold, "batch_size": batch_size, "device": device}
        detect(remaining, worker | {"output": output.absolute()}, num_workers, gpus_per_worker, block_size)
        ray.shutdown()

    if missing := set(names) - finished_images(output):
        raise InputError(f"{len(missing)} images have no row, such as {min(missing)}; run the command again")
    errors = parquet_files.dataset(output, SCHEMA).count_rows(filter=parquet_files.field("error").is_valid())
    print(f"{len(names)} images -> {output}, {errors} of them with an error")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    run_cli(app)
