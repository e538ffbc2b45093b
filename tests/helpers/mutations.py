"""Small exports in every format, and seeded mutations of them: what other people's tools and hands do to files.

An export is a mapping from paths to contents. A mutation changes it so that either nothing is meant to change for a
reader (another order, a number written as text), or a value becomes one that no reader can take at face value.
Alterations to other valid values are left out: a reader cannot know them.
"""

import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image


SIZE = (48, 64)  # height, width
CLASSES = ("cat", "dog", "traffic light")
Objects = list[tuple[str, tuple[int, int, int, int], int]]  # class, x, y, width, height in pixels, iscrowd
Export = dict[str, bytes]


def _objects(number: int, crowds: bool) -> Objects:
    """Return the objects of an image; their boxes are exact in every format."""
    return [
        (CLASSES[(number + k) % 3], (4 * k + 4, 8, 16 + 4 * (number % 5), 12 + 4 * k), int(crowds and k == 2))
        for k in range(1 + number % 3)
    ]


IMAGES = {"train": [f"a {number}.png" for number in range(5)], "val": [f"v_{number}.png" for number in range(3)]}


def objects_of(name: str, crowds: bool = False) -> Objects:
    """Return the objects of an image by its file name."""
    return _objects(int(re.findall(r"\d", name)[0]), crowds)


def _png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", SIZE[::-1], (seed * 29 % 256, seed * 53 % 256, seed * 97 % 256)).save(buffer, "PNG")
    return buffer.getvalue()


PIXELS = {name: _png(number) for number, name in enumerate([*IMAGES["train"], *IMAGES["val"]], start=1)}


def _json(content: Any) -> bytes:
    return json.dumps(content).encode()


def coco() -> Export:
    """Write images in a directory of each split, and one file of annotations for each."""
    export = {f"{split}/{name}": PIXELS[name] for split, names in IMAGES.items() for name in names}
    for split, names in IMAGES.items():
        annotations: list[dict[str, Any]] = []
        for image_id, name in enumerate(names, start=10):
            for label, box, crowd in objects_of(name, crowds=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": CLASSES.index(label) + 5,
                        "bbox": list(box),
                        "area": box[2] * box[3],
                        "iscrowd": crowd,
                    }
                )
        export[f"{split}.json"] = _json(
            {
                "images": [
                    {"id": image_id, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
                    for image_id, name in enumerate(names, start=10)
                ],
                "annotations": annotations,
                "categories": [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=5)],
            }
        )
    return export


_OBJECT = (
    "<object>\n<name>{}</name>\n<difficult>{}</difficult>\n<bndbox>\n<xmin>{}</xmin>\n<ymin>{}</ymin>\n"
    "<xmax>{}</xmax>\n<ymax>{}</ymax>\n</bndbox>\n</object>\n"
)


def voc() -> Export:
    """Write images and XML files beside them, in a directory of each split."""
    export = {f"{split}/{name}": PIXELS[name] for split, names in IMAGES.items() for name in names}
    for path in list(export):
        objects = "".join(
            _OBJECT.format(label, crowd, x + 1, y + 1, x + w, y + h)
            for label, (x, y, w, h), crowd in objects_of(path, crowds=True)
        )
        export[path.replace(".png", ".xml")] = (
            f"<annotation>\n<filename>{Path(path).name}</filename>\n<size>\n<width>{SIZE[1]}</width>\n"
            f"<height>{SIZE[0]}</height>\n<depth>3</depth>\n</size>\n{objects}</annotation>\n"
        ).encode()
    return export


def yolo() -> Export:
    """Write images and labels in a directory of each split, and data.yaml."""
    export = {f"images/{split}/{name}": PIXELS[name] for split, names in IMAGES.items() for name in names}
    for path in list(export):
        export[path.replace("images/", "labels/").replace(".png", ".txt")] = "".join(
            f"{CLASSES.index(label)} {(x + w / 2) / 64!r} {(y + h / 2) / 48!r} {w / 64!r} {h / 48!r}\n"
            for label, (x, y, w, h), _ in objects_of(path)
        ).encode()
    export["data.yaml"] = f"train: images/train\nval: images/val\nnc: 3\nnames: {list(CLASSES)}\n".encode()
    return export


def table() -> Export:
    """Write images with metadata.jsonl in a directory of each split."""
    export = {f"{split}/{name}": PIXELS[name] for split, names in IMAGES.items() for name in names}
    for split, names in IMAGES.items():
        rows = [
            {
                "file_name": name,
                "image_id": number,
                "width": SIZE[1],
                "height": SIZE[0],
                "objects": {
                    "bbox": [list(box) for _, box, _ in objects_of(name)],
                    "category": [label for label, _, _ in objects_of(name)],
                },
            }
            for number, name in enumerate(names, start=3)
        ]
        export[f"{split}/metadata.jsonl"] = b"\n".join(map(_json, rows))
    return export


EXPORTS: dict[str, Callable[[], Export]] = {"coco": coco, "voc": voc, "yolo": yolo, "datasets": table}


