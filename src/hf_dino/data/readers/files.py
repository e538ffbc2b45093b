"""Find the image files that annotations name, also by names that another machine or tool wrote."""

import os
import re
import unicodedata
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from ..dataset import SPLITS
from ..images import is_image_file
from .common import split_from_name


RENAMED_WARNING = "image file names are those of another machine: matched by the last part of the name"

_MAY_LEAD_OUTSIDE = re.compile(r"\.\.|[/\\]|.:")  # of a normalized path: its parent, a root or a drive


class FoundFiles(NamedTuple):
    """Image files by the names that annotations have for them.

    Attributes:
        paths (`list[Path]`): One for each name, in order. A file that was not found is where it should be.
        renamed (`set[Path]`): Those of the files that were found by the last part of their name only.
        missing (`list[str]`): Names of files that were not found.
    """

    paths: list[Path]
    renamed: set[Path]
    missing: list[str]


def find_image_files(
    names: Sequence[str], folder: Path, root: Path | None = None, split: str | None = None
) -> FoundFiles:
    r"""Find image files by their names in a dataset.

    A name is a path relative to `folder`. If it is not found, it may have been written on another machine: then the
    file is taken that alone has the last part of the name, or that of several has the most parts before it, below
    `folder` or else below `root`. Backslashes, prefixes of uploads, URLs, percent-encoding, upper and lower case and
    Unicode normalization do not count. No two of them get the same file. A file that is missing among others that are
    where they should be is not looked for in other directories.

    Args:
        names (`Sequence[str]`): As annotations have them, all of one split.
        folder (`Path`): The directory that they are relative to.
        root (`Path`, *optional*): The dataset's directory, by default `folder`. No file outside of it is taken.
        split (`str`, *optional*): The split. Directories that are named after another one are not looked into.

    Returns:
        `FoundFiles`: Paths in the order of the names.
    """
    root = root or folder
    relative = {name: path for name in names if (path := relative_path(name, folder, root))}
    expected = {name: folder / path for name, path in relative.items()}
    located = {name: os.path.split(path) for name, path in relative.items()}
    listed = {
        directory: _list_files(folder / directory) for directory in {directory for directory, _ in located.values()}
    }
    direct = {name: expected[name] for name, (directory, file) in located.items() if file in listed[directory]}
    missing = {name: expected.get(name) for name in names if name not in direct}
    renamed = _find_elsewhere(missing, {*direct.values()}, (folder, root), split) if missing else {}
    found = expected | renamed
    return FoundFiles(
        [found.get(name) or folder / _parts(name)[-1] for name in names],
        {*renamed.values()},
        [name for name in missing if name not in renamed],
    )


def relative_path(name: str, folder: Path, root: Path) -> str | None:
    """Return what to join with `folder`, unless it leads out of the dataset's directory, as symbolic links may."""
    path = os.path.normpath(name)
    if _MAY_LEAD_OUTSIDE.match(path):
        path = _normal_path(folder / name)
        if not path.startswith(_normal_path(root).rstrip(os.sep) + os.sep):
            return None
    return None if "\0" in name else path


def _normal_path(path: Path) -> str:
    return os.path.normpath(path.absolute())


def _list_files(folder: Path) -> set[str]:
    """Return the names of files exactly as they are, whatever spellings of them the file system would accept."""
    with suppress(OSError, ValueError), os.scandir(folder) as entries:  # none there, or a name that cannot be
        return {entry.name for entry in entries if entry.is_file(follow_symlinks=False) or Path(entry).is_file()}
    return set()


def _find_elsewhere(
    expected: Mapping[str, Path | None], taken: set[Path], folders: Iterable[Path], split: str | None
) -> dict[str, Path]:
    """Find files by the last part of their names.

    Args:
        expected (`Mapping[str, Path | None]`): Names, and the paths that they should have; `None` for one outside.
        taken (`set[Path]`): Files that have other names.
        folders (iterable of `Path`): Directories that may contain the files, one after the other.
        split (`str` or `None`): See [`find_image_files`].
    """
    # in a directory where others were found by their names, a file has another spelling of its name or is missing
    complete = {path.parent for path in taken}
    home = {
        name: path.parent
        for name, path in expected.items()
        if path and path.parent in complete and path.name == _parts(name)[-1]
    }
    renamed: dict[str, Path] = {}
    names_in: dict[Path, list[str]] = defaultdict(list)
    for name, folder in home.items():
        names_in[folder].append(name)
    for folder, names in names_in.items():
        renamed |= _match(names, folder.iterdir(), taken)
    for folder in dict.fromkeys(folders):
        names = [name for name in expected if name not in home and name not in renamed]
        renamed |= _match(names, _walk(folder, split), {*taken, *renamed.values()})
    return renamed


