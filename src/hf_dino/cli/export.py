"""`hf-dino export`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import log_to_terminal


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or Hub id (OWNER/NAME) of the model.")],
    output: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            help="File to write, FILE.onnx or FILE.pt2; a directory for openvino. Nothing is overwritten.",
        ),
    ],
    format: Annotated[
        Literal["onnx", "openvino", "pt2"],
        typer.Option(
            help="Format to write: ONNX, OpenVINO, or pt2 of torch.export. onnx needs the extra `export`, openvino "
            "the extra `openvino`."
        ),
    ] = "onnx",
    attention: Annotated[
        Literal["grid_sample", "gather"],
        typer.Option(
            help="Operators that deformable attention consists of. gather avoids GridSample, which TensorRT is "
            "reported to compute wrongly; it is slower in ONNX Runtime."
        ),
    ] = "grid_sample",
) -> None:
    """Export a model to one file that other programs run, and verify it.

    The file takes batches of any number of images of any size, with their padding masks, and contains class names and
    the settings of the image processor. It is compared with the model on five batches. If it differs, it is deleted
    and the exit status is 1; a wrong argument or a missing package gives 2.
    """
    log_to_terminal()

    from ..export import check_output, export_model
    from ..hub import load_model_and_processor
    from ..model_info import read_origin
    from .checkpoints import format_size, print_columns

    with _wrong_use():
        check_output(output, format)
        detector, processor = load_model_and_processor(model)
    origin = read_origin(model) if Path(model).exists() else model
    comparisons = export_model(detector, processor, output, format=format, attention=attention, origin=origin)
    print("largest differences from the model, all queries of batches of padded noise:")
    header = ("images", "height", "width", "boxes", "logits", "changed ranks")
    rows = [(*each.shape, f"{each.boxes:.1e}", f"{each.logits:.1e}", each.ranks) for each in comparisons]
    print_columns([header, *(tuple(map(str, row)) for row in rows)])
    files = [path for path in (output, *output.rglob("*")) if path.is_file()]
    print(f"wrote {output}, {format_size(sum(path.stat().st_size for path in files))}")


@contextmanager
def _wrong_use() -> Iterator[None]:
    """End with the status of wrong arguments; status 1 is that of a file that differs from its model."""
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
