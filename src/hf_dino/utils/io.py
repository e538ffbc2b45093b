"""Read text files and hashes, and write files and directories atomically.

After an error, a killed process or a power cut, a file or directory is complete, as it was before, or absent.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TextIO

from .errors import InputError


_FSYNC_FLAGS = os.O_RDONLY if os.name == "posix" else os.O_RDWR  # Windows flushes only what is open for writing


def fsync(path: Path) -> None:
    """Flush a file, or the list of names in a directory, to the disk, so that it survives a power cut."""
    with suppress(OSError) if path.is_dir() else nullcontext():  # not every system can flush a directory
        descriptor = os.open(path, _FSYNC_FLAGS)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush a directory and everything in it to the disk."""
    for path in (*folder.rglob("*"), folder):
        fsync(path)


@contextmanager
def annotate_oserror(path: Path) -> Iterator[None]:
    """Add `path` to an `OSError` that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise


MAX_NAME_BYTES = 255  # of a file, in nearly all file systems


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path and rename it to `path` at the end. After an error, delete it.

    Args:
        path (`Path`): May exist. Its directory is created. The temporary file has the same suffix.
    """
    stem = path.stem.encode(errors="surrogateescape")[: MAX_NAME_BYTES - len(f"..part{path.suffix}".encode())]
    temporary = path.with_name(f".{stem.decode(errors='ignore')}.part{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with annotate_oserror(path):
            yield temporary
            fsync(temporary)
            temporary.replace(path)
            fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_update_directory(folder: Path, last: str) -> Iterator[Path]:
    """Yield a temporary directory and move its files into `folder` at the end, replacing files of the same name.

    Args:
        folder (`Path`): May contain other files, which are kept.
        last (`str`): The file that is deleted first and moved last: `folder` is complete exactly when it exists.
    """
    with _temporary_directory(folder / ".files.part", folder) as temporary:
        yield temporary
        fsync_tree(temporary)
        (folder / last).unlink(missing_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == last):
            path.replace(folder / path.name)
        fsync(folder)


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """Write a directory atomically: yield a temporary one and rename it to `folder` at the end, or delete it.

    Args:
        folder (`Path`): Must not exist, or be empty. Its parent is created.

    Raises:
        InputError: If it exists and is not an empty directory.
    """
    folder = folder.resolve()  # so that `.` has a name
    ensure_new_directory(folder)
    with _temporary_directory(folder.with_name(f".{folder.name}.part"), folder) as temporary:
        yield temporary
        fsync_tree(temporary)
        with suppress(FileNotFoundError):
            folder.rmdir()  # POSIX replaces an empty directory, Windows does not
        temporary.replace(folder)
        fsync(folder.parent)


@contextmanager
def _temporary_directory(temporary: Path, folder: Path) -> Iterator[Path]:
    """Create an empty directory and delete what is left of it at the end. Errors of a full disk name `folder`."""
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with annotate_oserror(folder):
            temporary.mkdir(parents=True)
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def ensure_new_directory(folder: Path) -> None:
    """Check an output directory before the work that it is for: it must not exist, or be empty.

    Raises:
        InputError: If it exists and is not an empty directory, or is below a file.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise _already_exists(folder)
    if file := next((path for path in folder.absolute().parents if path.is_file()), None):
        raise InputError(f"{folder}: cannot be created, since {file} is a file; use a different path")


def ensure_new_files(*paths: Path | None) -> None:
    """Check output files before the work that they are for: all must be new and different. Create their directories.

    Args:
        paths (`Path`, *optional*): The files; `None` for those that are not wanted.

    Raises:
        InputError: If a file exists or is given twice.
    """
    given = [path for path in paths if path is not None]
    for path in given:
        if path.exists():
            raise _already_exists(path)
        if given.count(path) > 1:
            raise InputError(f"{path}: is given for two outputs; use a different path for each")
    for folder in {path.parent for path in given}:
        folder.mkdir(parents=True, exist_ok=True)


def _already_exists(path: Path) -> InputError:
    return InputError(f"{path}: already exists; use a different path or remove it")


@contextmanager
def open_new_text_file(path: Path) -> Iterator[TextIO]:
    """Open a text file that appears at `path` once it is complete. After an error there is none.

    Raises:
        InputError: If `path` exists.
    """
    ensure_new_files(path)
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield file


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON. After an error, the previous file is still there."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        InputError: If the file is not found, cannot be read, or is not in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: file not found") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: is not in UTF-8 ({error.reason} at byte {error.start}); save it again with the encoding UTF-8"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file in UTF-8, without surrounding whitespace, and without empty lines.

    Raises:
        InputError: As [`read_text`].
    """
    # not splitlines, which also splits at characters that a name may contain
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cache_folder(name: str) -> Path:
    """Return a directory in the cache of hf_dino, which `HF_DINO_CACHE` moves; it need not exist."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111, raises no error
    return Path(os.environ.get("HF_DINO_CACHE") or Path(home, "hf_dino"), name)