class Mutation(NamedTuple):
    """A mutated export.

    Attributes:
        export (`dict[str, bytes]`): Its files.
        description (`str`): What was done, to be able to repeat it.
        images (`set[str]` or `None`): Names of the only images that may read otherwise; `None` for any.
    """

    export: Export
    description: str
    images: set[str] | None


def write_export(export: Export, folder: Path) -> None:
    """Write the files of an export below a directory."""
    for path, content in export.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def mutate(form: str, seed: int) -> Mutation:
    """Return an export in a format with one mutation that depends on the seed, or two for every fourth seed."""
    rng = random.Random(f"{form} {seed}")
    first = _mutate_once(rng, form, EXPORTS[form]())
    if seed % 4:
        return first
    try:
        second = _mutate_once(rng, form, dict(first.export))
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, OSError):
        return first  # the first one left nothing to change
    images = None if None in (first.images, second.images) else (first.images or set()) | (second.images or set())
    return Mutation(second.export, f"{first.description}; {second.description}", images)


def _mutate_once(rng: random.Random, form: str, export: Export) -> Mutation:
    while (mutation := rng.choice(MUTATORS[form])(rng, export)) is None:
        pass
    return mutation


NOT_NUMBERS = [None, float("nan"), float("inf"), "abc", "", [], {}, True, False, 1e300, -1e300, "NaN", [1], "1,5"]
NOT_TEXT = [None, "", " ", [], {}, True, ["cat"]]


def _spellings(value: float) -> list[Any]:
    """Return the same number as other tools write it."""
    return [float(value), str(value), f" {value} ", f"{value}.0", [value]]


def _same_name(value: str) -> list[Any]:
    return [f" {value}", f"{value}\t", value]


def _pick(rng: random.Random, value: Any) -> Any:
    """Return what may stand in place of a number or a text."""
    if isinstance(value, str):
        return rng.choice(NOT_TEXT + _same_name(value))
    return rng.choice(NOT_NUMBERS + _spellings(value))


_IDENTIFIERS = ("id", "image_id", "category_id")


def _mutate_value(rng: random.Random, container: Any, key: Any) -> str:
    """Replace or delete one value of a JSON document, in place."""
    value = container[key]
    if key == "iscrowd":  # may be missing, and true and false are as good as 1 and 0
        container[key] = rng.choice(["abc", "yes", 2, -1, None, [], float("nan"), value, float(value), str(value)])
        return f"{key}: {value!r} -> {container[key]!r}"
    if rng.random() < 0.15:
        del container[key]
        return f"{key} deleted"
    if isinstance(value, list) and value and rng.random() < 0.7:
        inner = rng.randrange(len(value))
        return f"{key}: {_mutate_value(rng, value, inner)}"
    if isinstance(value, dict):
        return f"{key}: {_mutate_value(rng, value, rng.choice(sorted(value)))}"
    new = rng.choice([None, "abc", [], {}, 5, value + value[:1]]) if isinstance(value, list) else _pick(rng, value)
    if key in _IDENTIFIERS:
        new = rng.choice([new, -1, 1.5, 2**70, 999])
    container[key] = new
    return f"{key}: {value!r} -> {new!r}"


def _mutate_coco_entry(rng: random.Random, export: Export) -> Mutation:
    split = rng.choice(sorted(IMAGES))
    content = json.loads(export[f"{split}.json"])
    part = rng.choice(["images", "annotations", "annotations", "annotations", "categories"])
    entry = rng.choice(content[part])
    names = {each["id"]: each["file_name"] for each in content["images"]}
    touched = {names[entry["image_id"]]} if part == "annotations" else None
    description = f"{split} {part} {_mutate_value(rng, entry, rng.choice(sorted(entry)))}"
    export[f"{split}.json"] = _json(content)
    return Mutation(export, description, touched)


def _mutate_coco_structure(rng: random.Random, export: Export) -> Mutation:
    split = rng.choice(sorted(IMAGES))
    content = json.loads(export[f"{split}.json"])
    part = rng.choice(["images", "annotations", "categories"])

    def retype(change: Callable[[Any], Any]) -> None:
        for part, key in (("images", "id"), ("annotations", "image_id"), ("categories", "id")):
            for entry in content[part]:
                entry[key] = change(entry[key])

    actions: dict[str, Callable[[], Any]] = {
        "shuffled": lambda: rng.shuffle(content[part]),
        "doubled entry": lambda: content[part].append(dict(rng.choice(content[part]))),
        "doubled image file": lambda: content["images"].append(dict(content["images"][0], id=77)),
        "part null": lambda: content.update({part: None}),
        "part empty": lambda: content.update({part: []}),
        "part missing": lambda: content.pop(part),
        "part as mapping": lambda: content.update({part: dict(enumerate(content[part]))}),
        "more keys": lambda: [entry.update(note={"by": "me"}, segmentation=[]) for entry in content[part]],
        "more parts": lambda: content.update(info=None, licenses=[], type="instances"),
        "ids as floats": lambda: retype(float),
        "ids as text": lambda: retype(str),
        "null entry": lambda: content[part].append(None),
        "sizes missing": lambda: [entry.pop("width") for entry in content["images"]],
        "sizes swapped": lambda: [
            entry.update(width=entry["height"], height=entry["width"]) for entry in content["images"]
        ],
        "image not listed": lambda: content["images"].pop(rng.randrange(len(content["images"]))),
        "category not listed": lambda: content["categories"].pop(rng.randrange(3)),
        "a list around all": lambda: content.update({"images": [content["images"]]}),
        "corners": lambda: [
            each.update(bbox=[each["bbox"][0], each["bbox"][1], each["bbox"][0] + 45, each["bbox"][1] + 35])
            for each in content["annotations"]
        ],
        "fractions": lambda: [
            each.update(bbox=[value / 64 for value in each["bbox"]]) for each in content["annotations"]
        ],
    }
    name = rng.choice(sorted(actions))
    actions[name]()
    export[f"{split}.json"] = _json(content)
    return Mutation(export, f"{split} {part} {name}", None)


