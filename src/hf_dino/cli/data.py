"""`hf-dino data check`, `augment` and `convert`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..training_arguments import AUGMENTATION_HELP, DATASET_HELP, STREAMING_HELP
from .options import (
    AnnotationsOption,
    BoxFormatOption,
    ColumnsOption,
    Command,
    ImagesOption,
    MaxImagePixelsOption,
    RotatedBoxesOption,
    log_to_terminal,
    make_app,
    read_options,
    require_one_source,
)


if TYPE_CHECKING:
    from rich.table import Table

    from ..data import DataReport, DetectionSplit


DatasetArgument = Annotated[str | None, typer.Argument(metavar="DATASET", help=DATASET_HELP, show_default=False)]
StreamingOption = Annotated[bool, typer.Option("--streaming", help=STREAMING_HELP)]
MaxSamplesOption = Annotated[
    int | None,
    typer.Option(metavar="INTEGER", min=1, help="Number of images to read of each split; needs --streaming."),
]
CacheOption = Annotated[
    Path | None, typer.Option(metavar="DIRECTORY", help="Directory to keep the images of --streaming in.")
]

app = make_app("Check, preview and convert datasets.")
_MAX_MESSAGES = 20  # errors that are printed, and warnings


@dataclass(frozen=True)
class _Source:
    """Dataset that a command reads: a directory or name on the Hub, or images with their COCO annotation file."""

    dataset: str | None
    images: Path | None
    annotations: Path | None
    streaming: bool
    max_samples: int | None
    cache_dir: Path | None
    options: tuple[str, str, Sequence[str] | None]

    def check(self, context: typer.Context) -> None:
        """End the command if the options exclude each other."""
        require_one_source(context, "a DATASET", self.dataset, self.images, self.annotations)
        if self.dataset is None and (self.streaming or self.max_samples or self.cache_dir):
            context.fail("--streaming, --max_samples and --cache_dir need a DATASET.")

    def read(self, **more: Any) -> dict[str, "DetectionSplit"]:
        """Read the dataset, with more options of the readers."""
        from ..data.readers import read_coco_file, read_data, split_from_name

        options = read_options(*self.options, **more)
        if self.dataset is not None:
            return read_data(
                self.dataset,
                streaming=self.streaming,
                max_samples=self.max_samples,
                cache_dir=self.cache_dir,
                options=options,
            )
        assert self.images is not None and self.annotations is not None
        split = split_from_name(self.annotations.stem) or "train"
        return {split: read_coco_file([self.images], self.annotations, options)}


@app.command(cls=Command)
def check(
    context: typer.Context,
    dataset: DatasetArgument = None,
    images: ImagesOption = None,
    annotations: AnnotationsOption = None,
    streaming: StreamingOption = False,
    max_samples: MaxSamplesOption = None,
    cache_dir: CacheOption = None,
    box_format: BoxFormatOption = "xywh",
    rotated_boxes: RotatedBoxesOption = "enclose",
    columns: ColumnsOption = None,
    max_image_pixels: MaxImagePixelsOption = None,
    headers_only: Annotated[
        bool, typer.Option("--headers_only", help="Read only the header of each image: faster, misses damaged pixels.")
    ] = False,
    num_workers: Annotated[
        int | None,
        typer.Option(metavar="INTEGER", min=1, help="Threads that read images.", show_default="one per processor"),
    ] = None,
    preview: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Save a grid of sample images with their boxes to this file."),
    ] = None,
    num_images: Annotated[int, typer.Option(metavar="INTEGER", min=1, help="Number of images in --preview.")] = 12,
) -> None:
    """Report errors and warnings about a dataset.

    Nothing is changed. Give either DATASET, or --images and --annotations. The exit status is 1 if an error would stop
    training.
    """
    source = _Source(
        dataset, images, annotations, streaming, max_samples, cache_dir, (box_format, rotated_boxes, columns)
    )
    source.check(context)
    _log_to_terminal()

    from ..data import DataReport, check_data
    from ..data.preview import draw_image_grid, ensure_can_draw, sample_images

    if preview:
        ensure_can_draw(preview)
    errors: list[str] = []
    splits = source.read(on_error=errors.append)
    with _progress("images", sum(len(split.images) for split in splits.values())) as advance:
        found = check_data(splits, decode=not headers_only, num_workers=num_workers, on_image=advance)
    missing = [
        f"{split} split not found; fine-tuning needs it"
        for split in ("train", "validation")
        if dataset and split not in splits
    ]
    report = DataReport(errors + found.errors, found.warnings + missing, found.counts)
    print_report(report)
    if preview:
        draw_image_grid(sample_images(splits, num_images), preview)
        print(f"preview: {preview}")
    raise typer.Exit(1 if report.errors else 0)


@app.command(cls=Command)
def augment(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="Save the preview to this image file. It must not exist.")
    ],
    dataset: DatasetArgument = None,
    images: ImagesOption = None,
    annotations: AnnotationsOption = None,
    streaming: StreamingOption = False,
    max_samples: MaxSamplesOption = None,
    cache_dir: CacheOption = None,
    box_format: BoxFormatOption = "xywh",
    rotated_boxes: RotatedBoxesOption = "enclose",
    columns: ColumnsOption = None,
    max_image_pixels: MaxImagePixelsOption = None,
    augmentation: Annotated[
        str,
        typer.Option(metavar="NAME", help=f"Augmentation: {AUGMENTATION_HELP}."),
    ] = "dino",
    image_size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PIXELS",
            help="Size of images in training in pixels: shortest edge, shortest and longest edge, or HEIGHTxWIDTH.",
            show_default="800 1333",
        ),
    ] = None,
    num_images: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Number of images, each in a row of its own.")
    ] = 4,
    num_views: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Number of augmented copies of each image.")
    ] = 3,
    seed: Annotated[int, typer.Option(metavar="INTEGER", min=0, help="Seed of the augmentation, as in training.")] = 0,
) -> None:
    """Draw images as training augments them.

    Each row of the preview shows an image and its augmented copies, with boxes. Give either DATASET, or --images and
    --annotations.
    """
    source = _Source(
        dataset, images, annotations, streaming, max_samples, cache_dir, (box_format, rotated_boxes, columns)
    )
    source.check(context)
    _log_to_terminal()

    from ..data import make_augmentation
    from ..data.preview import draw_image_grid, ensure_can_draw, sample_augmented
    from ..hub import parse_image_size
    from ..image_processing_dino_detr import LONGEST_EDGE, SHORTEST_EDGE

    ensure_can_draw(output)
    size = parse_image_size(image_size or [str(SHORTEST_EDGE), str(LONGEST_EDGE)])
    transform = make_augmentation(augmentation, size)
    split = next(iter(source.read().values()))
    draw_image_grid(sample_augmented(split, transform, num_images, num_views, seed), output, columns=1 + num_views)
    print(f"preview: {output}")


@app.command(cls=Command)
def convert(
    context: typer.Context,
    output_dir: Annotated[
        Path, typer.Option(metavar="DIRECTORY", help="Directory to write; must be empty or not exist.")
    ],
    format: Annotated[
        Literal["coco", "voc", "yolo"],
        typer.Option(
            help="Format to write. coco keeps boxes as they are, yolo within 0.00001 of the image's side, voc rounds "
            "them to whole pixels. Only coco stores crowd regions and areas."
        ),
    ],
    dataset: DatasetArgument = None,
    images: ImagesOption = None,
    annotations: AnnotationsOption = None,
    streaming: StreamingOption = False,
    max_samples: MaxSamplesOption = None,
    cache_dir: CacheOption = None,
    box_format: BoxFormatOption = "xywh",
    rotated_boxes: RotatedBoxesOption = "enclose",
    columns: ColumnsOption = None,
    max_image_pixels: MaxImagePixelsOption = None,
) -> None:
    """Convert a dataset to another format.

    Image files are copied byte by byte; a warning names information that the format cannot store. Give either DATASET,
    or --images and --annotations.
    """
    source = _Source(
        dataset, images, annotations, streaming, max_samples, cache_dir, (box_format, rotated_boxes, columns)
    )
    source.check(context)
    _log_to_terminal()

    from ..data import InputError, convert_data

    if dataset and Path(dataset).resolve() in output_dir.resolve().parents:
        raise InputError(f"{output_dir}: is in {dataset}, which is not changed; use a different --output_dir")
    splits = source.read()
    num_images = sum(len(split.images) for split in splits.values())
    with _progress("checked, then copied", 2 * num_images) as advance:
        warnings = convert_data(splits, output_dir, format, on_image=advance)
    _print_messages("warning", "yellow", warnings)
    print(f"data: {output_dir}")


def _log_to_terminal() -> None:
    """Print log messages, but not those of the reader, which the report repeats."""
    from ..data.dataset import logger

    log_to_terminal(hide=[logger.name])


@contextmanager
def _progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar and give the function that advances it by one."""
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.advance(task)


