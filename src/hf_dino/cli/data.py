"""`hf-dino data check`, `augment`, `convert` and `split`."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..training_arguments import AUGMENTATION_HELP
from ..utils.errors import count_of
from .options import Command, Facts, Source, make_app, reads_dataset


if TYPE_CHECKING:
    from rich.table import Table

    from ..data import DataParts, DataReport, DetectionSplit
    from ..data.check import SplitCounts


OutputOption = Annotated[
    Path, typer.Option(metavar="DIRECTORY", help="Directory to write; must be empty or not exist.")
]
_FORMAT_HELP = (
    "Format to write. coco keeps boxes as they are, yolo within 0.00001 of the image's side, voc rounds them to whole "
    "pixels. Only coco stores crowd regions and areas."
)

app = make_app("Check, preview, convert and split datasets.")
_MAX_MESSAGES = 20  # errors that are printed, and warnings


@app.command(cls=Command)
@reads_dataset
def check(
    source: Source,
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
) -> Facts:
    """Report errors and warnings about a dataset.

    Nothing is changed. Give either DATASET, or --images and --annotations. The exit status is 1 if an error would stop
    training.
    """
    from ..data import DataReport, check_data
    from ..data.preview import draw_image_grid, ensure_can_draw, sample_images
    from ..data.split import missing_split_message

    if preview:
        ensure_can_draw(preview)
    errors: list[str] = []
    splits = source.read(on_error=errors.append)
    _print_format(source, splits)
    with _progress("images", sum(len(split.images) for split in splits.values())) as advance:
        found = check_data(splits, decode=not headers_only, num_workers=num_workers, on_image=advance)
    missing = missing_split_message(source.dataset, splits, source.options()) if source.dataset else ""
    report = DataReport(errors + found.errors, [*found.warnings, *filter(None, [missing])], found.counts)
    print_report(report)
    if preview:
        draw_image_grid(sample_images(splits, num_images), preview)
        print(f"preview: {preview}")
    facts = {
        "splits": {split: _split_facts(each) for split, each in report.counts.items()},
        "warnings": report.warnings,
        "errors": report.errors,
        "preview": preview,
    }
    return Facts(facts, status=1 if report.errors else 0)


@app.command(cls=Command)
@reads_dataset
def augment(
    source: Source,
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="Save the preview to this image file. It must not exist.")
    ],
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
) -> Facts:
    """Draw images as training augments them.

    Each row of the preview shows an image and its augmented copies, with boxes. Give either DATASET, or --images and
    --annotations.
    """
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
    return Facts({"preview": output, "augmentation": augmentation, "image_size": size, "seed": seed})


@app.command(cls=Command)
@reads_dataset
def convert(
    source: Source,
    output_dir: OutputOption,
    format: Annotated[Literal["coco", "voc", "yolo"], typer.Option(help=_FORMAT_HELP)],
) -> Facts:
    """Convert a dataset to another format.

    Image files are copied byte by byte; a warning names information that the format cannot store. Give either DATASET,
    or --images and --annotations.
    """
    from ..data import convert_data

    _require_outside(source, output_dir)
    splits = source.read()
    num_images = sum(len(split.images) for split in splits.values())
    with _progress("checked, then copied", 2 * num_images) as advance:
        warnings = convert_data(splits, output_dir, format, on_image=advance)
    _print_messages("warning", "yellow", warnings)
    print(f"data: {output_dir}")
    images = {name: len(data.images) for name, data in splits.items()}
    return Facts({"data": output_dir, "format": format, "images": images, "warnings": warnings})


@app.command(cls=Command)
@reads_dataset
def split(
    source: Source,
    output_dir: OutputOption,
    val: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the images for validation, from 0 to 1; 0 makes none.")
    ] = 0.2,
    test: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the images for test, from 0 to 1; 0 makes none.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="INTEGER", min=0, max=2**31, help="Seed of the choice of images.")] = 0,
    format: Annotated[Literal["coco", "voc", "yolo"], typer.Option(help=_FORMAT_HELP)] = "coco",
    merge: Annotated[
        bool,
        typer.Option("--merge", help="Merge splits that are to be made, but exist, with train before it is split."),
    ] = False,
    similarity: Annotated[
        float,
        typer.Option(
            metavar="NUMBER",
            min=0,
            max=1,
            help="Least similarity of images that are near-duplicates, and kept in one split; 1 for equal ones only.",
        ),
    ] = 0.9,
) -> Facts:
    """Split the training images of a dataset into train, validation and test.

    DATASET is not changed; image files are copied byte by byte. Each class gets the same share of its images, and
    near-duplicates, such as frames of a video, stay in one split. Splits that exist are kept. Give either DATASET, or
    --images and --annotations.
    """
    from ..data import ReadOptions, convert_data, split_data
    from ..data.split import missing_split_message

    _require_outside(source, output_dir)
    splits = source.read()
    _print_format(source, splits)
    num_images = sum(len(split.images) for split in splits.values())
    with _progress("compared, checked, then copied", 3 * num_images) as advance:
        parts = split_data(
            splits, validation=val, test=test, seed=seed, merge=merge, similarity=similarity, on_image=advance
        )
        warnings = convert_data(parts.splits, output_dir, format, on_image=advance)
    _print_parts(parts)
    _print_messages("warning", "yellow", [*parts.warnings, *warnings])
    print(f"data: {output_dir}")
    train = shlex.join(["hf-dino", "train", "--dataset", str(output_dir)])
    missing = missing_split_message(str(output_dir), parts.splits, ReadOptions())
    print(missing or f"next: {train} --model_name_or_path MODEL --output_dir RUN")
    if not missing:
        print(
            "MODEL: a model directory or Hub id; `hf-dino checkpoints` lists official ones. From random weights: "
            "--config_name FILE instead. RUN: a new directory"
        )
    return Facts(
        {
            "data": output_dir,
            "format": format,
            "splits": {name: _part_facts(data) for name, data in parts.splits.items()},
            "near_duplicates": [[image.path for image in group] for group in parts.near_duplicates],
            "warnings": [*parts.warnings, *warnings, *filter(None, [missing])],
        }
    )


def _split_facts(counts: "SplitCounts") -> dict[str, Any]:
    numbers = {"images": counts.num_images, "images_without_objects": counts.num_empty_images}
    numbers |= {"objects": counts.num_objects, "crowds": counts.num_crowds}
    return {**numbers, "objects_by_size": counts.sizes, "objects_by_class": counts.classes}


def _part_facts(data: "DetectionSplit") -> dict[str, Any]:
    from ..data.split import count_classes

    classes = {name: {"images": images, "objects": objects} for name, (images, objects) in count_classes(data).items()}
    return {"images": len(data.images), "classes": classes}


def _print_format(source: Source, splits: Mapping[str, "DetectionSplit"]) -> None:
    """Print which files were read, and which were not."""
    from ..data.readers import describe_files

    print(f"format: {describe_files(source.dataset or str(source.annotations), splits)}")


def _require_outside(source: Source, output_dir: Path) -> None:
    """Check an output directory before any work: it must be new, and not in a directory that is not changed."""
    from ..data import InputError
    from ..data.split import dataset_directory
    from ..utils.io import ensure_new_directory

    given = [source.images] if source.dataset is None else [dataset_directory(Path(source.dataset))]
    for folder in filter(None, given):
        if folder.resolve() in output_dir.resolve().parents:
            raise InputError(f"{output_dir}: is in {folder}, which is not changed; use a different --output_dir")
    ensure_new_directory(output_dir)


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
    totals = f"{count_of(len(report.errors), 'error')}, {count_of(len(report.warnings), 'warning')}"
    console.print(totals, highlight=False)


def _print_parts(parts: "DataParts") -> None:
    """Print the images and objects of each class in each split, and the near-duplicates."""
    from rich.console import Console

    from ..data.images import short_path
    from ..data.split import count_classes
    from ..utils.errors import summarize_list

    counts = {name: count_classes(data) for name, data in parts.splits.items()}
    header = ("class", *(what for name in counts for what in (f"{name}\nimages", "objects")))
    classes = dict.fromkeys(name for of_split in counts.values() for name in of_split)
    rows = {name: [n for of_split in counts.values() for n in of_split.get(name, (0, 0))] for name in classes}
    rows["(all)"] = [
        n for name, data in parts.splits.items() for n in (len(data.images), sum(n for _, n in counts[name].values()))
    ]
    Console().print(_table(header, rows))
    if groups := parts.near_duplicates:
        names = [" = ".join(short_path(image.path) for image in group[:2]) for group in groups]
        duplicates = count_of(sum(map(len, groups)), "near-duplicate")
        print(f"kept together: {duplicates} in {count_of(len(groups), 'group')}: {summarize_list(names, 3)}")


def _print_messages(kind: str, style: str, messages: Sequence[str]) -> None:
    from rich.console import Console

    console = Console()
    for message in messages[:_MAX_MESSAGES]:
        console.print(f"{kind}: {message}", style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)
    if len(messages) > _MAX_MESSAGES:
        console.print(f"… and {count_of(len(messages) - _MAX_MESSAGES, f'more {kind}')}", style=style)


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
