"""`hf-dino predict`."""

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from ..utils.errors import InputError, summarize_list
from .options import DeviceOption, MaxImagePixelsOption, ModelOption, log_to_terminal
from .predict_video import (
    VIDEO_FORMATS,
    EndOption,
    EveryOption,
    StartOption,
    TrackOption,
    VideoOptions,
    detect_in_video,
)


if TYPE_CHECKING:
    from ..hub import DinoDetrForObjectDetection
    from ..inference import Detector, ImageInput, ImageResult, ResultsDirectory

logger = logging.getLogger(__name__)

FORMATS = ("images", "json", "jsonl", "csv", "coco", "yolo", "voc", "labelstudio", "crops")
Item = TypeVar("Item")

MAX_LINES = 100  # on the terminal: one per image, or only a summary
MAX_ERRORS = 20  # on the terminal
MAX_RAISED = 2  # of them in the last message, which has a line for each
PROGRESS_DELAY = 2.0  # seconds


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
            show_default="0.2",
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
    """
    log_to_terminal()
    formats = _split(save)
    if unknown := [name for name in formats or [""] if name not in (*FORMATS, "mot")]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(FORMATS)}, mot.", param_hint="'--save'")
    if resume and overwrite:
        context.fail("Give either --resume or --overwrite.")
    if tile_overlap is not None and tile is None:
        context.fail("--tile_overlap needs --tile.")
    overlap = 0.2 if tile_overlap is None else tile_overlap

    import torch

    from ..inference import DetectionOptions, Detector, ResultsDirectory, Video, find_inputs
    from ..utils.names import named_classes

    inputs = find_inputs(images, recursive)
    videos = VideoOptions(every, start, end, track)
    videos.check(context, sum(isinstance(item.source, Video) for item in inputs), formats)
    drawing = _single_drawing(output, images, inputs, formats)
    if drawing and (formats != ["images"] or resume):
        context.fail("--save and --resume need a directory as --output.")
    settings = {"model": model_name_or_path, "threshold": threshold, "classes": _split(classes or []), "top_k": top_k}
    settings |= videos.settings() | {"nms": nms, "dtype": dtype, "tile": tile, "tile_overlap": overlap}
    results = ResultsDirectory(output, formats, settings)
    inputs = inputs if drawing else _outside(output, inputs)
    done = _check_outputs(results, inputs, drawing, resume, overwrite)
    model, processor = _load_model(model_name_or_path, device, dtype, compile)
    results.classes = named_classes(model.config.id2label)
    options = DetectionOptions(threshold, _labels(classes, results.classes), top_k, nms, tile, overlap)
    detector = Detector(model, processor, options, batch_size=batch_size, dtype=getattr(torch, dtype))
    remaining = [item for item in inputs if str(item.source) not in done]
    run = _Run(detector, results, num_workers, total=len(remaining), quiet=json_summary, video_options=videos)
    run.draw_one(remaining[0], drawing) if drawing else run.save_all(remaining, overwrite)
    run.report(len(done))


class _Run:
    """One run of the command: its loop, its counts, and what it prints."""

    def __init__(
        self,
        detector: "Detector",
        results: "ResultsDirectory",
        num_workers: int,
        total: int,
        quiet: bool,
        video_options: VideoOptions,
    ):
        self.detector, self.results, self.num_workers = detector, results, num_workers
        self.total, self.quiet, self.video_options = total, quiet, video_options
        self.errors: dict[str, str] = {}
        self.objects: Counter[str] = Counter()
        self.kinds = "images"
        self.num_images = self.num_videos = self.num_frames = 0
        self.target = results.folder
        self.start = time.monotonic()

    def draw_one(self, item: "ImageInput", target: Path) -> None:
        """Draw one image or video into a file."""
        from ..inference import Video
        from ..inference.results import draw_rows
        from ..visualization import save_image

        self.target = target
        if isinstance(item.source, Video):
            self.kinds = "videos"
            detect_in_video(self, item, target)
            return
        (result,) = self.detector.stream([item])
        if result.image is not None:
            save_image(draw_rows(result.image, result.detections, self.results.classes), target)
        self._count(result)

    def save_all(self, inputs: Sequence["ImageInput"], overwrite: bool) -> None:
        """Save all images, then all videos, in a directory. After Ctrl-C, what was finished is saved."""
        from ..inference import Video
        from ..inference.detector import map_ahead, worker_threads
        from ..inference.results import to_record

        results = self.results
        videos = [item for item in inputs if isinstance(item.source, Video)]
        images = [item for item in inputs if not isinstance(item.source, Video)]
        if overwrite:
            results.remove_previous()
        results.has_videos = bool(videos)
        self.kinds = " and ".join(["images"] * bool(images) + ["videos"] * bool(videos))
        results.open()
        try:
            with worker_threads(self.num_workers) as pool:
                ahead = 2 * self.num_workers
                stream = map_ahead(results.save_files, self.detector.stream(images, pool, ahead), pool, ahead)
                for result in self.show_progress(stream, len(images), "images"):
                    if result.image is not None:
                        results.append(to_record(result))
                    self._count(result)
            for item in videos:
                drawing, mot = (
                    results.path_of(item, suffix) if name in results.formats else None
                    for name, suffix in (("images", ".mp4"), ("mot", ".mot.txt"))
                )
                detect_in_video(self, item, drawing, mot, results.append)
        except KeyboardInterrupt:
            results.close(complete=False)
            raise
        results.close(complete=True)

    def _count(self, result: "ImageResult") -> None:
        if result.error:
            self.errors[str(result.input.source)] = result.error
            return
        self.num_images += 1
        names = Counter(each["name"] for each in result.detections)
        self.objects += names
        if not self.quiet and self.total <= MAX_LINES:
            counts = ", ".join(f"{count} {name}" for name, count in names.most_common())
            nothing = f"nothing above {self.detector.options.threshold}"
            print(f"{result.input.source}: {counts or nothing} -> {self.target}")

    def show_progress(self, results: Iterator[Item], total: int | None, unit: str) -> Iterator[Item]:
        """Show the progress of a run that takes longer than `PROGRESS_DELAY`."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:.1f} {task.fields[unit]}/s"))
        # lines for a file are not to be printed above the bar
        redirect = sys.stdout.isatty()
        progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), redirect_stdout=redirect)
        task = progress.add_task("detecting", total=total, rate=0.0, unit=unit)
        start = time.monotonic()
        try:
            for number, result in enumerate(results, start=1):
                yield result
                seconds = time.monotonic() - start
                if seconds > PROGRESS_DELAY and total != 1:
                    progress.start()  # does nothing if it has
                    progress.update(task, completed=number, rate=number / seconds)
        finally:
            if progress.live.is_started:
                progress.stop()

    def report(self, num_skipped: int) -> None:
        """Print the summary.

        Raises:
            InputError: If an image could not be read.
        """
        seconds = time.monotonic() - self.start
        if self.quiet:
            print(json.dumps(self._summary(num_skipped, seconds), indent=2))
        elif self.total > MAX_LINES or num_skipped:
            skipped = f", {num_skipped} were there already" if num_skipped else ""
            print(
                f"{self.num_images} images{skipped}, {self.objects.total()} objects, "
                f"{self.num_images / seconds:.1f} images/s -> {self.target}"
            )
        if self.errors and self.kinds == "videos" and self.total == 1:
            raise InputError(*self.errors.values())
        if self.errors:
            errors, count = [*self.errors.values()], len(self.errors)
            for error in [] if self.quiet else errors[MAX_RAISED:MAX_ERRORS]:
                print(f"not read: {error}")
            more = f" ... and {count - MAX_RAISED} more; --json lists all" * (count > MAX_RAISED)
            listed = "\n".join(errors[:MAX_RAISED])
            raise InputError(f"{count} of {self.total} {self.kinds} cannot be read:\n{listed}{more}")

    def _summary(self, num_skipped: int, seconds: float) -> dict[str, Any]:
        videos = {
            "videos": self.num_videos, "frames": self.num_frames, "fps": round(self.num_frames / seconds, 2)
        }  # fmt: skip
        return {
            "output": str(self.target),
            "images": self.num_images,
            "skipped": num_skipped,
            "objects": dict(self.objects.most_common()),
            "errors": self.errors,
            "seconds": round(seconds, 3),
            "images_per_second": round(self.num_images / seconds, 2),
            **videos,
        }


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
    """Return the images that are not in the output directory, whose drawings are no images to detect in."""
    if not output.exists():
        return inputs
    folder = output.resolve()
    paths = {item: getattr(item.source, "path", item.source) for item in inputs}  # of a video or of an image
    inside = {item for item, path in paths.items() if isinstance(path, Path) and folder in path.resolve().parents}
    if inside:
        names = summarize_list(sorted(item.name for item in inside))
        logger.warning("%s: %d images in the output directory are not used; %s", output, len(inside), names)
    if len(inside) == len(inputs):
        raise InputError(f"{output}: contains all images, so that none is left; use a different --output")
    return [item for item in inputs if item not in inside]


