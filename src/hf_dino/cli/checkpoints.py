"""`hf-dino checkpoints` and `hf-dino info`."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..utils.errors import count_of
from .models import choose_device, move_to_device
from .options import DeviceOption, Facts, JsonOption, log_to_terminal, parse_height_and_width


if TYPE_CHECKING:
    from ..conversion.known import KnownCheckpoint


def checkpoints(
    cached: Annotated[bool, typer.Option("--cached", help="List downloaded files and their sizes instead.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="List downloaded files, ask, and delete them.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
    json: JsonOption = False,
) -> Facts:
    """List the published checkpoints that `hf-dino convert` takes by name.

    AP is on COCO val2017, published by the authors and not measured here.
    """
    return _list_downloads(clear, yes) if cached or clear else _list_known()


def _list_known() -> Facts:
    from ..conversion.known import KNOWN_CHECKPOINTS, OTHER_CHECKPOINTS

    for _, group in groupby(KNOWN_CHECKPOINTS.values(), key=lambda known: known.format):
        rows = list(group)
        print(f"from {', '.join(sorted({known.host for known in rows}))}; license {rows[0].license}")
        print(f"AP from {rows[0].ap_source}")
        print_columns(
            [("name", "backbone", "levels", "epochs", "AP", "size", "verified by", "here"), *map(_row, rows)]
        )
        print()
    print(f"{len(OTHER_CHECKPOINTS)} more of detrex have a backbone that cannot be converted.")
    print("Download and convert one: hf-dino convert NAME --output_dir DIRECTORY")
    return Facts({"checkpoints": [_known_facts(known) for known in KNOWN_CHECKPOINTS.values()]})


def _known_facts(known: "KnownCheckpoint") -> dict[str, Any]:
    from ..conversion.known import verified_by

    return {
        "name": known.name,
        "backbone": known.backbone_name,
        "num_feature_levels": known.num_feature_levels,
        "epochs": known.epochs,
        "ap": known.box_ap,
        "ap_source": known.ap_source,
        "size": known.cached_path.stat().st_size if known.cached_path.is_file() else known.size,
        "verified_by": verified_by(known),
        "is_cached": known.cached_path.is_file(),
        "host": known.host,
        "license": known.license,
    }


def _row(known: "KnownCheckpoint") -> tuple[str, ...]:
    facts = _known_facts(known)
    return (
        *(str(facts[name]) for name in ("name", "backbone", "num_feature_levels", "epochs")),
        f"{100 * known.box_ap:.1f}",
        format_size(facts["size"]) if facts["size"] else "unknown",
        facts["verified_by"],
        "yes" if facts["is_cached"] else "no",
    )


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text in columns that are as wide as needed, in any terminal and any file."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  " + "  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())


def format_size(num_bytes: int) -> str:
    """Return a number of bytes for humans.

    Example:

    ```python
    >>> format_size(999), format_size(562_000_000), format_size(2_615_534_683)
    ('999 B', '562.0 MB', '2.6 GB')

    ```
    """
    exponent = min((len(str(num_bytes)) - 1) // 3, 4)
    return f"{num_bytes / 1000**exponent:.{int(exponent > 0)}f} {('B', 'kB', 'MB', 'GB', 'TB')[exponent]}"


def _list_downloads(clear: bool, yes: bool) -> Facts:
    from ..conversion.known import downloaded_files
    from ..utils.download import delete_downloads

    folder, files = downloaded_files()
    sizes = [file.stat().st_size for file in files]
    rows = [(str(file.relative_to(folder)), format_size(size)) for file, size in zip(files, sizes)]
    print_columns([*rows, ("total", format_size(sum(sizes)))])
    print(f"in {folder}")
    question = f"Delete {'this' if len(files) == 1 else 'these'} {count_of(len(files), 'file')}?"
    delete = bool(clear and files and (yes or typer.confirm(question, abort=True)))
    if delete:
        delete_downloads(files)
        print(f"deleted {count_of(len(files), 'file')}, {format_size(sum(sizes))}")
    listed = [{"path": file, "size": size} for file, size in zip(files, sizes)]
    return Facts({"directory": folder, "files": listed, "size": sum(sizes), "deleted": delete})


def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or Hub id (OWNER/NAME) of the model.")],
    image_size: Annotated[
        str, typer.Option(metavar="HEIGHTxWIDTH", help="Size in pixels of the image that is counted and measured.")
    ] = "800x1066",
    device: DeviceOption = None,
    json: JsonOption = False,
) -> Facts:
    """Describe a model: parameters, FLOPs, memory and time of a forward pass, labels, image size, versions, origin.

    FLOPs are those of matrix products, convolutions and attention; a multiplication and an addition count as two.
    """
    log_to_terminal()

    from ..hub import load_model_and_processor
    from ..model_info import describe_facts, describe_model

    size = parse_height_and_width("--image_size", image_size)
    detector, processor = load_model_and_processor(model)
    move_to_device(detector, choose_device(device))
    facts = describe_model(model, detector, processor, size)
    print_columns(list(describe_facts(facts).items()))
    print()
    print_columns(
        [("part", "parameters", "GFLOPs"), *(_part_row(name, **part) for name, part in facts["parts"].items())]
    )
    return Facts(facts)


def _part_row(name: str, parameters: int, flops: int) -> tuple[str, ...]:
    return name, f"{parameters:,}".rjust(len("parameters")), f"{flops / 1e9:.3f}".rjust(len("GFLOPs"))