def _mutate_file_names(rng: random.Random, export: Export) -> Mutation:
    split = rng.choice(sorted(IMAGES))
    content = json.loads(export[f"{split}.json"])
    forms: dict[str, Callable[[str], str]] = {
        "backslashes": lambda name: f"images\\{name}",
        "absolute": lambda name: f"/home/me/{split}/{name}",
        "Windows": lambda name: f"C:\\data\\{name}",
        "escapes": lambda name: f"../../../../etc/{name}",
        "percent": lambda name: name.replace(" ", "%20").replace("_", "%5F"),
        "URL": lambda name: f"https://host/data/{name.replace(' ', '%20')}?token=1",
        "upload": lambda name: f"data/upload/1/0a1b2c3d-{name}",
        "upper case": str.upper,
        "no suffix": lambda name: name.removesuffix(".png"),
        "other suffix": lambda name: name.replace(".png", ".jpg"),
        "one name for all": lambda name: content["images"][0]["file_name"],
        "of the other split": lambda name: f"../{'val' if split == 'train' else 'train'}/{name}",
        "very long": lambda name: "x" * 5000 + name,
        "zero byte": lambda name: name + "\0",
    }
    form = rng.choice(sorted(forms))
    entries = content["images"] if rng.random() < 0.5 else [rng.choice(content["images"])]
    for entry in entries:
        entry["file_name"] = forms[form](entry["file_name"])
    export[f"{split}.json"] = _json(content)
    return Mutation(export, f"{split}: {len(entries)} names {form}", None)


def _mutate_xml(rng: random.Random, export: Export) -> Mutation | None:
    path = rng.choice(sorted(path for path in export if path.endswith(".xml")))
    text = export[path].decode()
    tags = list(re.finditer(r"<(\w+)>([^<\n]*)</\1>", text))
    tag = rng.choice(tags)
    name, value = tag[1], tag[2]
    values = ["", "abc", "nan", "inf", "1e400", "-5", f" {value} ", f"\n{value}\n", f"{value}px", "1,5", "9" * 30]
    if name == "name":
        values = ["", " ", f" {value} ", value.upper(), value.replace(" ", "_") + " ", "\u200b", "a\nb"]
    elif name != "filename":
        values += [f"{value}.0", f"{value}e0", f"+{value}"]
    changes = {
        "value": lambda: f"<{name}>{rng.choice(values)}</{name}>",
        "deleted": lambda: "",
        "doubled": lambda: tag[0] + f"<{name}>{rng.choice(values)}</{name}>",
        "renamed": lambda: f"<{name.upper()}>{value}</{name.upper()}>",
        "attribute": lambda: tag[0].replace(f"<{name}>", f'<{name} source="x">'),
        "comment": lambda: tag[0] + "<!-- note -->",
        "in another": lambda: f"<extra>{tag[0]}</extra>",
    }
    change = rng.choice(sorted(changes))
    new = changes[change]()
    if name in ("filename", "depth") or (name == "difficult" and (change != "value" or "></" in new)):
        return None  # may be missing
    export[path] = (text[: tag.start()] + new + text[tag.end() :]).encode()
    return Mutation(export, f"{path}: {tag[0]!r} -> {new!r}", {Path(path).stem + ".png"})


def _mutate_xml_structure(rng: random.Random, export: Export) -> Mutation:
    path = rng.choice(sorted(path for path in export if path.endswith(".xml")))
    text = export[path].decode()
    box = re.search(r"<bndbox>.*?</bndbox>\n", text, re.DOTALL)
    assert box
    changes: dict[str, Callable[[], bytes]] = {
        "truncated": lambda: text[: rng.randrange(len(text) - 2)].encode(),
        "two documents": lambda: (text + text).encode(),
        "empty": lambda: b"",
        "binary": lambda: bytes(range(256)),
        "byte order mark": lambda: b"\xef\xbb\xbf" + text.encode(),
        "utf-16": lambda: text.encode("utf-16"),
        "declared utf-16": lambda: b'<?xml version="1.0" encoding="utf-16"?>' + text.encode(),
        "unknown encoding": lambda: b'<?xml version="1.0" encoding="klingon"?>' + text.encode(),
        "carriage returns": lambda: text.replace("\n", "\r\n").encode(),
        "no box": lambda: text.replace(box[0], "").encode(),
        "two boxes": lambda: text.replace(box[0], box[0] + box[0].replace(">8<", ">9<").replace("1", "2")).encode(),
        "box in another": lambda: text.replace(box[0], f"<part>{box[0]}</part>").encode(),
        "another root": lambda: text.replace("annotation>", "note>").encode(),
        "namespace": lambda: text.replace("<annotation>", '<annotation xmlns="urn:x">').encode(),
        "corners swapped": lambda: text.replace("xmin", "MIN").replace("xmax", "xmin").replace("MIN", "xmax").encode(),
        "no size": lambda: re.sub(r"<size>.*?</size>\n", "", text, flags=re.DOTALL).encode(),
        "another size": lambda: text.replace(f"<width>{SIZE[1]}", "<width>500").encode(),
        "parts": lambda: text.replace("</object>", f"<part><name>cat</name>{box[0]}</part></object>").encode(),
    }
    name = rng.choice(sorted(changes))
    export[path] = changes[name]()
    return Mutation(export, f"{path} {name}", {Path(path).stem + ".png"})


