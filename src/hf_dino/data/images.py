"""Read images as the RGB pixels that their annotations refer to, from files or from tables."""

import importlib
import logging
import os
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol, TypeAlias

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..image_processing_dino_detr import DARK_ADVICE, DARK_LIMIT, convert_to_rgb
from ..utils.errors import BrokenInputError, InputError, count_of, summarize_list


logger = logging.getLogger(__name__)

PLUGINS = {
    ".heic": "pillow-heif", ".heif": "pillow-heif", ".hif": "pillow-heif", ".jxl": "pillow-jxl-plugin",
    ".avif": "'pillow>=11.3'",
}  # fmt: skip
"""What to install to read images that Pillow alone, or an old one, cannot read, by their extensions."""

# Pillow opens these, but the first four need a program of their own, MPEG is a video, IPTC only metadata, and *.pcd is
# nowadays a point cloud.
_NOT_IMAGES = frozenset({"BUFR", "GRIB", "HDF5", "WMF", "EPS", "MPEG", "IPTC", "PCD"})

IMAGE_EXTENSIONS = frozenset(
    extension
    for extension, format in Image.registered_extensions().items()
    if format in {*Image.OPEN, "MPO"} - _NOT_IMAGES  # MPO is opened as JPEG
) | frozenset(PLUGINS)
"""Extensions of image files, in lower case."""

# annotations, notes and files of the system: certainly not images, so they are not reported
_SIDE_FILES = frozenset({".txt", ".xml", ".json", ".jsonl", ".csv", ".yaml", ".yml", ".md", ".html", ".db", ".ini"})
_MANY_IMAGES = ("MPO", "PSD")  # a photo with its preview, and an image with its layers: the first is the image


class ImageFileLike(Protocol):
    """An image that is not a file of its own. `str()` is its name in messages; it can be pickled."""

    def open(self, mode: str = "rb", /) -> BinaryIO:
        """Open the encoded bytes, as `Path.open("rb")` does."""
        ...


ImageSource: TypeAlias = Path | ImageFileLike

# Pillow's own `exif_transpose` also rewrites all EXIF data, and fails on malformed tags.
EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXIF_SWAPS_SIDES = (5, 6, 7, 8)  # exchange height and width

# Pillow's decoders raise any of these on a broken file
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, OverflowError, TypeError, IndexError, struct.error)


def read_image(source: str | ImageSource, annotated_size: tuple[int, int] | None = None) -> Image.Image:
    """Read an image as 8-bit RGB, in the orientation that its annotations refer to.

    Palette, gray and CMYK images are converted. The rest is logged for the first image of a kind: transparency is
    blended with white, 16 bits are reduced to 8 (65535 becomes 255), and only the first frame or page is read. The
    EXIF orientation is applied, unless `annotated_size` shows that the annotations were made without it. An image that
    is a pixel larger or smaller than annotated is cut or extended.

    Args:
        source (`str`, `Path` or `ImageFileLike`): The image.
        annotated_size (`tuple[int, int]`, *optional*): `(height, width)` in pixels according to the annotations.

    Returns:
        `PIL.Image.Image`: The image in mode `"RGB"`.

    Raises:
        InputError: If the image is missing, broken, of an unsupported kind, or not of the annotated size.
    """
    source = Path(source) if isinstance(source, str) else source
    with _open_image(source) as image:
        warn_about_frames(image, source)
        is_16_bits = has_16_bits(image)
        image.load()
        orientation = exif_orientation(image)
    transpose = EXIF_TRANSPOSES.get(_orientation_to_apply(image, orientation, annotated_size, source))
    converted = to_rgb(image if transpose is None else image.transpose(transpose), source)
    if is_16_bits:
        warn_about_16_bits(int(np.max(converted.getextrema())), source)
    return _cut_or_extend(converted, annotated_size)


def to_rgb(image: Image.Image, source: ImageSource) -> Image.Image:
    """Convert an image, or a part of one, to 8-bit RGB. The first one with transparency is logged.

    Raises:
        InputError: If its values have no known range.
    """
    try:
        converted = convert_to_rgb(image)
    except ValueError as error:
        raise BrokenInputError(f"{source}: {error}") from None
    if image.has_transparency_data and np.min(image.convert("RGBA").getchannel("A").getextrema()) < 255:
        warn_once("transparency", f"{source} has transparent parts: blended with white")
    return converted


