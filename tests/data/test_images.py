"""Every kind of image file becomes the RGB pixels that its annotations refer to, or one clear error."""

import contextlib
import logging
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
from PIL import ExifTags, Image, ImageOps

from hf_dino.data import InputError, list_images, read_image
from hf_dino.data import images as images_module
from hf_dino.data.images import IMAGE_EXTENSIONS, find_unused_images, get_image_size, set_max_image_pixels


NAN = float("nan")


@pytest.fixture
def gradient():
    """40 x 60 RGB, different everywhere."""
    rows, columns = np.mgrid[0:40, 0:60]
    return Image.fromarray(np.stack([rows * 6, columns * 4, rows + columns], axis=-1).astype(np.uint8))


def save_with_orientation(image, path, orientation=6):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(path, exif=exif)


YCBCR = pytest.param(
    "YCbCr",
    marks=pytest.mark.skipif(
        PIL.__version__ < "13", reason="Pillow before 13 cannot read the YCbCr TIFF that it writes"
    ),
)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", YCBCR])
def test_every_mode_becomes_rgb(gradient, tmp_path, mode):
    path = tmp_path / ("image.tif" if mode in ("CMYK", "YCbCr") else "image.png")
    gradient.convert(mode).save(path)
    image = read_image(path)
    assert (image.mode, image.size) == ("RGB", (60, 40))
    if mode in ("RGB", "RGBA", "CMYK"):
        assert np.abs(np.asarray(image).astype(int) - np.asarray(gradient)).max() <= 1


def test_cmyk_jpeg_is_not_inverted(tmp_path):
    Image.new("RGB", (32, 32), (200, 40, 40)).convert("CMYK").save(tmp_path / "a.jpg")
    assert np.abs(np.asarray(read_image(tmp_path / "a.jpg"), dtype=int) - (200, 40, 40)).max() < 12


def test_transparency_is_blended_with_white(tmp_path):
    Image.new("RGBA", (2, 1), (10, 20, 30, 0)).save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png"))[0, 0].tolist() == [255, 255, 255]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30] + [0, 0, 0] * 255)
    palette.save(tmp_path / "b.png", transparency=0)
    assert np.asarray(read_image(tmp_path / "b.png"))[0, 0].tolist() == [255, 255, 255]