def _mutate_labels(rng: random.Random, export: Export) -> Mutation:
    path = rng.choice(sorted(path for path in export if path.startswith("labels/")))
    lines = export[path].decode().splitlines()
    row = rng.randrange(len(lines))
    words = lines[row].split()
    column = rng.randrange(5)
    value = words[column]
    hostile = ["", "abc", "nan", "inf", "-0.5", "1e400", value.replace(".", ",") + ",", "0x1", "1.7", "64", "None"]
    if column == 0:
        hostile = ["", "abc", "-1", "1.5", "99", "nan", "1e400", f"{value}.0", f"0{value}", f"{value}:", "cat"]
    changes: dict[str, Callable[[], list[str]]] = {
        "value": lambda: [*words[:column], rng.choice(hostile), *words[column + 1 :]],
        "one more": lambda: [*words, rng.choice(["0.5", "abc", "1"])],
        "fewer": lambda: words[: rng.randrange(1, 5)],
        "pixels": lambda: [words[0], *(repr(float(word) * 64) for word in words[1:])],
        "commas": lambda: [",".join(words)],
        "decimal commas": lambda: [words[0], *(word.replace(".", ",") for word in words[1:])],
        "comment": lambda: ["#", *words],
        "after it a comment": lambda: [*words, "#", "dog"],
        "tabs": lambda: ["\t".join(words) + "\t"],
        "written fully": lambda: [words[0], *(f"{float(word):.12f}" for word in words[1:])],
        "twice": lambda: [*words, "\n", *words],
        "corners": lambda: [*words, *words[1:]],
        "blank lines": lambda: ["\n\n", *words, "\n"],
    }
    name = rng.choice(sorted(changes))
    new = " ".join(changes[name]())
    export[path] = ("\n".join([*lines[:row], new, *lines[row + 1 :]]) + rng.choice(["", "\n", "\r\n"])).encode()
    return Mutation(export, f"{path} {name}: {lines[row]!r} -> {new!r}", {Path(path).stem + ".png"})


def _mutate_label_file(rng: random.Random, export: Export) -> Mutation:
    path = rng.choice(sorted(path for path in export if path.startswith("labels/")))
    content = export.pop(path)
    changes: dict[str, Callable[[], Export]] = {
        "missing": dict,
        "binary": lambda: {path: bytes(range(256))},
        "byte order mark": lambda: {path: b"\xef\xbb\xbf" + content},
        "utf-16": lambda: {path: content.decode().encode("utf-16")},
        "carriage returns": lambda: {path: content.replace(b"\n", b"\r\n")},
        "another name": lambda: {path.replace(".txt", "-1.txt"): content},
        "upper case": lambda: {path.replace(".txt", ".TXT"): content},
        "another directory": lambda: {path.replace("labels/", "labels/x/"): content},
        "without an image": lambda: {path: content, path.replace(".txt", "-1.txt"): content},
        "beside the image": lambda: {path.replace("labels/", "images/"): content},
    }
    name = rng.choice(sorted(changes))
    return Mutation(export | changes[name](), f"{path} {name}", {Path(path).stem + ".png", Path(path).stem + "-1.jpg"})


