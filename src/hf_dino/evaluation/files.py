"""A new file that appears under its name once it is whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ..data.errors import InputError


@contextmanager
def new_text_file(path: Path) -> Iterator[TextIO]:
    """Open a file beside `path` for writing and give it that name at the end, or leave nothing after an error.

    Raises:
        InputError: If `path` exists: nothing is replaced.
    """
    if path.exists():
        raise InputError(f"{path}: exists already; give another name or remove it")
    temporary = path.with_name(f".{path.name}.part")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
