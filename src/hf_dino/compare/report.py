"""Report a comparison: every number in JSON, curves as images, and one HTML file that has both."""

import base64
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..export.benchmark import processor_name
from ..family import FAMILY
from ..utils.errors import InputError
from ..utils.io import atomic_write, write_json
from .figures import Curve, plot_curves, short_name, summarize
from .measures import read_measures
from .plan import Run, find_runs, read_settings, wait_for_lock
from .speed import read_speed


_TEMPLATE = Path(__file__).with_name("report.html")
_PACKAGES = ("hf_dino", "torch", "transformers", "pycocotools")
REFERENCE_ROW = "dino_4scale"
SHARE_OF_FINAL = 0.9  # of the final AP, at which a row counts as nearly done

# Pairs of the papers that are not parent and child: the first has the lower AP (DAB-DETR, table 2, with 50 epochs).
_MORE_PAIRS = (("deformable_detr_two_stage", "dab_deformable_detr"),)

FIGURES = {
    "instability_share": (
        "instability.png",
        "Matching instability",
        "share of twice the objects",
        "Queries that changed the object they are matched to since the evaluation before, as DN-DETR defines it, "
        "divided by the most that can change, twice the objects. All rows are matched with DINO's costs. Where "
        "queries are selected from the image, a query is a rank among them, which changes also if only the ranks do.",
    ),
    "recall_boxes": (
        "recall.png",
        "Recall of the first boxes",
        "share of the objects",
        "Objects for which the decoder starts from a box with an IoU of at least 0.5. Rows without such boxes are not "
        "shown.",
    ),
    "recall_points": (
        "recall_points.png",
        "Recall of the first points",
        "share of the objects",
        "Objects in which a query of the decoder starts, as a point or as the center of a box.",
    ),
    "denoising_after": (
        "denoising.png",
        "Denoising accuracy",
        "share of the positive queries",
        "Positive denoising queries that the decoder gives the class of their object and a box with an IoU of at "
        "least 0.5, with the same noise at each evaluation.",
    ),
}
"""Measures that have a figure: file, title, label of the axis, and explanation."""

MEASURES = ("ap", "ap50", "ap75", "instability", *FIGURES, "denoising_before")


def report_comparison(output_dir: Path, command: str | None = None) -> dict[str, Any]:
    """Write `report.json`, `report.html` and the figures of a comparison, of the rows that there are so far.

    Processes that share a comparison write it one after the other.

    Args:
        output_dir (`Path`): Directory of the comparison.
        command (`str`, *optional*): The command line of the trainings, which the report repeats; by default that of
            the report before.

    Returns:
        `dict[str, Any]`: What `report.json` has.

    Raises:
        InputError: If there is no comparison, or no evaluation yet.
    """
    read_settings(output_dir)  # else there would be a lock where there is no comparison
    with wait_for_lock(output_dir / "locks" / "report"):
        return _write(output_dir, collect(output_dir, command or _last_command(output_dir)))


def _write(output_dir: Path, report: dict[str, Any]) -> dict[str, Any]:
    shown = {name: row for name, row in report["rows"].items() if row["curves"]["ap"]["x"]}
    if not shown:
        raise InputError(f"{output_dir}: has no evaluation yet; a report can be made after the first one")
    plot_curves(output_dir / "report.png", _ap_panels(shown))
    figures = [("Average precision", "report.png", "Validation AP; bands are from the lowest to the highest seed.")]
    for measure, (file, title, label, text) in FIGURES.items():
        curves = [curve for name in shown if (curve := _curve(shown, name, measure)).x]
        if curves:
            plot_curves(output_dir / file, [("optimizer steps", label, curves)], percent=True)
            figures.append((title, file, text))
    write_json(output_dir / "report.json", report)
    _write_html(output_dir, report, figures)
    return report


def _last_command(output_dir: Path) -> str:
    """Return the command of the report before, and nothing if there is none or it is damaged."""
    with suppress(OSError, ValueError, TypeError, LookupError):
        return str(json.loads((output_dir / "report.json").read_text(encoding="utf-8"))["command"])
    return ""


