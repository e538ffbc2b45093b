"""`hf-dino predict`."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..utils.errors import InputError, count_of, summarize_list
from .models import load_model
from .options import DeviceOption, MaxImagePixelsOption, ModelOption, log_to_terminal
from .predict_video import VIDEO_FORMATS, EndOption, EveryOption, StartOption, TrackOption, check_video_options


if TYPE_CHECKING:
    from ..inference import ImageInput, ResultsDirectory

logger = logging.getLogger(__name__)

FORMATS = ("images", "json", "jsonl", "csv", "coco", "yolo", "voc", "labelstudio", "crops")


def predict(
    context: typer.Context,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE",
            help="Images and videos: files, directories, quoted glob patterns, URLs, camera:0, or @FILE for a text "
            "file with one of these per line.",
        ),
    ],
    model_name_or_path: ModelOption,
    output: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            help="Where to save the results: a directory, or a file to draw one image or, as .mp4, one video.",
        ),
    ],
    save: Annotated[
        list[str],
        typer.Option(
            metavar="FORMAT",
            help=f"What to save in the directory, one or several of: {', '.join(FORMATS)}; of videos, one or several "
            f"of: {', '.join(VIDEO_FORMATS)}.",
        ),
    ] = ["images"],  # noqa: B006, typer copies it
    recursive: Annotated[
        bool, typer.Option("--recursive", help="Also detect in the images of subdirectories.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue an interrupted run: skip images that are in the directory already."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results of an earlier run.")] = False,
    threshold: Annotated[
        float, typer.Option(metavar="NUMBER", min=0, max=1, help="Lowest score of a detection.")
    ] = 0.3,
    classes: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Names of the classes to detect.", show_default="all of the model"),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            metavar="INTEGER", min=1, help="Maximum number of detections in an image.", show_default="the model's"
        ),
    ] = None,
    nms: Annotated[
        float | None,
        typer.Option(
            metavar="IOU",
            min=0,
            max=1,
            help="IoU above which only the better of two detections of a class is kept; DINO needs none.",
        ),
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            min=32,
            help="Side of the overlapping tiles that images are cut into, for small objects in large images.",
            show_default="images are not cut",
        ),
    ] = None,
    tile_overlap: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            min=0,
            max=0.9,
            help="Smallest part of its side that a tile has in common with the next one; should exceed the objects.",
            show_default="0.5",
        ),
    ] = None,
    every: EveryOption = None,
    start: StartOption = None,
    end: EndOption = None,
    track: TrackOption = False,
    batch_size: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Images per batch, all of the same resized size.")
    ] = 8,
    num_workers: Annotated[
        int,
        typer.Option(metavar="INTEGER", min=0, help="Threads that read and save images while the model runs."),
    ] = 2,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Precision of the computations.")
    ] = "float32",
    device: DeviceOption = None,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile the layers with torch.compile: about a minute, and faster batches from then on."
        ),
    ] = False,
    json_summary: Annotated[
        bool, typer.Option("--json", help="Print only a summary in JSON to the standard output.")
    ] = False,
    max_image_pixels: MaxImagePixelsOption = None,
) -> None:
    """Detect objects in images and videos, and save drawings or detections.

    With `--output drawn.png`, one image is drawn into that file. Otherwise --output is a directory, in which --save
    chooses the formats: a drawing of each image is a PNG file with its name, and `results.jsonl` has a line per image,
    which is written as soon as the image is done. Images that cannot be read are skipped, and listed at the end; the
    exit status is 1 then.

    `accelerate launch -m hf_dino predict` or `torchrun -m hf_dino predict` splits the images among several processes.
    """
    log_to_terminal()
    formats = _split(save)
    known = dict.fromkeys(FORMATS + VIDEO_FORMATS)
    if unknown := [name for name in formats or [""] if name not in known]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(known)}.", param_hint="'--save'")
    if resume and overwrite:
        context.fail("Give either --resume or --overwrite.")
    if tile_overlap is not None and tile is None:
        context.fail("--tile_overlap needs --tile.")

    import torch

    from ..inference import (
        TILE_OVERLAP,
        DetectionOptions,
        Detector,
        PredictionRun,
        ResultsDirectory,
        VideoOptions,
        find_inputs,
        join_processes,
        prepare_for_inference,
    )
    from ..utils.names import named_classes

    overlap = TILE_OVERLAP if tile_overlap is None else tile_overlap
    queue, inputs, drawing = join_processes(), [], None
    videos = VideoOptions(every, start, end, track)
    settings = {
        "model": model_name_or_path, "threshold": threshold, "classes": _split(classes or []), "top_k": top_k,
        "nms": nms, "dtype": dtype, "tile": tile, "tile_overlap": overlap, **videos.settings(),
    }  # fmt: skip
    results = ResultsDirectory(output, formats, settings, rank=queue.rank)
    if queue.rank == 0:
        inputs = find_inputs(images, recursive)
        check_video_options(context, videos, sum(item.is_video for item in inputs), formats)
        drawing = _single_drawing(output, images, inputs, formats)
        if drawing and (formats != ["images"] or resume):
            context.fail("--save and --resume need a directory as --output.")
        if drawing and queue.size > 1:
            context.fail(f"{drawing} is drawn by one process; name a directory, or start it without a launcher.")
        inputs = inputs if drawing else _outside(output, inputs)
        _check_outputs(results, inputs, drawing, resume, overwrite)
    else:
        queue.wait()
    model, processor = load_model(model_name_or_path, device, dtype, compile)
    model = model if compile else prepare_for_inference(model)
    results.classes = named_classes(model.config.id2label)
    options = DetectionOptions(threshold, _labels(classes, results.classes), top_k, nms, tile, overlap)
    detector = Detector(model, processor, options, batch_size=batch_size, dtype=getattr(torch, dtype))
    run = PredictionRun(detector, results, queue, videos, num_workers=num_workers, quiet=json_summary)
    if drawing:
        run.draw_one(inputs[0], drawing)
    else:
        run.save_all(inputs, resume=resume, overwrite=overwrite)
    run.report()


def _split(values: Sequence[str]) -> list[str]:
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def _labels(names: Sequence[str] | None, classes: Mapping[int, str]) -> frozenset[int] | None:
    """Return the labels of classes given by name, several of them joined by commas.

    Raises:
        typer.BadParameter: If the model has no such class.
    """
    from ..utils.names import match_names

    if names is None:
        return None
    known = match_names({name: name for name in names}, classes)  # a name may have a comma
    wanted = [part for name in names for part in ([name] if name in known else _split([name]))]
    labels = match_names({name: name for name in wanted}, classes)
    if unknown := [name for name in wanted or [""] if name not in labels]:
        raise typer.BadParameter(
            f"the model has no class {unknown[0]!r}; it has {summarize_list(classes.values(), 20)}.",
            param_hint="'--classes'",
        )
    return frozenset(labels.values())


def _single_drawing(
    output: Path, arguments: Sequence[str], inputs: Sequence["ImageInput"], formats: Sequence[str]
) -> Path | None:
    """Return the image or video file to draw into, `None` if the output is a directory."""
    from PIL import Image

    from ..inference.sources import is_video

    kind = "video" if is_video(output.name) else "image"
    is_file = kind == "video" or output.suffix.lower() in Image.registered_extensions()
    if output.is_dir() or not (is_file or (output.suffix and formats == ["images"])):
        return None
    if len(arguments) == len(inputs) == 1 and not Path(arguments[0]).is_dir():
        return output
    if is_file:
        raise InputError(f"{output}: is the name of one {kind}, but {len(inputs)} are to be drawn; name a directory")
    return None


def _outside(output: Path, inputs: list["ImageInput"]) -> list["ImageInput"]:
    """Return the inputs that are not in the output directory, whose drawings are not to be detected in."""
    if not output.exists():
        return inputs
    folder = output.resolve()
    paths = {item: getattr(item.source, "path", item.source) for item in inputs}  # of a video or of an image
    inside = {item for item, path in paths.items() if isinstance(path, Path) and folder in path.resolve().parents}
    if inside:
        names = summarize_list(sorted(item.name for item in inside))
        kinds = " and ".join(sorted({f"{item.kind}s" for item in inside}))
        number, verb = count_of(len(inside), kinds[:-1], kinds), "is" if len(inside) == 1 else "are"
        logger.warning("%s: %s in the output directory %s not used; %s", output, number, verb, names)
    if len(inside) == len(inputs):
        raise InputError(f"{output}: contains all images and videos that are given; use a different --output")
    return [item for item in inputs if item not in inside]


def _check_drawing(item: "ImageInput", drawing: Path) -> None:
    path = getattr(item.source, "path", item.source)  # of a video or of an image
    if isinstance(path, Path) and path.resolve() == drawing.resolve():
        raise InputError(f"{drawing}: is what is to be drawn; use another name for the drawing")
    if item.is_video and drawing.suffix.lower() != ".mp4":
        raise InputError(f"{drawing}: a video is drawn into an MP4 file; use a name with .mp4")


def _check_outputs(
    results: "ResultsDirectory", inputs: Sequence["ImageInput"], drawing: Path | None, resume: bool, overwrite: bool
) -> None:
    """Check outputs before the model is loaded."""
    from ..utils.io import ensure_new_files
    from ..visualization import check_drawing_dependencies

    if drawing:
        _check_drawing(inputs[0], drawing)
        ensure_new_files(*() if overwrite else (drawing,))
        check_drawing_dependencies(*() if inputs[0].is_video else (drawing,))
    else:
        results.check_inputs(inputs)
        results.check_previous(inputs, resume=resume, overwrite=overwrite)