def _check_drawn_video(item: "ImageInput", drawing: Path) -> None:
    from ..inference import Video

    path = item.source.path if isinstance(item.source, Video) else None
    is_same = path is not None and path.resolve() == drawing.resolve()
    if isinstance(item.source, Video) and (is_same or drawing.suffix.lower() != ".mp4"):
        raise InputError(f"{drawing}: a video is drawn into a new MP4 file; use another name, with .mp4")


def _check_outputs(
    results: "ResultsDirectory", inputs: Sequence["ImageInput"], drawing: Path | None, resume: bool, overwrite: bool
) -> set[str]:
    """Check outputs before the model is loaded, and return the images that are saved already."""
    from ..inference import Video
    from ..utils.io import ensure_new_files
    from ..visualization import check_drawing_dependencies

    if drawing:
        _check_drawn_video(inputs[0], drawing)
        ensure_new_files(*() if overwrite else (drawing,))
        check_drawing_dependencies(*() if isinstance(inputs[0].source, Video) else (drawing,))
        return set()
    results.check_inputs(inputs)
    if resume:
        return results.check_resumed(inputs)
    if not overwrite:
        results.check_new(inputs)
    return set()


def _load_model(name: str, device: str | None, dtype: str, compile: bool) -> tuple[Any, Any]:
    """Return a model, or an exported one that is called alike, and its image processor."""
    import torch

    from ..exported import is_exported, load_exported
    from ..hub import load_model_and_processor

    if is_exported(name):
        if device not in (None, "cpu") or dtype != "float32" or compile:
            raise InputError(
                f"{name}: is an exported model, which runs on the CPU only; leave out --device, --dtype, --compile"
            )
        return load_exported(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "float16" and device.partition(":")[0] == "cpu":
        raise InputError("--dtype float16 needs a GPU; use bfloat16 or float32")
    model, processor = load_model_and_processor(name)
    move_to_device(model, device)
    if compile:
        from ..training import compile_layers

        compile_layers(model)
    return model, processor


def move_to_device(model: "DinoDetrForObjectDetection", device: str) -> None:
    """Move a model to a device.

    Raises:
        InputError: If it cannot be used.
    """
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch has no error of its own for this
        reason = str(error).partition("\n")[0]
        raise InputError(f"--device {device}: cannot be used ({reason})") from error
