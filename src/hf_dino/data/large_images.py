"""Read parts of images that are too large to be decoded whole, or more than once.

Pillow decodes nothing but whole files. So a band of rows of a TIFF or PNG file is made into a small file of its own,
in memory, which Pillow decodes as it would decode the whole: its pixels are the same in every mode and compression.
Images in other formats, and those with an EXIF orientation, are decoded whole, once for all parts.
"""

import io
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image

from ..utils.errors import InputError
from .images import (
    EXIF_SWAPS_SIDES,
    EXIF_TRANSPOSES,
    ImageSource,
    exif_orientation,
    has_16_bits,
    read_image,
    report_decoder_errors,
    to_rgb,
    warn_about_16_bits,
    warn_about_frames,
)


LARGE_PIXELS = 25_000_000  # 100 MB in Pillow; smaller images are simply decoded
LIMIT_FACTOR = 8  # pixels decoded at a time, in multiples of Pillow's limit: by default 716 million, or 2.9 GB
BAND_BYTES = 2**22  # of a band of rows, where the file leaves the choice

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels


def open_image(source: str | ImageSource) -> "Image.Image | LargeImage":
    """Read a small image, and open a large one so that parts of it can be read. Pillow's limit does not apply.

    Args:
        source (`str`, `Path` or `ImageFileLike`): The image.

    Raises:
        InputError: If the image is missing, broken or of an unsupported kind, or if too much of it would have to be
            decoded at a time.
    """
    source = Path(source) if isinstance(source, str) else source
    source = source if isinstance(source, Path) else _Downloaded(source)
    with _without_limit(source), source.open("rb") as file, Image.open(file) as image:
        is_large = image.width * image.height > LARGE_PIXELS
    return LargeImage(source) if is_large else read_image(source)


