"""An evaluation as one HTML file that needs neither network nor JavaScript: numbers, curves, mistakes, images."""

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
from ..metrics import METRIC_NAMES
from ..utils.io import open_new_text_file
from ..visualization import draw_detections, hstack_images
from .analysis import KINDS, Analysis, ImageErrors, OperatingPoint
from .scores import CocoScores


_TEMPLATE = Path(__file__).with_name("report.html")
_PACKAGES = ("hf_dino", "torch", "transformers", "pycocotools")
_WIDEST = 1600  # pixels of the two images beside each other
_MOST_CLASSES = 80  # in the confusion matrix: more could not be read
_MOST_CONFUSIONS = 20
# rows of `CocoScores.precision`: label, IoU thresholds, color
_CURVES = (
    ("IoU .50", slice(0, 1), "#b5530a"),
    ("IoU .75", slice(5, 6), "#2b7a0b"),
    ("mean of IoU .50 to .95", slice(None), "#0353a4"),
)
_COMPLAINTS = ("duplicate", "wrong class", "badly placed", "wrong class and place", "background")


class CategoryRow(NamedTuple):
    """What the table says of one category: AP and AP50 are -1, and `curves` empty, where there is no object."""

    name: str
    num_objects: int
    ap: float
    ap50: float
    best: OperatingPoint
    curves: list[tuple[str, str]]


def write_report(
    path: Path,
    data: DetectionSplit,
    scores: CocoScores,
    analysis: Analysis,
    *,
    title: str,
    details: Mapping[str, str],
) -> None:
    """Write the report.

    Args:
        path (`Path`): A new file, which appears once it is whole.
        data (`DetectionSplit`): The dataset, of which the worst images are read.
        scores (`CocoScores`): From [`evaluate_coco`].
        analysis (`Analysis`): From [`analyze`], of the same detections.
        title (`str`): Names the model and the data.
        details (`dict[str, str]`): How it was made, such as model, data and command; versions are added.

    Raises:
        InputError: If the file exists.
    """
    # names come from files of others: a class called "<b>" is text
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["shorten"] = partial(_shorten, limit=60)
    template = environment.from_string(_TEMPLATE.read_text("utf-8"))
    names = list(data.categories.values())
    shown = _classes_to_show(analysis.confusion)
    with open_new_text_file(path) as file:
        stream = template.stream(
            title=title,
            metrics=[(METRIC_NAMES[name], value) for name, value in scores.metrics.items()],
            num_images=len(data.images),
            num_objects=int(analysis.confusion[:-1].sum()),
            num_crowds=int(to_annotation_array(data)["iscrowd"].sum()),
            threshold=analysis.threshold,
            counts=analysis.counts,
            kinds=KINDS,
            categories=_category_rows(names, scores, analysis),
            legend=[(label, color) for label, _, color in _CURVES],
            curves=_plot_curves(scores.precision),
            confusion=_plot_confusion(names, analysis.confusion, shown),
            num_in_matrix=len(shown),
            confusions=_confusions(names, analysis.confusion),
            worst=_worst_images(data, analysis.worst),
            details={**details, "versions": _versions()},
        )
        file.writelines(stream)


def _category_rows(names: Sequence[str], scores: CocoScores, analysis: Analysis) -> list[CategoryRow]:
    """The categories with objects, the lowest average precision first, then those without."""
    ap50 = scores.precision[0].mean(axis=0).tolist()
    rows = [
        CategoryRow(
            name,
            int(analysis.confusion[index].sum()),
            scores.ap_per_category[name],
            ap50[index],
            analysis.best[name],
            [(_points(values), color) for values, color in _curves_of(scores.precision[:, :, [index]])],
        )
        for index, name in enumerate(names)
    ]
    return sorted(rows, key=lambda row: (row.ap < 0, row.ap))


def _curves_of(precision: np.ndarray) -> Iterator[tuple[np.ndarray, str]]:
    """Precision at 101 recalls, averaged over the categories that have objects; none if no category has."""
    known = precision[:, :, precision[0, 0] >= 0]
    if known.size:
        yield from ((known[thresholds].mean(axis=(0, 2)), color) for _, thresholds, color in _CURVES)


def _points(values: np.ndarray) -> str:
    """A curve in a square of 100 x 100, for SVG, whose second axis points downwards."""
    return " ".join(f"{recall},{100 * (1 - value):.1f}" for recall, value in enumerate(values))


def _plot_curves(precision: np.ndarray) -> str:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (label, *_), (values, color) in zip(_CURVES, _curves_of(precision)):
        axes.plot(np.linspace(0, 1, len(values)), values, label=f"{label}: {values.mean():.3f}", color=color)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, title="average precision")
    return _png(figure)


