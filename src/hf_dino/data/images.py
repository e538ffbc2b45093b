"""Read images as the RGB pixels that their annotations refer to, from files or from tables."""

import logging
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, TypeAlias

from PIL import ExifTags, Image, UnidentifiedImageError

from ..image_processing_dino_detr import convert_to_rgb
from ..utils.errors import InputError


logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


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

    Palette, gray and CMYK images are converted, transparency is blended with white, and 16-bit gray is divided by 257
    (65535 becomes 255), which is logged. The EXIF orientation is applied, unless `annotated_size` shows that the
    annotations were made without it.

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
        image.load()
        orientation = _exif_orientation(image)
    transpose = EXIF_TRANSPOSES.get(_orientation_to_apply(image, orientation, annotated_size, source))
    upright = image if transpose is None else image.transpose(transpose)
    try:
        converted = convert_to_rgb(upright)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None
    if upright.mode.startswith("I"):
        _warn_once("16-bit", f"{source} has 16-bit gray values: divided by 257 to get 8 bits")
    return converted


def get_image_size(source: ImageSource, annotated_size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Return the `(height, width)` of [`read_image`]'s result from the file's header, without decoding the pixels.

    Raises:
        InputError: If the header is missing, broken, of an unsupported kind, or does not match the annotated size.
    """
    with _open_image(source) as image:
        orientation = _exif_orientation(image)
        # Pillow transposes a TIFF on loading; before that, later versions report the new size with the old orientation
        if image.format == "TIFF" and orientation in EXIF_SWAPS_SIDES:
            image.load()
            orientation = _exif_orientation(image)
    swapped = _orientation_to_apply(image, orientation, annotated_size, source) in EXIF_SWAPS_SIDES
    return (image.width, image.height) if swapped else (image.height, image.width)


def list_images(paths: list[Path]) -> list[Path]:
    """Expand directories into the image files directly inside them, sorted by name.

    Raises:
        InputError: If a path does not exist or a directory contains no image.
    """
    files = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: file or directory not found")
        found = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if is_image_file(entry))
        if not found:
            raise InputError(f"{path}: the directory contains no images ({', '.join(sorted(IMAGE_EXTENSIONS))})")
        files.extend(found)
    return files


def is_image_file(path: Path) -> bool:
    """Return whether a path has the extension of an image and is a file."""
    return path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file()


def short_path(source: str | ImageSource) -> str:
    """Return the last directory and the file name of an image, for messages."""
    return "/".join(re.split(r"[/\\]", str(source))[-2:])


@contextmanager
def _open_image(source: ImageSource) -> Iterator[Image.Image]:
    """Open an image and report any error as a fault of the file. Call only Pillow inside the context."""
    try:
        with source.open("rb") as file, Image.open(file) as image:
            yield image
    except FileNotFoundError:
        raise InputError(f"{source}: image file not found") from None
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{source}: is larger than Pillow reads ({error}). Cut it into tiles, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    except _DECODER_ERRORS as error:
        # Pillow's own message would name a file object
        reason = "not a known image format" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"{source}: cannot be read as an image ({reason}). Repair or remove the file") from None


def _exif_orientation(image: Image.Image) -> int:
    # Pillow's PNG class overrides `getexif` to decode the whole image, in case EXIF data follows the pixels. The base
    # class reads only what precedes them, which is where it is in practice.
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)


def _orientation_to_apply(
    image: Image.Image, orientation: int, annotated_size: tuple[int, int] | None, source: ImageSource
) -> int:
    """Return the image's EXIF orientation, or 1 if the annotations were made without applying it."""
    stored = (image.height, image.width)
    shown = stored[::-1] if orientation in EXIF_SWAPS_SIDES else stored
    if annotated_size is None or annotated_size == shown:
        return orientation
    if stored == annotated_size:
        _warn_once(
            "EXIF orientation", f"{source} is annotated without its EXIF orientation, which is therefore not applied"
        )
        return 1
    raise InputError(
        f"{source}: is annotated as {annotated_size[1]} x {annotated_size[0]} pixels (width x height), but the file "
        f"has {image.width} x {image.height} (EXIF orientation {orientation}). Annotate this file, or restore the one "
        "that was annotated"
    )


_warned: set[str] = set()


def _warn_once(kind: str, message: str) -> None:
    """Warn about the first image of a kind only: a dataset may contain thousands."""
    if kind not in _warned:
        _warned.add(kind)
        logger.warning("%s (further images like this are not reported)", message)
