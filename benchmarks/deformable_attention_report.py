"""Write the results of the benchmark of multi-scale deformable attention as tables and as a plot."""

from pathlib import Path
from typing import Any

from matplotlib import pyplot

from deformable_attention_baselines import IMPLEMENTATIONS, REFERENCES


# One family of colors for ours, another for the others.
COLORS = {
    "hf_dino": "#1f5fa8",
    "hf_dino, AVX2": "#7fb2e5",
    "hf_dino, fused": "#0b2f5c",
    "transformers": "#e08a1e",
    "official operator": "#b5482f",
    "mmcv": "#8c6d31",
    "kernels-community": "#6b8e3d",
    "msda-triton": "#8a5aa0",
}


NOTE = (
    "Times faster: than the reference of the same form. MiB: peak memory beyond the inputs; beyond results: without "
    "outputs and gradients, as a multiple of the size of `value`. Every byte once: the time to copy what must move."
)


def write_table(path: Path, content: dict[str, Any]) -> None:
    """Write one table per case, with a row per implementation and both passes side by side."""
    columns = ["times faster", "MiB", "beyond results"]
    lines = []
    for forward, both in zip(content["measured"][::2], content["measured"][1::2]):
        heading = ["", f"{forward['pass']} ms", *columns, f"{both['pass']} ms", *columns]
        lines += [f"### {title(forward)}", "", row(heading), row(["---", *["---:"] * 8])]
        for name, result in forward["results"].items():
            lines.append(row([name, *cells(result), *cells(both["results"][name])]))
        lines += [row(["every byte once", forward["bound_ms"], *[""] * 3, both["bound_ms"], *[""] * 3]), ""]
    absent = [f"- {name}: {state}" for name, state in content["implementations"].items() if state != "takes part"]
    source = f"{content['device']}, copies {content['copy_gb_per_s']} GB/s; medians of `{content['command']}`"
    path.write_text("\n".join([source, "", NOTE, "", *lines, "Not measured:", "", *absent]) + "\n")


def title(one: dict[str, Any]) -> str:
    return f"{one['shape']}, batch of {one['batch_size']}, {one['dtype']}"


def row(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def cells(result: dict[str, Any]) -> list[Any]:
    keys = ("median_ms", "times_faster", "peak_memory_mib", "memory_beyond_results_in_values")
    numbers = [result.get(key, "") for key in keys]
    if result["verdict"] == "right":
        return numbers
    error = f" (relative error {result['relative_error']})" if "relative_error" in result else ""
    return [f"{result['verdict']}{error} {numbers[0]}".strip(), *numbers[1:]]


def draw(path: Path, content: dict[str, Any]) -> None:
    """Plot the speed-ups on a log scale: one panel per shape and batch size, one group of bars per dtype and pass."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for one in content["measured"]:
        panels.setdefault(f"{one['shape']}, batch of {one['batch_size']}", []).append(one)
    names = [name for name in COLORS if content["implementations"][name] == "takes part"]
    width = 0.84 / len(names)
    size = (3 + 0.55 * len(names) * max(map(len, panels.values())), 1 + 3.2 * len(panels))
    figure, axes = pyplot.subplots(len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (heading, groups) in zip(axes[:, 0], panels.items()):
        for group, one in enumerate(groups):
            for number, name in enumerate(names):
                x = group + (number - (len(names) - 1) / 2) * width
                draw_bar(axis, x, width, name, one["results"][name])
            draw_bound(axis, group, one)
        axis.set_yscale("log")
        axis.axhline(1, color="black", linewidth=1)
        axis.set_ylim(min(0.5, axis.get_ylim()[0]), axis.get_ylim()[1] * 1.8)
        axis.yaxis.set_major_formatter("{x:g}×")
        axis.set_xticks(range(len(groups)), [f"{one['dtype']}\n{one['pass']}" for one in groups])
        axis.set_title(heading, loc="left", fontweight="bold")
        axis.set_ylabel("times faster than\nthe PyTorch reference")
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    handles: list[Any] = [pyplot.Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in names]
    labels = [name + fused_note(name) for name in names]
    handles.append(pyplot.Line2D([], [], color="black", linestyle=":"))
    labels.append("bound: every byte once, at copying speed")
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"Multi-scale deformable attention on {content['device']}")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_bar(axis: Any, x: float, width: float, name: str, result: dict[str, Any]) -> None:
    if result["verdict"] != "right" or "times_faster" not in result:
        axis.text(x, 1.1, result["verdict"].split(":")[0], rotation=90, ha="center", va="bottom", color=COLORS[name])
        return
    ratio = result["times_faster"]
    axis.bar(x, ratio - 1, width * 0.92, bottom=1, color=COLORS[name])
    axis.text(x, max(ratio, 1) * 1.05, f"{ratio:.3g}", ha="center", va="bottom", fontsize=8)


def draw_bound(axis: Any, group: int, one: dict[str, Any]) -> None:
    reference_ms = one["results"][REFERENCES["plain"]].get("median_ms")
    if reference_ms:
        axis.hlines(reference_ms / one["bound_ms"], group - 0.45, group + 0.45, color="black", linestyle=":")


def fused_note(name: str) -> str:
    return f" (against {REFERENCES['fused']})" if IMPLEMENTATIONS[name].form == "fused" else ""
