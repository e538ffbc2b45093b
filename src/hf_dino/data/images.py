"""Read a picture file as the RGB pixels that its annotations were drawn on."""

import logging
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from ..image_processing_dino_detr import to_rgb
from .errors import InputError


logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def read_image(path: str | Path, annotated_size: tuple[int, int] | None = None) -> Image.Image:
    """Read one picture as 8-bit RGB, turned the way a viewer shows it.

    Palette, grey and CMYK pictures are converted, transparent parts lie on white, and 16-bit grey is divided by 257
    (so that 65535 becomes 255), which is logged. The camera's EXIF rotation is applied, unless the annotations were
    drawn on the pixels as stored, which `annotated_size` tells.

    Args:
        path (`str` or `Path`): The picture file.
        annotated_size (`tuple[int, int]`, *optional*):
            `(height, width)` in pixels that the annotations give for this picture.

    Returns:
        `PIL.Image.Image`: The picture in mode `"RGB"`.

    Raises:
        InputError: If the file is missing, broken or of an unsupported kind, or has another size than annotated.
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such picture file") from None
    # Pillow reports broken files by whichever of these its decoder happened to stumble over
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as a picture ({error}); repair or remove the file") from None
    upright = _upright(image, annotated_size, path)
    try:
        converted = to_rgb(upright)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if upright.mode.startswith("I"):
        _log_once("16-bit", f"{path} has 16-bit grey values: divided by 257 to get 8 bits")
    return converted


def list_pictures(paths: list[Path]) -> list[Path]:
    """Expand folders into the picture files directly inside them, in the order of their names.

    Raises:
        InputError: If a path does not exist or a folder holds no picture.
    """
    files = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: there is no such file or folder")
        found = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if _is_picture(entry))
        if not found:
            raise InputError(f"{path}: the folder holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))})")
        files.extend(found)
    return files


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()


def _upright(image: Image.Image, annotated_size: tuple[int, int] | None, path: Path) -> Image.Image:
    turned = ImageOps.exif_transpose(image)
    if annotated_size is None or (turned.height, turned.width) == annotated_size:
        return turned
    if (image.height, image.width) == annotated_size:
        _log_once("EXIF rotation left out", f"{path} is annotated as stored: its EXIF rotation is not applied")
        return image
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    raise InputError(
        f"{path}: the annotations say {annotated_size[1]} x {annotated_size[0]} pixels (width x height) but the file "
        f"has {image.width} x {image.height} (EXIF orientation {orientation}); annotate this file or restore the one "
        "that was annotated"
    )


_reported: set[str] = set()


def _log_once(kind: str, message: str) -> None:
    """Warn about the first picture of a kind only: a data set often holds thousands of them."""
    if kind not in _reported:
        _reported.add(kind)
        logger.warning("%s (further pictures of this kind are not reported)", message)
