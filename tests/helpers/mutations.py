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
    """Return an export in a format with one mutation that depends on the seed."""
    rng = random.Random(f"{form} {seed}")
    export = EXPORTS[form]()
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


_EVERYWHERE = [_mutate_image, _mutate_directory]
MUTATORS: dict[str, list[Callable[[random.Random, Export], Mutation | None]]] = {
    "coco": [
        _mutate_coco_entry,
        _mutate_coco_entry,
        _mutate_coco_structure,
        _mutate_file_names,
        _mutate_json_text,
        *_EVERYWHERE,
    ],
    "voc": [_mutate_xml, _mutate_xml, _mutate_xml_structure, *_EVERYWHERE],
    "yolo": [_mutate_labels, _mutate_labels, _mutate_label_file, _mutate_yaml, *_EVERYWHERE],
    "datasets": [_mutate_row, _mutate_table, _mutate_json_text, *_EVERYWHERE],
}
