"""Build, check and measure the CUDA code on a machine with a GPU, in eight minutes at most.

    python benchmarks/gpu.py --output results        # or: make gpu OUT=results
    python benchmarks/gpu.py --dry-run               # everything at tiny sizes on the CPU, in less than a minute

Nothing needs to be installed beyond PyTorch, transformers and a CUDA toolkit, and the network is not used. Python
packages that are missing are installed from the directory `--wheels`, which `make gpu-wheels` fills. No setting of the
GPU is changed.

The most important stages run first. Each has a time limit and runs in a separate process, or in one that it shares
with related stages, so the others still run if it fails, crashes or hangs. Every row is written and printed as soon as
it is measured. The output directory contains

    gpu.jsonl  every row, as it was measured
    gpu.json   the same rows, with the duration and outcome of each stage
    gpu.log    all output
    gpu.md     the table that is printed last
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from gpu_stages.rows import DRY_RUN_TIME_FACTOR, Row, Rows, parse_line
from gpu_stages.stages import STAGES
from gpu_stages.wheels import install_missing


BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
PATHS = [ROOT / "src", BENCHMARKS]

RESERVED = 6  # seconds to stop the remaining processes and print the table
TIME_IS_UP = "stopped: its time was up"
GRACE = 4  # seconds between SIGTERM and SIGKILL


class Run:
    """A run of all stages.

    Args:
        args (`argparse.Namespace`): From [`parse_arguments`].
        work (`Path`): A directory for temporary files.
    """

    def __init__(self, args: argparse.Namespace, work: Path):
        self.args, self.work = args, work
        self.time_factor = DRY_RUN_TIME_FACTOR if args.dry_run else 1
        self.started = time.time()
        self.deadline = self.started + args.seconds - RESERVED
        self.output = args.output.resolve()
        self.output.mkdir(parents=True, exist_ok=True)
        self.rows_path = self.output / "gpu.jsonl"
        self.rows_path.write_text("")
        self.shown = 0  # bytes of the rows that are printed
        self.log = (self.output / "gpu.log").open("w")
        self.stages: dict[str, Row] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.drawing: subprocess.Popen[bytes] | None = None
        # several threads per process slow down a dry run on a machine that is shared
        defaults = {"OMP_NUM_THREADS": "1"} if args.dry_run else {}
        self.environment = (
            defaults
            | os.environ
            | {
                "PYTHONPATH": os.pathsep.join(map(str, [*PATHS, work / "site", *old_python_path()])),
                "PYTHONUNBUFFERED": "1",
                "HF_HUB_OFFLINE": "1",
                "TRANSFORMERS_OFFLINE": "1",
                "TORCHINDUCTOR_COMPILE_THREADS": "4",  # in each of three processes
            }
        )

    def prepare(self) -> None:
        """Install missing packages, and start drawing the images of the last stage."""
        self.print(install_missing(self.args.wheels, self.work / "site"))
        size, train, validation = (128, 8, 4) if self.args.dry_run else (554, 205, 40)
        options = [f"--image_size={size}", f"--num_train={train}", f"--num_val={validation}", "--num_test=0"]
        command = ["-m", "hf_dino.data.shapes", f"--output_dir={self.work / 'shapes'}", *options]
        self.drawing = self.start([sys.executable, *command])

    def start(self, command: list[str]) -> "subprocess.Popen[bytes]":
        """Start a command in a new process group, so that it can be stopped together with its child processes."""
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=self.environment,
            preexec_fn=os.setpgrp,
        )

    def run_group(self, names: list[str]) -> None:
        """Run stages in one process. After a crash or a time limit, start another one for the remaining cases."""
        pending = list(names)
        while pending and self.seconds_left() > 1:
            begun = {name: len(Rows(self.rows_path, name).begun()) for name in pending}
            current, ended = self.attempt(pending)
            if current is None:
                break
            rows = Rows(self.rows_path, current)
            for case in rows.unfinished():
                rows.add(case, ok=False, error=ended)
            again = ended != TIME_IS_UP and len(rows.begun()) > begun[current] and self.stage_left(current) > 1
            if not again:
                self.close_stage(current, ended)
            pending = pending[pending.index(current) + (not again) :]

    def attempt(self, names: list[str]) -> tuple[str | None, str]:
        """Run stages in one process, and wait until it ends or has to be stopped.

        Returns:
            `tuple[str | None, str]`: The stage that did not finish, `None` if all finished; and how the process ended.
        """
        options = [f"--rows={self.rows_path}", f"--work={self.work}", f"--deadline={self.deadline}"]
        options += [f"--device={self.args.device}", *["--dry-run"] * self.args.dry_run]
        process = self.start([sys.executable, "-m", "gpu_stages.run", *names, *options])
        self.process = process
        pending, last_line, ended = list(names), time.time(), ""
        while process.poll() is None and pending and not ended:
            last_line = time.time() if self.close_finished(pending) else last_line
            ended = self.overdue(pending[0], last_line) if pending else ""
            time.sleep(0.05)
        self.end(process, GRACE if ended else 0)  # also child processes that outlive it
        self.close_finished(pending)
        if not pending:
            return None, "done"
        return pending[0], ended or f"failed with exit code {process.returncode}"

    def close_finished(self, pending: list[str]) -> bool:
        """Print new rows, and remove finished stages from `pending`. Return whether there are new lines."""
        lines = self.read_new_lines()
        for line in lines:
            if "end" in line:
                self.close_stage(line["stage"], "done")
                pending.remove(line["stage"])
        return bool(lines)

    def overdue(self, name: str, last_line: float) -> str:
        """Return why a stage must be stopped now, or an empty string if it may continue.

        Args:
            name (`str`): The stage.
            last_line (`float`): When it wrote its last line, by the clock of `time.time`.
        """
        if self.stage_left(name) < 0:
            return TIME_IS_UP
        stall = self.time_factor * STAGES[name].stall
        return f"stopped: no news for {stall:.0f} s" if time.time() - last_line > stall else ""

    def stage_left(self, name: str) -> float:
        """Return the seconds that a stage has left, and one more, since it stops by itself at its deadline."""
        started = min(Rows(self.rows_path, name).started(), time.time())
        return min(started + self.time_factor * STAGES[name].seconds, self.deadline) + 1 - time.time()

    def seconds_left(self) -> float:
        return self.deadline - time.time()

    def close_stage(self, name: str, ended: str) -> None:
        """Record how a stage ended, and update the output files."""
        started = min(Rows(self.rows_path, name).started(), time.time())
        self.stages[name] = {"ended": ended, "seconds": round(time.time() - started, 1)}
        self.print(f"[{time.time() - self.started:5.1f} s] {name}: {ended} in {self.stages[name]['seconds']} s")
        self.write()

    def end(self, process: "subprocess.Popen[bytes]", grace: float) -> None:
        """Stop a process and its child processes, first by SIGTERM and after `grace` seconds by SIGKILL."""
        for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
            with suppress(ProcessLookupError, PermissionError):  # they have ended already
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):  # a process that waits for the driver cannot be killed
                process.wait(seconds)

    def read_new_lines(self) -> list[Row]:
        """Return the lines written since the last call, and print the rows among them."""
        with self.rows_path.open("rb") as file:
            file.seek(self.shown)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        self.shown += len(complete)
        lines = [parse_line(line) for line in complete.decode().splitlines()]
        for line in lines:
            if "case" in line:
                self.print(format_row(line))
        return lines

    def print(self, text: str) -> None:
        """Print a line, and write it to the log."""
        print(text, flush=True)
        print(text, file=self.log, flush=True)

    def write(self) -> None:
        """Write `gpu.json` and `gpu.md` with the rows so far."""
        rows = [parse_line(line) for line in self.rows_path.read_text().splitlines()]
        content: dict[str, Any] = {
            "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
            "seconds": round(time.time() - self.started, 1),
            "stages": self.stages,
            "rows": [row for row in rows if "case" in row],
        }
        (self.output / "gpu.json").write_text(json.dumps(content, indent=1) + "\n")
        (self.output / "gpu.md").write_text(self.table(content["rows"]) + "\n")

    def table(self, rows: list[Row]) -> str:
        """Return a summary: the outcome of each stage, then the measurements, then the rows that failed."""
        stages = [f"{name}: {stage['ended']} ({stage['seconds']} s)" for name, stage in self.stages.items()]
        failed = [format_row(row) for row in rows if not row.get("ok")]
        figures = format_rows([row for row in rows if row.get("ok") and row["stage"] != "correctness"])
        checks = [row for row in rows if row["stage"] == "correctness"]
        right = sum(bool(row.get("ok")) for row in checks)
        lines = [*stages, f"correctness: {right} of {len(checks)} right", *figures, *(failed or ["nothing failed"])]
        return "\n".join(lines)

    def finish(self) -> None:
        """Stop the remaining processes, write the results and print the table."""
        for process in (self.process, self.drawing):
            if process is not None:
                self.end(process, 1)
        self.read_new_lines()
        self.write()
        self.print("\n" + (self.output / "gpu.md").read_text())

    def failed(self) -> bool:
        """Return whether a stage did not finish or a row failed."""
        rows = [parse_line(line) for line in self.rows_path.read_text().splitlines()]
        bad = [row for row in rows if "case" in row and not row.get("ok")]
        ended = [self.stages.get(name, {}).get("ended") for name in self.args.stages]
        return bool(bad) or any(how != "done" for how in ended)


def format_row(row: Row) -> str:
    """Format a row as one line."""
    figures = figures_of(row)
    mark = "" if row.get("ok") else "FAILED "
    return f"{mark}{row['stage']} | {row['case']} | {' '.join(f'{name}={value}' for name, value in figures.items())}"


def format_rows(rows: list[Row]) -> list[str]:
    """Format rows as lines. Three or more consecutive rows with the same columns share a heading."""
    lines: list[str] = []
    for (stage, *names), group in itertools.groupby(rows, lambda row: (row["stage"], *figures_of(row))):
        same = list(group)
        if len(same) < 3:
            lines += map(format_row, same)
            continue
        lines.append(f"{stage} | {' | '.join(names)}")
        lines += [" | ".join(["  " + row["case"], *map(str, figures_of(row).values())]) for row in same]
    return lines


def figures_of(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in ("stage", "case", "ok")}


def old_python_path() -> list[str]:
    return [path for path in [os.environ.get("PYTHONPATH")] if path]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    output = Path(os.environ.get("OUT") or BENCHMARKS / "results" / "gpu")
    parser.add_argument("--output", type=Path, default=output, help=f"directory for the results (default: {output})")
    parser.add_argument("--seconds", type=float, default=480, help="time limit of the run in seconds (default: 480)")
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels", help="directory of wheels (default: wheels)")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="stages to run (default: all)"
    )
    parser.add_argument("--dry-run", action="store_true", help="run everything at tiny sizes on the CPU")
    args = parser.parse_args(arguments)
    args.device = "cpu" if args.dry_run else "cuda"
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)

    def stop(number: int, frame: FrameType | None) -> Any:
        signal.signal(number, signal.SIG_IGN)  # the table is printed only once
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as work:
        run = Run(args, Path(work))
        try:
            run.prepare()
            for _, names in itertools.groupby(args.stages, lambda name: STAGES[name].group):
                run.run_group(list(names))
        finally:
            run.finish()
        return int(run.failed())


if __name__ == "__main__":
    sys.exit(main())
