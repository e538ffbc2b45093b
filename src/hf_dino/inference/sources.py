"""Find the images and videos that a command line names: files, directories, patterns, URLs and lists of them."""

import glob
import io
import logging
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO, NamedTuple, Protocol, runtime_checkable
from urllib.parse import urlsplit

from huggingface_hub import constants, get_session
from huggingface_hub.errors import HTTPError
from PIL import Image

from ..data.images import ImageSource, is_image_file, is_noted, list_images
from ..utils.download import display_url, url_file_name
from ..utils.errors import InputError, count_of, summarize_list
from ..utils.io import read_lines


logger = logging.getLogger(__name__)

VIDEO_EXTENSIONS = frozenset(
    {
        ".3g2", ".3gp", ".asf", ".avi", ".dv", ".f4v", ".flv", ".h264", ".h265", ".hevc", ".ivf", ".m2ts", ".m2v",
        ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".ogm", ".ogv", ".rm", ".rmvb", ".ts",
        ".vob", ".webm", ".wmv", ".y4m",
    }
)  # fmt: skip
"""Extensions of video files, in lower case."""

LIVE_ADDRESSES = ("camera:", "rtsp://", "rtsps://", "rtmp://", "rtmps://", "rtp://", "udp://", "srt://")
MAX_URL_BYTES = 100 * 2**20
MAX_URL_SECONDS = 60.0


@runtime_checkable
class DecodedImage(Protocol):
    """An image that need not be read from a file, such as a frame of a video."""

    def to_image(self) -> Image.Image:
        """Return the pixels in RGB."""
        ...


@dataclass(frozen=True)
class Video:
    """A video, which is opened when it is read.

    Attributes:
        address (`str`): A file, a URL, or a camera, such as `camera:0`.
    """

    address: str

    def __str__(self) -> str:
        return display_url(self.address) if "://" in self.address else self.address

    @property
    def path(self) -> Path | None:
        """The file; `None` for URLs and cameras."""
        return None if self.is_live or "://" in self.address else Path(self.address)

    @property
    def is_camera(self) -> bool:
        """`True` for a camera of this machine."""
        return self.address.lower().startswith(LIVE_ADDRESSES[0])

    @property
    def is_live(self) -> bool:
        """`True` for what is sent while it is recorded, so that it can be read only once."""
        return self.address.lower().startswith(LIVE_ADDRESSES)

    @property
    def name(self) -> str:
        """The file name, or what comes closest to one."""
        if self.is_camera:
            return re.sub(r"[^\w-]+", "-", self.address)
        parts = urlsplit(self.address) if "://" in self.address else None
        return PurePath(parts.path if parts else self.address).name or str(parts and parts.hostname)


class ImageInput(NamedTuple):
    """An image to detect objects in, or a video.

    Attributes:
        source (`Path`, `ImageFileLike`, `DecodedImage` or `Video`): The image; `str()` identifies it in results.
        name (`str`): Its path relative to the directory that was given, with `/`; outputs are named after it.
    """

    source: ImageSource | DecodedImage | Video
    name: str

    @property
    def is_video(self) -> bool:
        """`True` for a video."""
        return isinstance(self.source, Video)

    @property
    def kind(self) -> str:
        """Its name in messages: image or video."""
        return "video" if self.is_video else "image"


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
    """Expand the arguments of a command line into images and videos, in their order. Only names are read.

    A directory is expanded into its images, sorted by name, without hidden files; one without images, into its videos.
    The rest of what it contains is logged, but for texts and annotations. It is the same with patterns.

    Args:
        arguments (`Iterable[str]`): Image and video files, directories, glob patterns (`**` matches directories of any
            depth), URLs, cameras, and `@FILE` for a text file with one of these per line.
        recursive (`bool`, *optional*, defaults to `False`): Also look below subdirectories.

    Returns:
        `list[ImageInput]`: The source of a video is a [`Video`].

    Raises:
        InputError: If an argument names no image or video.
    """
    return [found for argument in arguments for found in _expand(argument, recursive)]


def _expand(argument: str, recursive: bool) -> Sequence[ImageInput]:
    if argument.startswith("@"):
        return _expand_list(Path(argument[1:]), recursive)
    video = Video(argument)
    if video.is_live or ("://" in argument and is_video(video.name)):
        return [ImageInput(video, video.name)]
    if argument.lower().startswith(("http://", "https://")):
        image = UrlImage(argument)
        return [ImageInput(image, image.file_name)]
    path = Path(argument)
    if path.is_dir():
        return _expand_directory(path, recursive)
    if not path.exists() and glob.has_magic(argument):
        return _expand_pattern(argument)
    return [_to_input(file, path.parent) for file in list_images([path])]


def is_video(name: str) -> bool:
    """Return whether a file name has the extension of a video."""
    return PurePath(name).suffix.lower() in VIDEO_EXTENSIONS


def _to_input(path: Path, folder: Path) -> ImageInput:
    """Return a file as an input that is named by its path below a directory."""
    return ImageInput(Video(str(path)) if is_video(path.name) else path, path.relative_to(folder).as_posix())


def _expand_directory(path: Path, recursive: bool) -> list[ImageInput]:
    paths = sorted(path.rglob("*") if recursive else path.iterdir())
    visible = [file for file in paths if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    videos = [file for file in visible if is_video(file.name) and file.is_file()]
    try:
        files = list_images([path], recursive)
    except InputError:
        if not videos:
            raise
        others = [file for file in visible if is_noted(file) and not (recursive and file.is_dir())]
        _warn_about_others(str(path), "videos", sorted({*others} - {*videos}))
        return [_to_input(file, path) for file in videos]
    _warn_about_videos(str(path), videos)
    return [_to_input(file, path) for file in files]


def _warn_about_videos(argument: str, videos: Sequence[Path]) -> None:
    """Log the videos next to images: phones store a short one for each photo, and a video takes long."""
    if videos:
        count, names = count_of(len(videos), "video"), summarize_list(file.name for file in videos)
        logger.warning("%s: %s next to images: not used unless named; %s", argument, count, names)


def _warn_about_others(argument: str, used: str, others: Sequence[Path]) -> None:
    if others:
        logger.warning("%s: %d entries are not %s: not used; %s", argument, len(others), used, summarize_list(others))


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
    videos = [path for path in matches if is_video(path.name) and path.is_file()]
    others = [path for path in matches if path.is_file() and path not in {*images, *videos}]
    if not images + videos:
        contents = f", but {summarize_list(others)}" if others else ""
        raise InputError(f"{pattern}: the pattern matches no images{contents}")
    _warn_about_videos(pattern, videos if images else [])
    _warn_about_others(pattern, "images" if images else "videos", others)
    return [_to_input(path, root) for path in images or videos]
