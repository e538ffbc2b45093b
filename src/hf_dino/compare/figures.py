"""Curves of a comparison, readable with all rows in one plot: colors by lineage, and names beside the curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..family import FAMILY
from ..utils.io import atomic_write


# By the first model of a lineage; distinct also to the color-blind (Okabe and Ito, https://jfly.uni-koeln.de/color).
_COLORS = {
    "detr": "#8c4a7f",
    "deformable_detr": "#009e73",
    "dab_deformable_detr": "#d55e00",
    "dino_pure": "#56b4e9",
    "dino_4scale": "#0353a4",
}
_STYLES = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 1, 1, 1, 1, 1)))
_SHORT_NAMES = {
    "deformable_detr_refine": "Deformable DETR+",
    "deformable_detr_two_stage": "Deformable DETR++",
    "dino_pure": "pure selection",
    "dino_mixed": "mixed selection",
    "dino_look_forward_twice": "look forward twice",
}
_LABEL_GAP = 0.052  # of the height of the axes, between the middles of two names


class Curve(NamedTuple):
    """What is drawn of a row.

    Attributes:
        row (`str`): Key of [`FAMILY`].
        x (`list[float]`): Steps, or seconds.
        mean, low, high (`list[float]`): Mean, minimum and maximum over the seeds, at each `x`.
        note (`str`, *optional*): Follows the name.
    """

    row: str
    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    note: str = ""


def short_name(row: str) -> str:
    """Return the name of a row for a plot.

    Example:

    ```python
    >>> short_name("dino_4scale"), short_name("deformable_detr_two_stage")
    ('DINO-4scale', 'Deformable DETR++')

    ```
    """
    return _SHORT_NAMES.get(row, FAMILY[row].name)


def lineage(row: str) -> str:
    """Return the model that a row descends from, or is, that has a color.

    Example:

    ```python
    >>> lineage("dab_detr"), lineage("dn_deformable_detr"), lineage("dino_5scale")
    ('detr', 'dab_deformable_detr', 'dino_4scale')

    ```
    """
    parent = FAMILY[row].parent
    return row if row in _COLORS or parent is None else lineage(parent)


def appearance(row: str) -> dict[str, Any]:
    """Return color and line style of a row, which are its own."""
    relatives = [each for each in FAMILY if lineage(each) == lineage(row)]
    return {
        "color": _COLORS.get(lineage(row), "#44515c"),
        "linestyle": _STYLES[relatives.index(row) % len(_STYLES)],
        "linewidth": 2.2,
    }


def plot_curves(path: Path, panels: Sequence[tuple[str, str, Sequence[Curve]]], *, percent: bool = False) -> None:
    """Plot curves over steps and, in a second panel, the same over time, with one column of names for both.

    Args:
        path (`Path`): The file. Written atomically.
        panels (`list[tuple[str, str, list[Curve]]]`): Labels of both axes, and the curves.
        percent (`bool`, *optional*, defaults to `False`): Whether the values are shares, from 0 to 1.
    """
    figure = Figure(figsize=(8.6 if len(panels) == 1 else 14, 6), layout="constrained")
    FigureCanvasAgg(figure)  # draws in memory, so it needs no display and does not touch pyplot's global state
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (x_label, y_label, curves) in zip(all_axes, panels):
        _plot(axes, curves)
        axes.set(xlabel=x_label, ylabel=y_label, xlim=(0, None), ylim=(0, 1 if percent else None))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelleft=True)
    _label(all_axes[0], panels[0][2])
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _plot(axes: Any, curves: Sequence[Curve]) -> None:
    for curve in curves:
        look = appearance(curve.row)
        axes.fill_between(curve.x, curve.low, curve.high, color=look["color"], alpha=0.1, linewidth=0)
        axes.plot(curve.x, curve.mean, **look)
        axes.plot(curve.x[-1:], curve.mean[-1:], color=look["color"], marker="o", markersize=4)


def _label(axes: Any, curves: Sequence[Curve]) -> None:
    """Write the names to the right of the axes, sorted by the last value, each with a piece of its line."""
    to_axes = axes.transData + axes.transAxes.inverted()
    ranked = sorted((curve for curve in curves if curve.x), key=lambda curve: curve.mean[-1])
    heights = spread([to_axes.transform((0, curve.mean[-1]))[1] for curve in ranked], _LABEL_GAP)
    for curve, height in zip(ranked, heights):
        look = appearance(curve.row)
        end = to_axes.transform((curve.x[-1], curve.mean[-1]))
        options = {"transform": axes.transAxes, "clip_on": False}
        axes.plot([end[0], 1.03], [end[1], height], color=look["color"], linewidth=0.6, alpha=0.6, **options)
        axes.plot([1.03, 1.08], [height, height], **look, **options)
        text = f"{short_name(curve.row)}{curve.note}  {curve.mean[-1]:.3f}"
        axes.text(1.09, height, text, color="#1c2733", va="center", fontsize=9.5, transform=axes.transAxes)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending numbers apart within [0, 1]: none is closer to the next than `gap`, and each is near its place.

    Example:

    ```python
    >>> [round(height, 2) for height in spread([0.1, 0.5, 0.5, 0.52], gap=0.1)]
    [0.1, 0.41, 0.51, 0.61]

    ```
    """
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _top(groups[-2], gap) + gap > _bottom(groups[-1], gap):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_bottom(group, gap) + gap * index for group in groups for index in range(len(group))]


def _bottom(group: Sequence[float], gap: float) -> float:
    """Return the lowest place of a group that is stacked around its mean."""
    height = gap * (len(group) - 1)
    return max(0.0, min(sum(group) / len(group) - height / 2, 1 - height))


def _top(group: Sequence[float], gap: float) -> float:
    return _bottom(group, gap) + gap * (len(group) - 1)


def summarize(seeds: Sequence[Mapping[float, float]]) -> tuple[list[float], ...]:
    """Return the points that all seeds have, and the mean, minimum and maximum of their values there.

    Example:

    ```python
    >>> summarize([{10: 0.1, 20: 0.3}, {10: 0.3}])
    ([10], [0.2], [0.1], [0.3])

    ```
    """
    points = sorted(set.intersection(*map(set, seeds))) if seeds else []
    values = [[seed[point] for seed in seeds] for point in points]
    return points, [sum(each) / len(each) for each in values], [*map(min, values)], [*map(max, values)]
