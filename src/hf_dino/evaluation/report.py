"""Write an evaluation as a single HTML file that needs neither network nor JavaScript."""

import base64
import io
import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ..data.dataset import DetectionDataset, DetectionSplit, to_annotation_array, xywh_to_xyxy
from ..model_card import describe_max_detections, metric_name
from ..utils.errors import count_of
from ..utils.io import open_new_text_file
from ..visualization import draw_detections, hstack_images
from .coco_eval import CocoScores
from .error_analysis import ERROR_TYPES, OUTCOMES, ErrorAnalysis, ImageErrors, OperatingPoint


_TEMPLATE = Path(__file__).with_name("report.html")
_PACKAGES = ("hf_dino", "torch", "transformers", "pycocotools")
_MAX_IMAGE_SIZE = 1600  # pixels, of objects and detections next to each other
_MAX_CLASSES = 80  # of the confusion matrix; more would be illegible
_MAX_CONFUSIONS = 20
# label, rows of `CocoScores.precision` (IoU thresholds), color
_CURVES = (
    ("IoU .50", slice(0, 1), "#b5530a"),
    ("IoU .75", slice(5, 6), "#2b7a0b"),
    ("mean of IoU .50 to .95", slice(None), "#0353a4"),
)


class CategoryRow(NamedTuple):
    """A row of the table of classes; `curves` are points of SVG polylines and their colors.

    Without objects, `ap` and `ap50` are -1 and `curves` is empty.
    """

    name: str
    num_objects: int
    ap: float
    ap50: float
    best: OperatingPoint
    curves: list[tuple[str, str]]


def write_report(
    path: Path,
    split: DetectionSplit,
    scores: CocoScores,
    analysis: ErrorAnalysis,
    *,
    title: str,
    details: Mapping[str, str],
) -> None:
    """Write the report.

    Args:
        path (`Path`): Must not exist. It appears once it is complete.
        split (`DetectionSplit`): The split of the dataset. The images with the most errors are read.
        scores (`CocoScores`): From [`evaluate_coco`].
        analysis (`ErrorAnalysis`): From [`analyze_errors`], of the same detections.
        title (`str`): Names the model and the dataset.
        details (`dict[str, str]`): How the report was made, such as model, dataset and command; package versions are
            added.

    Raises:
        InputError: If the file exists or an image cannot be read.
    """
    # category names are not trusted: "<b>" is text
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["shorten"] = partial(_shorten, limit=60)
    template = environment.from_string(_TEMPLATE.read_text("utf-8"))
    names = list(split.categories.values())
    shown = _classes_to_show(analysis.confusion)
    with open_new_text_file(path) as file:
        stream = template.stream(
            title=title,
            metrics=[(metric_name(name), value) for name, value in scores.metrics.items()],
            max_detections=scores.max_detections,
            note=describe_max_detections(scores.max_detections),
            num_images=len(split.images),
            num_objects=int(analysis.confusion[:-1].sum()),
            num_crowds=int(to_annotation_array(split)["iscrowd"].sum()),
            threshold=analysis.threshold,
            counts=analysis.counts,
            outcomes=OUTCOMES,
            categories=_category_rows(names, scores, analysis),
            legend=[(label, color) for label, _, color in _CURVES],
            curves=_plot_curves(scores.precision),
            confusion=_plot_confusion(names, analysis.confusion, shown),
            num_shown=len(shown),
            max_classes=_MAX_CLASSES,
            confusions=_confusions(names, analysis.confusion),
            worst_images=_worst_images(split, analysis.worst_images),
            details={**details, "versions": _versions()},
        )
        file.writelines(stream)


def _category_rows(names: Sequence[str], scores: CocoScores, analysis: ErrorAnalysis) -> list[CategoryRow]:
    """Sort categories by ascending average precision, those without objects last."""
    ap50 = scores.precision[0].mean(axis=0).tolist()
    rows = [
        CategoryRow(
            name,
            int(analysis.confusion[index].sum()),
            scores.ap_per_category[name],
            ap50[index],
            analysis.best_thresholds[name],
            [(_polyline(curve), color) for curve, color in _mean_curves(scores.precision[:, :, [index]])],
        )
        for index, name in enumerate(names)
    ]
    return sorted(rows, key=lambda row: (row.ap < 0, row.ap))


def _mean_curves(precision: np.ndarray) -> Iterator[tuple[np.ndarray, str]]:
    """Yield precision at 101 recalls, averaged over the categories with objects, and color of each of `_CURVES`."""
    known = precision[:, :, precision[0, 0] >= 0]
    if known.size:
        yield from ((known[thresholds].mean(axis=(0, 2)), color) for _, thresholds, color in _CURVES)


def _polyline(curve: np.ndarray) -> str:
    """Return a curve's SVG points in a square of 100 x 100, whose y axis points down."""
    return " ".join(f"{recall},{100 * (1 - precision):.1f}" for recall, precision in enumerate(curve))


def _plot_curves(precision: np.ndarray) -> str:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (label, *_), (curve, color) in zip(_CURVES, _mean_curves(precision)):
        axes.plot(np.linspace(0, 1, len(curve)), curve, label=f"{label}: {curve.mean():.3f}", color=color)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, title="average precision")
    return _png(figure)


