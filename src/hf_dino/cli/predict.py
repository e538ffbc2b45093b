"""`hf-dino predict`."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import MaxImagePixelsOption, ModelOption, log_to_terminal


if TYPE_CHECKING:
    from ..hub import DinoDetrForObjectDetection


_MAX_RAISED = 2  # errors in the last message, which has a line for each


def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files, or directories of image files.")],
    model_name_or_path: ModelOption,
    output: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            help="Where to save the drawing: an image file for one image, a directory for several. Nothing is "
            "overwritten.",
        ),
    ],
    detections_json: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Save the detections to this JSON file: name, score, and box as x0, y0, x1, y1 in pixels. It must "
            "not exist.",
        ),
    ] = None,
    threshold: Annotated[
        float, typer.Option(metavar="NUMBER", min=0, max=1, help="Lowest score of a detection.")
    ] = 0.3,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="Device to run on, such as cpu, cuda, cuda:1 or mps.",
            show_default="cuda if available, otherwise cpu",
        ),
    ] = None,
    max_image_pixels: MaxImagePixelsOption = None,
) -> None:
    """Detect objects in images and draw them.

    For one image, --output is an image file. For several, or for a directory of images, it is a directory, in which
    each drawing is a PNG file with the name of its image. Images that cannot be read are skipped, and listed at the
    end.
    """
    log_to_terminal()

    import torch
    from rich.progress import track

    from ..hub import load_model_and_processor
    from ..inference import draw_objects, plan_outputs
    from ..utils.errors import InputError
    from ..utils.io import ensure_new_files, write_json
    from ..visualization import check_drawing_dependencies

    outputs = plan_outputs(images, output)
    ensure_new_files(*outputs.values(), detections_json)
    check_drawing_dependencies(*outputs.values())
    model, processor = load_model_and_processor(model_name_or_path)
    move_to_device(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    detections: dict[str, list[dict[str, Any]]] = {}
    errors: list[str] = []
    for source, target in track(outputs.items(), "detecting", disable=len(outputs) == 1):
        try:
            detections[str(source)] = draw_objects(model, processor, source, target, threshold)
        except InputError as error:
            errors.append(str(error))
            continue
        names = Counter(detection["name"] for detection in detections[str(source)])
        counts = ", ".join(f"{count} {name}" for name, count in names.most_common())
        print(f"{source}: {counts or f'nothing above {threshold}'} -> {target}")
    if detections_json and detections:
        write_json(detections_json, detections)
    for message in errors[_MAX_RAISED:]:
        print(f"not read: {message}")
    if errors:
        message = "\n".join([f"{len(errors)} of {len(outputs)} images cannot be read:", *errors[:_MAX_RAISED]])
        raise InputError(message + f" ... and {len(errors) - _MAX_RAISED} more above" * (len(errors) > _MAX_RAISED))


def move_to_device(model: "DinoDetrForObjectDetection", device: str) -> None:
    """Move a model to a device.

    Raises:
        InputError: If it cannot be used.
    """
    from ..utils.errors import InputError

    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch has no error of its own for this
        reason = str(error).partition("\n")[0]
        raise InputError(f"--device {device}: cannot be used ({reason})") from error
