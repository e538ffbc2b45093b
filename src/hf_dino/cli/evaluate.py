"""`hf-dino evaluate`."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..training_arguments import DATASET_HELP
from ..utils.errors import InputError, count_of, import_extra
from .options import (
    AnnotationsOption,
    BoxFormatOption,
    ColumnsOption,
    Facts,
    ImagesOption,
    JsonOption,
    MaxImagePixelsOption,
    ModelOption,
    RotatedBoxesOption,
    command_line,
    log_to_terminal,
    read_options,
    require_one_source,
)


if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from ..data import DetectionSplit, ReadOptions
    from ..evaluation import CocoScores


def evaluate(
    context: typer.Context,
    model_name_or_path: ModelOption,
    dataset: Annotated[str | None, typer.Option("--dataset", "--data", metavar="DATASET", help=DATASET_HELP)] = None,
    split: Annotated[
        Literal["train", "validation", "test"], typer.Option(help="Split of --dataset to evaluate on.")
    ] = "validation",
    images: ImagesOption = None,
    annotations: AnnotationsOption = None,
    box_format: BoxFormatOption = "xywh",
    rotated_boxes: RotatedBoxesOption = "enclose",
    columns: ColumnsOption = None,
    max_image_pixels: MaxImagePixelsOption = None,
    metrics_json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save all metrics to this JSON file. It must not exist.")
    ] = None,
    results_json: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Save the detections to this file in COCO results format. It must not exist."
        ),
    ] = None,
    report_html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save an error analysis to this HTML file. It must not exist.")
    ] = None,
    coco_backend: Annotated[
        Literal["pycocotools", "faster-coco-eval"],
        typer.Option(help="Package that computes COCO metrics; faster-coco-eval is faster and equally exact."),
    ] = "pycocotools",
    max_detections: Annotated[
        int,
        typer.Option(
            metavar="INTEGER",
            min=100,
            help="Detections of a class in an image that count: COCO's 100, or more for images with more objects, "
            "which makes other metrics than COCO's.",
        ),
    ] = 100,
    image_processor_backend: Annotated[
        Literal["torchvision", "pil"] | None,
        typer.Option(
            help="Library that resizes images; pil resizes exactly as the official implementation.",
            show_default="the model's",
        ),
    ] = None,
    per_device_eval_batch_size: Annotated[
        int,
        typer.Option(metavar="INTEGER", min=1, help="Images per batch on each process, all of the same resized size."),
    ] = 8,
    dataloader_num_workers: Annotated[
        int, typer.Option(metavar="INTEGER", min=0, help="DataLoader workers of each process.")
    ] = 2,
    mixed_precision: Annotated[
        Literal["no", "fp16", "bf16"] | None,
        typer.Option(help="Precision of the computations.", show_default="that of `accelerate config`"),
    ] = None,
    update_card: Annotated[
        bool,
        typer.Option("--update_card", help="Add the metrics to the model card, README.md in the model's directory."),
    ] = False,
    json: JsonOption = False,
) -> Facts | None:
    """Evaluate a model on a dataset with the COCO metrics.

    Give either --dataset, or --images and --annotations. Classes are matched with those of the model by name. The
    report is one HTML file: average precision and best score threshold of each class, precision over recall, types of
    errors, confused classes, and the images with the most errors.

    `accelerate launch -m hf_dino evaluate` splits the images among several processes.
    """
    require_one_source(context, "--dataset", dataset, images, annotations)
    log_to_terminal()
    _check_dependencies(coco_backend, report_html)

    from huggingface_hub import ModelCard
    from rich.progress import Progress

    from ..evaluation import evaluate_model
    from ..exported import is_exported, load_exported
    from ..hub import load_detector
    from ..publishing import CARD, read_metadata
    from ..training import read_and_check
    from ..utils.distributed import create_accelerator
    from ..utils.io import ensure_new_files

    ensure_new_files(metrics_json, results_json, report_html)
    card = Path(model_name_or_path, CARD) if update_card else None
    if card:
        read_metadata(card, ModelCard)
    exported = is_exported(model_name_or_path)
    if exported and mixed_precision not in (None, "no"):
        raise InputError(f"{model_name_or_path}: is an exported model; leave out --mixed_precision")
    accelerator = create_accelerator(mixed_precision)
    options = read_options(box_format, rotated_boxes, columns)
    (data,) = read_and_check(partial(_read_split, dataset, split, images, annotations, options)).values()
    load = load_exported if exported else load_detector
    model, processor = load(model_name_or_path, backend=image_processor_backend)

    with Progress(disable=not accelerator.is_main_process) as progress:
        task = progress.add_task("evaluating", total=len(data.images) / accelerator.num_processes)
        scores, detections = evaluate_model(
            model if exported else _prepare(model, accelerator),
            processor,
            data,
            accelerator,
            batch_size=per_device_eval_batch_size,
            num_workers=dataloader_num_workers,
            on_batch=partial(progress.advance, task),
            engine=coco_backend,
            max_detections=max_detections,
        )
    facts = None
    if accelerator.is_main_process:
        name = split if dataset else data.name
        print(f"{name}, {count_of(len(data.images), 'image')}:\n{scores.table}")
        details = {
            "model": model_name_or_path,
            "data": str(data.source),
            "scored by": coco_backend,
            "command": command_line(context),
        }
        written = _write(data, scores, detections, details, metrics_json, results_json, report_html)
        if card:
            where = (data.name, split if dataset else None, max_detections, model.config.model_type)
            _update_card(card, scores.metrics, *where)
            written["update_card"] = card
        facts = Facts(
            {
                "model": model_name_or_path,
                "data": str(data.source),
                "split": name,
                "images": len(data.images),
                "coco_backend": coco_backend,
                "metrics": scores.to_dict(),
                "written": written,
            }
        )
    accelerator.end_training()
    return facts


def _prepare(model: "PreTrainedModel", accelerator: "Accelerator") -> Any:
    """Return a model on the device of its process, prepared for inference unless its weights are to be sharded."""
    from accelerate.utils import DistributedType

    from ..inference import prepare_for_inference

    if accelerator.distributed_type != DistributedType.FSDP:
        model = prepare_for_inference(model.to(accelerator.device))
    return accelerator.prepare(model)


def _update_card(card: Path, metrics: dict[str, float], *where: Any) -> None:
    """Add metrics to a model card; `where` they were measured is as in [`add_results`]."""
    from ..model_card import add_results
    from ..utils.io import atomic_write, read_text

    text = add_results(read_text(card), metrics, *where)
    with atomic_write(card) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"updated: {card}")


def _check_dependencies(coco_backend: str, report_html: Path | None) -> None:
    """Check that everything is installed that is imported only after the model has run."""
    import_extra("accelerate", "train", "evaluation")

    from ..evaluation import check_engine
    from ..visualization import check_drawing_dependencies

    check_engine(coco_backend)
    if report_html:
        check_drawing_dependencies()
        import_extra("jinja2", "train", "--report_html")


def _read_split(
    dataset: str | None, split: str, images: Path | None, annotations: Path | None, options: "ReadOptions"
) -> dict[str, "DetectionSplit"]:
    from ..data import read_coco, read_data

    if dataset is not None:
        return read_data(dataset, splits=[split], options=options)
    assert images is not None and annotations is not None
    data = read_coco(images, annotations, options)
    return {data.name: data}


def _write(
    data: "DetectionSplit",
    scores: "CocoScores",
    detections: "np.ndarray",
    details: dict[str, str],
    metrics_json: Path | None,
    results_json: Path | None,
    report_html: Path | None,
) -> dict[str, Path]:
    """Write the files that are not None, and return them by the name of their option."""
    from ..evaluation import analyze_errors, write_coco_results
    from ..utils.io import write_json

    if metrics_json is not None:
        write_json(metrics_json, scores.to_dict())
    if results_json is not None:
        write_coco_results(results_json, detections)
    if report_html is not None:
        from ..evaluation.report import write_report

        title = f"{details['model']} on {data.name}"
        write_report(report_html, data, scores, analyze_errors(data, detections), title=title, details=details)
    files = {"metrics_json": metrics_json, "results_json": results_json, "report_html": report_html}
    written = {option: path for option, path in files.items() if path is not None}
    for path in written.values():
        print(f"written: {path}")
    return written