def _mutate_yaml(rng: random.Random, export: Export) -> Mutation:
    text = export["data.yaml"].decode()
    names = f"names: {list(CLASSES)}"
    changes = {
        "names null": text.replace(names, "names:"),
        "names missing": text.replace(names, ""),
        "names text": text.replace(names, "names: cat"),
        "names of nothing": text.replace(names, "names: [cat, null, true]"),
        "names nested": text.replace(names, "names: [[cat], dog, bus]"),
        "fewer names": text.replace(names, "names: [cat, dog]").replace("nc: 3", "nc: 2"),
        "more classes": text.replace("nc: 3", "nc: 5"),
        "fewer classes": text.replace("nc: 3", "nc: 2"),
        "classes as text": text.replace("nc: 3", "nc: many"),
        "equal names": text.replace("'dog'", "'cat'"),
        "names with blanks": text.replace("'dog'", "'dog '"),
        "mapping": text.replace(names, "names: {0: cat, 1: dog, 2: traffic light}"),
        "mapping of text": text.replace(names, "names: {'0': cat, '1': dog, '2': traffic light}"),
        "mapping with a gap": text.replace(names, "names: {0: cat, 1: dog, 3: traffic light}"),
        "mapping of names": text.replace(names, "names: {cat: 0, dog: 1, traffic light: 2}"),
        "mapping of floats": text.replace(names, "names: {0.0: cat, 1.0: dog, 2.0: traffic light}"),
        "mapping of parts": text.replace(names, "names: {0.2: cat, 1.2: dog, 1.7: traffic light}"),
        "path missing": text.replace("images/val", "images/nowhere"),
        "path of another machine": "path: /home/me/data\n" + text,
        "absolute": text.replace("images/val", "/home/me/data/images/val"),
        "beside": text.replace("images/", "../images/"),
        "backslashes": text.replace("images/", "images\\"),
        "list": text.replace("images/val", "[images/val]"),
        "same for both": text.replace("images/val", "images/train"),
        "split null": text.replace("val: images/val", "val:"),
        "number as path": text.replace("images/val", "5"),
        "truncated": text[: rng.randrange(10, len(text) - 2)],
        "broken": text + "\t- : [",
        "empty": "",
        "a list": "- 1\n- 2\n",
        "carriage returns": text.replace("\n", "\r\n"),
        "Python": text + "x: !!python/object/apply:os.system ['true']\n",
    }
    name = rng.choice(sorted(changes))
    export["data.yaml"] = changes[name].encode()
    return Mutation(export, f"data.yaml {name}", None)


def _mutate_row(rng: random.Random, export: Export) -> Mutation:
    split = rng.choice(sorted(IMAGES))
    path = f"{split}/metadata.jsonl"
    rows = [json.loads(line) for line in export[path].splitlines()]
    chosen = rng.sample(rows, len(rows) if rng.random() < 0.3 else 1)
    touched = {row["file_name"] for row in chosen}
    seed, key = rng.random(), rng.choice(sorted(rows[0]))
    described = [_mutate_value(random.Random(seed), row, key) for row in chosen]
    export[path] = b"\n".join(map(_json, rows))
    return Mutation(export, f"{path} {len(chosen)} rows: {described[0]}", None if key == "file_name" else touched)


def _mutate_table(rng: random.Random, export: Export) -> Mutation:
    split = rng.choice(sorted(IMAGES))
    path = f"{split}/metadata.jsonl"
    rows = [json.loads(line) for line in export[path].splitlines()]
    number = {name: k for k, name in enumerate(CLASSES)}

    def each(change: Callable[[dict[str, Any]], Any]) -> None:
        for row in rows:
            change(row["objects"])

    changes: dict[str, Callable[[], Any]] = {
        "column renamed": lambda: [row.update(things=row.pop("objects")) for row in rows],
        "annotations": lambda: [row.update(annotations=row.pop("objects")) for row in rows],
        "boxes renamed": lambda: each(lambda objects: objects.update(places=objects.pop("bbox"))),
        "no categories": lambda: each(lambda objects: objects.pop("category")),
        "no objects": lambda: [row.pop("objects") for row in rows],
        "numbers": lambda: each(lambda o: o.update(category=[number[name] for name in o["category"]])),
        "floats": lambda: each(lambda o: o.update(category=[float(number[name]) for name in o["category"]])),
        "upper case": lambda: each(lambda o: o.update(category=[name.upper() for name in o["category"]])),
        "one in upper case": lambda: rows[0]["objects"].update(
            category=[n.upper() for n in rows[0]["objects"]["category"]]
        ),
        "list of objects": lambda: [
            row.update(objects=[dict(zip(row["objects"], pair)) for pair in zip(*row["objects"].values())])
            for row in rows
        ],
        "categories shorter": lambda: rows[0]["objects"]["category"].pop(),
        "row missing": lambda: rows.pop(),
        "row twice": lambda: rows.append(rows[0]),
        "row null": lambda: rows[0].update(objects=None),
        "file names with directory": lambda: [row.update(file_name=f"./{row['file_name']}") for row in rows],
        "backslashes": lambda: [row.update(file_name=f".\\{row['file_name']}") for row in rows],
        "file missing": lambda: rows[0].update(file_name="nowhere.png"),
        "corners in objects": lambda: each(
            lambda o: o.update(bbox=[{"x": b[0], "y": b[1], "width": b[2], "height": b[3]} for b in o["bbox"]])
        ),
        "areas shorter": lambda: each(lambda o: o.update(area=[1.0])),
        "truncated": lambda: rows.append({"file_name": "a 0.png", "objects": "{"}),
        "sizes swapped": lambda: [row.update(width=row["height"], height=row["width"]) for row in rows],
        "sizes null": lambda: [row.update(width=None) for row in rows],
    }
    name = rng.choice(sorted(changes))
    changes[name]()
    export[path] = b"\n".join(map(_json, rows))
    return Mutation(export, f"{path} {name}", None)


