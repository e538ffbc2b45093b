"""`hf-dino export`, `hf-dino verify` and `hf-dino benchmark`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..training_arguments import DATASET_HELP
from ..utils.errors import count_of
from .checkpoints import format_size, print_columns
from .options import Facts, JsonOption, log_to_terminal, parse_height_and_width


if TYPE_CHECKING:
    from ..export import Comparison

SourceOption = Annotated[
    str,
    typer.Option(
        "--model_name_or_path", "--model", metavar="NAME", help="Directory or Hub id (OWNER/NAME) of the model."
    ),
]


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
        Literal["onnx", "openvino", "pt2", "aoti"],
        typer.Option(
            help="Format to write: ONNX, OpenVINO, pt2 of torch.export, or aoti, which AOTInductor compiles for this "
            "machine only. onnx needs the extra `export`, openvino the extra `openvino`, aoti a C++ compiler."
        ),
    ] = "onnx",
    attention: Annotated[
        Literal["grid_sample", "gather", "compiled"] | None,
        typer.Option(
            help="Operators that deformable attention consists of. gather avoids GridSample, which TensorRT is "
            "reported to compute wrongly; it is slower in ONNX Runtime. compiled is the kernel of this package, for "
            "pt2 and aoti.",
            show_default="compiled for aoti if available, otherwise grid_sample",
        ),
    ] = None,
    precision: Annotated[
        Literal["float32", "float16", "int8", "int8_dynamic"],
        typer.Option(
            help="Precision of the weights, of onnx and openvino; others than float32 need --dataset. int8 quantizes "
            "convolutions, calibrated on images, int8_dynamic the matrix products of onnx."
        ),
    ] = "float32",
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            "--data",
            metavar="DATASET",
            help=f"Dataset for --precision: calibrates on its training split, measures AP on its validation split, or "
            f"on test if there is none. {DATASET_HELP}",
        ),
    ] = None,
    max_ap_loss: Annotated[
        float,
        typer.Option(metavar="NUMBER", min=0, max=1, help="Loss of AP above which --precision writes no file."),
    ] = 0.005,
    json: JsonOption = False,
) -> Facts:
    """Export a model to one file that other programs run, and verify it.

    The file takes batches of any number of images of any size, with their padding masks, and contains class names and
    the settings of the image processor. It is compared with the model on five batches. If it differs, it is deleted
    and the exit status is 1; a wrong argument or a missing package gives 2.
    """
    log_to_terminal()

    from ..export import check_output, export_model, read_precision_data
    from ..exported import open_session
    from ..hub import load_model_and_processor
    from ..model_info import read_origin

    check_output(output, format, precision, attention, dataset)
    data = None if dataset is None else read_precision_data(dataset, precision)
    detector, processor = load_model_and_processor(model)
    comparisons = export_model(
        detector,
        processor,
        output,
        format=format,
        attention=attention,
        origin=read_origin(model) if Path(model).exists() else model,
        precision=precision,
        data=data,
        max_ap_loss=max_ap_loss,
    )
    stated = open_session(output).facts
    _print_comparisons(comparisons)
    _print_precision(stated)
    files = [path for path in (output, *output.rglob("*")) if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"wrote {output}, {format_size(size)}")
    written = {"model": model, "output": output, "format": format, "size": size}
    return Facts({**written, **_export_facts(stated, comparisons)})


def verify(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Exported model: a .onnx or .pt2 file, or a directory of OpenVINO.")
    ],
    model_name_or_path: SourceOption,
    json: JsonOption = False,
) -> Facts:
    """Verify an exported file against its model again.

    All raw outputs on five batches are compared, then the digests of the model's weights and of the file's contents
    with those of the export. Of a file of lower precision only the digests are compared. The exit status is 1 if
    anything differs.
    """
    log_to_terminal()

    from ..export import verify
    from ..exported import open_session
    from ..hub import load_model_and_processor

    stated = open_session(file).facts
    detector, _ = load_model_and_processor(model_name_or_path)
    comparisons = verify(file, detector)
    _print_comparisons(comparisons)
    _print_precision(stated)
    print(f"{file}: was exported from these weights and is unchanged")
    verified = {"model": model_name_or_path, "file": file}
    return Facts({**verified, **_export_facts(stated, comparisons)})


def benchmark(
    model_name_or_path: SourceOption,
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE",
            help="Exported models: .onnx or .pt2 files, or directories of OpenVINO.",
            show_default=False,
        ),
    ] = None,
    sizes: Annotated[
        list[str], typer.Option(metavar="HEIGHTxWIDTH", help="Sizes in pixels of the images that are timed.")
    ] = ["640x640", "800x1066"],  # noqa: B006, typer copies it
    rounds: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Rounds of each size; in each, every candidate runs once.")
    ] = 10,
    threads: Annotated[int, typer.Option(metavar="INTEGER", min=1, help="Threads of each candidate on the CPU.")] = 1,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            "--data",
            metavar="DATASET",
            help=f"Dataset to measure AP on: on its validation split, or on test if there is none. {DATASET_HELP}",
        ),
    ] = None,
    json: JsonOption = False,
) -> Facts:
    """Measure a model and its exported files on the CPU of this machine: size, load time, time per image, AP.

    The candidates take turns in one process, so that other work on the machine slows all of them alike.
    """
    log_to_terminal()

    from ..export import measure

    shapes = [parse_height_and_width("--sizes", size) for text in sizes for size in text.split(",")]
    measured = measure(model_name_or_path, files or [], shapes, rounds, threads, dataset)
    print(
        f"{measured['machine']}, {count_of(threads, 'thread')}, median of {count_of(rounds, 'round')} "
        f"(90th percentile) in ms"
    )
    _print_measurements(measured["candidates"])
    return Facts(measured)


def _print_measurements(rows: Sequence[dict[str, Any]]) -> None:
    has_ap = rows[0]["ap"] is not None
    header = ("", "runtime", "MB", "load s", *rows[0]["milliseconds"], *["AP"] * has_ap)
    table = [
        (
            each["name"],
            each["runtime"],
            f"{each['megabytes']:.1f}",
            f"{each['load_seconds']:.1f}",
            *(f"{time['median']:.0f} ({time['p90']:.0f})" for time in each["milliseconds"].values()),
            *([f"{each['ap']:.4f}"] if has_ap else []),
        )
        for each in rows
    ]
    print_columns([header, *table])


def _print_comparisons(comparisons: Sequence["Comparison"]) -> None:
    if comparisons:
        print("largest differences from the model, all queries of batches of padded noise:")
        header = ("images", "height", "width", "boxes", "logits", "changed ranks")
        rows = [(*each.shape, f"{each.boxes:.1e}", f"{each.logits:.1e}", each.ranks) for each in comparisons]
        print_columns([header, *(tuple(map(str, row)) for row in rows)])


def _print_precision(facts: dict[str, Any]) -> None:
    if facts["precision"] != "float32":
        print(
            f"{facts['precision']}: AP {facts['ap_before']:.4f} before, {facts['ap_after']:.4f} after, on "
            f"{facts['data']}; verified in float32 before"
        )


def _export_facts(stated: dict[str, Any], comparisons: Sequence["Comparison"]) -> dict[str, Any]:
    names = ("attention", "precision", "data", "ap_before", "ap_after")
    differences = [
        {
            **dict(zip(("images", "height", "width"), each.shape)),
            "boxes": each.boxes,
            "logits": each.logits,
            "changed_ranks": each.ranks,
        }
        for each in comparisons
    ]
    return {**{name: stated.get(name) for name in names}, "differences": differences}