class LargeImage:
    """An image of which parts are read, as [`read_image`] would read them.

    Parts are best read from top to bottom: those of a band of rows share what was decoded for the first of them.
    `with image:` frees it at the end, and lets one thread at a time in.

    Args:
        source (`Path` or `ImageFileLike`): The image.

    Attributes:
        size (`tuple[int, int]`): Width and height in pixels, after the EXIF orientation is applied.
    """

    _lock = threading.RLock()

    def __init__(self, source: ImageSource):
        self.source = source
        self._brightest = 0
        self._bands: dict[int, Image.Image] = {}
        self._reader: _Reader | None = None
        reader = self._open()
        self._stored_size, self._orientation, self._num_rows = reader.size, reader.orientation, reader.num_rows
        self.size = reader.size[::-1] if reader.orientation in EXIF_SWAPS_SIDES else reader.size
        self._check_limit()
        self.release()

    def _open(self) -> "_Reader":
        with _without_limit(self.source):
            file = self.source.open("rb")
            image = Image.open(file)
            self._has_16_bits = has_16_bits(image)
            warn_about_frames(image, self.source)
            try:
                self._reader = _READERS.get(image.format or "", _Whole)(file, image)
            except (_NotInBandsError, ArithmeticError, LookupError, ValueError, struct.error):
                self._reader = _Whole(file, image)
        return self._reader

    def _check_limit(self) -> None:
        (width, height), limit = self._stored_size, Image.MAX_IMAGE_PIXELS
        rows = min(self._num_rows, height)
        if limit and rows * width > LIMIT_FACTOR * limit:
            raise InputError(
                f"{self.source}: has {width} x {height} pixels, of which {width} x {rows} would be decoded at a time, "
                f"more than {LIMIT_FACTOR * limit}; save it as a tiled TIFF, or raise --max_image_pixels "
                f"(PIL.Image.MAX_IMAGE_PIXELS)"
            )

    def crop(self, box: Box) -> Image.Image:
        """Read a part of the image in mode `"RGB"`.

        Args:
            box (`tuple[int, int, int, int]`): x0, y0, x1, y1 in pixels, inside the image.

        Raises:
            InputError: If the file is broken.
        """
        x0, y0, x1, y1 = _to_stored(box, self._stored_size, self._orientation)
        part = Image.new("RGB", (x1 - x0, y1 - y0))
        for top, band in self._decode(y0, y1):
            y, bottom = max(y0, top), min(y1, top + band.height)
            rgb = to_rgb(band.crop((x0, y - top, x1, bottom - top)), self.source)
            self._brightest = max(self._brightest, int(np.max(rgb.getextrema()))) if self._has_16_bits else 0
            part.paste(rgb, (0, y - y0))
        transpose = EXIF_TRANSPOSES.get(self._orientation)
        return part if transpose is None else part.transpose(transpose)

    def reduce(self, factor: int) -> Image.Image:
        """Return the whole image, smaller by a whole number, in mode `"RGB"`; as `reduce` of Pillow's images."""
        width, height = self.size
        reduced = Image.new("RGB", (-(-width // factor), -(-height // factor)))
        step = factor * max(1, BAND_BYTES // (width * factor))
        for top in range(0, height, step):
            part = self.crop((0, top, width, min(top + step, height)))
            reduced.paste(part.reduce(factor), (0, top // factor))
        return reduced

    def release(self) -> None:
        """Free what was decoded, and close the file; it is opened again when it is needed."""
        self._bands = {}
        if self._reader is not None:
            self._reader.file.close()
            self._reader = None
        if self._brightest:
            warn_about_16_bits(self._brightest, self.source)

    def __enter__(self) -> "LargeImage":
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self._lock.release()

    def _decode(self, y0: int, y1: int) -> Iterator[tuple[int, Image.Image]]:
        """Yield the bands that contain rows, each with its first row."""
        reader, num_rows = self._reader or self._open(), self._num_rows
        first = y0 // num_rows
        self._bands = {index: band for index, band in self._bands.items() if index >= first}
        for index in range(first, -(-y1 // num_rows)):
            if index not in self._bands:
                with _without_limit(self.source):
                    self._bands[index] = reader.read(index)
            yield index * num_rows, self._bands[index]


class _Downloaded:
    """An image that is not a file, in memory: it is to be opened more than once."""

    def __init__(self, source: Any):
        self.name = str(source)
        with source.open("rb") as file:
            self.content = file.read()

    def __str__(self) -> str:
        return self.name

    def open(self, mode: str = "rb", /) -> BinaryIO:
        return io.BytesIO(self.content)


_limit_lock = threading.Lock()


@contextmanager
def _without_limit(source: ImageSource) -> Iterator[None]:
    """Let Pillow decode an image of any size, and report any error as a fault of the file."""
    with _limit_lock, report_decoder_errors(source):
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _to_stored(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """Return where a part of the upright image is in the stored one, whose width and height are given."""
    x0, y0, x1, y1 = box if orientation not in EXIF_SWAPS_SIDES else (box[1], box[0], box[3], box[2])
    if orientation in (2, 3, 7, 8):
        x0, x1 = size[0] - x1, size[0] - x0
    if orientation in (3, 4, 6, 7):
        y0, y1 = size[1] - y1, size[1] - y0
    return x0, y0, x1, y1


class _NotInBandsError(Exception):
    """A file that has to be decoded whole."""


class _Reader(Protocol):
    """A file that is decoded in bands of rows.

    Attributes:
        file (`BinaryIO`): The open file.
        size (`tuple[int, int]`): Width and height of what is stored.
        orientation (`int`): EXIF orientation that the bands have.
        num_rows (`int`): Rows of a band; the last may have fewer.
    """

    file: BinaryIO
    size: tuple[int, int]
    orientation: int
    num_rows: int

    def read(self, index: int) -> Image.Image:
        """Decode a band."""
        ...


class _Whole:
    """A file that is a single band."""

    def __init__(self, file: BinaryIO, image: Any):
        self.file, self.image, self.size, self.orientation = file, image, image.size, exif_orientation(image)
        if image.format == "TIFF":  # Pillow transposes it while loading; before that, only later versions say so
            stored = image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT]
            self.size = stored[::-1] if self.orientation in EXIF_SWAPS_SIDES else stored
            self.orientation = 1
        self.num_rows = self.size[1]

    def read(self, index: int) -> Image.Image:
        self.image.load()
        return self.image


_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANAR = 256, 257, 258, 259, 262, 277, 284
_STRIPS = (273, 278, 279)  # offsets, rows of a strip, numbers of bytes
_TILES = (324, 323, 325, 322)  # the same of tiles, and the width of a tile
# those above, fill order, options of fax, predictor, palette, extra samples, sample format, tables and subsampling of
# JPEG, parameters of LERC
_COPIED = (_BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANAR, 266, 292, 293, 317, 320, 338, 339, 347, 530, 50674)
_UNCOMPRESSED, _OLD_JPEG, _JPEG, _YCBCR = 1, 6, 7, 6


class _TiffBands:
    """A TIFF file by rows of tiles, or by strips."""

    orientation = 1

    def __init__(self, file: BinaryIO, image: Any):
        tags: Mapping[int, Any] = image.tag_v2
        compression, photometric = (tags.get(tag, 1) for tag in (_COMPRESSION, _PHOTOMETRIC))
        # the last two are not decoded tile by tile by libtiff
        if exif_orientation(image) != 1 or compression == _OLD_JPEG or (photometric, compression) == (_YCBCR, 1):
            raise _NotInBandsError
        self.file, self.prefix = file, image.tag_v2.prefix
        self.size = width, height = tags[_WIDTH], tags[_HEIGHT]
        self.layout = _TILES if _TILES[0] in tags else _STRIPS
        self.sides: dict[int, int] = {_STRIPS[1]: min(tags.get(_STRIPS[1], height), height)}
        if self.layout == _TILES:
            self.sides = {tag: tags[tag] for tag in (_TILES[1], _TILES[3])}
        self.copied = {tag: tags[tag] for tag in _COPIED if tag in tags}
        num_columns = -(-width // self.sides.get(_TILES[3], width))
        num_planes = tags.get(_SAMPLES, 1) if tags.get(_PLANAR) == 2 else 1
        grid = (num_planes, -(-height // self._tile_rows), num_columns)
        self.offsets, self.counts = (np.reshape(tags[self.layout[i]], grid).astype(int) for i in (0, 2))
        bits = int(np.broadcast_to(tags.get(_BITS, 1), tags.get(_SAMPLES, 1)).sum())
        row_bytes = -(-width * bits // 8)
        if self.layout == _STRIPS and compression == _UNCOMPRESSED and grid == (1, 1, 1):
            self._split_strip(row_bytes)
        self.tiles_in_band = max(1, BAND_BYTES // (row_bytes * self._tile_rows))
        self.num_rows = self.tiles_in_band * self._tile_rows
        if self.num_rows >= height:
            raise _NotInBandsError

    @property
    def _tile_rows(self) -> int:
        return self.sides[self.layout[1]]

    def _split_strip(self, row_bytes: int) -> None:
        """Make a strip of each row of the only strip, which is the same since it is not compressed."""
        self.sides = {_STRIPS[1]: 1}
        starts = np.arange(self.size[1])
        self.offsets = (self.offsets[0, 0, 0] + starts * row_bytes)[None, :, None]
        self.counts = np.full_like(self.offsets, row_bytes)

    def read(self, index: int) -> Image.Image:
        band = slice(index * self.tiles_in_band, (index + 1) * self.tiles_in_band)
        offsets, counts = self.offsets[:, band].ravel(), self.counts[:, band].ravel()
        data = b"".join(self._read(offset, count) for offset, count in zip(offsets.tolist(), counts.tolist()))
        starts = _TIFF_HEADER + np.cumsum([0, *counts[:-1]])
        rows = min(self.num_rows, self.size[1] - index * self.num_rows)
        tags = {_WIDTH: self.size[0], _HEIGHT: rows, self.layout[0]: starts, self.layout[2]: counts, **self.sides}
        image = Image.open(io.BytesIO(_make_tiff(self.prefix, {**self.copied, **tags}, data)))
        image.load()
        return image

    def _read(self, offset: int, count: int) -> bytes:
        self.file.seek(offset)
        data = self.file.read(count)
        if len(data) < count:
            raise OSError("image file is truncated")
        return data


_TIFF_HEADER = 8  # bytes


def _make_tiff(prefix: bytes, tags: Mapping[int, Any], data: bytes) -> bytes:
    """Return a TIFF file whose tiles are in `data`; offsets count from its beginning."""
    order = "<" if prefix == b"II" else ">"
    data += bytes(len(data) % 2)
    entries, more = b"", b""
    start = _TIFF_HEADER + len(data) + 2 + 12 * len(tags) + 4
    for tag, value in sorted(tags.items()):
        is_bytes = isinstance(value, bytes)
        packed = value if is_bytes else np.atleast_1d(value).astype(f"{order}u4").tobytes()
        is_short = len(packed) <= 4
        entries += struct.pack(f"{order}HHI", tag, 7 if is_bytes else 4, len(packed) // (1 if is_bytes else 4))
        entries += packed.ljust(4, b"\0") if is_short else struct.pack(f"{order}I", start + len(more))
        more += b"" if is_short else packed + bytes(len(packed) % 2)
    header = prefix + struct.pack(f"{order}HI", 42, _TIFF_HEADER + len(data))
    return header + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + more


_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by color type: gray, RGB, palette, gray with alpha, RGBA
_PNG_PALETTE = 3
# the color type of 8 bits whose pixels have so many bytes: rows are filtered without regard to what the bytes mean
_PNG_OF_BYTES = {1: 0, 2: 4, 3: 2, 4: 6}


class _PngBands:
    """A PNG file, which can only be decoded from its beginning.

    Its compressed stream is decompressed as far as needed. The rows of a band are still filtered, the first by
    differences from the last row of the band above, which is therefore put on top.
    """

    orientation = 1

    def __init__(self, file: BinaryIO, image: Image.Image):
        self.file, self.chunks = file, list(_png_chunks(file))
        names = [name for name, *_ in self.chunks]
        header = self._content(b"IHDR")
        width, height, self.depth, self.color, *_, interlaced = struct.unpack(">IIBBBBB", header)
        is_plain = not interlaced and b"acTL" not in names and b"eXIf" not in names[names.index(b"IDAT") :]
        has_odd_transparency = b"tRNS" in names and self.color != _PNG_PALETTE
        if not is_plain or exif_orientation(image) != 1 or has_odd_transparency:
            raise _NotInBandsError
        self.size = (width, height)
        bits = self.depth * _PNG_CHANNELS[self.color]
        self.row_bytes = -(-width * bits // 8)
        # all channels but that of gray images are reduced to their high bytes by Pillow
        self.keeps_high_bytes = self.depth == 16 and self.color != 0
        self.pixel_bytes = max(1, bits // 8) // (2 if self.keeps_high_bytes else 1)
        self.num_rows = min(height, max(1, BAND_BYTES // self.row_bytes))
        self.palette = b"".join(_png_chunk(name, self._content(name)) for name in (b"PLTE", b"tRNS") if name in names)
        self.next = height  # no band is next

    def _content(self, name: bytes) -> bytes:
        _, offset, length = next(chunk for chunk in self.chunks if chunk[0] == name)
        self.file.seek(offset)
        return self.file.read(length)

    def read(self, index: int) -> Image.Image:
        if index < self.next:
            self.next, self.stream = 0, self._decode()
        while self.next < index:
            next(self.stream)
            self.next += 1
        self.next += 1
        return next(self.stream)

    def _decode(self) -> Iterator[Image.Image]:
        above = bytes(self.row_bytes // (2 if self.keeps_high_bytes else 1))
        for filtered in self._filtered_bands():
            rows = np.frombuffer(filtered, np.uint8).reshape(-1, 1 + self.row_bytes)
            if self.keeps_high_bytes:  # filters do not mix bytes of different places in a pixel
                rows = np.hstack([rows[:, :1], rows[:, 1::2]])
            width = len(above) // self.pixel_bytes
            content = b"\0" + above + rows.tobytes()
            unfiltered = _open_png(width, len(rows) + 1, 8, _PNG_OF_BYTES[self.pixel_bytes], content)
            above = unfiltered.crop((0, len(rows), width, len(rows) + 1)).tobytes()
            yield self._interpret(unfiltered.crop((0, 1, width, len(rows) + 1)))

    def _interpret(self, unfiltered: Image.Image) -> Image.Image:
        """Return pixels of their kind, from an image of their bytes."""
        if self.keeps_high_bytes or (self.depth, self.color) == (8, _PNG_OF_BYTES[self.pixel_bytes]):
            return unfiltered
        rows = np.frombuffer(unfiltered.tobytes(), np.uint8).reshape(-1, self.row_bytes)
        content = np.pad(rows, [(0, 0), (1, 0)]).tobytes()
        return _open_png(self.size[0], len(rows), self.depth, self.color, content, self.palette)

    def _filtered_bands(self) -> Iterator[bytes]:
        pending, remaining, pieces = bytearray(), self.size[1], self._decompress()
        while remaining:
            rows = min(self.num_rows, remaining)
            length = rows * (1 + self.row_bytes)
            while len(pending) < length:
                pending += next(pieces)
            yield bytes(pending[:length])
            del pending[:length]
            remaining -= rows

    def _decompress(self) -> Iterator[bytes]:
        decoder = zlib.decompressobj()
        for name, offset, length in self.chunks:
            for start in range(0, length if name == b"IDAT" else 0, _PIECE):
                self.file.seek(offset + start)
                try:
                    yield decoder.decompress(self.file.read(min(_PIECE, length - start)))
                except zlib.error as error:
                    raise OSError(f"broken data stream: {error}") from None
        raise OSError("image file is truncated")


_PIECE = 2**14  # bytes of a compressed stream, at most a thousand times as many when decompressed


def _png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, offset and length of each chunk."""
    offset = len(_PNG_MAGIC)
    file.seek(offset)
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        yield name, offset + 8, length
        offset += length + 12
        file.seek(offset)


def _png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _open_png(width: int, height: int, depth: int, color: int, rows: bytes, palette: bytes = b"") -> Image.Image:
    header = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    data = _png_chunk(b"IDAT", zlib.compress(rows, 0)) + _png_chunk(b"IEND", b"")
    image = Image.open(io.BytesIO(_PNG_MAGIC + header + palette + data))
    image.load()
    return image


_READERS: Mapping[str, Callable[[BinaryIO, Any], _Reader]] = {"TIFF": _TiffBands, "PNG": _PngBands}
