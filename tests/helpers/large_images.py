"""Write TIFF and PNG files in layouts that Pillow does not write."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


TILE_TAGS = {"width": 322, "height": 323, "offsets": 324, "counts": 325}


def encode_tile(tile: Image.Image, compression: str | None) -> tuple[bytes, dict]:
    """Return the data of a tile, and the tags of a TIFF file that Pillow made of it."""
    file = io.BytesIO()
    tile.save(file, "TIFF", compression=compression, tiffinfo={278: tile.height})
    content = file.getvalue()
    with Image.open(file) as saved:
        tags = dict(saved.tag_v2)
    (offset,), (count,) = (value if isinstance(value, tuple) else (value,) for value in (tags[273], tags[279]))
    return content[offset : offset + count], tags


def write_tiled_tiff(
    path: Path, image: Image.Image, tile: tuple[int, int], compression: str | None, planar: bool = False
) -> None:
    """Cut an image into tiles (width, height in pixels), each compressed as Pillow compresses a strip."""
    planes = image.split() if planar else [image]
    columns, rows = (range(0, length, side) for length, side in zip(image.size, tile))
    boxes = [(x, y, x + tile[0], y + tile[1]) for y in rows for x in columns]
    encoded = [encode_tile(plane.crop(box), compression) for plane in planes for box in boxes]
    tags = {tag: value for tag, value in encode_tile(image.crop(boxes[0]), compression)[1].items() if tag > 257}
    tags = {tag: value for tag, value in tags.items() if tag not in (273, 278, 279)} | {284: 1 + planar}
    write_tiff(path, image.size, tile, [data for data, _ in encoded], tags)


def write_tiff(path: Path, size: tuple[int, int], tile: tuple[int, int], tiles: list[bytes], tags: dict) -> None:
    """Write a tiled TIFF file. Tiles that are the same object are stored once."""
    offsets, content = {}, b""
    for data in tiles:
        if id(data) not in offsets:
            offsets[id(data)] = 8 + len(content)
            content += data + bytes(len(data) % 2)
    tags = {**tags, 256: size[0], 257: size[1], TILE_TAGS["width"]: tile[0], TILE_TAGS["height"]: tile[1]}
    tags |= {TILE_TAGS["offsets"]: tuple(offsets[id(data)] for data in tiles)}
    tags |= {TILE_TAGS["counts"]: tuple(map(len, tiles))}
    start = 8 + len(content) + 2 + 12 * len(tags) + 4
    entries, more = b"", b""
    for tag, value in sorted(tags.items()):
        values = value if isinstance(value, tuple | bytes) else (value,)
        packed = values if isinstance(values, bytes) else struct.pack(f"<{len(values)}I", *values)
        field = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", start + len(more))
        more += packed + bytes(len(packed) % 2) if len(packed) > 4 else b""
        entries += struct.pack("<HHI", tag, 7 if isinstance(values, bytes) else 4, len(values)) + field
    header = struct.pack("<2sHI", b"II", 42, 8 + len(content))
    path.write_bytes(header + content + struct.pack("<H", len(tags)) + entries + bytes(4) + more)


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def write_filtered_png(path: Path, rows: np.ndarray, header: tuple[int, int, int, int], chunks: bytes = b"") -> None:
    """Write a PNG file whose rows are filtered in all five ways in turn.

    Args:
        rows (`np.ndarray` of shape `(height, bytes of a row)`): The pixels as they are stored, unfiltered.
        header: Width, bits of a sample, color type, bytes of a pixel.
        chunks: Further chunks, before the pixels.
    """
    width, depth, color, step = header
    current = rows.astype(np.int16)
    left = np.pad(current, [(0, 0), (step, 0)])[:, :-step]
    above, corner = np.pad(current, [(1, 0), (0, 0)])[:-1], np.pad(left, [(1, 0), (0, 0)])[:-1]
    estimate = left + above - corner
    distances = np.abs(np.stack([left, above, corner]) - estimate)
    paeth = np.choose(distances.argmin(axis=0), [left, above, corner])
    predictions = np.stack([np.zeros_like(left), left, above, (left + above) // 2, paeth])
    kinds = np.arange(len(rows)) % 5
    filtered = (current - predictions[kinds, np.arange(len(rows))]).astype(np.uint8)
    content = zlib.compress(np.hstack([kinds.astype(np.uint8)[:, None], filtered]).tobytes())
    pieces = [png_chunk(b"IDAT", content[start : start + 1000]) for start in range(0, len(content), 1000)]
    start = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, color, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + start + chunks + b"".join(pieces) + png_chunk(b"IEND", b""))
