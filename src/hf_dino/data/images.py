"""Read an image as the RGB pixels that its annotations were drawn on, wherever its bytes are."""

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
    """An image that is no file of its own. `str()` names it in messages, and another process can have it too."""

    def open(self, mode: str = "rb", /) -> BinaryIO:
        """Open its encoded bytes, as `Path.open("rb")` does."""
        ...


ImageSource: TypeAlias = Path | ImageFileLike

# What shows an image of each EXIF orientation upright. Pillow's own `exif_transpose` also writes all EXIF data anew,
# and fails where a camera wrote it oddly.
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


def read_image(source: str | ImageSource, annotated_size: tuple[int, int] | None = None) -> Image.Image:
    """Read one image as 8-bit RGB, turned the way a viewer shows it.

    Palette, gray and CMYK images are converted, transparent parts lie on white, and 16-bit gray is divided by 257
    (so that 65535 becomes 255), which is logged. The camera's EXIF rotation is applied, unless the annotations were
    drawn on the pixels as stored, which `annotated_size` tells.

    Args:
        source (`str`, `Path` or `ImageFileLike`): The image file, or where else the image is.
        annotated_size (`tuple[int, int]`, *optional*):
            `(height, width)` in pixels that the annotations give for this image.

    Returns:
        `PIL.Image.Image`: The image in mode `"RGB"`.

    Raises:
        InputError: If the image is missing, broken or of an unsupported kind, or has another size than annotated.
    """
    source = Path(source) if isinstance(source, str) else source
    with _opened(source) as image:
        image.load()
        orientation = _orientation(image)
    turn = EXIF_TRANSPOSES.get(_applied_orientation(image, orientation, annotated_size, source))
    upright = image if turn is None else image.transpose(turn)
    try:
        converted = convert_to_rgb(upright)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None
    if upright.mode.startswith("I"):
        _log_once("16-bit", f"{source} has 16-bit gray values: divided by 257 to get 8 bits")
    return converted


def get_image_size(source: ImageSource, annotated_size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Say what `(height, width)` [`read_image`] would return, from the head of the file: fast, but not proven.

    Raises:
        InputError: If the head is missing, broken or of an unsupported kind, or tells another size than annotated.
    """
    with _opened(source) as image:
        orientation = _orientation(image)
        # Pillow turns a TIFF on loading; before that, its later versions give the turned size, yet the old orientation
        if image.format == "TIFF" and orientation in EXIF_SWAPS_SIDES:
            image.load()
            orientation = _orientation(image)
    turned = _applied_orientation(image, orientation, annotated_size, source) in EXIF_SWAPS_SIDES
    return (image.width, image.height) if turned else (image.height, image.width)


def list_images(paths: list[Path]) -> list[Path]:
    """Expand folders into the image files directly inside them, in the order of their names.

    Raises:
        InputError: If a path does not exist or a folder holds no image.
    """
    files = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: there is no such file or folder")
        found = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if is_image_file(entry))
        if not found:
            raise InputError(f"{path}: the folder holds no images ({', '.join(sorted(IMAGE_EXTENSIONS))})")
        files.extend(found)
    return files


def is_image_file(path: Path) -> bool:
    """Whether the name is that of an image and the file is there."""
    return path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file()


def short_name(source: str | ImageSource) -> str:
    """Name an image by its file and folder only, for people who know where the data is."""
    return "/".join(re.split(r"[/\\]", str(source))[-2:])


@contextmanager
def _opened(source: ImageSource) -> Iterator[Image.Image]:
    """Open an image for calls of Pillow, and of nothing else: whatever fails within is the file's fault."""
    try:
        with source.open("rb") as file, Image.open(file) as image:
            yield image
    except FileNotFoundError:
        raise InputError(f"{source}: there is no such image file") from None
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{source}: is larger than Pillow reads ({error}); cut it into tiles, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    except _BROKEN as error:
        # where Pillow does not know the kind, its own words name a file object
        reason = "it is of no known kind" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"{source}: cannot be read as an image ({reason}); repair or remove the file") from None


# Pillow reports broken files by whichever of these its decoder happened to stumble over
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, OverflowError, TypeError, IndexError, struct.error)


def _orientation(image: Image.Image) -> int:
    # The method of Pillow's PNG class decodes the whole image to find EXIF data behind the pixels. Nobody puts it
    # there, and the base class has what stands before them.
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)


def _applied_orientation(
    image: Image.Image, orientation: int, annotated_size: tuple[int, int] | None, source: ImageSource
) -> int:
    """The image's EXIF orientation, as a viewer applies it; 1 if annotations were drawn on the pixels as stored."""
    stored = (image.height, image.width)
    shown = stored[::-1] if orientation in EXIF_SWAPS_SIDES else stored
    if annotated_size is None or annotated_size == shown:
        return orientation
    if stored == annotated_size:
        _log_once("EXIF rotation left out", f"{source} is annotated as stored: its EXIF rotation is not applied")
        return 1
    raise InputError(
        f"{source}: the annotations say {annotated_size[1]} x {annotated_size[0]} pixels (width x height) but the "
        f"file has {image.width} x {image.height} (EXIF orientation {orientation}); annotate this file or restore the "
        "one that was annotated"
    )


_reported: set[str] = set()


def _log_once(kind: str, message: str) -> None:
    """Warn about the first image of a kind only: a dataset often holds thousands of them."""
    if kind not in _reported:
        _reported.add(kind)
        logger.warning("%s (further images of this kind are not reported)", message)
