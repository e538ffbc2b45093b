"""The history of a run in files that anything can read: JSON lines, CSV, and an image of the curves."""

import csv
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..utils.io import annotate_oserror, atomic_write
from ..visualization import plot_training_curves


logger = logging.getLogger(__name__)


class RunHistory:
    """Rows of a history, kept in `history.jsonl` and `history.csv` as they come.

    What these files had is replaced at the start: a resumed run begins with the rows that its checkpoint knows, and
    what came after that happens once more. Later, a file that cannot be written is only warned of: no row is lost.

    Args:
        folder (`Path`): Where the files are; made if it does not exist.
        rows (`list[dict]`): The rows so far, to which [`RunHistory.add`] appends: a run's `state.history`.
        writes (`bool`): Whether this process writes the files: one of all does.
    """

    def __init__(self, folder: Path, rows: list[dict[str, Any]], writes: bool):
        self.folder = folder
        self.rows = rows
        self.writes = writes
        self._columns: list[str] = []
        self._is_whole = False
        if writes:
            self._write_all()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row, called by every process."""
        self.rows.append(dict(row))
        if self.writes:
            with _warning_only():
                self._append(row)

    def plot(self) -> None:
        """Draw the curves of losses and average precision into `curves.png`."""
        if self.writes:
            with _warning_only():
                plot_training_curves(self.rows, self.folder / "curves.png")

    def _append(self, row: Mapping[str, Any]) -> None:
        if not self._is_whole or not row.keys() <= set(self._columns):
            self._write_all()
            return
        self._is_whole = False
        json_lines, table = self._paths()
        with annotate_oserror(json_lines), json_lines.open("a", encoding="utf-8") as file:
            file.write(_json_line(row))
        with annotate_oserror(table), table.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)
        self._is_whole = True

    def _write_all(self) -> None:
        self._is_whole = False
        self._columns = list(dict.fromkeys(name for row in self.rows for name in row))
        json_lines, table = self._paths()
        with atomic_write(json_lines) as path:
            path.write_text("".join(map(_json_line, self.rows)), encoding="utf-8")
        with atomic_write(table) as path, path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self.rows)
        self._is_whole = True

    def _paths(self) -> tuple[Path, Path]:
        return self.folder / "history.jsonl", self.folder / "history.csv"


@contextmanager
def _warning_only() -> Iterator[None]:
    """Let a file that only informs, open in another program or on a full disk, not end the run."""
    try:
        yield
    except OSError as error:
        logger.warning("%s; the run goes on, and its checkpoints have the whole history", error)


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"