def print_report(report: "DataReport") -> None:
    """Print the counts as tables, then warnings, then errors."""
    from rich.console import Console

    from ..data.check import SIZES

    console = Console()
    columns = ("images", "without objects", "objects", "crowds", *SIZES)
    counts = {
        split: (each.num_images, each.num_empty_images, each.num_objects, each.num_crowds, *each.sizes.values())
        for split, each in report.counts.items()
    }
    console.print(_table(("split", *columns), counts))
    names = dict.fromkeys(name for each in report.counts.values() for name, count in each.classes.items() if count)
    objects = {name: [each.classes.get(name, "—") for each in report.counts.values()] for name in names}
    console.print(_table(("class", *report.counts), objects))
    _print_messages("warning", "yellow", report.warnings)
    _print_messages("error", "red", report.errors)
    console.print(f"{len(report.errors)} errors, {len(report.warnings)} warnings", highlight=False)


def _print_messages(kind: str, style: str, messages: Sequence[str]) -> None:
    from rich.console import Console

    console = Console()
    for message in messages[:_MAX_MESSAGES]:
        console.print(f"{kind}: {message}", style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)
    if len(messages) > _MAX_MESSAGES:
        console.print(f"… and {len(messages) - _MAX_MESSAGES} more {kind}s", style=style)


def _table(header: Sequence[str], rows: Mapping[str, Sequence[object]]) -> "Table":
    from rich.table import Table
    from rich.text import Text  # a class name in brackets is not markup

    table = Table()
    table.add_column(header[0], no_wrap=True, max_width=40)
    for name in header[1:]:
        table.add_column(name, justify="right")
    for name, numbers in rows.items():
        table.add_row(Text(name), *map(str, numbers))
    return table