def get_image_size(source: ImageSource, annotated_size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Return the `(height, width)` of [`read_image`]'s result from the file's header, without decoding the pixels.

    Raises:
        InputError: If the header is missing, broken, of an unsupported kind, or does not match the annotated size.
    """
    with _open_image(source) as image:
        orientation = exif_orientation(image)
        # Pillow transposes a TIFF on loading; before that, later versions report the new size with the old orientation
        if image.format == "TIFF" and orientation in EXIF_SWAPS_SIDES:
            image.load()
            orientation = exif_orientation(image)
    swapped = _orientation_to_apply(image, orientation, annotated_size, source) in EXIF_SWAPS_SIDES
    return annotated_size or ((image.width, image.height) if swapped else (image.height, image.width))


def list_images(paths: list[Path], recursive: bool = False) -> list[Path]:
    """Expand directories into the image files in them, sorted by name, without hidden files.

    What else a directory contains is logged, but for texts and annotations.

    Args:
        paths (`list[Path]`): Image files and directories.
        recursive (`bool`, *optional*, defaults to `False`): Whether to include the images of subdirectories, links to
            directories among them. What else these contain is not logged.

    Raises:
        InputError: If a path does not exist or a directory contains no image.
    """
    files = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: file or directory not found")
        visible = [path] if path.is_file() else [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        found = sorted(entry for entry in visible if entry == path or is_image_file(entry))
        others = sorted(entry.name + "/" * entry.is_dir() for entry in {*visible} - {*found} if is_noted(entry))
        if recursive and path.is_dir():
            top = os.path.normpath(path.absolute())
            found = sorted(path / os.path.relpath(image, top) for image in _walk_images(path))
            others = [name for name in others if not name.endswith("/")]
        if not found:
            contents = f", but {summarize_list(others)}" if others else ""
            raise InputError(f"{path}: the directory contains no images{contents}")
        if others:
            number = count_of(len(others), "entry is not an image", "entries are not images")
            logger.warning("%s: %s: not used; %s", path, number, summarize_list(others))
        files.extend(found)
    return files


def is_noted(path: Path) -> bool:
    """Return whether a path that is not used is worth a warning: texts and annotations are not."""
    return path.is_dir() or path.suffix.lower() not in _SIDE_FILES


def find_unused_images(folder: Path, used: Iterable[Path]) -> list[str]:
    """Return the paths of the image files below a directory, without hidden ones, that are not among `used`.

    Args:
        folder (`Path`): The directory. Links to directories are followed.
        used (`Iterable[Path]`): Image files, by any path.

    Returns:
        `list[str]`: In ascending order.
    """
    used_paths = {os.path.normpath(path.absolute()) for path in used}
    unused = sorted(set(_walk_images(folder)) - used_paths)
    if unused:  # a file may have been reached by a link
        used_files = {_file_id(path) for path in used_paths}
        unused = [path for path in unused if _file_id(path) not in used_files]
    return unused


def _walk_images(folder: Path) -> Iterator[str]:
    pending, seen = [os.path.normpath(folder.absolute())], set()
    while pending:
        directory = pending.pop()
        if (file_id := _file_id(directory)) in seen:
            continue
        seen.add(file_id)
        for entry in os.scandir(directory):
            if entry.name.startswith((".", "__MACOSX")):
                continue
            path = Path(entry.path) if entry.is_symlink() else entry  # `entry` fails on a link to itself
            if path.is_dir():
                pending.append(entry.path)
            elif Path(entry.name).suffix.lower() in IMAGE_EXTENSIONS and path.is_file():
                yield entry.path


def _file_id(path: str) -> tuple[int, int] | None:
    """Return what all paths of a file have in common, `None` if there is no file."""
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def is_image_file(path: Path) -> bool:
    """Return whether a path has the extension of an image and is a file."""
    return path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file()


def short_path(source: str | ImageSource) -> str:
    """Return the last directory and the file name of an image, for messages."""
    return "/".join(re.split(r"[/\\]", str(source))[-2:])


def set_max_image_pixels(limit: int | None) -> None:
    """Set the size in pixels above which Pillow warns about an image, and refuses one of more than twice the size.

    Args:
        limit (`int`, *optional*): Width times height; `None` changes nothing.
    """
    if limit is not None:
        Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def _open_image(source: ImageSource) -> Iterator[Image.Image]:
    """Open an image and report any error as a fault of the file. Call only Pillow inside the context."""
    with report_decoder_errors(source), source.open("rb") as file, Image.open(file) as image:
        yield image


@contextmanager
def report_decoder_errors(source: ImageSource) -> Iterator[None]:
    """Report any error of Pillow as a fault of the file."""
    plugin = _missing_plugin(source)
    try:
        yield
    except InputError:  # of a source that is not a file
        raise
    except FileNotFoundError:
        raise BrokenInputError(f"{source}: image file not found") from None
    except Image.DecompressionBombError as error:
        raise BrokenInputError(
            f"{source}: is larger than Pillow reads ({error}). Cut it into tiles, or raise PIL.Image.MAX_IMAGE_PIXELS "
            "(--max_image_pixels); hf-dino predict --tile needs neither"
        ) from None
    except _DECODER_ERRORS as error:
        if plugin:
            raise InputError(f"{source}: {plugin} is needed to read this image: pip install {plugin}") from None
        # Pillow's own message would name a file object
        reason = "not a known image format" if isinstance(error, UnidentifiedImageError) else error
        raise BrokenInputError(f"{source}: cannot be read as an image ({reason}). Repair or remove the file") from None


def _missing_plugin(source: ImageSource) -> str:
    """Return what to install to read an image, empty if nothing is known to be missing."""
    extension = Path(str(source)).suffix.lower()
    if extension not in PLUGINS or extension in Image.registered_extensions():
        return ""
    with suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    with suppress(ImportError):
        importlib.import_module("pillow_jxl")  # registers itself
    return "" if extension in Image.registered_extensions() else PLUGINS[extension]


def exif_orientation(image: Image.Image) -> int:
    """Return the orientation of an open image, 1 if it has none."""
    # Pillow's PNG class overrides `getexif` to decode the whole image, in case EXIF data follows the pixels. The base
    # class reads only what precedes them, which is where it is in practice.
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)


def _orientation_to_apply(
    image: Image.Image, orientation: int, annotated_size: tuple[int, int] | None, source: ImageSource
) -> int:
    """Return the image's EXIF orientation, or 1 if the annotations were made without applying it.

    Annotated sizes may differ by a pixel, which rounding explains.
    """
    if annotated_size is None:
        return orientation
    stored = (image.height, image.width)
    sizes = {orientation: stored[::-1] if orientation in EXIF_SWAPS_SIDES else stored}
    sizes.setdefault(1, stored)
    distances = {key: max(abs(a - b) for a, b in zip(size, annotated_size)) for key, size in sizes.items()}
    closest = min(distances, key=lambda key: distances[key])  # of equals, with the orientation
    text = (
        f"is annotated as {annotated_size[1]} x {annotated_size[0]} pixels (width x height), but the file has "
        f"{image.width} x {image.height} (EXIF orientation {orientation})"
    )
    if distances[closest] > 1:
        raise BrokenInputError(f"{source}: {text}. Annotate this file, or restore the one that was annotated")
    if distances[closest]:
        warn_once("size", f"{source} {text}: cut or extended by a pixel, boxes are kept")
    if closest != orientation:
        warn_once(
            "EXIF orientation", f"{source} is annotated without its EXIF orientation, which is therefore not applied"
        )
    return closest


def _cut_or_extend(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """Give an image its annotated `(height, width)` at the right and below; new pixels are those next to them."""
    if size in (None, (image.height, image.width)):
        return image
    height, width = size
    missing = [(0, max(0, height - image.height)), (0, max(0, width - image.width)), (0, 0)]
    return Image.fromarray(np.pad(np.asarray(image), missing, mode="edge")[:height, :width])


def has_16_bits(image: Image.Image) -> bool:
    """Return whether an open image, of which nothing is decoded, has more than 8 bits per channel."""
    return ";16" in str(getattr(image, "tile", "")) or image.mode.startswith("I")


def warn_about_frames(image: Image.Image, source: ImageSource) -> None:
    """Warn if an open image is one of several in its file."""
    num_frames = getattr(image, "n_frames", 1)
    if num_frames > 1 and image.format not in _MANY_IMAGES:
        warn_once("frames", f"{source} has {num_frames} frames or pages: only the first is read")


def warn_about_16_bits(brightest: int, source: ImageSource) -> None:
    """Warn that 16 bits were reduced to 8, given the largest value that came out."""
    if 0 < brightest <= DARK_LIMIT // 257:
        warn_once(
            "dark",
            f"{source} has 16-bit values, but is nearly black: {brightest} of 255 at most. If so, {DARK_ADVICE}",
        )
    else:
        warn_once("16-bit", f"{source} has 16-bit values: divided by 257 to get 8 bits")


_warned: set[str] = set()


def warn_once(kind: str, message: str) -> None:
    """Warn about the first image of a kind only: a dataset may contain thousands."""
    if kind not in _warned:
        _warned.add(kind)
        logger.warning("%s (further images like this are not reported)", message)
