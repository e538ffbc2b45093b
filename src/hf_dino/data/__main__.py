"""Look at a dataset for detection before training on it, or convert it: `python -m hf_dino.data COMMAND SOURCE`.

SOURCE is a folder in the format of COCO, Pascal VOC, YOLO or Hugging Face `datasets`, or a name on the Hub.
It is never changed.
"""

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..image_processing_dino_detr import LONGEST_EDGE, SHORTEST_EDGE
from ..utils.arguments import HelpFormatter, at_least, parse_size
from ..utils.errors import InputError, import_extra, run_cli
from .augmentation import AUGMENTATIONS, make_augmentation
from .check import SIZES, DataReport, check_data
from .convert import WRITERS, convert_data
from .dataset import DetectionSplit, ErrorHandler, raise_input_error
from .preview import draw_image_grid, ensure_can_draw, sample_augmented, sample_images
from .readers import read_coco_file, read_data, split_from_name


_MOST_LINES = 20  # of errors, and of warnings
_NEEDED = ("train", "validation")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; `arguments` replace those of the process. Return the exit status, 1 for errors in data."""
    log = logging.StreamHandler()
    log.addFilter(lambda record: record.name != DetectionSplit.__module__)  # the report says that
    logging.basicConfig(format="%(message)s", handlers=[log])
    options = _parse(arguments)
    return options.run(options)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m hf_dino.data", description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (run, say, add) in _COMMANDS.items():
        command = commands.add_parser(name, help=say, description=say, formatter_class=HelpFormatter)
        _add_source(command)
        add(command)
        command.set_defaults(run=run)
    options = parser.parse_args(arguments)
    given = [option is not None for option in (options.source, options.images, options.annotations)]
    if given not in ([True, False, False], [False, True, True]):
        parser.error("give either SOURCE, or --images and --annotations")
    if options.source is None and (options.streaming or options.limit or options.cache):
        parser.error("--streaming, --limit and --cache are for a SOURCE, not for --images and --annotations")
    return options


def _add_source(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "source", nargs="?", metavar="SOURCE", help="a folder, or OWNER/NAME[:CONFIGURATION] on the Hub"
    )
    command.add_argument("--images", type=Path, metavar="DIR", help="instead of SOURCE: the images of a COCO file")
    command.add_argument("--annotations", type=Path, metavar="FILE", help="instead of SOURCE: the COCO file")
    command.add_argument("--streaming", action="store_true", help="fetch images one by one, and keep them")
    command.add_argument("--limit", type=at_least(1), metavar="N", help="of a stream: images of each split")
    command.add_argument("--cache", type=Path, metavar="DIR", help="of a stream: the folder to keep it in")


def _add_check(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quick", action="store_true", help="read the head of each image only")
    command.add_argument("--num-workers", type=at_least(1), metavar="N", help="threads (default: one per processor)")
    command.add_argument("--sheet", type=Path, metavar="FILE", help="draw some images with their boxes; a new file")
    command.add_argument("--num-images", type=at_least(1), default=12, metavar="N", help="on the sheet")


def _add_augment(command: argparse.ArgumentParser) -> None:
    augmentations = f"{', '.join(AUGMENTATIONS)}, or path/to/file.py:function"
    command.add_argument("--augmentation", default="dino", metavar="NAME", help=augmentations)
    size = "SHORTEST [LONGEST] edge, or HEIGHTxWIDTH, as in training"
    default = [str(SHORTEST_EDGE), str(LONGEST_EDGE)]
    command.add_argument("--image-size", nargs="+", default=default, metavar="PIXELS", help=size)
    command.add_argument("--output", type=Path, required=True, metavar="FILE", help="the sheet; a new file")
    command.add_argument("--num-images", type=at_least(1), default=4, metavar="N", help="each a row of the sheet")
    command.add_argument("--num-views", type=at_least(1), default=3, metavar="N", help="of each, beside the original")
    command.add_argument("--seed", type=at_least(0), default=0, help="of the augmentation, as in training")


def _add_convert(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    command.add_argument(
        "--format",
        required=True,
        choices=WRITERS,
        help="boxes stay as they are in coco, move by less than a hundred-thousandth of the image's side in yolo, "
        "and to whole pixels in voc; only coco holds crowd regions and areas",
    )


def check(options: argparse.Namespace) -> int:
    """Print the report and draw the sheet."""
    if options.sheet:
        ensure_can_draw(options.sheet)
    rich = import_extra("rich.progress", "train", "the report")
    errors: list[str] = []
    splits = _read(options, errors.append)
    total = sum(len(data.images) for data in splits.values())
    with rich.Progress(transient=True) as progress:
        task = progress.add_task("images", total=total)
        found = check_data(
            splits,
            decode=not options.quick,
            num_workers=options.num_workers,
            on_image=lambda: progress.advance(task),
        )
    missing = [f"there is no {split} split, which fine-tuning needs" for split in _NEEDED if split not in splits]
    warnings = found.warnings + (missing if options.source else [])
    report = DataReport(errors + found.errors, warnings, found.counts)
    print_report(report)
    if options.sheet:
        draw_image_grid(sample_images(splits, options.num_images), options.sheet)
        print(f"sheet: {options.sheet}")
    return 1 if report.errors else 0


def augment(options: argparse.Namespace) -> int:
    """Draw images as they are and as epochs of training see them."""
    ensure_can_draw(options.output)
    augmentation = make_augmentation(options.augmentation, parse_size(options.image_size))
    data = next(iter(_read(options, raise_input_error).values()))
    views, count, seed = options.num_views, options.num_images, options.seed
    draw_image_grid(sample_augmented(data, augmentation, count, views, seed), options.output, columns=1 + views)
    print(f"sheet: {options.output}")
    return 0


def convert(options: argparse.Namespace) -> int:
    """Write the dataset in another format and print what that format does not hold."""
    if options.source and Path(options.source).resolve() in options.output.resolve().parents:
        raise InputError(f"{options.output}: lies in {options.source}, which is not changed; choose another place")
    rich = import_extra("rich.progress", "train", "the progress")
    splits = _read(options, raise_input_error)
    images = sum(len(data.images) for data in splits.values())
    with rich.Progress(transient=True) as progress:
        task = progress.add_task("checked, then copied", total=2 * images)
        warnings = convert_data(splits, options.output, options.format, on_image=lambda: progress.advance(task))
    _print_messages(import_extra("rich.console", "train", "the progress").Console(), "warning", "yellow", warnings)
    print(f"data: {options.output}")
    return 0


def _read(options: argparse.Namespace, on_error: ErrorHandler) -> dict[str, DetectionSplit]:
    if options.source is None:
        split = split_from_name(options.annotations.stem) or "train"
        return {split: read_coco_file([options.images], options.annotations, on_error)}
    return read_data(
        options.source,
        streaming=options.streaming,
        max_samples=options.limit,
        cache_dir=options.cache,
        on_error=on_error,
    )


def print_report(report: DataReport) -> None:
    """Print counts as tables, then warnings, then errors."""
    console = import_extra("rich.console", "train", "the report").Console()
    columns = ("images", "without objects", "objects", "crowds", *SIZES)
    console.print(
        _table(
            ("split", *columns),
            {
                split: (
                    each.num_images,
                    each.num_empty_images,
                    each.num_objects,
                    each.num_crowds,
                    *each.sizes.values(),
                )
                for split, each in report.counts.items()
            },
        )
    )
    names = dict.fromkeys(name for each in report.counts.values() for name, count in each.classes.items() if count)
    objects = {name: [each.classes.get(name, "—") for each in report.counts.values()] for name in names}
    console.print(_table(("class", *report.counts), objects))
    _print_messages(console, "warning", "yellow", report.warnings)
    _print_messages(console, "error", "red", report.errors)
    console.print(f"{len(report.errors)} errors, {len(report.warnings)} warnings", highlight=False)


def _print_messages(console: Any, kind: str, style: str, messages: Sequence[str]) -> None:
    for message in messages[:_MOST_LINES]:
        console.print(f"{kind}: {message}", style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)
    if len(messages) > _MOST_LINES:
        console.print(f"… and {len(messages) - _MOST_LINES} more {kind}s", style=style)


def _table(header: Sequence[str], rows: Mapping[str, Sequence[object]]) -> Any:
    table = import_extra("rich.table", "train", "the report").Table()
    text = import_extra("rich.text", "train", "the report").Text  # without it, brackets in a name would be markup
    table.add_column(header[0], no_wrap=True, max_width=40)
    for name in header[1:]:
        table.add_column(name, justify="right")
    for name, numbers in rows.items():
        table.add_row(text(name), *map(str, numbers))
    return table


_COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], str, Callable[[argparse.ArgumentParser], Any]]] = {
    "check": (check, "Report what is wrong with the data; exit status 1 if it would stop a training.", _add_check),
    "augment": (augment, "Draw images with their boxes as training sees them.", _add_augment),
    "convert": (convert, "Write the data in another format, images byte for byte.", _add_convert),
}


if __name__ == "__main__":
    run_cli(main)
