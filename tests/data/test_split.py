"""Parts of a dataset: every image in one, classes in equal shares, near-duplicates together, the source untouched."""

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from helpers.coco_files import annotation, write_coco
from helpers.command_line import hf_dino
from helpers.data_formats import FORMATS, coco_text, draw, voc_xml, write, write_shapes
from helpers.models import tiny_config
from hf_dino.data import (
    AnnotatedImage,
    DetectionSplit,
    InputError,
    ReadOptions,
    check_data,
    convert_data,
    read_data,
    split_data,
)
from hf_dino.data.split import compare_thumbnails, missing_split_message, thumbnail


pytestmark = pytest.mark.usefixtures("datasets_cache")


def scene(rng, size=(48, 64)):
    """A smooth image unlike any other."""
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize(size[::-1], Image.Resampling.BICUBIC)


def shot_again(image, rng):
    """The same scene a moment later: brighter or darker, moved by up to a percent, compressed, with noise."""
    moved = image.transform(
        image.size, Image.Transform.AFFINE, (1, 0, rng.uniform(-0.7, 0.7), 0, 1, rng.uniform(-0.7, 0.7))
    )
    pixels = np.asarray(moved, dtype=np.float64) * rng.uniform(0.8, 1.1) + rng.normal(0, 4, (*image.size[::-1], 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=int(rng.integers(60, 95)))
    return Image.open(file).convert("RGB")


@dataclass(frozen=True)
class InMemory:
    """An image that is not a file."""

    name: str
    content: bytes

    def open(self, mode="rb", /):
        return io.BytesIO(self.content)

    def __str__(self):
        return self.name


def in_memory(name, image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return InMemory(name, file.getvalue())


def annotated(image_id, image, category_ids, iscrowd=None):
    count = len(category_ids)
    return AnnotatedImage(
        image_id=image_id,
        path=in_memory(f"{image_id}.png", image),
        height=image.height,
        width=image.width,
        boxes=np.tile([1.0, 2.0, 9.0, 8.0], (count, 1)),
        category_ids=np.array(category_ids, dtype=np.int64),
        areas=np.full(count, 72.0),
        iscrowd=np.zeros(count, dtype=np.int64) if iscrowd is None else np.array(iscrowd),
    )


def random_labels(rng, num_images, num_classes):
    """Classes of each image: some frequent and some rare, several in an image or none."""
    frequencies = np.clip(2 * rng.dirichlet(np.full(num_classes, 0.5)), 0.01, 0.9)
    return [np.flatnonzero(rng.random(num_classes) < frequencies) for _ in range(num_images)]


def split_of(labels, images, **options):
    categories = {number: f"class {number}" for number in range(max(map(max, filter(len, labels))) + 1)}
    return DetectionSplit(
        "memory", [annotated(n, image, ids) for n, (image, ids) in enumerate(zip(images, labels), 1)], categories
    )


def ids_of(parts):
    return {split: sorted(image.image_id for image in data.images) for split, data in parts.splits.items()}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shares", [{"validation": 0.2}, {"validation": 0.15, "test": 0.15}, {"validation": 0.5}])
def test_every_class_has_its_share_in_every_part(seed, shares):
    """Within two images, and so have images without objects and all images; a random choice is off by up to 15."""
    rng = np.random.default_rng(seed)
    num_images, num_classes = int(rng.integers(60, 300)), int(rng.integers(1, 25))
    labels = random_labels(rng, num_images, num_classes)
    parts = split_data({"train": split_of(labels, [scene(rng, (18, 18)) for _ in labels])}, seed=seed, **shares)
    assert sorted(image_id for ids in ids_of(parts).values() for image_id in ids) == list(range(1, num_images + 1))
    assert parts.near_duplicates == []

    def counts(images):
        numbers = np.zeros(num_classes + 2)
        for image in images:
            numbers[np.unique(image.category_ids)] += 1
            numbers[num_classes] += not len(image.category_ids)
        return np.append(numbers[:-1], len(images))

    total = counts([image for data in parts.splits.values() for image in data.images])
    for split, share in {"train": 1 - sum(shares.values()), **shares}.items():
        assert np.abs(counts(parts.splits[split].images) - share * total).max() <= 2
    assert not [error for error in check_data(parts.splits).errors if "does not have" in error]


def test_near_duplicates_are_never_divided():
    rng = np.random.default_rng(0)
    sizes = [1] * 40 + [2, 2, 3, 5, 8, 13]
    images, truth = [], []
    for size in sizes:
        images += [first := scene(rng, (96, 128)), *(shot_again(first, rng) for _ in range(size - 1))]
        truth.append(list(range(len(images) - size + 1, len(images) + 1)))
    labels = random_labels(rng, len(images), 5)
    order = rng.permutation(len(images))
    pool = split_of(labels, images)
    pool = DetectionSplit(pool.source, [pool.images[index] for index in order], pool.categories)
    for seed in range(3):
        parts = split_data({"train": pool}, validation=0.2, test=0.1, seed=seed)
        found = [sorted(image.image_id for image in group) for group in parts.near_duplicates]
        assert sorted(found) == [group for group in truth if len(group) > 1]
        for ids in truth:
            assert sum(bool({*ids} & {*of_part}) for of_part in ids_of(parts).values()) == 1
    alone = split_data({"train": pool}, similarity=1.0)
    assert alone.near_duplicates == []


def test_a_sequence_of_frames_stays_together_although_its_ends_differ():
    rng = np.random.default_rng(0)
    panorama = scene(rng, (60, 600)).resize((400, 60))
    frames = [panorama.crop((2 * step, 0, 2 * step + 100, 60)) for step in range(40)]
    looks = compare_thumbnails([thumbnail(frame) for frame in frames])
    assert looks[0] @ looks[-1] < 0.5
    images = [*frames, *(scene(rng, (60, 100)) for _ in range(60))]
    parts = split_data({"train": split_of([np.array([0])] * 100, images)})
    assert [len(group) for group in parts.near_duplicates] == [40]


def test_images_of_a_fixed_camera_are_divided_with_a_warning():
    """Only what is more alike than most is kept together, in the end equal files."""
    rng = np.random.default_rng(0)
    background = scene(rng)
    images = []
    for _ in range(30):
        images.append(image := background.copy())
        x, y = rng.integers(0, 40, 2).tolist()
        image.paste((255, 0, 0), (x, y, x + 6, y + 6))
    images += images[:3]
    parts = split_data({"train": split_of([np.array([0])] * 33, images)})
    assert len(parts.splits["validation"].images) in (6, 7)
    (warning,) = parts.warnings
    assert re.fullmatch(r"most images look alike: only (equal files|those .* of 0\.9\d+) are kept together", warning)
    for equal in ((1, 31), (2, 32), (3, 33)):
        assert sum(bool({*equal} & {*of_part}) for of_part in ids_of(parts).values()) == 1


def test_images_without_contrast_are_not_near_duplicates():
    gray = [Image.new("RGB", (40, 30), (level,) * 3) for level in range(0, 250, 25)]
    assert split_data({"train": split_of([np.array([0])] * 10, gray)}).near_duplicates == []


def named_parts(folder):
    return {
        split: sorted(hashlib.sha256(image.path.read_bytes()).hexdigest() for image in data.images)
        for split, data in read_data(folder).items()
    }


def one_part(folder, num_images=24, num_classes=4, seed=0):
    """An export in COCO format: one file, with crowds, areas of masks and images without objects."""
    rng = np.random.default_rng(seed)
    objects = [
        annotation(n + 1, int(class_) + 1, [1, 2, 20, 11], area=200.5, iscrowd=int(rng.random() < 0.1))
        for n, classes in enumerate(random_labels(rng, num_images, num_classes))
        for class_ in classes
    ]
    names = {number + 1: f"class {number}" for number in range(num_classes)}
    sizes = [(30 + n % 3, 40) for n in range(num_images)]
    write_coco(folder, objects, sizes=sizes, categories=names)
    (folder / "annotations.json").rename(folder / "instances_default.json")
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_images_are_chosen_whatever_their_names_order_and_format(tmp_path):
    source = one_part(tmp_path / "a")
    content = json.loads((source / "instances_default.json").read_text())
    other = tmp_path / "elsewhere" / "b"
    for image in content["images"]:
        name = f"{hashlib.sha256(image['file_name'].encode()).hexdigest()[:8]}.png"
        (other / "images").mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "images" / image["file_name"], other / "images" / name)
        image["file_name"] = name
    for part in ("images", "annotations"):
        np.random.default_rng(1).shuffle(content[part])
    write(other / "labels.json", json.dumps(content))
    for name, folder, options in (
        ("first", source, []),
        ("renamed", other, []),
        ("yolo", source, ["--format=yolo"]),
        ("seed", source, ["--seed=1"]),
    ):
        words = ["data", "split", folder, "--test=0.2", "--output_dir", tmp_path / name, *options]
        assert hf_dino(words) == 0
    first = named_parts(tmp_path / "first")
    assert list(first) == ["train", "validation", "test"]
    assert first == named_parts(tmp_path / "renamed") == named_parts(tmp_path / "yolo")
    assert first != named_parts(tmp_path / "seed")


def records(data):
    """All that a COCO file has of each image, by its id."""
    return {
        image.image_id: (
            image.path.read_bytes(),
            (image.height, image.width),
            image.boxes.tolist(),
            [data.categories[id_] for id_ in image.category_ids.tolist()],
            image.category_ids.tolist(),
            image.areas.tolist(),
            image.iscrowd.tolist(),
        )
        for image in data.images
    }


def test_a_part_has_what_the_source_has_which_is_not_changed(tmp_path):
    source = one_part(tmp_path / "source")
    before = contents(source)
    assert hf_dino(["data", "split", source, "--output_dir", tmp_path / "out", "--test", "0.1"]) == 0
    assert contents(source) == before
    whole = records(read_data(source)["train"])
    parts = [records(data) for data in read_data(tmp_path / "out").values()]
    assert Counter(image_id for part in parts for image_id in part) == Counter(whole.keys())
    assert {image_id: record for part in parts for image_id, record in part.items()} == whole
    assert any(any(record[-1]) for record in whole.values())


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_split(tmp_path, name, capsys):
    shapes = write_shapes(tmp_path / "shapes")
    FORMATS[name](shapes, tmp_path / "source")
    before = contents(tmp_path / "source")
    words = ["data", "split", tmp_path / "source", "--output_dir", tmp_path / "out"]
    assert hf_dino([*words, "--merge", "--val=0.4"]) == 0
    printed = capsys.readouterr().out
    assert "test: kept" not in printed
    assert contents(tmp_path / "source") == before
    source, parts = read_data(tmp_path / "source"), read_data(tmp_path / "out")
    assert {split: len(data.images) for split, data in parts.items()} == {"train": 5, "validation": 3, "test": 2}
    assert sum(len(image.boxes) for data in parts.values() for image in data.images) == sum(
        len(image.boxes) for data in source.values() for image in data.images
    )

    def pixels(data):
        return sorted(image.read().tobytes() for image in data.images)

    assert pixels(parts["test"]) == pixels(source["test"])
    assert sorted(pixels(parts["train"]) + pixels(parts["validation"])) == sorted(
        pixels(source["train"]) + pixels(source["validation"])
    )


def killed_after(number, work):
    """Run work, which calls a function for each image, in a process that is killed at the `number`-th call."""
    child = os.fork()
    if not child:
        calls = iter(range(1, number))
        try:
            work(lambda: next(calls, None) or os.kill(os.getpid(), signal.SIGKILL))
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_killed_split_leaves_no_dataset_and_does_not_block_the_next(tmp_path):
    source = one_part(tmp_path / "source")
    before = contents(source)
    parts = split_data(read_data(source)).splits
    for number in (1, 24, 25, 40, 48):  # each image is checked, then each copied
        assert killed_after(number, lambda on_image: convert_data(parts, tmp_path / "out", "coco", on_image=on_image))
        assert not (tmp_path / "out").exists()
        assert len([*(tmp_path / ".out.part").rglob("*.png")]) == max(0, number - 24)
    assert contents(source) == before
    assert hf_dino(["data", "split", source, "--output_dir", tmp_path / "out"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def two_splits(folder, third=None):
    for number, split in enumerate(filter(None, ("train", "val", third))):
        names = [f"{split}{n}.png" for n in range(10)]
        write(folder / f"{split}.json", coco_text(*names))
        for n, name in enumerate(names):
            draw(folder / split / name, seed=100 * number + n)
    return folder


def test_a_split_that_exists_is_kept_merged_or_the_reason_to_stop(tmp_path):
    source = two_splits(tmp_path / "mine")
    words = ["data", "split", source, "--output_dir"]
    with pytest.raises(
        InputError, match=r"mine: has a validation split\. Keep it with --val 0 and make another one, or"
    ):
        hf_dino([*words, tmp_path / "out"])
    assert not (tmp_path / "out").exists()
    assert hf_dino([*words, tmp_path / "kept", "--val=0", "--test=0.2"]) == 0
    kept = read_data(tmp_path / "kept")
    assert {split: len(data.images) for split, data in kept.items()} == {"train": 8, "validation": 10, "test": 2}
    assert named_parts(tmp_path / "kept")["validation"] == named_parts(source)["validation"]
    assert hf_dino([*words, tmp_path / "merged", "--merge", "--val=0.4"]) == 0
    merged = named_parts(tmp_path / "merged")
    assert {split: len(images) for split, images in merged.items()} == {"train": 12, "validation": 8}
    assert not {*named_parts(source)["validation"]} <= {*merged["validation"]}


def test_the_only_split_is_divided_whatever_its_name(tmp_path):
    source = two_splits(tmp_path / "mine")
    (source / "train.json").unlink()
    assert hf_dino(["data", "split", source, "--output_dir", tmp_path / "out"]) == 0
    assert {split: len(images) for split, images in named_parts(tmp_path / "out").items()} == {
        "train": 8,
        "validation": 2,
    }


def test_classes_are_merged_by_name(tmp_path, capsys):
    for split, categories in (("train", {1: "cat", 2: "dog"}), ("val", {1: "dog", 2: "bird"})):
        objects = [annotation(n, 1 + n % 2, [1, 2, 20, 10]) for n in range(1, 11)]
        write_coco(tmp_path / split, objects, sizes=[(40, 60 + (split == "val"))] * 10, categories=categories)
        (tmp_path / split / "annotations.json").rename(tmp_path / f"{split}.json")
        for number, path in enumerate(sorted((tmp_path / split / "images").iterdir())):
            draw(tmp_path / split / path.name, (40, 60 + (split == "val")), seed=number + 100 * (split == "val"))
        shutil.rmtree(tmp_path / split / "images")
    assert hf_dino(["data", "split", tmp_path, "--merge", "--output_dir", f"{tmp_path}-split"]) == 0
    printed = capsys.readouterr().out
    assert "warning: 2 classes have another id, since those of the splits differ" in printed
    assert "warning: image ids are not kept, since 10 occur in several splits" in printed
    before, after = (
        Counter(data.categories[id_] for data in read_data(folder).values() for image in data.images
                for id_ in image.category_ids.tolist())
        for folder in (tmp_path, f"{tmp_path}-split")
    )  # fmt: skip
    assert before == after == {"cat": 5, "dog": 10, "bird": 5}


def test_classes_of_few_images_stay_in_train_and_this_is_said():
    rng = np.random.default_rng(0)
    labels = [np.array([0])] * 20 + [np.array([0, 1]), np.array([2]), np.array([2])]
    first = scene(rng)
    images = [scene(rng) for _ in range(21)] + [first, shot_again(first, rng)]
    parts = split_data({"train": split_of(labels, images)})
    assert {22, 23, 21} <= {*ids_of(parts)["train"]}
    assert parts.warnings == [
        "validation: 2 of 3 classes have too few images to be in it: 'class 1' (1), 'class 2' (2)"
    ]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (
            [[0]] * 2,
            {},
            r"the validation split would have no objects\. The dataset has 2 images, 2 that differ, 2 with",
        ),
        ([[0], [1], [2], [3]], {"validation": 0.5}, "the validation split would have no objects"),
        ([[0], *[[]] * 9], {"validation": 0.5}, "10 that differ, 1 with objects"),
        ([[0]] * 5, {"validation": 0.1, "test": 0.1}, "the test split would have no objects"),
        ([[0]] * 5, {"validation": 1.0}, r"together more than 0 and less than 1; got 1\.0 and 0\.0"),
        ([[0]] * 5, {"validation": 0.6, "test": 0.4}, "less than 1"),
        ([[0]] * 5, {"validation": 0.0}, "more than 0"),
        ([[0]] * 5, {"validation": -0.1, "test": 0.5}, "got -0.1"),
        ([[0]] * 5, {"validation": float("nan")}, "got nan"),
    ],
)
def test_impossible_parts(labels, options, message):
    rng = np.random.default_rng(0)
    data = split_of([np.array(each, dtype=int) for each in labels], [scene(rng) for _ in labels])
    with pytest.raises(InputError, match=message) as caught:
        split_data({"train": data}, **options)
    assert "\n" not in str(caught.value)


def test_crowds_do_not_count_as_objects_of_a_part():
    rng = np.random.default_rng(0)
    images = [annotated(n, scene(rng), [0], [int(n % 2)]) for n in range(1, 21)]
    parts = split_data({"train": DetectionSplit("memory", images, {0: "cell"})})
    assert Counter(int(image.iscrowd[0]) for image in parts.splits["validation"].images) == {0: 2, 1: 2}


def test_warnings_of_the_reader_go_to_the_part_of_their_image(tmp_path):
    source = one_part(tmp_path / "source")
    content = json.loads((source / "instances_default.json").read_text())
    content["annotations"] += [annotation(image["id"], 1, [5, 5, 0, 5]) for image in content["images"]]
    write(source / "instances_default.json", json.dumps(content))
    parts = split_data(read_data(source)).splits
    for data in parts.values():
        (paths,) = [paths for warning, paths in data.warnings.items() if "no width" in warning]
        assert sorted(paths) == sorted(str(image.path) for image in data.images)


def test_the_output_is_new_and_outside_of_the_source(tmp_path):
    source = one_part(tmp_path / "source")
    write(tmp_path / "full" / "a.txt", "mine")
    for output, message in ((source / "out", "which is not changed"), (tmp_path / "full", "already exists")):
        with pytest.raises(InputError, match=message):
            hf_dino(["data", "split", source, "--output_dir", output])
    pair = ["--images", source / "images", "--annotations", source / "instances_default.json"]
    with pytest.raises(InputError, match="which is not changed"):
        hf_dino(["data", "split", *pair, "--output_dir", source / "images" / "out"])
    with pytest.raises(InputError, match=r"cannot be created, since .* is a file"):
        hf_dino(["data", "split", source, "--output_dir", tmp_path / "full" / "a.txt" / "out"])
    assert hf_dino(["data", "split", *pair, "--output_dir", tmp_path / "out"]) == 0
    assert contents(tmp_path / "full") == {tmp_path / "full" / "a.txt": b"mine"}


def test_a_file_stands_for_the_directory_of_its_dataset(tmp_path):
    file = tmp_path / "mine" / "annotations" / "instances_default.json"
    write(file, "{}")
    message = missing_split_message(str(file), ["train"], ReadOptions())
    assert message.endswith(f"--output_dir {tmp_path}/mine-split")
    with pytest.raises(InputError, match=r"mine/out: is in .*mine, which is not changed"):
        hf_dino(["data", "split", file, "--output_dir", tmp_path / "mine" / "out"])


def test_a_broken_image_is_an_error_before_anything_is_written(tmp_path):
    source = one_part(tmp_path / "source")
    path = source / "images" / "3.png"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match=r"3\.png: cannot be read as an image"):
        hf_dino(["data", "split", source, "--output_dir", tmp_path / "out"])
    assert [each.name for each in tmp_path.iterdir()] == ["source"]


