"""The shapes dataset: annotations match the images, and no file is lost or overwritten."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_dino.data.shapes import OUTLINES, draw_image, generate_shapes, main
from hf_dino.utils.errors import InputError


SMALL = {"image_size": 64, "num_train": 6, "num_val": 2, "num_test": 2}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def points_inside(corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Even-odd rule, slowly: `corners` (n, 2), `points` (m, 2), both (x, y) -> (m,) bool."""
    inside = np.zeros(len(points), dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        crosses = (y0 > points[:, 1]) != (y1 > points[:, 1])
        with np.errstate(divide="ignore", invalid="ignore"):
            inside ^= crosses & (points[:, 0] < x0 + (points[:, 1] - y0) * (x1 - x0) / (y1 - y0))
    return inside


def test_boxes_and_areas_fit_the_outlines_clipped_at_the_border() -> None:
    size, step = 96, 0.25
    axis = np.arange(step / 2, size, step)
    points = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    border_cases = 0
    for seed in range(12):
        for drawn in draw_image(np.random.default_rng(seed), size)[1]:
            seen = points[points_inside(drawn.outline, points)]
            x, y, width, height = drawn.box
            expected = np.concatenate([seen.min(axis=0) - step / 2, seen.max(axis=0) + step / 2])
            np.testing.assert_allclose([x, y, x + width, y + height], expected, atol=2.1 * step)
            perimeter = np.linalg.norm(drawn.outline - np.roll(drawn.outline, 1, axis=0), axis=1).sum()
            assert abs(drawn.area - len(seen) * step**2) <= perimeter * step
            border_cases += drawn.outline.min() < 0 or drawn.outline.max() > size
    assert border_cases  # otherwise the clipping was not tested


def test_enough_of_every_object_is_visible() -> None:
    size = 96
    axis = np.arange(0.5, size)
    points = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    for seed in range(20):
        masks = [points_inside(drawn.outline, points) for drawn in draw_image(np.random.default_rng(seed), size)[1]]
        for index, mask in enumerate(masks):
            covered = np.logical_or.reduce([np.zeros_like(mask), *masks[index + 1 :]])
            assert (mask & ~covered).sum() >= 0.6 * mask.sum()


def test_images_vary() -> None:
    images = [draw_image(np.random.default_rng(seed), 64) for seed in range(80)]
    assert {len(objects) for _, objects in images} == set(range(6))
    assert {drawn.name for _, objects in images for drawn in objects} == set(OUTLINES)
    assert len(OUTLINES) >= 5


def test_same_settings_same_files(tmp_path: Path) -> None:
    first = generate_shapes(tmp_path / "first", **SMALL)
    second = generate_shapes(tmp_path / "second", **SMALL)
    assert contents(first) == contents(second)
    other = contents(generate_shapes(tmp_path / "other", seed=1, **SMALL))
    assert not set(contents(first).values()) & {data for name, data in other.items() if name.endswith(".png")}


def test_splits_share_no_image_and_larger_sets_begin_alike(tmp_path: Path) -> None:
    small = contents(generate_shapes(tmp_path / "small", **SMALL))
    images = [data for name, data in small.items() if name.endswith(".png")]
    assert len(set(images)) == len(images) == 10
    large = contents(generate_shapes(tmp_path / "large", **(SMALL | {"num_train": 8})))
    assert all(large[name] == data for name, data in small.items() if name.endswith(".png"))


def test_annotations_are_coco(tmp_path: Path) -> None:
    coco_module = pytest.importorskip("pycocotools.coco")
    folder = generate_shapes(tmp_path / "shapes", **SMALL)
    coco = coco_module.COCO(folder / "train.json")
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(OUTLINES)
    assert len(coco.getImgIds()) == 6
    for image in coco.loadImgs(coco.getImgIds()):
        with Image.open(folder / "train" / image["file_name"]) as opened:
            assert (opened.size, opened.mode) == ((image["width"], image["height"]), "RGB")
        for annotation in coco.loadAnns(coco.getAnnIds([image["id"]])):
            x, y, width, height = annotation["bbox"]
            assert min(x, y) >= 0
            assert max(x + width, y + height) <= 64
            assert 0 < annotation["area"] <= width * height
    ids = [annotation["id"] for annotation in json.loads((folder / "train.json").read_text())["annotations"]]
    assert ids == list(range(1, len(ids) + 1))


def test_the_same_dataset_is_used_again(tmp_path: Path) -> None:
    folder = generate_shapes(tmp_path / "shapes", **SMALL)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    generate_shapes(folder, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times


def test_nothing_else_is_overwritten(tmp_path: Path) -> None:
    folder = generate_shapes(tmp_path / "shapes", **SMALL)
    before = contents(folder)
    with pytest.raises(InputError, match=r"is another shapes dataset.*'seed': 0.*instead of.*'seed': 5"):
        generate_shapes(folder, seed=5, **SMALL)
    assert contents(folder) == before
    (folder / "val" / "000001.png").unlink()
    with pytest.raises(InputError, match="files are missing, 1 of 2 val images found"):
        generate_shapes(folder, **SMALL)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="mine: is not empty and not a shapes dataset"):
        generate_shapes(tmp_path / "mine", **SMALL)
    assert contents(tmp_path / "mine") == {"notes.txt": b"mine"}


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        generate_shapes(tmp_path / "shapes", **SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 8}, "image_size must be at least 32 pixels, got 8"),
        ({"num_val": -1}, "must not be negative"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_numbers_out_of_range(tmp_path: Path, wrong: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate_shapes(tmp_path / "shapes", **(SMALL | wrong))


@pytest.mark.parametrize(
    "options",
    [
        ("--output_dir", "--image_size", "--num_train", "--num_val", "--num_test"),
        ("--output-dir", "--image-size", "--num-train", "--num-val", "--num-test"),
        ("--output", "--image-size", "--num-train", "--num-val", "--num-test"),
    ],
)
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]) -> None:
    folder = tmp_path / "shapes"
    arguments = [f"{option}={value}" for option, value in zip(options, (folder, 64, 2, 0, 0), strict=True)]
    main(arguments)
    assert capsys.readouterr().out == f"{folder}\n"
    assert len(list((folder / "train").iterdir())) == 2
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--seed", "9"])
    assert "another shapes dataset" in capsys.readouterr().err
