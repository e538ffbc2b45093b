"""Every kind of image file becomes the RGB pixels that its annotations refer to, or one clear error."""

import logging
import struct

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from hf_dino.data import InputError, list_images, read_image
from hf_dino.data import images as images_module
from hf_dino.data.images import get_image_size


@pytest.fixture
def gradient():
    """40 x 60 RGB, different everywhere."""
    rows, columns = np.mgrid[0:40, 0:60]
    return Image.fromarray(np.stack([rows * 6, columns * 4, rows + columns], axis=-1).astype(np.uint8))


def save_with_orientation(image, path, orientation=6):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(path, exif=exif)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr"])
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