def test_16_bit_images_keep_their_range_and_are_logged_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(images_module, "_warned", set())
    for name in ("a.png", "b.png"):
        Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16)).save(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        images = [np.asarray(read_image(tmp_path / name))[0, :, 0].tolist() for name in ("a.png", "b.png")]
    assert images == [[0, 1, 128, 255]] * 2
    assert len(caplog.records) == 1
    assert "a.png has 16-bit" in caplog.text


def test_float_image_is_an_error(tmp_path):
    Image.fromarray(np.array([[0.0, 7.5]], dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(
        InputError, match=r"a\.tif: the image has float32 values from 0.0 to 7.5.*save it with 8 or 16 bits"
    ):
        read_image(tmp_path / "a.tif")


def test_exif_orientation_is_applied_unless_annotated_without_it(gradient, tmp_path):
    path = tmp_path / "a.png"
    save_with_orientation(gradient, path)
    upright = gradient.transpose(Image.Transpose.ROTATE_270)
    assert read_image(path).tobytes() == upright.tobytes()
    assert read_image(path, annotated_size=(60, 40)).tobytes() == upright.tobytes()
    assert read_image(path, annotated_size=(40, 60)).tobytes() == gradient.tobytes()
    with pytest.raises(InputError, match=r"a\.png: is annotated as 50 x 40 .* file has 60 x 40 \(EXIF orientation 6"):
        read_image(path, annotated_size=(40, 50))


@pytest.mark.parametrize("orientation", range(10))
def test_every_exif_orientation_is_applied_as_pillow_does(gradient, tmp_path, orientation):
    path = tmp_path / "a.png"
    save_with_orientation(gradient, path, orientation)
    with Image.open(path) as image:
        assert read_image(path).tobytes() == ImageOps.exif_transpose(image).tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_header_gives_the_size_of_the_decoded_image(gradient, tmp_path, orientation):
    for name in ("a.png", "a.jpg", "a.tif"):
        save_with_orientation(gradient, tmp_path / name, orientation)
        height, width = get_image_size(tmp_path / name)
        assert (height, width) == ((60, 40) if orientation >= 5 else (40, 60))
        assert read_image(tmp_path / name, annotated_size=(height, width)).size == (width, height)


def test_exif_data_that_pillow_cannot_rewrite(gradient, tmp_path):
    path = tmp_path / "a.jpg"
    tags = [(0x0100, 9, 1, 0xFFFFFFFF), (0x0112, 3, 1, 6)]  # a width of -1, and orientation 6
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    gradient.save(path, exif=b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4))
    with Image.open(path) as image, pytest.raises(struct.error):
        ImageOps.exif_transpose(image)
    assert read_image(path).size == (40, 60)


@pytest.mark.parametrize("error", [OverflowError, TypeError, IndexError, struct.error])
def test_any_error_of_pillow_names_the_image(gradient, tmp_path, monkeypatch, error):
    def fail(image):
        raise error("odd data")

    gradient.save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "getexif", fail)
    for read in (read_image, get_image_size):
        with pytest.raises(InputError, match=r"a\.png: cannot be read as an image \(odd data\)\. Repair or remove"):
            read(tmp_path / "a.png")


def test_an_image_that_is_too_large_for_pillow_is_not_called_broken(gradient, tmp_path, monkeypatch):
    gradient.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(
        InputError, match=r"a\.png: is larger .*2400 pixels.*. Cut it into tiles, or raise PIL"
    ) as error:
        read_image(tmp_path / "a.png")
    assert "Repair" not in str(error.value)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"no image"])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_broken_file_is_named(gradient, tmp_path, damage, suffix):
    path = tmp_path / f"broken.{suffix}"
    gradient.save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"broken\.\w+: cannot be read as an image"):
        read_image(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png: image file not found"):
        read_image(tmp_path / "gone.png")


def test_hidden_files_and_links_to_themselves_are_no_images(gradient, tmp_path, caplog):
    gradient.save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"Mac OS X")
    assert list_images([tmp_path]) == [tmp_path / "a.png"]
    assert caplog.messages == []
    for name in ("loop", "loop.png"):
        (tmp_path / name).symlink_to(name)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "up").symlink_to("..")
    assert find_unused_images(tmp_path, []) == [str(tmp_path / "a.png")]


def test_list_images(gradient, tmp_path):
    for name in ("b.png", "a.JPG"):
        gradient.save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    assert [path.name for path in list_images([tmp_path, tmp_path / "b.png"])] == ["a.JPG", "b.png", "b.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: the directory contains no images"):
        list_images([tmp_path / "empty"])
    with pytest.raises(InputError, match="gone: file or directory not found"):
        list_images([tmp_path / "gone"])


# What a conversion changes is said once


@pytest.fixture
def warned(caplog, monkeypatch):
    """Return what was warned about since the last call."""
    monkeypatch.setattr(images_module, "_warned", set())
    caplog.set_level(logging.WARNING)

    def messages():
        texts = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return texts

    return messages


def save_16_bits(path, values, mode="I;16"):
    Image.frombytes(mode, values.shape[::-1], values.astype("<u2").tobytes()).save(path)


