"""Read hardware counters of the forward and backward kernels with ncu."""

import csv
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_stages.rows import Row, Stage


SAMPLE = Path(__file__).with_name("ncu_sample.csv")
# Our names and ncu's names of the metrics.
METRICS = {
    "us": "gpu__time_duration.sum",
    "dram_mb": "dram__bytes.sum",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_hit_percent": "lts__t_sector_hit_rate.pct",
    "l1_hit_percent": "l1tex__t_sector_hit_rate.pct",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
FACTORS = {"us": 1e-3, "dram_mb": 1e-6}  # from nanoseconds and bytes, the base units
# Sets of metrics, tried in order, since ncu measures nothing if it does not know one of the names.
METRIC_SETS = (tuple(METRICS), ("us", "dram_mb", "dram_percent", "registers"), ("us",))


def command_for(ncu: str, names: tuple[str, ...], report: Path) -> list[str]:
    """Return the command that measures the kernels of one call of each kind."""
    return [
        ncu, "--clock-control", "none", "--target-processes", "all",
        "--kernel-name-base", "function", "--kernel-name", "regex:^(forward|backward)_kernel$",
        "--metrics", ",".join(METRICS[name] for name in names),
        "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(report),
        sys.executable, "-m", "gpu_stages.operator_once", "--device", "cuda", "--size", "large",
    ]  # fmt: skip


def read_report(text: str) -> dict[str, Row]:
    """Return the counters of each kernel by its short name.

    Args:
        text (`str`): Output of ncu: its messages, a header, a line of units and a line per kernel.

    Raises:
        ValueError: If there is no table. The message has ncu's errors.
    """
    lines = text.splitlines()
    start = next((index for index, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        errors = [line for line in lines if "ERROR" in line or "ERR_" in line] or lines[-2:]
        raise ValueError(f"ncu measured nothing: {' / '.join(errors)}")
    table = list(csv.DictReader(lines[start:]))
    return {
        f"{row['ID']} {short_name(row['Kernel Name'])}": {
            name: round(number(row[metric]) * FACTORS.get(name, 1), 2)
            for name, metric in METRICS.items()
            if row.get(metric)
        }
        for row in table
        if row["ID"]  # empty in the line of units
    }


def short_name(kernel: str) -> str:
    """Return the pass that a kernel computes, and the dtype of `value`.

    Example:

    ```python
    >>> short_name("void hf_dino::cuda::backward_kernel<__nv_bfloat16, hf_dino::cuda::UsualShape>(...)")
    'backward bfloat16'

    ```
    """
    which = "backward" if "backward_kernel" in kernel else "forward"
    arguments = kernel.partition("<")[2]
    dtype = next((name for mark, name in DTYPES.items() if arguments.startswith(mark)), "")
    return f"{which} {dtype}".strip()


DTYPES = {"float": "float32", "__nv_bfloat16": "bfloat16", "__half": "float16", "double": "float64"}


def number(text: str) -> float:
    """Read a number as ncu prints it, with commas between thousands."""
    return float(text.replace(",", ""))


def count(ncu: str, timeout: float) -> dict[str, Row]:
    """Run ncu with the first set of metrics that it can measure.

    Raises:
        ValueError: If it measures nothing with any set.
    """
    for names in METRIC_SETS:
        with tempfile.TemporaryDirectory() as work:
            report = Path(work, "ncu.csv")
            command = command_for(ncu, names, report)
            print(*command, flush=True)
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
            text = report.read_text() if report.exists() else done.stdout + done.stderr
            print(text, done.stdout[-3000:], done.stderr[-3000:], sep="\n", flush=True)
        try:
            return read_report(text)
        except ValueError as error:
            failure = error
            if "ERR_NVGPUCTRPERM" in text:
                break
    raise failure


def main(stage: Stage) -> None:
    for name in stage.todo(["ncu"]):
        with stage.rows.case(name) as row:
            if stage.dry_run:
                print(*command_for("ncu", METRIC_SETS[0], Path("ncu.csv")))
                kernels = read_report(SAMPLE.read_text())
            else:
                kernels = count(shutil.which("ncu") or "/usr/local/cuda/bin/ncu", stage.seconds_left())
            row["kernels"] = len(kernels)
            for kernel, counters in kernels.items():
                stage.rows.add(kernel, ok=True, **counters)