def _mutate_json_text(rng: random.Random, export: Export) -> Mutation:
    path = rng.choice(sorted(path for path in export if path.endswith((".json", ".jsonl"))))
    content = export[path]
    changes: dict[str, Callable[[], bytes]] = {
        "truncated": lambda: content[: rng.randrange(len(content) - 2)],
        "empty": lambda: b"",
        "binary": lambda: bytes(range(256)),
        "byte order mark": lambda: b"\xef\xbb\xbf" + content,
        "utf-16": lambda: content.decode().encode("utf-16"),
        "two documents": lambda: content + b"\n" + content,
        "carriage returns": lambda: content.replace(b", ", b",\r\n"),
        "comment": lambda: b"// exported\n" + content,
        "single quotes": lambda: content.replace(b'"', b"'"),
        "null": lambda: b"null",
        "a string": lambda: _json(content.decode()),
    }
    name = rng.choice(sorted(changes))
    export[path] = changes[name]()
    return Mutation(export, f"{path} {name}", None)


def _mutate_image(rng: random.Random, export: Export) -> Mutation:
    path = rng.choice(sorted(path for path in export if path.endswith(".png")))
    content = export.pop(path)
    turned = io.BytesIO()
    Image.open(io.BytesIO(content)).transpose(Image.Transpose.ROTATE_90).save(turned, "PNG")
    changes: dict[str, Callable[[], Export]] = {
        "missing": dict,
        "empty": lambda: {path: b""},
        "truncated": lambda: {path: content[: rng.randrange(8, len(content) - 12)]},
        "a web page": lambda: {path: b"<html>404</html>"},
        "upper case": lambda: {path.replace(".png", ".PNG"): content},
        "another suffix": lambda: {path.replace(".png", ".jpg"): content},
        "no suffix": lambda: {path.removesuffix(".png"): content},
        "in a directory": lambda: {path.replace("/", "/deep/", 1): content},
        "beside itself": lambda: {path: content, path.replace("/", "/copy of ", 1): content},
        "a hidden twin": lambda: {path: content, path.replace("/", "/._", 1): b"Mac OS X"},
        "a GIF": lambda: {path: _converted(content, "GIF")},
        "palette": lambda: {path: _converted(content, "PNG", "P")},
    }
    if not path.startswith(("images/",)) and any(each.endswith((".xml", ".json", ".jsonl")) for each in export):
        changes["turned"] = lambda: {path: turned.getvalue()}
    name = rng.choice(sorted(changes))
    return Mutation(export | changes[name](), f"{path} {name}", None)


def _converted(content: bytes, form: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(content)).convert(mode).save(buffer, form)
    return buffer.getvalue()


def _mutate_directory(rng: random.Random, export: Export) -> Mutation:
    def moved(old: str, new: str) -> Export:
        return {re.sub(old, new, path): content for path, content in export.items()}

    changes: dict[str, Callable[[], Export]] = {
        "one level down": lambda: {f"export/{path}": content for path, content in export.items()},
        "a stray text": lambda: {**export, "README.txt": b"made by me"},
        "a stray JSON": lambda: {**export, "notes.json": b'{"a": 1}'},
        "a stray image": lambda: {**export, "train/stray.png": _png(200)},
        "a stray table": lambda: {**export, "results.csv": b"epoch,loss\n1,2\n"},
        "a stray YAML": lambda: {**export, "config.yaml": b"a: 1\n"},
        "hidden files": lambda: {**export, ".DS_Store": b"\0\1", "__MACOSX/train/._a.png": b"\0"},
        "valid": lambda: moved(r"\bval\b", "valid"),
        "capitals": lambda: moved(r"\bval\b", "Val"),
        "another name": lambda: moved(r"\bval\b", "holdout"),
        "both names": lambda: export | {path.replace("val", "valid"): content for path, content in export.items()},
    }
    name = rng.choice(sorted(changes))
    return Mutation(changes[name](), f"directory {name}", None)


def _other(split: str) -> str:
    return "val" if split == "train" else "train"