def test_check_names_images_that_look_like_those_of_train(tmp_path):
    rng = np.random.default_rng(0)
    first = scene(rng)
    train = split_of([np.array([0])] * 4, [first, *(scene(rng) for _ in range(3))])
    other = split_of([np.array([0])] * 3, [scene(rng), shot_again(first, rng), shot_again(first, rng)])
    warnings = check_data({"train": train, "validation": other}).warnings
    assert "validation: 2 images look like images of train: 2.png = 1.png, 3.png = 1.png" in warnings
    for decode, splits in ((False, {"train": train, "validation": other}), (True, {"train": train, "test": train})):
        found = [warning for warning in check_data(splits, decode=decode).warnings if "look like" in warning]
        assert len(found) == decode


def command_in(text):
    """Return the words after the `hf-dino` of a message's last line."""
    return shlex.split(text.partition("hf-dino ")[2].splitlines()[0])


def test_the_commands_that_messages_name_lead_from_an_export_to_a_model(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_part(tmp_path / "my export", num_images=10)
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(tiny_config(freeze_backbone_batch_norms=False).to_diff_dict()))
    options = [f"--config_name={config}", "--image_size=64", "--global_batch_size=2", "--dataloader_num_workers=0"]
    run = ["--output_dir=run", "--max_train_steps=2", "--augmentation=none"]
    message = r"my export: validation split not found; make one with: hf-dino data split 'my export' --output_dir "
    with pytest.raises(InputError, match=message) as caught:
        hf_dino(["train", "--data", "my export", *options, *run])
    assert hf_dino(["data", "check", "my export"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "not found" in line]
    assert (
        command_in(line)
        == command_in(str(caught.value))
        == ["data", "split", "my export", "--output_dir", "my export-split"]
    )
    assert hf_dino(command_in(line)) == 0
    printed = capsys.readouterr().out
    assert "format: COCO (instances_default.json)" in printed
    command = command_in(printed.partition("next: ")[2])
    assert command[command.index("--model_name_or_path") + 1 :][::2] == ["MODEL", "RUN"]
    command = command[: command.index("--model_name_or_path")]
    assert hf_dino(["data", "check", "my export-split"]) == 0
    assert "not found" not in capsys.readouterr().out
    assert hf_dino([*command, *options, *run]) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("source", "splits", "options", "message"),
    [
        ("mine", ["train", "validation"], {}, ""),
        ("mine/", ["train", "test"], {}, "validation split not found; make one with: hf-dino data split mine/ "
         "--output_dir mine-split"),
        ("me/cells:part@v2", ["train"], {"columns": {"objects": "my faces"}}, "validation split not found; make one "
         "with: hf-dino data split me/cells:part@v2 --columns 'objects=my faces' --output_dir cells-split"),
        ("mine", ["test"], {"box_format": "xyxy"}, "train and validation split not found; make one with: hf-dino data "
         "split mine --box_format xyxy --output_dir mine-split"),
        ("mine", ["validation", "test"], {}, "train split not found; make one with: hf-dino data split mine --merge "
         "--output_dir mine-split"),
        ("mine/data.yaml", ["train"], {}, "validation split not found; make one with: hf-dino data split "
         "mine/data.yaml --output_dir mine-split"),
    ],
)  # fmt: skip
def test_the_message_about_a_missing_split(tmp_path, monkeypatch, source, splits, options, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine" / "data.yaml", "")
    assert missing_split_message(source, splits, ReadOptions(**options)) == message


def test_the_message_in_the_directory_of_the_dataset(tmp_path, monkeypatch):
    write(tmp_path / "mine" / "data.yaml", "")
    monkeypatch.chdir(tmp_path / "mine")
    for source in (".", "data.yaml"):
        assert missing_split_message(source, ["train"], ReadOptions()).endswith(f"--output_dir {tmp_path}/mine-split")


def test_parts_without_validation_are_said_not_to_be_ready(tmp_path, capsys):
    source = one_part(tmp_path / "mine")
    assert hf_dino(["data", "split", source, "--val=0", "--test=0.2", "--output_dir", tmp_path / "out"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("validation split not found; make one with: hf-dino data split")


def test_pascal_voc_without_lists(tmp_path):
    for number in range(10):
        draw(tmp_path / "mine" / f"{number}.png", seed=number)
        write(tmp_path / "mine" / f"{number}.xml", voc_xml((40, 60), [("cell", [1, 2, 30, 20])]))
    assert hf_dino(["data", "split", tmp_path / "mine", "--output_dir", tmp_path / "out", "--format=voc"]) == 0
    assert {split: len(data.images) for split, data in read_data(tmp_path / "out").items()} == {
        "train": 8,
        "validation": 2,
    }
