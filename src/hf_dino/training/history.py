"""The history of a run in files that anything can read: JSON lines, CSV, and a picture of the curves."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import replacing
from ..visualization import plot_training_curves


class RunHistory:
    """Rows of a history, kept in `history.jsonl` and `history.csv` as they come.

    What these files had is replaced at the start: a resumed run begins with the rows that its checkpoint knows, and
    what came after that happens once more.

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
        if writes:
            with replacing(folder / "history.jsonl") as path:
                path.write_text("".join(map(_json_line, rows)), encoding="utf-8")
            self._write_csv()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row, called by every process."""
        self.rows.append(dict(row))
        if not self.writes:
            return
        with (self.folder / "history.jsonl").open("a", encoding="utf-8") as file:
            file.write(_json_line(row))
        if row.keys() <= set(self._columns):
            with (self.folder / "history.csv").open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        else:
            self._write_csv()

    def plot(self) -> None:
        """Draw the curves of losses and average precision into `curves.png`."""
        if self.writes:
            plot_training_curves(self.rows, self.folder / "curves.png")

    def _write_csv(self) -> None:
        self._columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with replacing(self.folder / "history.csv") as path, path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self.rows)


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"
