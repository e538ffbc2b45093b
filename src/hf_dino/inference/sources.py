"""Find the images that a command line names: files, directories, patterns, URLs and lists of them."""

import glob
import io
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import BinaryIO, NamedTuple

from huggingface_hub import constants, get_session
from huggingface_hub.errors import HTTPError

from ..data.images import ImageSource, is_image_file, list_images
from ..utils.download import display_url, url_file_name
from ..utils.errors import InputError, summarize_list
from ..utils.io import read_lines


logger = logging.getLogger(__name__)

MAX_URL_BYTES = 100 * 2**20
MAX_URL_SECONDS = 60.0


class ImageInput(NamedTuple):
    """An image to detect objects in.

    Attributes:
        source (`Path` or `ImageFileLike`): The image; `str()` identifies it in results.
        name (`str`): Its path relative to the directory that was given, with `/`; outputs are named after it.
    """

    source: ImageSource
    name: str


class UrlImage:
    """An image on the web, downloaded into memory each time that it is opened.

    Args:
        url (`str`): Address, http or https.

    Raises:
        InputError: If it is not the URL of a file.
    """

    def __init__(self, url: str):
        self.url = url
        self.file_name = url_file_name(url)

    def __str__(self) -> str:
        return display_url(self.url)

    def open(self, mode: str = "rb", /) -> BinaryIO:
        """Download the encoded bytes, within limits of size and time."""
        content = io.BytesIO()
        try:
            for block in self._blocks():
                content.write(block)
        except (HTTPError, OSError) as error:
            raise InputError(f"{self}: cannot be downloaded ({error or type(error).__name__})") from None
        content.seek(0)
        return content

    def _blocks(self) -> Iterator[bytes]:
        deadline, size = time.monotonic() + MAX_URL_SECONDS, 0
        timeout = min(MAX_URL_SECONDS, constants.HF_HUB_DOWNLOAD_TIMEOUT)
        with get_session().stream("GET", self.url, timeout=timeout, follow_redirects=True) as response:
            if response.status_code != 200:
                raise InputError(f"{self}: the server answered {response.status_code} {response.reason_phrase}")
            for block in response.iter_bytes():
                size += len(block)
                if size > MAX_URL_BYTES:
                    raise InputError(f"{self}: is larger than {MAX_URL_BYTES >> 20} MiB; download it by other means")
                if time.monotonic() > deadline:
                    raise InputError(f"{self}: took longer than {MAX_URL_SECONDS:.0f} s; download it by other means")
                yield block


def find_inputs(arguments: Iterable[str], recursive: bool = False) -> list[ImageInput]:
    """Expand the arguments of a command line into images. Only names are read, in the order of the arguments.

    A directory is expanded into its images, sorted by name, without hidden files. The rest of what it contains is
    logged, but for texts and annotations.

    Args:
        arguments (`Iterable[str]`): Image files, directories, glob patterns (`**` matches directories of any depth),
            http or https URLs, and `@FILE` for a text file with one of these per line.
        recursive (`bool`, *optional*, defaults to `False`): Also look below subdirectories.

    Raises:
        InputError: If an argument names no image.
    """
    return [found for argument in arguments for found in _expand(argument, recursive)]


def _expand(argument: str, recursive: bool) -> Sequence[ImageInput]:
    if argument.startswith("@"):
        return _expand_list(Path(argument[1:]), recursive)
    if argument.lower().startswith(("http://", "https://")):
        image = UrlImage(argument)
        return [ImageInput(image, image.file_name)]
    path = Path(argument)
    if path.is_dir():
        return [ImageInput(file, _relative(file, path)) for file in list_images([path], recursive)]
    if not path.exists() and glob.has_magic(argument):
        return _expand_pattern(argument)
    return [ImageInput(file, file.name) for file in list_images([path])]


def _expand_list(path: Path, recursive: bool) -> list[ImageInput]:
    lines = read_lines(path)
    if lists := [line for line in lines if line.startswith("@")]:
        raise InputError(f"{path}: a list cannot contain other lists, got {summarize_list(lists)}")
    if not lines:
        raise InputError(f"{path}: the list is empty; write one image per line")
    return find_inputs(lines, recursive)


def _expand_pattern(pattern: str) -> list[ImageInput]:
    parts = PurePath(pattern).parts
    root = Path(*parts[: next(index for index, part in enumerate(parts) if glob.has_magic(part))])
    matches = sorted(map(Path, glob.glob(pattern, recursive=True)))  # noqa: PTH207, takes absolute patterns too
    images = [path for path in matches if is_image_file(path)]
    others = [str(path) for path in matches if path.is_file() and path not in set(images)]
    if not images:
        contents = f", but {summarize_list(others)}" if others else ""
        raise InputError(f"{pattern}: the pattern matches no images{contents}")
    if others:
        logger.warning("%s: %d files are not images: not used; %s", pattern, len(others), summarize_list(others))
    return [ImageInput(path, _relative(path, root)) for path in images]


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