def _classes_to_show(confusion: np.ndarray) -> np.ndarray:
    """Return indices of the classes that have objects or detections, at most `_MAX_CLASSES` with the most objects."""
    num_objects = confusion.sum(axis=1)[:-1]
    occurring = np.flatnonzero(num_objects + confusion.sum(axis=0)[:-1])
    return np.sort(occurring[np.argsort(-num_objects[occurring], kind="stable")[:_MAX_CLASSES]])


def _plot_confusion(names: Sequence[str], confusion: np.ndarray, shown: np.ndarray) -> str:
    """Plot the matrix with each row divided by its sum, and with counts if there are few classes."""
    rows = np.append(shown, len(names))
    counts = confusion[np.ix_(rows, rows)]
    shares = counts / np.maximum(confusion[rows].sum(axis=1, keepdims=True), 1)
    has_counts = len(rows) <= 16
    side = max(4.0, 2 + (0.5 if has_counts else 0.17) * len(rows))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    labels = [_shorten(names[index]) for index in shown]
    for axis, last in ((axes.xaxis, "false negative"), (axes.yaxis, "no object")):
        # without parse_math, a name with dollar signs would be an error
        axis.set_ticks(range(len(rows)), [*labels, last], fontsize=8, parse_math=False)
    axes.tick_params(axis="x", labelrotation=90)
    axes.set(xlabel="predicted class", ylabel="class of the object")
    for (row, column), number in np.ndenumerate(counts) if has_counts else ():
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(number), ha="center", va="center", fontsize=8, color=color)
    return _png(figure)


def _shorten(name: str, limit: int = 24) -> str:
    line = " ".join(name.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def _confusions(names: Sequence[str], confusion: np.ndarray) -> list[tuple[str, str, int, int]]:
    """Return class, predicted class, count and number of objects of the class, by descending count."""
    errors = confusion[:-1, :-1] * (1 - np.eye(len(names), dtype=np.int64))
    totals = confusion.sum(axis=1)
    most = np.argsort(-errors, axis=None, kind="stable")[:_MAX_CONFUSIONS]
    pairs = [(int(row), int(column)) for row, column in zip(*np.unravel_index(most, errors.shape))]
    return [(names[i], names[j], int(errors[i, j]), int(totals[i])) for i, j in pairs if errors[i, j]]


def _worst_images(split: DetectionSplit, worst: Sequence[ImageErrors]) -> Iterator[dict[str, Any]]:
    """Yield one image at a time, as the template asks for it, since images are large."""
    dataset = DetectionDataset(split)
    for errors in worst:
        counts = {error: errors.outcomes.count(error) for error in ERROR_TYPES} | {
            "false negative": int(np.count_nonzero(~errors.is_detected))
        }
        record = split.images[errors.image_index]
        image: Image.Image = dataset[errors.image_index]["image"]
        yield {
            "name": f"{record.path} (id {record.image_id})",
            "errors": ", ".join(f"{error}: {count}" for error, count in counts.items() if count),
            "source": _jpeg(_draw(image, split, errors)),
        }


def _draw(image: Image.Image, split: DetectionSplit, errors: ImageErrors) -> Image.Image:
    """Draw objects on the left and detections on the right, with the errors in parentheses."""
    record, detections = split.images[errors.image_index], errors.detections
    object_marks = np.select(
        [~errors.is_detected, record.iscrowd == 1], [" (false negative)", " (crowd)"], ""
    ).tolist()
    detection_marks = ["" if outcome == "true positive" else f" ({outcome})" for outcome in errors.outcomes]
    objects = draw_detections(
        image, xywh_to_xyxy(record.boxes), _labels(split, record.category_ids.tolist(), object_marks)
    )
    predictions = draw_detections(
        image,
        xywh_to_xyxy(detections["bbox"]),
        _labels(split, detections["category_id"].tolist(), detection_marks),
        detections["score"].tolist(),
    )
    captions = (
        f"ground truth: {count_of(len(object_marks), 'object')}",
        f"predicted: {count_of(len(detections), 'detection')}",
    )
    both = hstack_images(objects, predictions, captions)
    both.thumbnail((_MAX_IMAGE_SIZE, _MAX_IMAGE_SIZE))
    return both


def _labels(split: DetectionSplit, category_ids: Sequence[int], marks: Sequence[str]) -> list[str]:
    return [f"{_shorten(split.categories[category_id])}{mark}" for category_id, mark in zip(category_ids, marks)]


def _versions() -> str:
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in _PACKAGES)])


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "from source"


def _png(figure: Figure) -> str:
    FigureCanvasAgg(figure)  # draws in memory, so it needs no display and does not touch pyplot's global state
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the font lacks many scripts; the tables show all names
        figure.savefig(buffer, format="png", dpi=110)
    return _data_url(buffer, "png")


def _jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return _data_url(buffer, "jpeg")


def _data_url(buffer: io.BytesIO, image_format: str) -> str:
    return f"data:image/{image_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"
