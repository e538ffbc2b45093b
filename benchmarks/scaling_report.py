"""Write the growth of time and memory as a table and as an image."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.ticker import LogLocator, NullFormatter

from deformable_attention_report import COLORS, row


MEASURES = {"seconds": "time", "mebibytes": "memory"}
COLUMNS = 6
NOTE = (
    "Exponents: over all sizes, and between the last two. Constant, linear, quadratic: parts of the largest time in "
    "the fit `a + b x + c x²`; growth is the exponent there without the constant. Pairs from: the size at which the "
    "quadratic part is as large as the linear one, if it was measured."
)


def write_table(path: Path, result: dict[str, Any]) -> None:
    """Write a row for each curve."""
    heading = ["", "largest", "exponent", "at the end", "growth", "constant", "linear", "quadratic", "pairs from"]
    lines = [f"{result['machine']}; `{result['command']}`", "", NOTE, ""]
    for panel in result["panels"].values():
        lines += [f"### {heading_of(panel)}, {panel['sizes'][0]:,} to {panel['sizes'][-1]:,}", ""]
        lines += [row(heading), row(["---", *["---:"] * (len(heading) - 1)])]
        for measure, noun in MEASURES.items():
            for name, both in panel["curves"].items():
                lines.append(row(cells(f"{name}, {noun}", both[measure], measure, panel["sizes"][-1])))
        lines.append("")
    path.write_text("\n".join(lines))


def heading_of(panel: dict[str, Any]) -> str:
    return f"{panel['title']} against {panel['variable']}"


def cells(name: str, curve: dict[str, Any], measure: str, last_size: int) -> list[Any]:
    value = curve["values"][-1]
    largest = f"{value:.3g} s" if measure == "seconds" else f"{value:,.0f} MiB"
    if (fit := curve["fit"]) is None:
        return [name, largest, "not fitted", *[""] * 6]
    exponents = [fit["exponent"], fit["exponent_at_the_end"]]
    if "growth" not in fit:
        return [name, largest, *exponents, *[""] * 5]
    percent = [f"{part}%" for part in fit["percent_at_the_end"].values()]
    pairs_from = fit["quadratic_from"]
    pairs_from = "beyond" if pairs_from is None or pairs_from > last_size else f"{pairs_from:,}"
    return [name, largest, *exponents, fit["growth"], *percent, pairs_from]


def draw(path: Path, result: dict[str, Any]) -> None:
    """Plot time above memory for each variable, on log scales, with the fits as lines."""
    panels = list(result["panels"].values())
    columns, bands = min(COLUMNS, len(panels)), -(-len(panels) // COLUMNS)
    size = (3.1 * columns, 5.4 * bands + 0.8)
    figure, axes = pyplot.subplots(2 * bands, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for number, panel in enumerate(panels):
        band, column = divmod(number, COLUMNS)
        for offset, measure in enumerate(MEASURES):
            draw_panel(axes[2 * band + offset, column], panel, measure)
    names = sorted({name for panel in panels for name in panel["curves"]})
    handles: list[Any] = [pyplot.Line2D([], [], color=COLORS[name], marker="o") for name in names]
    handles.append(pyplot.Line2D([], [], color="black", linestyle=":"))
    labels = [f"{name}, with the exponent at the largest size; of time without the constant part" for name in names]
    labels.append("from here on pairs take more time than single items")
    figure.legend(handles, labels, loc="outside lower center", frameon=False)
    figure.suptitle(f"Growth of time and memory on {result['machine']}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_panel(axis: Any, panel: dict[str, Any], measure: str) -> None:
    axis.set_axis_on()
    for position, (name, both) in enumerate(panel["curves"].items()):
        draw_curve(axis, panel["sizes"], both[measure], COLORS[name])
        if fit := both[measure]["fit"]:
            place = {"transform": axis.transAxes, "va": "top", "color": COLORS[name], "fontweight": "bold"}
            exponent = fit.get("growth", fit["exponent_at_the_end"])
            axis.text(0.04, 0.96 - 0.1 * position, f"x^{exponent:.2f}", **place)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(axis.get_ylim()[0] / 1.5, axis.get_ylim()[1] * 4)
    axis.set_xticks(panel["sizes"][::-2], [f"{size:,}" for size in panel["sizes"][::-2]])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
    axis.yaxis.set_major_formatter("{x:,g}")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_minor_formatter(NullFormatter())
    axis.set_title(panel["title"] if measure == "seconds" else "", loc="left", fontweight="bold", fontsize=10)
    axis.set_xlabel(panel["variable"] if measure == "mebibytes" else "")
    axis.set_ylabel({"seconds": "seconds", "mebibytes": "MiB at the peak"}[measure])
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def draw_curve(axis: Any, sizes: list[int], curve: dict[str, Any], color: str) -> None:
    seen = [(size, value) for size, value in zip(sizes, curve["values"]) if value > 0]
    fit = curve["fit"] or {}
    axis.plot(*zip(*seen), "o" if "terms" in fit else "o-", color=color, markersize=4)
    if "terms" not in fit:
        return
    x = np.geomspace(sizes[0], sizes[-1], 99)
    axis.plot(x, (x[:, None] / sizes[-1]) ** [0, 1, 2] @ fit["terms"], color=color)
    if fit["quadratic_from"] and sizes[0] < fit["quadratic_from"] < sizes[-1]:
        axis.axvline(fit["quadratic_from"], color=color, linestyle=":")