def _classes_to_show(confusion: np.ndarray) -> np.ndarray:
    """Classes that occur, among the objects or the detections; if these are very many, those with most objects."""
    num_objects = confusion.sum(axis=1)[:-1]
    occurring = np.flatnonzero(num_objects + confusion.sum(axis=0)[:-1])
    return np.sort(occurring[np.argsort(-num_objects[occurring], kind="stable")[:_MOST_CLASSES]])


def _plot_confusion(names: Sequence[str], confusion: np.ndarray, shown: np.ndarray) -> str:
    """Draw the rows as shares, with numbers where they can be read."""
    rows = np.append(shown, len(names))
    counts = confusion[np.ix_(rows, rows)]
    shares = counts / np.maximum(confusion[rows].sum(axis=1, keepdims=True), 1)
    readable = len(rows) <= 16
    side = max(4.0, 2 + (0.5 if readable else 0.17) * len(rows))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    labels = [_shorten(names[index]) for index in shown]
    for axis, nothing in ((axes.xaxis, "not found"), (axes.yaxis, "no object")):
        # parse_math: a name may hold dollar signs
        axis.set_ticks(range(len(rows)), [*labels, nothing], fontsize=8, parse_math=False)
    axes.tick_params(axis="x", labelrotation=90)
    axes.set(xlabel="taken for", ylabel="object")
    for (row, column), count in np.ndenumerate(counts) if readable else ():
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=color)
    return _png(figure)


def _shorten(name: str, limit: int = 24) -> str:
    line = " ".join(name.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def _confusions(names: Sequence[str], confusion: np.ndarray) -> list[tuple[str, str, int, int]]:
    """Object, what it was taken for, how often, and of how many: the most frequent first."""
    between = confusion[:-1, :-1] * (1 - np.eye(len(names), dtype=np.int64))
    totals = confusion.sum(axis=1)
    most = np.argsort(-between, axis=None, kind="stable")[:_MOST_CONFUSIONS]
    pairs = [(int(row), int(column)) for row, column in zip(*np.unravel_index(most, between.shape))]
    return [(names[i], names[j], int(between[i, j]), int(totals[i])) for i, j in pairs if between[i, j]]


def _worst_images(data: DetectionSplit, worst: Sequence[ImageErrors]) -> Iterator[dict[str, Any]]:
    """One after the other, as the template asks for them: images are large."""
    dataset = DetectionDataset(data)
    for mistakes in worst:
        counts = {kind: mistakes.kinds.count(kind) for kind in _COMPLAINTS} | {
            "not found": int(np.count_nonzero(~mistakes.found))
        }
        record = data.images[mistakes.index]
        image: Image.Image = dataset[mistakes.index]["image"]
        yield {
            "name": f"{record.path} (id {record.image_id})",
            "mistakes": ", ".join(f"{count} {kind}" for kind, count in counts.items() if count),
            "source": _jpeg(_draw(image, data, mistakes)),
        }


def _draw(image: Image.Image, data: DetectionSplit, mistakes: ImageErrors) -> Image.Image:
    """Objects on the left, detections on the right, the mistakes named on both sides."""
    record, detections = data.images[mistakes.index], mistakes.detections
    crowds = np.where(record.iscrowd == 1, " (crowd)", "")
    marks = np.where(mistakes.found, crowds, " (not found)").tolist()
    objects = [data.categories[category_id] for category_id in record.category_ids.tolist()]
    found = [data.categories[category_id] for category_id in detections["category_id"].tolist()]
    kinds = ["" if kind == "correct" else f" ({kind})" for kind in mistakes.kinds]
    truth = draw_detections(image, xywh_to_xyxy(record.boxes), _labels(objects, marks))
    answer = draw_detections(
        image, xywh_to_xyxy(detections["bbox"]), _labels(found, kinds), detections["score"].tolist()
    )
    both = hstack_images(truth, answer, (f"{len(objects)} objects", f"{len(found)} detections"))
    both.thumbnail((_WIDEST, _WIDEST))
    return both


def _labels(names: Sequence[str], marks: Sequence[str]) -> list[str]:
    return [f"{_shorten(name)}{mark}" for name, mark in zip(names, marks, strict=True)]


def _versions() -> str:
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in _PACKAGES)])


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "from source"


def _png(figure: Figure) -> str:
    FigureCanvasAgg(figure)  # draws into memory: works without a display and leaves pyplot's global state alone
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # its font lacks many scripts; the tables show all names
        figure.savefig(buffer, format="png", dpi=110)
    return _data_url(buffer, "png")


def _jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return _data_url(buffer, "jpeg")


def _data_url(buffer: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
