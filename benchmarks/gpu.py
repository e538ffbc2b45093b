"""Build, check and measure the CUDA code on a machine with a GPU, in eight minutes at most.

    python benchmarks/gpu.py --output results        # or: make gpu OUT=results
    python benchmarks/gpu.py --dry-run               # everything at tiny sizes on the CPU, in less than a minute

Nothing needs to be installed beyond PyTorch, transformers and a CUDA toolkit, and the network is not used; a Python
package that is missing is taken from the folder `--wheels` (`make gpu-wheels` fills it). No setting of the GPU is
changed.

The stages come in the order of their importance, each in processes of its own with a time limit, so that one that
fails, crashes or hangs costs the others nothing. Every row is on disk and on the screen as soon as it is measured. In
the output folder are

    gpu.jsonl  every row, as it was measured
    gpu.json   the same with the stages, their times and how they ended
    gpu.log    all that was printed
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

from gpu_stages.rows import DRY_RUN_PATIENCE, Row, Rows, parse_line
from gpu_stages.stages import STAGES
from gpu_stages.wheels import install_missing


BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
PATHS = [ROOT / "src", BENCHMARKS]


RESERVED = 6  # seconds to end what still runs and to print the table
TIME_IS_UP = "stopped: its time was up"
GRACE = 4  # seconds in which a process may end by itself


class Run:
    """A run of all stages.

    Args:
        args (`argparse.Namespace`): From [`parse_arguments`].
        work (`Path`): A folder for what is not kept.
    """

    def __init__(self, args: argparse.Namespace, work: Path):
        self.args, self.work = args, work
        self.patience = DRY_RUN_PATIENCE if args.dry_run else 1
        self.started = time.time()
        self.deadline = self.started + args.seconds - RESERVED
        self.output = args.output.resolve()
        self.output.mkdir(parents=True, exist_ok=True)
        self.rows_path = self.output / "gpu.jsonl"
        self.rows_path.write_text("")
        self.shown = 0  # bytes of the rows that are on the screen
        self.log = (self.output / "gpu.log").open("w")
        self.stages: dict[str, Row] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, [*PATHS, work / "site", *old_python_path()])),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "4",  # in each of three processes
        }

    def prepare(self) -> None:
        """Install what is missing, and begin to draw the images of the last stage."""
        self.say(install_missing(self.args.wheels, self.work / "site"))
        size, train, validation = (128, 8, 4) if self.args.dry_run else (554, 205, 40)
        options = [f"--image-size={size}", f"--num-train={train}", f"--num-val={validation}", "--num-test=0"]
        command = ["-m", "hf_dino.data.shapes", f"--output={self.work / 'shapes'}", *options]
        self.drawing = self.start([sys.executable, *command])

    def start(self, command: list[str]) -> "subprocess.Popen[bytes]":
        """Start a command in a process group of its own, so that it can be ended with the processes that it starts."""
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
        """Run stages in one process; after a crash or a time limit, start another one for what is left."""
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
        """Start the process of some stages and wait for it; return the stage at which it ended, and how.

        Returns:
            `tuple[str | None, str]`: `None` if it got to the end of all of them.
        """
        options = [f"--rows={self.rows_path}", f"--work={self.work}", f"--deadline={self.deadline}"]
        options += [f"--device={self.args.device}", *["--dry-run"] * self.args.dry_run]
        process = self.start([sys.executable, "-m", "gpu_stages.run", *names, *options])
        self.process = process
        pending, news = list(names), time.time()
        ended = ""
        while process.poll() is None and pending and not ended:
            lines = self.read_new_lines()
            news = time.time() if lines else news
            for line in lines:
                if "end" in line:
                    self.close_stage(line["stage"], "done")
                    pending.remove(line["stage"])
            ended = self.overdue(pending[0], news) if pending else ""
            time.sleep(0.05)
        self.end(process, GRACE if ended else 0)  # with all that it may have left running
        for line in self.read_new_lines():
            if "end" in line:
                self.close_stage(line["stage"], "done")
                pending.remove(line["stage"])
        if not pending:
            return None, "done"
        return pending[0], ended or f"failed with exit code {process.returncode}"

    def overdue(self, name: str, news: float) -> str:
        """Return why a stage must end now; empty as long as it need not."""
        if self.stage_left(name) < 0:
            return TIME_IS_UP
        stall = self.patience * STAGES[name].stall
        return f"stopped: no news for {stall:.0f} s" if time.time() - news > stall else ""

    def stage_left(self, name: str) -> float:
        """Return the seconds that a stage has left, a second more than it knows itself."""
        started = min(Rows(self.rows_path, name).started(), time.time())
        return min(started + self.patience * STAGES[name].seconds, self.deadline) + 1 - time.time()

    def seconds_left(self) -> float:
        return self.deadline - time.time()

    def close_stage(self, name: str, ended: str) -> None:
        """Note how a stage ended, and write everything."""
        started = min(Rows(self.rows_path, name).started(), time.time())
        self.stages[name] = {"ended": ended, "seconds": round(time.time() - started, 1)}
        self.say(f"[{time.time() - self.started:5.1f} s] {name}: {ended} in {self.stages[name]['seconds']} s")
        self.write()

    def end(self, process: "subprocess.Popen[bytes]", grace: float) -> None:
        """End a process and those that it started, first by asking."""
        for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
            with suppress(ProcessLookupError, PermissionError):  # none is left
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):  # one that waits for the driver cannot even be killed
                process.wait(seconds)

    def read_new_lines(self) -> list[Row]:
        """Return the lines that have come since the last time, and print the rows among them."""
        with self.rows_path.open("rb") as file:
            file.seek(self.shown)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        self.shown += len(complete)
        lines = [parse_line(line) for line in complete.decode().splitlines()]
        for line in lines:
            if "case" in line:
                self.say(format_row(line))
        return lines

    def say(self, text: str) -> None:
        """Print a line, on the screen and in the log."""
        print(text, flush=True)
        print(text, file=self.log, flush=True)

    def write(self) -> None:
        """Write what is known so far."""
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
        """Return the result in few lines: the stages, then what failed, then the figures."""
        stages = [f"{name}: {stage['ended']} ({stage['seconds']} s)" for name, stage in self.stages.items()]
        failed = [format_row(row) for row in rows if not row.get("ok")]
        figures = format_rows([row for row in rows if row.get("ok") and row["stage"] != "correctness"])
        checks = [row for row in rows if row["stage"] == "correctness"]
        right = sum(bool(row.get("ok")) for row in checks)
        lines = [*stages, f"correctness: {right} of {len(checks)} right", *figures, *(failed or ["nothing failed"])]
        return "\n".join(lines)

    def finish(self) -> None:
        """End what still runs, write everything and print the table."""
        for process in (self.process, getattr(self, "drawing", None)):
            if process is not None:
                self.end(process, 1)
        self.read_new_lines()
        self.write()
        self.say("\n" + (self.output / "gpu.md").read_text())

    def failed(self) -> bool:
        """Return whether any stage did not get to its end, or any row is not right."""
        rows = [parse_line(line) for line in self.rows_path.read_text().splitlines()]
        bad = [row for row in rows if "case" in row and not row.get("ok")]
        ended = [self.stages.get(name, {}).get("ended") for name in self.args.stages]
        return bool(bad) or any(how != "done" for how in ended)


def format_row(row: Row) -> str:
    """Return a row in one line."""
    figures = figures_of(row)
    mark = "" if row.get("ok") else "FAILED "
    return f"{mark}{row['stage']} | {row['case']} | {' '.join(f'{name}={value}' for name, value in figures.items())}"


def format_rows(rows: list[Row]) -> list[str]:
    """Return rows in lines; those with the same figures as their neighbors under one heading."""
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
    parser.add_argument("--output", type=Path, default=output, help=f"folder for the result (default: {output})")
    parser.add_argument("--seconds", type=float, default=480, help="after which the run ends (default: 480)")
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels", help="folder of wheels (default: wheels)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="which (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="everything at tiny sizes on the CPU")
    args = parser.parse_args(arguments)
    args.device = "cpu" if args.dry_run else "cuda"
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)

    def stop(number: int, frame: FrameType | None) -> Any:
        signal.signal(number, signal.SIG_IGN)  # the table comes once
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
