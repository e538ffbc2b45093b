"""Parts of large images are those of the whole image as read_image decodes it, whatever the file."""

import logging
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from helpers.large_images import png_chunk, write_filtered_png, write_tiled_tiff
from hf_dino.data import InputError, read_image
from hf_dino.data import images as images_module
from hf_dino.data import large_images as module
from hf_dino.data.large_images import LargeImage, open_image


WIDTH, HEIGHT = 203, 151
BOXES = [(0, 0, WIDTH, HEIGHT), (0, 0, 90, 60), (60, 0, WIDTH, 61), (31, 40, 110, 90), (0, 5, 1, 6), (5, 80, 203, 151)]


@pytest.fixture(autouse=True)
def narrow_bands(monkeypatch):
    monkeypatch.setattr(module, "BAND_BYTES", 1000)
    monkeypatch.setattr(module, "LARGE_PIXELS", 1000)
    monkeypatch.setattr(images_module, "_warned", set())


def make_image(mode: str) -> Image.Image:
    """Return an image that is different everywhere."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    noise = np.random.default_rng(0).integers(0, 30, rows.shape)
    rgb = Image.fromarray(np.stack([rows, columns, rows * columns // 200 + noise], axis=-1).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((rows * 430 + columns).astype(np.uint16))
    if mode == "P":
        return rgb.quantize(100)
    if mode in ("RGBA", "LA"):
        image = rgb.convert(mode[:-1])
        image.putalpha(Image.fromarray(columns.astype(np.uint8)))
        return image
    return rgb.convert(mode)


def assert_parts_are_those_of_the_whole(path, reader: str):
    expected, image = read_image(path), open_image(path)
    assert isinstance(image, LargeImage)
    assert image.size == expected.size
    assert type(image._open()).__name__ == reader
    num_bands = -(-image._stored_size[1] // image._num_rows)
    assert (num_bands > 3) == (reader != "_Whole")
    boxes = [box for box in BOXES if box[2] <= image.size[0] and box[3] <= image.size[1]]
    for box in boxes + boxes[::-1]:  # forward, and back to parts that were freed
        part = image.crop(box)
        assert (part.mode, part.tobytes()) == ("RGB", expected.crop(box).tobytes())
    assert image.reduce(3).tobytes() == expected.reduce(3).tobytes()
    image.release()
    assert image._reader is None
    assert not image._bands
    with image:
        assert image.crop(boxes[1]).tobytes() == expected.crop(boxes[1]).tobytes()


COMPRESSIONS = [None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"]
MODES = ["RGB", "L", "P", "RGBA", "LA", "CMYK", "I;16", "1"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_tiff(tmp_path, mode, compression):
    if compression == "jpeg" and mode not in ("RGB", "L"):
        pytest.skip("libtiff does not write it")
    image = make_image(mode)
    image.save(tmp_path / "strips.tif", compression=compression, tiffinfo={278: 16})
    assert_parts_are_those_of_the_whole(tmp_path / "strips.tif", "_TiffBands")
    write_tiled_tiff(tmp_path / "tiles.tif", image, (64, 48 if mode == "1" else 32), compression)
    if compression is None and mode in ("1", "LA"):
        return  # Pillow decodes neither correctly from raw tiles
    assert_parts_are_those_of_the_whole(tmp_path / "tiles.tif", "_TiffBands")


def test_other_layouts_of_tiff(tmp_path):
    image = make_image("RGB")
    for compression in (None, "tiff_lzw", "jpeg"):
        write_tiled_tiff(tmp_path / "planar.tif", image, (64, 32), compression, planar=True)
        assert_parts_are_those_of_the_whole(tmp_path / "planar.tif", "_TiffBands")
    image.save(tmp_path / "one_strip.tif", tiffinfo={278: HEIGHT})
    assert_parts_are_those_of_the_whole(tmp_path / "one_strip.tif", "_TiffBands")
    image.save(tmp_path / "one_compressed_strip.tif", tiffinfo={278: HEIGHT}, compression="tiff_lzw")
    assert_parts_are_those_of_the_whole(tmp_path / "one_compressed_strip.tif", "_Whole")
    image.save(tmp_path / "big.tif", big_tiff=True, compression="tiff_lzw", tiffinfo={278: 16})
    assert_parts_are_those_of_the_whole(tmp_path / "big.tif", "_TiffBands")
    swapped = Image.frombytes("I;16B", (WIDTH, HEIGHT), np.asarray(make_image("I;16")).astype(">u2").tobytes())
    swapped.save(tmp_path / "big_endian.tif", tiffinfo={278: 16})
    assert_parts_are_those_of_the_whole(tmp_path / "big_endian.tif", "_TiffBands")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "I;16", "1"])
def test_png(tmp_path, mode):
    make_image(mode).save(tmp_path / "a.png")
    assert_parts_are_those_of_the_whole(tmp_path / "a.png", "_PngBands")


@pytest.mark.parametrize(
    ("depth", "color", "channels"),
    [(1, 0, 1), (2, 0, 1), (4, 0, 1), (8, 0, 1), (16, 0, 1), (8, 2, 3), (16, 2, 3), (1, 3, 1), (2, 3, 1), (4, 3, 1)]
    + [(8, 3, 1), (8, 4, 2), (16, 4, 2), (8, 6, 4), (16, 6, 4)],
)
def test_png_with_all_filters(tmp_path, depth, color, channels):
    bits = depth * channels
    rows = np.random.default_rng(0).integers(0, 256, (HEIGHT, -(-WIDTH * bits // 8)), dtype=np.uint8)
    palette = np.random.default_rng(1).integers(0, 256, 3 * 2 ** min(depth, 8), dtype=np.uint8).tobytes()
    chunks = png_chunk(b"PLTE", palette) + png_chunk(b"tRNS", palette[: 2**depth]) if color == 3 else b""
    write_filtered_png(tmp_path / "a.png", rows, (WIDTH, depth, color, max(1, bits // 8)), chunks)
    assert_parts_are_those_of_the_whole(tmp_path / "a.png", "_PngBands")


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_the_exif_orientation_is_applied(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    make_image("RGB").save(tmp_path / f"a{suffix}", exif=exif)
    assert_parts_are_those_of_the_whole(tmp_path / f"a{suffix}", "_Whole")


def test_what_cannot_be_decoded_in_bands_is_decoded_whole(tmp_path):
    image = make_image("RGB")
    for name in ("a.jpg", "a.bmp", "a.webp", "a.ppm", "a.gif"):
        image.save(tmp_path / name)
        assert_parts_are_those_of_the_whole(tmp_path / name, "_Whole")
    make_image("CMYK").save(tmp_path / "cmyk.jpg")
    assert_parts_are_those_of_the_whole(tmp_path / "cmyk.jpg", "_Whole")
    image.save(tmp_path / "transparent.png", transparency=(0, 0, 0))
    assert_parts_are_those_of_the_whole(tmp_path / "transparent.png", "_Whole")
    image.save(tmp_path / "animated.png", save_all=True, append_images=[make_image("RGB").rotate(180)])
    assert_parts_are_those_of_the_whole(tmp_path / "animated.png", "_Whole")


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:2000] + data[4000:]])
def test_a_broken_file_is_an_error_that_names_it(tmp_path, name, damage):
    make_image("RGB").save(tmp_path / name, **{"compression": "tiff_lzw"} if name == "a.tif" else {})
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(InputError, match=rf"{name}: cannot be read as an image"):
        open_image(tmp_path / name).crop((0, 0, WIDTH, HEIGHT))
    assert Image.MAX_IMAGE_PIXELS is not None


def test_a_png_file_is_decompressed_once_from_top_to_bottom(tmp_path, monkeypatch):
    make_image("RGB").save(tmp_path / "a.png")
    image, starts = open_image(tmp_path / "a.png"), []
    monkeypatch.setattr(zlib, "decompressobj", lambda start=zlib.decompressobj: starts.append(0) or start())
    for top in range(0, HEIGHT - 40, 20):
        for left in (0, 100):
            image.crop((left, top, left + 50, top + 40))
            num_rows = sum(band.height for band in image._bands.values())
            assert num_rows <= 40 + 2 * image._num_rows  # the others are freed
    assert len(starts) == 1


def test_the_limit_is_on_what_is_decoded_at_a_time(tmp_path, monkeypatch):
    image = make_image("RGB")
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.bmp")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT // 8 - 1)
    with pytest.raises(InputError, match="exceeds limit"):
        read_image(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").crop((0, 0, WIDTH, HEIGHT)).tobytes() == image.tobytes()
    with pytest.raises(
        InputError, match=r"a\.bmp: has 203 x 151 pixels.*; save it as a tiled TIFF, or raise --max_im"
    ):
        open_image(tmp_path / "a.bmp")
    assert Image.MAX_IMAGE_PIXELS == WIDTH * HEIGHT // 8 - 1


def test_changes_of_pixels_are_logged_once(tmp_path, caplog):
    make_image("I;16").save(tmp_path / "sixteen.png")
    make_image("RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(np.full((HEIGHT, WIDTH), 900, np.uint16)).save(tmp_path / "dark.tif", tiffinfo={278: 16})
    make_image("L").save(tmp_path / "pages.tif", save_all=True, append_images=[make_image("L")], tiffinfo={278: 16})
    with caplog.at_level(logging.WARNING):
        for name in ("sixteen.png", "alpha.png", "dark.tif", "pages.tif"):
            with open_image(tmp_path / name) as image:
                for top in (0, 50, 100):
                    image.crop((0, top, WIDTH, top + 50))
    texts = [record.getMessage() for record in caplog.records]
    expected = ("sixteen.png has 16-bit", "alpha.png has transparent", "dark.tif has 16-bit", "pages.tif has 2 frames")
    assert len(texts) == 4
    assert all(sum(words in text for text in texts) == 1 for words in expected)