def _mutate_between_coco_files(rng: random.Random, export: Export) -> Mutation:
    """Let the files of the splits differ in what they share."""
    split = rng.choice(sorted(IMAGES))
    content = json.loads(export[f"{split}.json"])
    annotations, images, categories = content["annotations"], content["images"], content["categories"]
    ids = [each["id"] for each in categories]
    new_ids = dict(zip(ids, rng.choice([rng.sample(ids, len(ids)), [0, 1, 2], [11, 2**40, 3]])))
    name = rng.choice(["c\u0430t", "\uff43at", "cat\u200b", "ca\u0301t", "cats", "Cat", "CAT", "kat"])

    def renumber(changed: list[dict[str, Any]]) -> None:
        for entry, key in [(each, "id") for each in categories] + [(each, "category_id") for each in changed]:
            entry[key] = new_ids[entry[key]]

    def scale(factor_x: float, factor_y: float) -> None:
        for each in annotations:
            x, y, w, h = each["bbox"]
            each["bbox"] = [x * factor_x, y * factor_y, w * factor_x, h * factor_y]

    actions: dict[str, Callable[[], Any]] = {
        "ids of its own": lambda: renumber(annotations),
        "a look-alike": lambda: categories[0].update(name=name),
        "boxes without area": lambda: [each["bbox"].__setitem__(rng.choice([2, 3]), 0) for each in annotations],
        "boxes in percent": lambda: scale(100 / SIZE[1], 100 / SIZE[0]),
        "boxes in thousands": lambda: scale(1000 / SIZE[1], 1000 / SIZE[0]),
        "sizes one larger": lambda: [each.update(width=each["width"] + 1) for each in images],
        "sizes two larger": lambda: [each.update(height=each["height"] + 2) for each in images],
        "doubled sizes": lambda: [each.update(width=2 * each["width"], height=2 * each["height"]) for each in images],
        "names with hard blanks": lambda: [
            each.update(file_name=each["file_name"].replace(" ", "\xa0")) for each in images
        ],
        "images of the other split": lambda: images.extend(
            {"id": 90 + number, "file_name": file, "height": SIZE[0], "width": SIZE[1]}
            for number, file in enumerate(IMAGES[_other(split)])
        ),
        "thousands of boxes": lambda: annotations.extend(
            {**annotations[0], "id": 1000 + number, "bbox": [number % 50, number % 40, 2 + number % 7, 3]}
            for number in range(3000)
        ),
        "another category": lambda: content.update(categories=[*categories[1:], {"id": 5, "name": "rat"}]),
    }
    action = rng.choice(sorted(actions))
    actions[action]()
    export[f"{split}.json"] = _json(content)
    return Mutation(export, f"{split}: {action}", None)


def _mutate_all_xml_of_a_split(rng: random.Random, export: Export) -> Mutation:
    split = rng.choice(sorted(IMAGES))
    name = rng.choice(["c\u0430t", "\uff43at", "cat\u200b", "Cat"])

    def scale(text: str, width: float, height: float) -> str:
        for sides, factor in ((r"x(?:min|max)", width), (r"y(?:min|max)", height)):
            text = re.sub(
                rf"<({sides})>(\d+)<", lambda tag, by=factor: f"<{tag[1]}>{float(tag[2]) * by / 64:.5f}<", text
            )
        return text

    changes: dict[str, Callable[[str], str]] = {
        "fractions": lambda text: scale(text, 1.0, 64 / 48),
        "percent": lambda text: scale(text, 100.0, 6400 / 48),
        "half as large": lambda text: text.replace(">64<", ">32<").replace(">48<", ">24<"),
        "one wider": lambda text: text.replace("<width>64<", "<width>65<"),
        "two higher": lambda text: text.replace("<height>48<", "<height>50<"),
        "a look-alike": lambda text: text.replace(">cat<", f">{name}<"),
        "without area": lambda text: re.sub(r"<xmax>\d+<", "<xmax>1<", text),
        "corners swapped": lambda text: text.replace("min>", "mix>").replace("max>", "min>").replace("mix>", "max>"),
        "width and height as corners": lambda text: text.replace("xmax>", "width_>").replace("ymax>", "height_>"),
    }
    change = rng.choice(sorted(changes))
    paths = [path for path in export if path.startswith(f"{split}/") and path.endswith(".xml")]
    return Mutation(
        export | {path: changes[change](export[path].decode()).encode() for path in paths}, f"{split} {change}", None
    )


def _mutate_all_labels_of_a_split(rng: random.Random, export: Export) -> Mutation:
    split = rng.choice(sorted(IMAGES))

    def change_lines(change: Callable[[int, list[float]], list[Any]]) -> None:
        for path in export:
            if path.startswith(f"labels/{split}/"):
                rows = [line.split() for line in export[path].decode().splitlines()]
                new = [change(int(row[0]), [float(value) for value in row[1:]]) for row in rows]
                export[path] = "".join(" ".join(map(str, row)) + "\n" for row in new).encode()

    def add_list(order: tuple[str, ...], where: str) -> None:
        export[where] = "\n".join(order).encode()

    changes: dict[str, Callable[[], Any]] = {
        "pixels": lambda: change_lines(lambda c, b: [c, b[0] * 64, b[1] * 48, b[2] * 64, b[3] * 48]),
        "percent": lambda: change_lines(lambda c, b: [c, *(100 * value for value in b)]),
        "classes from 1": lambda: change_lines(lambda c, b: [c + 1, *b]),
        "without area": lambda: change_lines(lambda c, b: [c, b[0], b[1], 0, b[3]]),
        "another order in classes.txt": lambda: add_list(CLASSES[::-1], "classes.txt"),
        "another order in labels/classes.txt": lambda: add_list(CLASSES[::-1], f"labels/{split}/classes.txt"),
        "more in classes.txt": lambda: add_list((*CLASSES, "rat"), "classes.txt"),
        "the same in classes.txt": lambda: add_list(CLASSES, "classes.txt"),
        "another yaml": lambda: export.update(
            {"dataset.yaml": export["data.yaml"].replace(b"'cat', 'dog'", b"'dog', 'cat'")}
        ),
        "a cache": lambda: export.update({f"labels/{split}.cache": b"\0"}),
    }
    change = rng.choice(sorted(changes))
    changes[change]()
    return Mutation(export, f"{split} {change}", None)


