"""`hf-dino export`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import Facts, JsonOption, log_to_terminal


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
    json: JsonOption = False,
) -> Facts:
    """Export a model to one file that other programs run, and verify it.

    The file takes batches of any number of images of any size, with their padding masks, and contains class names and
    the settings of the image processor. It is compared with the model on five batches. If it differs, it is deleted
    and the exit status is 1.
    """
    log_to_terminal()

    from ..export import check_output, export_model
    from ..hub import load_model_and_processor
    from ..model_info import read_origin
    from .checkpoints import format_size, print_columns

    check_output(output, format)
    detector, processor = load_model_and_processor(model)
    origin = read_origin(model) if Path(model).exists() else model
    comparisons = export_model(detector, processor, output, format=format, attention=attention, origin=origin)
    print("largest differences from the model, all queries of batches of padded noise:")
    header = ("images", "height", "width", "boxes", "logits", "changed ranks")
    rows = [(*each.shape, f"{each.boxes:.1e}", f"{each.logits:.1e}", each.ranks) for each in comparisons]
    print_columns([header, *(tuple(map(str, row)) for row in rows)])
    files = [path for path in (output, *output.rglob("*")) if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"wrote {output}, {format_size(size)}")
    return Facts(
        {
            "model": model,
            "output": output,
            "format": format,
            "attention": attention,
            "size": size,
            "differences": [
                {"images": images, "height": height, "width": width, "boxes": each.boxes, "logits": each.logits}
                | {"changed_ranks": each.ranks}
                for each in comparisons
                for images, height, width in [each.shape]
            ],
        }
    )
