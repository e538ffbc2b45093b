"""Find the image files that annotations name, also by names that another machine or tool wrote."""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from ..images import is_image_file


RENAMED_WARNING = "image file names are those of another machine: matched by the last part of the name"


class FoundFiles(NamedTuple):
    """Image files by the names that annotations have for them.

    Attributes:
        paths (`list[Path]`): One for each name, in order. A file that was not found is where it should be.
        renamed (`list[Path]`): Those of the files that were found by the last part of their name only.
    """

    paths: list[Path]
    renamed: list[Path]


def find_image_files(names: Sequence[str], folder: Path, root: Path | None = None) -> FoundFiles:
    r"""Find image files by their names in a dataset.

    A name is a path relative to `folder`. If there is no such file, it may have been written on another machine: then
    the file is taken that alone has the last part of the name, below `folder` or else below `root`. Backslashes,
    prefixes of uploads, URLs, percent-encoding, upper and lower case and Unicode normalization do not count. No two
    names get the same file.

    Args:
        names (`Sequence[str]`): As annotations have them, all of one split.
        folder (`Path`): The directory that they are relative to.
        root (`Path`, *optional*): The dataset's directory, by default `folder`. No file outside of it is taken.

    Returns:
        `FoundFiles`: Paths in the order of the names.
    """
    root = root or folder
    direct = {name: path for name in names if (path := _path_inside(folder, name, root)) and path.is_file()}
    taken = {_normal_path(path) for path in direct.values()}
    missing = [name for name in dict.fromkeys(names) if name not in direct]
    renamed: dict[str, Path] = {}
    for directory in dict.fromkeys((folder, root)) if missing else ():
        index = _FileIndex(directory, taken)
        renamed |= _one_to_one({name: path for name in missing if name not in renamed and (path := index.find(name))})
    found = direct | renamed
    paths = [found.get(name) or _path_inside(folder, name, root) or folder / _last_part(name) for name in names]
    return FoundFiles(paths, list(renamed.values()))


def _path_inside(folder: Path, name: str, root: Path) -> Path | None:
    """Return the path of a name, unless it leads out of the dataset's directory. Symbolic links may."""
    path = folder / name
    return path if _normal_path(path).startswith(_normal_path(root) + os.sep) and "\0" not in name else None


def _normal_path(path: Path) -> str:
    return os.path.normpath(path.absolute())  # symbolic links are followed, wherever they lead


def _one_to_one(found: Mapping[str, Path]) -> dict[str, Path]:
    """Leave out the files that several names would get."""
    num_names = Counter(found.values())
    return {name: path for name, path in found.items() if num_names[path] == 1}


def _last_part(name: str) -> str:
    path = urlsplit(name).path if "://" in name else name
    return re.split(r"[/\\]|\?d=", path.rstrip("/\\"))[-1].replace("\0", "")


class _FileIndex:
    """The image files below a directory by their names, and by what their names would be without what tools add."""

    def __init__(self, directory: Path, taken: Iterable[str]):
        taken = set(taken)
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        self._by_spelling: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(directory.rglob("*")) if directory.is_dir() else ():
            if is_image_file(path) and _normal_path(path) not in taken:
                name, *others = _spellings(path.name)
                self._by_name[name].append(path)
                for spelling in others:
                    self._by_spelling[spelling].append(path)

    def find(self, name: str) -> Path | None:
        """Return the only file with a name, or with the spelling closest to it that any file has."""
        spellings = _spellings(_last_part(name))
        indexes = (self._by_name, self._by_spelling)
        files = next((index[each] for index in indexes for each in spellings if each in index), [])
        return files[0] if len(files) == 1 else None


def _spellings(name: str) -> list[str]:
    """Return a file name as it is, percent-decoded, and without Label Studio's prefix of an upload."""
    decoded = unquote(name)
    spellings = (name, decoded, re.sub("^[0-9a-f]{8}-", "", decoded))
    return list(dict.fromkeys(unicodedata.normalize("NFC", each).casefold() for each in spellings))