def _mutate_rows_of_a_split(rng: random.Random, export: Export) -> Mutation:
    split = rng.choice(sorted(IMAGES))
    path = f"{split}/metadata.jsonl"
    rows = [json.loads(line) for line in export[path].splitlines()]
    name = rng.choice(["c\u0430t", "\uff43at", "cat\u200b", "Cat"])

    def set_boxes(change: Callable[[list[float]], list[float]]) -> None:
        for row in rows:
            row["objects"]["bbox"] = [change(box) for box in row["objects"]["bbox"]]

    def set_names(change: Callable[[str], Any]) -> None:
        for row in rows:
            row["objects"]["category"] = [change(name) for name in row["objects"]["category"]]

    changes: dict[str, Callable[[], Any]] = {
        "columns permuted": lambda: [rows.__setitem__(k, dict(sorted(row.items()))) for k, row in enumerate(rows)],
        "fractions": lambda: set_boxes(lambda b: [b[0] / 64, b[1] / 48, b[2] / 64, b[3] / 48]),
        "without area": lambda: set_boxes(lambda b: [b[0], b[1], 0, b[3]]),
        "numbers of its own": lambda: set_names(lambda name: CLASSES[::-1].index(name)),
        "a look-alike": lambda: set_names(lambda old: name if old == "cat" else old),
        "sizes one larger": lambda: [row.update(width=row["width"] + 1) for row in rows],
        "sizes two larger": lambda: [row.update(height=row["height"] + 2) for row in rows],
        "ids of the other split": lambda: [row.update(image_id=3 + number) for number, row in enumerate(rows)],
    }
    change = rng.choice(sorted(changes))
    changes[change]()
    export[path] = b"\n".join(map(_json, rows))
    return Mutation(export, f"{path} {change}", None)


def _mutate_places(rng: random.Random, export: Export) -> Mutation | None:
    """Move files between splits and directories, and leave behind what tools do."""
    path = rng.choice(sorted(path for path in export if path.endswith(".png")))
    split = "train" if "train/" in path else "val"
    content = export[path]
    labels = [each for each in export if Path(each).stem == Path(path).stem and each != path]
    bits = io.BytesIO()
    Image.new("I;16", SIZE[::-1], 40000).save(bits, "PNG")
    changes: dict[str, Callable[[], Export]] = {
        "in two other directories": lambda: {
            path.replace(f"{split}/", f"{split}/one/"): content,
            path.replace(f"{split}/", f"{split}/two/"): _png(201),
        },
        "and another one of its name": lambda: {path: content, path.replace(f"{split}/", f"{split}/two/"): _png(201)},
        "in the other split": lambda: {path.replace(f"{split}/", f"{_other(split)}/"): content},
        "in both splits": lambda: {path: content, path.replace(f"{split}/", f"{_other(split)}/"): content},
        "in 16 bits": lambda: {path: bits.getvalue()},
        "with two extensions": lambda: {path: content, path.replace(".png", ".jpg"): _converted(content, "JPEG")},
        "with an archive": lambda: {path: content, f"{split}/images.zip": b"PK\3\4", "export.zip": b"PK\3\4"},
        "with a hard blank": lambda: {path.replace(" ", "\xa0").replace("_", "\uff3f"): content},
        "with a backup": lambda: {path: content, f"{path}~": content, f"{path}.bak": content},
        "smaller by one": lambda: {path: _resized(content, -1)},
        "smaller by two": lambda: {path: _resized(content, -2)},
    }
    if labels and len(labels) == 1:
        label = labels[0]
        moved = label.replace(f"{split}/", f"{_other(split)}/")
        changes["its label in the other split"] = lambda: {path: content, moved: export.pop(label)}
        changes["its label also in the other split"] = lambda: {path: content, moved: export[label]}
        changes["its label without partner"] = lambda: {path: content, label.replace(".", "-copy."): export[label]}
    name = rng.choice(sorted(changes))
    if any(each.startswith("images/") for each in export) and name.startswith("smaller"):
        return None  # fractions of whatever size the image has
    del export[path]
    return Mutation(changes[name]() | export, f"{path} {name}", None)


def _resized(content: bytes, by: int) -> bytes:
    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(content))
    image.resize((image.width + by, image.height)).save(buffer, "PNG")
    return buffer.getvalue()


_EVERYWHERE = [_mutate_image, _mutate_directory, _mutate_places]
MUTATORS: dict[str, list[Callable[[random.Random, Export], Mutation | None]]] = {
    "coco": [
        _mutate_coco_entry,
        _mutate_coco_entry,
        _mutate_coco_structure,
        _mutate_between_coco_files,
        _mutate_file_names,
        _mutate_json_text,
        *_EVERYWHERE,
    ],
    "voc": [_mutate_xml, _mutate_xml, _mutate_xml_structure, _mutate_all_xml_of_a_split, *_EVERYWHERE],
    "yolo": [
        _mutate_labels,
        _mutate_labels,
        _mutate_label_file,
        _mutate_all_labels_of_a_split,
        _mutate_yaml,
        *_EVERYWHERE,
    ],
    "datasets": [_mutate_row, _mutate_table, _mutate_rows_of_a_split, _mutate_json_text, *_EVERYWHERE],
}