def collect(output_dir: Path, command: str) -> dict[str, Any]:
    """Return every number of a comparison.

    Args:
        output_dir (`Path`): Directory of the comparison.
        command (`str`): The command line, which the report repeats.
    """
    settings, runs, speed = read_settings(output_dir), find_runs(output_dir), read_speed(output_dir)
    names = list(dict.fromkeys(run.row for run in runs))
    rows = {name: _collect_row([run for run in runs if run.row == name], settings) for name in names}
    reference = rows.get(REFERENCE_ROW, {}).get("final", {}).get("ap")
    for name, row in rows.items():
        target = reference and SHARE_OF_FINAL * reference["mean"]
        seeds = [row["measures"][seed] for seed in row["finished_seeds"]]
        row["steps_to_90"] = statistic([steps_to(seed, SHARE_OF_FINAL * seed[-1]["ap"]) for seed in seeds])
        row["steps_to_90_of_dino"] = statistic([steps_to(seed, target) for seed in seeds])
        row["cost"] = speed.get("rows", {}).get(name)
    return {
        "settings": settings,
        "rows": rows,
        "order": list(compare_with_papers(rows)),
        "speed_measured": {name: value for name, value in speed.items() if name != "rows"},
        "machine": {"processor": processor_name(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": versions(),
        "command": command,
    }


def _collect_row(runs: Sequence[Run], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of a row; its curves are of its finished seeds, or of the others if there are none."""
    member, measures = FAMILY[runs[0].row], {run.seed: read_measures(run.folder) for run in runs}
    last = settings["max_train_steps"]
    complete = [run.seed for run in runs if measures[run.seed] and measures[run.seed][-1]["step"] == last]
    finished = [run.seed for run in runs if run.is_finished and run.seed in complete]
    shown = [measures[seed] for seed in finished or measures if measures[seed]]
    return {
        "name": member.name,
        "parent": member.parent,
        "change": member.change,
        "published_ap": dict(member.published_ap),
        "finished_seeds": finished,
        "unfinished_seeds": [run.seed for run in runs if not run.is_finished],
        "incomplete_seeds": [run.seed for run in runs if run.is_finished and run.seed not in complete],
        "final": {name: statistic([measures[seed][-1].get(name) for seed in finished]) for name in MEASURES},
        "curves": {name: _band(shown, name) for name in MEASURES},
        "measures": measures,
    }


def _band(seeds: Sequence[Sequence[Mapping[str, Any]]], measure: str) -> dict[str, list[float]]:
    values = [{row["step"]: row[measure] for row in rows if row.get(measure) is not None} for rows in seeds]
    return dict(zip(("x", "mean", "low", "high"), summarize(values)))


def statistic(values: Sequence[float | None]) -> dict[str, float] | None:
    """Return mean, minimum and maximum of values over seeds; `None` if there is none, or a seed has no value.

    Example:

    ```python
    >>> statistic([1, 2, 6]), statistic([1, None])
    ({'mean': 3.0, 'min': 1, 'max': 6}, None)

    ```
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return {"mean": sum(known) / len(known), "min": min(known), "max": max(known)}


def steps_to(measures: Sequence[Mapping[str, Any]], ap: float | None) -> int | None:
    """Return the step of the first evaluation with at least this AP; `None` if there is none.

    Example:

    ```python
    >>> steps_to([{"step": 10, "ap": 0.2}, {"step": 20, "ap": 0.5}], 0.4)
    20

    ```
    """
    return next((row["step"] for row in measures if ap is not None and row["ap"] >= ap), None)


def compare_with_papers(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Compare each row with the one that its paper improves on, of those that are finished.

    Args:
        rows (`Mapping`): From [`collect`].

    Yields:
        `lower` and `higher`, rows in the order of the papers; `difference`, of the mean AP; `seeds`, the smaller
        number of them; and the `verdict`: `"as published"` or `"reversed"` if the seeds' ranges of AP do not overlap,
        otherwise `"within the spread"`.
    """
    final = {name: row["final"]["ap"] for name, row in rows.items() if row["final"]["ap"]}
    parents = ((ancestor, name) for name in final if (ancestor := _ancestor(name, final)))
    for lower, higher in (*parents, *_MORE_PAIRS):
        if {lower, higher} <= final.keys():
            low, high = final[lower], final[higher]
            verdict = (
                "as published"
                if high["min"] > low["max"]
                else "reversed"
                if high["max"] < low["min"]
                else "within the spread"
            )
            difference = high["mean"] - low["mean"]
            seeds = min(len(rows[name]["finished_seeds"]) for name in (lower, higher))
            yield {
                "lower": lower,
                "higher": higher,
                "difference": difference,
                "verdict": verdict,
                "seeds": seeds,
            }


def _ancestor(row: str, known: Mapping[str, Any]) -> str | None:
    """Return the closest ancestor of a row that is known."""
    parent = FAMILY[row].parent
    return parent if parent is None or parent in known else _ancestor(parent, known)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the numbers depend on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "from source"


def _curve(rows: Mapping[str, Mapping[str, Any]], name: str, measure: str, scale: float = 1.0) -> Curve:
    """Return the curve of a measure of a row, with its steps multiplied by `scale`."""
    band, row = rows[name]["curves"][measure], rows[name]
    note = "" if row["finished_seeds"] else " (unfinished)"
    return Curve(name, [x * scale for x in band["x"]], band["mean"], band["low"], band["high"], note)


def _ap_panels(rows: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, list[Curve]]]:
    """Return AP over steps and, of the rows whose speed was measured, over time."""
    panels = [("optimizer steps", "validation AP", [_curve(rows, name, "ap") for name in rows])]
    minutes = {name: row["cost"]["step_seconds"] / 60 for name, row in rows.items() if row["cost"]}
    timed = [_curve(rows, name, "ap", scale) for name, scale in minutes.items()]
    if timed:
        panels.append(("minutes of training: steps x median time of a step", "validation AP", timed))
    return panels


def _write_html(output_dir: Path, report: Mapping[str, Any], figures: Sequence[tuple[str, str, str]]) -> None:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["short_name"] = short_name
    template = environment.from_string(_TEMPLATE.read_text("utf-8"))
    rows = report["rows"]
    ranked = sorted(rows, key=lambda name: -(rows[name]["final"]["ap"] or {"mean": -1})["mean"])
    text = template.render(
        report=report,
        ranked=ranked,
        figures=[(title, _data_url(output_dir / file), text) for title, file, text in figures],
    )
    with atomic_write(output_dir / "report.html") as temporary:
        temporary.write_text(text, encoding="utf-8")


def _data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