@pytest.mark.parametrize(
    ("highest", "is_dark"), [(1023, True), (4095, True), (16383, True), (17000, False), (0, False)]
)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_of_a_smaller_range_are_said_to_be_dark(tmp_path, warned, highest, is_dark, suffix):
    values = np.linspace(0, highest, 60 * 40).reshape(40, 60).astype(np.uint16)
    save_16_bits(tmp_path / f"a.{suffix}", values)
    assert np.array_equal(np.asarray(read_image(tmp_path / f"a.{suffix}"))[..., 0], values // 257)
    (message,) = warned()
    assert ("nearly black" in message and "np.uint8(pixels * (255 / 4095))" in message) == is_dark
    assert f"a.{suffix} has 16-bit values" in message


def test_16_bits_per_color_are_said_to_be_reduced(tmp_path, warned):
    """Pillow writes none, so this is a PNG by hand."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for highest, word in ((4095, "nearly black"), (65535, "divided by 257")):
        pixels = np.linspace(0, highest, 4 * 6 * 3).reshape(4, 18).astype(">u2")
        rows = b"".join(b"\0" + row.tobytes() for row in pixels)
        header = struct.pack(">IIBBBBB", 6, 4, 16, 2, 0, 0, 0)
        content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
        assert read_image(tmp_path / "a.png").size == (6, 4)
        (message,) = warned()
        assert word in message


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_several_frames_the_first_is_read_and_the_others_are_said(gradient, tmp_path, warned, suffix):
    others = [Image.new("RGB", gradient.size, color) for color in ("red", "blue")]
    gradient.save(tmp_path / f"a.{suffix}", save_all=True, append_images=others)
    image = read_image(tmp_path / f"a.{suffix}")
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(gradient)).mean() < 30
    (message,) = warned()
    assert f"a.{suffix} has 3 frames or pages: only the first is read" in message


def test_the_preview_in_a_photo_is_not_a_frame(gradient, tmp_path, warned):
    gradient.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (6, 4))])
    read_image(tmp_path / "a.jpg")
    assert not warned()


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
@pytest.mark.parametrize("alpha", [0, 99, 255])
def test_transparent_parts_are_said_and_an_unused_alpha_channel_is_not(gradient, tmp_path, warned, mode, alpha):
    image = gradient.convert("LA" if mode == "LA" else "RGBA")
    image.putalpha(alpha)
    image.quantize(16).save(tmp_path / "a.png") if mode == "P" else image.save(tmp_path / "a.png")
    read_image(tmp_path / "a.png")
    assert [f"{tmp_path / 'a.png'} has transparent parts" in message for message in warned()] == [True] * (alpha < 255)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "CMYK", YCBCR])
def test_other_modes_need_no_word(gradient, tmp_path, warned, mode):
    gradient.convert(mode).save(tmp_path / "a.tif")
    read_image(tmp_path / "a.tif")
    assert not warned()


@pytest.mark.parametrize(
    "values", [np.array([[0, 70000]], dtype=np.int32), np.array([[-1, 7]], dtype=np.int32), np.float32([[0, NAN]])]
)
def test_32_bits_without_a_known_scale_are_an_error(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif: the image has \w+32 values .*save it with 8 or 16 bits"):
        read_image(tmp_path / "a.tif")


# Sizes that differ from the annotated one by a pixel


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("change", [(0, 1), (1, 0), (-1, -1), (1, -1)])
def test_a_pixel_of_difference_is_cut_or_added_and_said(gradient, tmp_path, warned, orientation, change):
    path = tmp_path / "a.png"
    save_with_orientation(gradient, path, orientation)
    upright = np.asarray(read_image(path))
    size = tuple(side + more for side, more in zip(upright.shape, change))
    image = np.asarray(read_image(path, annotated_size=size))
    assert image.shape == (*size, 3)
    assert get_image_size(path, annotated_size=size) == size
    common = tuple(slice(min(sides)) for sides in zip(size, upright.shape))
    assert np.array_equal(image[common], upright[common])
    assert np.array_equal(image[-1, :-1], upright[min(size[0], len(upright)) - 1, : size[1] - 1])
    (message,) = warned()
    assert f"annotated as {size[1]} x {size[0]} pixels" in message and "cut or extended by a pixel" in message


def test_a_pixel_of_difference_is_allowed_without_the_orientation_too(gradient, tmp_path, warned):
    save_with_orientation(gradient, tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", annotated_size=(41, 60)).crop((0, 0, 60, 40)).tobytes() == gradient.tobytes()
    assert len(warned()) == 2


@pytest.mark.parametrize("size", [(42, 60), (40, 62), (38, 60), (20, 30)])
def test_two_pixels_of_difference_are_an_error(gradient, tmp_path, size):
    gradient.save(tmp_path / "a.png")
    for read in (read_image, get_image_size):
        with pytest.raises(InputError, match=rf"a\.png: is annotated as {size[1]} x {size[0]} .* has 60 x 40"):
            read(tmp_path / "a.png", annotated_size=size)


# Files


@pytest.mark.filterwarnings("ignore:IM image format is deprecated")
def test_every_format_that_pillow_writes_is_an_image(gradient, tmp_path):
    """But for those that are no images, or that it cannot read again."""
    written = []
    for extension, format in Image.registered_extensions().items():
        with contextlib.suppress(Exception):
            Image.new("RGB", (16, 16)).save(tmp_path / f"{format}{extension}", format=format)
            read_image(tmp_path / f"{format}{extension}")
            written.append(extension)
    assert {".png", ".jfif", ".jpe", ".apng", ".webp", ".tga", ".ppm", ".jp2", ".qoi", ".pcx"} <= set(written)
    assert set(written) - {".eps", ".ps"} <= IMAGE_EXTENSIONS
    assert not {".pdf", ".mpg", ".h5", ".eps", ".grib", ".wmf", ".json", ".txt", ".pcd", ".npy"} & IMAGE_EXTENSIONS
    assert {".heic", ".heif", ".avif"} <= IMAGE_EXTENSIONS


@pytest.mark.parametrize("suffix", [".heic", ".HEIF", ".hif"])
def test_an_image_that_needs_a_plugin_names_it(tmp_path, monkeypatch, suffix):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"\0\0\0\x18ftypheic")
    assert list_images([tmp_path]) == [path]
    for read in (read_image, get_image_size):
        with pytest.raises(
            InputError, match=rf"a{suffix}: pillow-heif is needed to read .*: pip install pillow-heif$"
        ):
            read(path)


def test_a_plugin_that_is_installed_is_used(gradient, tmp_path, monkeypatch):
    def register_heif_opener():
        monkeypatch.setitem(Image.EXTENSION, ".heic", "PNG")

    plugin = SimpleNamespace(register_heif_opener=register_heif_opener)
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    gradient.save(tmp_path / "a.heic", format="PNG")
    assert read_image(tmp_path / "a.heic").tobytes() == gradient.tobytes()
    (tmp_path / "b.heic").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"b\.heic: cannot be read as an image \(not a known"):
        read_image(tmp_path / "b.heic")


def test_what_a_directory_contains_but_for_images_is_said(gradient, tmp_path, warned):
    for name in ("a.png", "b.jfif"):
        gradient.save(tmp_path / name)
    for name in ("notes.txt", "a.xml", "coco.json", ".DS_Store", "Thumbs.db", ".hidden.raw"):
        (tmp_path / name).touch()
    assert [path.name for path in list_images([tmp_path])] == ["a.png", "b.jfif"]
    assert not warned()
    for name in ("c.pdf", "d.nef", "e"):
        (tmp_path / name).touch()
    (tmp_path / "more.png").mkdir()
    assert [path.name for path in list_images([tmp_path])] == ["a.png", "b.jfif"]
    assert warned() == [f"{tmp_path}: 4 entries are not images: not used; c.pdf, d.nef, e, more.png/"]


def test_unused_images_are_those_that_no_path_and_no_link_leads_to(gradient, tmp_path, monkeypatch):
    for name in ("used.png", "unused.png", "linked.png", "deep/unused.jfif", ".cache/thumb.png", "notes.txt"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    used = [Path("data/used.png"), tmp_path / "link" / "linked.png", tmp_path / "data" / "gone.png"]
    for folder in (Path("data"), tmp_path / "data", tmp_path / "link"):
        unused = find_unused_images(folder, used)
        assert [Path(path).relative_to(folder.absolute()).as_posix() for path in unused] == [
            "deep/unused.jfif",
            "unused.png",
        ]


def test_an_image_may_be_as_large_as_asked_for(gradient, tmp_path, monkeypatch):
    gradient.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    set_max_image_pixels(None)
    with pytest.raises(InputError, match=r"raise PIL\.Image\.MAX_IMAGE_PIXELS \(--max_image_pixels\)"):
        read_image(tmp_path / "a.png")
    set_max_image_pixels(2400)
    assert read_image(tmp_path / "a.png").size == (60, 40)


@pytest.mark.parametrize("compression", ["jpeg", "tiff_lzw"])
def test_compressed_ycbcr_is_read(gradient, tmp_path, compression):
    gradient.convert("YCbCr").save(tmp_path / "a.tif", compression=compression)
    difference = np.asarray(read_image(tmp_path / "a.tif")).astype(int) - np.asarray(gradient)
    assert np.abs(difference).mean() < 8