def _walk(folder: Path, split: str | None) -> Iterator[Path]:
    entered = {None, split} if split else {None, *SPLITS}
    for directory, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if split_from_name(name) in entered]
        yield from (Path(directory, name) for name in files)


def _match(names: Sequence[str], files: Iterable[Path], taken: set[Path]) -> dict[str, Path]:
    """Return the files whose names match one to one."""
    if not names:
        return {}
    others = {_normal_path(path) for path in taken}
    index = _FileIndex(path for path in files if _normal_path(path) not in others and is_image_file(path))
    found = {name: path for name in names if (path := index.find(name))}
    num_names = Counter(found.values())
    return {name: path for name, path in found.items() if num_names[path] == 1}


class _FileIndex:
    """Image files by their names, in the spellings that tools may make of them."""

    def __init__(self, files: Iterable[Path]):
        self._files: dict[tuple[int, str], list[tuple[tuple[str, ...], Path]]] = defaultdict(list)
        for path in files:
            *spellings, without_prefix = _spellings(path.name)
            if without_prefix != spellings[-1]:
                spellings.append(without_prefix)
            for key in enumerate(spellings):
                self._files[key].append((_folded_parents(str(path.parent)), path))
        for same_name in self._files.values():
            same_name.sort()

    def find(self, name: str) -> Path | None:
        """Return the only file with a name in the closest spelling that any file has, or that with the most parts."""
        *parents, file = _parts(name)
        *spellings, without_prefix = _spellings(file)
        lowest = len(spellings)
        # of name and file, only one has the prefix: two prefixes are two uploads
        keys = [*([key] for key in enumerate(spellings)), [(lowest - 1, without_prefix), (lowest, spellings[-1])]]
        nearest = ([each for key in group for each in self._nearest(key, "/".join(parents))] for group in keys)
        return _only_longest(next(filter(None, nearest), []))

    def _nearest(self, key: tuple[int, str], parents: str) -> list[tuple[int, Path]]:
        """Return the files of a name with the most directories in common, two at least if there are, and how many."""
        files, wanted = self._files.get(key, []), _folded_parents(parents)
        position = bisect_left(files, (wanted,))
        return [(_num_common(wanted, folded), path) for folded, path in files[max(position - 2, 0) : position + 2]]


def _num_common(first: Sequence[str], second: Sequence[str]) -> int:
    return len([*takewhile(lambda pair: pair[0] == pair[1], zip(first, second))])


def _only_longest(files: Sequence[tuple[int, Path]]) -> Path | None:
    longest = max((number for number, _ in files), default=0)
    best = [path for number, path in files if number == longest]
    return best[0] if len(best) == 1 else None


@lru_cache(maxsize=1024)
def _folded_parents(path: str) -> tuple[str, ...]:
    """Return the names of directories from the innermost on, so that files in the same ones are neighbors in order."""
    return tuple(_spellings(name)[3] for name in reversed(_parts(path)))


def _parts(name: str) -> list[str]:
    """Return the directories and the file of a path, a URL, or a URL of Label Studio's local files."""
    path = re.split(r"[?#]", name)[0] if "://" in name else name.rpartition("?d=")[2]
    return re.split(r"[/\\]+", path)


def _spellings(name: str) -> tuple[str, str, str, str, str]:
    """Return a file name as it is, composed, percent-decoded, in lower case, and without Label Studio's prefix."""
    composed = unicodedata.normalize("NFC", name)
    decoded = unicodedata.normalize("NFC", _parts(unquote(name, errors="surrogateescape"))[-1])
    folded = unicodedata.normalize("NFC", decoded.casefold())
    return name, composed, decoded, folded, re.sub("^[0-9a-f]{8}-", "", folded)
