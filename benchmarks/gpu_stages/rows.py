"""The measurements of a stage of a GPU run: one JSON line per row, written as soon as it is measured.

A line with `begin` precedes each case. If the process is stopped or crashes, the last case that began is the cause:
the stage is restarted and skips every case that has begun.
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


Row = dict[str, Any]

DRY_RUN_TIME_FACTOR = 5  # multiplies the limits of a stage, since a dry run may share its processors with others


class Rows:
    """The rows of one stage in the file of all stages.

    Args:
        path (`Path`): The file, to which lines are appended.
        stage (`str`): The name of the stage.
    """

    def __init__(self, path: Path, stage: str):
        self.path, self.stage = path, stage

    def add(self, case: str, **figures: Any) -> None:
        """Append the row of a case."""
        self._write({"stage": self.stage, "case": case, **figures})

    def start(self) -> float:
        """Record that the stage starts, and return when it first did."""
        self._write({"stage": self.stage, "start": time.time()})
        return self.started()

    def started(self) -> float:
        """Return when the stage first started, by the clock of `time.time`; infinity if it has not."""
        return min((line["start"] for line in self._lines() if "start" in line), default=float("inf"))

    def end(self) -> None:
        """Record that the stage has finished."""
        self._write({"stage": self.stage, "end": time.time()})

    def begun(self) -> set[str]:
        """Return the cases that have begun in this or an earlier process."""
        return {line["begin"] for line in self._lines() if "begin" in line}

    def unfinished(self) -> set[str]:
        """Return the cases that have begun and have no row."""
        return self.begun() - {line["case"] for line in self._lines() if "case" in line}

    @contextmanager
    def case(self, name: str) -> Iterator[Row]:
        """Yield a row to be filled in, and append it; an exception becomes its `error`.

        Raises:
            SystemExit: If the GPU can no longer be used in this process.
        """
        self._write({"stage": self.stage, "begin": name})
        row: Row = {"ok": True}
        try:
            yield row
        except Exception as error:  # the next case may still work
            row |= {"ok": False, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        self.add(name, **row)
        if not gpu_works():
            raise SystemExit("the GPU can no longer be used in this process")

    def _lines(self) -> list[Row]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [line for line in map(parse_line, lines) if line.get("stage") == self.stage]

    def _write(self, line: Row) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def parse_line(line: str) -> Row:
    """Return the content of a line; empty for a line that a killed process left incomplete."""
    try:
        return dict(json.loads(line))
    except ValueError:
        return {}


def gpu_works() -> bool:
    """Check that this process can still use the GPU, which it cannot after an error such as an illegal address."""
    torch = sys.modules.get("torch")  # not every stage imports it
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


@dataclass(frozen=True)
class Stage:
    """Parameters of a stage.

    Attributes:
        rows (`Rows`): Receives its rows.
        device (`str`): `"cuda"`, or `"cpu"` in a dry run.
        dry_run (`bool`): Whether to use tiny sizes.
        deadline (`float`): When it is stopped, by the clock of `time.time`.
        work (`Path`): A directory for temporary files.
    """

    rows: Rows
    device: str
    dry_run: bool
    deadline: float
    work: Path

    def todo(self, cases: Iterable[str]) -> Iterator[str]:
        """Yield the cases that have not begun yet, as long as there is time."""
        begun = self.rows.begun()
        for name in cases:
            if name not in begun and self.seconds_left() > 0:
                yield name

    def seconds_left(self) -> float:
        """Return the time to the deadline."""
        return self.deadline - time.time()
