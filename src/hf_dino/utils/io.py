"""Write so that a reader, a process that dies half-way or a power cut never meets half a file or half a folder."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from .errors import InputError


def sync(path: Path) -> None:
    """Wait until a file's content, or which names are in a folder, would outlive a power cut."""
    if not path.is_dir():
        with path.open("r+b") as file:
            os.fsync(file.fileno())
        return
    with suppress(OSError):  # not every system can do this for a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Do the same for everything in a folder, and for the folder itself."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


@contextmanager
def annotate_oserror(path: Path) -> Iterator[None]:
    """Let an error of the system that names no file, as of a full disk, name this file or folder."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give the path of a file to write, which takes the place of `path` once it is whole, or not at all.

    Args:
        path (`Path`): May exist; its folder is made. The temporary file has the same suffix.
    """
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with annotate_oserror(path):
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_update_directory(folder: Path, last: str) -> Iterator[Path]:
    """Give a temporary folder whose files are moved into `folder` once all are written, replacing files of that name.

    Args:
        folder (`Path`): May hold other files, which stay.
        last (`str`): The file that is moved last, without which nobody takes the folder for complete.
    """
    with _part_of(folder, folder / ".files.part") as temporary:
        yield temporary
        fsync_tree(temporary)
        (folder / last).unlink(missing_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == last):
            path.replace(folder / path.name)
        sync(folder)


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """Give a temporary folder, which gets the name `folder` once everything is written; after an error there is none.

    Args:
        folder (`Path`): Does not exist or is empty; the folder above it is made.

    Raises:
        InputError: If it exists and is not an empty folder.
    """
    folder = folder.resolve()  # so that `.` has a name too
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise _exists(folder)
    with _part_of(folder, folder.with_name(f".{folder.name}.part")) as temporary:
        yield temporary
        fsync_tree(temporary)
        with suppress(FileNotFoundError):
            folder.rmdir()  # an empty one is replaced on POSIX, but not on Windows
        temporary.replace(folder)
        sync(folder.parent)


@contextmanager
def _part_of(folder: Path, temporary: Path) -> Iterator[Path]:
    """Make an empty `temporary` folder and remove what is left of it in the end; a full disk names `folder`."""
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with annotate_oserror(folder):
            temporary.mkdir(parents=True)
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def ensure_new_files(*paths: Path | None) -> None:
    """See, before the work is done, that it can be written: to files that are new, differ, and have a folder.

    Args:
        paths (`Path`, *optional*): The files; None for those that are not wanted. Their folders are made.

    Raises:
        InputError: If one exists, or is given twice.
    """
    given = [path for path in paths if path is not None]
    for path in given:
        if path.exists():
            raise _exists(path)
        if given.count(path) > 1:
            raise InputError(f"{path}: is given for two outputs; give each its own name")
    for folder in {path.parent for path in given}:
        folder.mkdir(parents=True, exist_ok=True)


def _exists(path: Path) -> InputError:
    return InputError(f"{path}: exists already; give another name or remove it")


@contextmanager
def open_new_text_file(path: Path) -> Iterator[TextIO]:
    """Open a file that gets the name `path` once it is whole; after an error there is none.

    Raises:
        InputError: If `path` exists: nothing is replaced.
    """
    ensure_new_files(path)
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield file


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, or leave the file that was there."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without the byte order mark that Windows likes to write.

    Raises:
        InputError: If there is no such file, or it cannot be read, or is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: is not in UTF-8 ({error.reason} at byte {error.start}); save it again with the encoding UTF-8, "
            "which every editor offers"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file as [`read_text`] does, without empty ones and blanks at their ends."""
    # not splitlines, which also splits at signs that a name may hold
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]
