"""Write so that a reader, or a process that dies half-way, never meets half a file or half a folder."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def files_into_folder(folder: Path, last: str) -> Iterator[Path]:
    """Give a temporary folder whose files are moved into `folder` once all are written, replacing files of that name.

    Args:
        folder (`Path`): May hold other files, which stay.
        last (`str`): The file that is moved last, without which nobody takes the folder for complete.
    """
    temporary = folder / ".files.part"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        (folder / last).unlink(missing_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == last):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, or leave the file that was there."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
