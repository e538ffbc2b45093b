"""The `shapes` dataset in every format that can be read, and small files of each."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_dino.data.shapes import generate_shapes


SPLITS = {"train": "train", "val": "validation", "test": "test"}


def write_shapes(folder: Path) -> Path:
    """Shapes of 128 pixels: boxes are multiples of a quarter pixel, exact in single precision as fractions.

    Annotations have no area, which other formats do not support. The second training image has no objects.
    """
    generate_shapes(folder, seed=1, image_size=128, num_train=5, num_val=3, num_test=2)
    for split in SPLITS:
        file = folder / f"{split}.json"
        content = json.loads(file.read_text())
        content["annotations"] = [
            {key: value for key, value in each.items() if key != "area"}
            for each in content["annotations"]
            if (split, each["image_id"]) != ("train", 2)
        ]
        file.write_text(json.dumps(content))
    return folder


def images_of(shapes: Path, split: str) -> list[tuple[Path, int, list[tuple[str, list[float]]]]]:
    """Each image, its id, and the class name and box (x, y, width, height in pixels) of its objects."""
    content = json.loads((shapes / f"{split}.json").read_text())
    names = {each["id"]: each["name"] for each in content["categories"]}
    objects: dict[int, list[Any]] = {each["id"]: [] for each in content["images"]}
    for each in content["annotations"]:
        objects[each["image_id"]].append((names[each["category_id"]], each["bbox"]))
    return [(shapes / split / each["file_name"], each["id"], objects[each["id"]]) for each in content["images"]]


def class_names(shapes: Path) -> list[str]:
    """In the order of the COCO file."""
    return [each["name"] for each in json.loads((shapes / "train.json").read_text())["categories"]]


def as_coco(shapes: Path, folder: Path) -> None:
    """As COCO's own folders are laid out."""
    (folder / "annotations").mkdir(parents=True)
    for split in SPLITS:
        shutil.copytree(shapes / split, folder / f"{split}2017")
        shutil.copy(shapes / f"{split}.json", folder / "annotations" / f"instances_{split}2017.json")
        (folder / "annotations" / f"captions_{split}2017.json").write_text("{}")


def voc_xml(size: tuple[int, int], objects: list[tuple[str, list[float]]], difficult: str = "0") -> str:
    """Return the text of an annotation file; `size` is (height, width)."""
    return (
        f"<annotation><size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"
        + "".join(
            f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x + 1}</xmin>"
            f"<ymin>{y + 1}</ymin><xmax>{x + width}</xmax><ymax>{y + height}</ymax></bndbox></object>"
            for name, (x, y, width, height) in objects
        )
        + "</annotation>"
    )


def as_voc(shapes: Path, folder: Path) -> None:
    """As the devkit: all splits in one folder, with a list of images for each."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for split in SPLITS:
        stems = []
        for path, _, objects in images_of(shapes, split):
            stems.append(f"{split}_{path.stem}")
            shutil.copy(path, folder / "JPEGImages" / f"{stems[-1]}.png")
            (folder / "Annotations" / f"{stems[-1]}.xml").write_text(voc_xml((128, 128), objects))
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems) + "\n")
        (folder / "ImageSets" / "Main" / f"circle_{split}.txt").write_text(f"{stems[0]} -1\n")


def yolo_lines(size: tuple[int, int], objects: list[tuple[int, list[float]]]) -> str:
    """Return the text of a label file; `size` is (height, width)."""
    height, width = size
    return "".join(
        f"{number} {(x + w / 2) / width!r} {(y + h / 2) / height!r} {w / width!r} {h / height!r}\n"
        for number, (x, y, w, h) in objects
    )


def as_yolo(shapes: Path, folder: Path) -> None:
    """As Ultralytics: folders images and labels, each with a folder for each split, and a YAML file."""
    names = class_names(shapes)
    for split in SPLITS:
        shutil.copytree(shapes / split, folder / "images" / split)
        (folder / "labels" / split).mkdir(parents=True)
        for path, _, objects in images_of(shapes, split):
            if objects:
                numbered = [(names.index(name), box) for name, box in objects]
                (folder / "labels" / split / f"{path.stem}.txt").write_text(yolo_lines((128, 128), numbered))
    splits = "".join(f"{split}: images/{split}\n" for split in SPLITS)
    (folder / "data.yaml").write_text(f"path: /another/machine\n{splits}names: {names}\n")


def as_imagefolder(shapes: Path, folder: Path) -> None:
    """As `datasets` reads it: metadata.jsonl next to the images of each split."""
    for split, name in SPLITS.items():
        shutil.copytree(shapes / split, folder / name)
        rows = [
            {
                "file_name": path.name,
                "image_id": image_id,
                "objects": {"bbox": [box for _, box in objects], "categories": [name for name, _ in objects]},
            }
            for path, image_id, objects in images_of(shapes, split)
        ]
        (folder / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


FORMATS = {"coco": as_coco, "voc": as_voc, "yolo": as_yolo, "datasets": as_imagefolder}


def draw(path: Path, size: tuple[int, int] = (40, 60), seed: int = 0) -> None:
    """Write a noise image of `size` (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def write(path: Path, text: str) -> None:
    """Write a text file and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def coco_text(*names: str, box: tuple[float, ...] = (1, 2, 30, 20)) -> str:
    """Return the text of a COCO file of images of 40 x 60 pixels, each with one object of class cell."""
    return json.dumps(
        {
            "images": [{"id": n, "file_name": name, "height": 40, "width": 60} for n, name in enumerate(names)],
            "annotations": [
                {"id": n, "image_id": n, "category_id": 1, "bbox": list(box)} for n, _ in enumerate(names)
            ],
            "categories": [{"id": 1, "name": "cell"}],
        }
    )
