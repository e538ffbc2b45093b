"""Tables of `datasets` read equal however they are written, and nothing in them is changed without a word."""

import copy
import json
import math
import re
from pathlib import Path

import datasets
import pytest

from helpers.command_line import hf_dino
from helpers.data_formats import draw, write
from hf_dino.data import InputError, ReadOptions, read_data
from hf_dino.data.readers import UNUSED_WARNING
from hf_dino.data.readers.common import boxes_to_xywh
from hf_dino.data.readers.tables import TableSplit, read_tables


pytestmark = pytest.mark.usefixtures("datasets_cache")

NAMES = ("a.png", "b.png", "c.png")
SIZE = (40, 60)
BOXES = [[[1, 2, 30, 20], [5, 5, 10, 12.5]], [], [[0, 0, 60, 40]]]
KINDS = [["zebra", "ant"], [], ["zebra"]]
NUMBERS = [[10, 2], [], [3]]
AREAS = [[500.0, 25.5], [], [2400.0]]
CROWDS = [[0, 1], [], [0]]
IDS = [7, 3, 12]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for seed, name in enumerate(NAMES):
        draw(folder / name, SIZE, seed)
    return [str(folder / name) for name in NAMES]


def rows_of(categories=KINDS):
    """Return the objects of each image as a dict of lists."""
    return [
        {"bbox": boxes, "category": of_image, "area": areas, "iscrowd": crowds}
        for boxes, of_image, areas, crowds in zip(BOXES, categories, AREAS, CROWDS)
    ]


def make_table(images, features=None, **columns):
    table = datasets.Dataset.from_dict({"image": images, **columns}, features=features)
    return table if features else table.cast_column("image", datasets.Image())


def read(table, source="cells", **options):
    """Read a table as the train split, without writing it."""
    return read_tables({"train": TableSplit(table, {"train": table})}, source, ReadOptions(**options))["train"]


def contents(data):
    """Everything that a model is trained on, and the ids of images."""
    return [
        (
            image.image_id,
            (image.height, image.width),
            image.boxes.tolist(),
            [data.categories[number] for number in image.category_ids],
            image.areas.tolist(),
            image.iscrowd.tolist(),
        )
        for image in data.images
    ]


EXPECTED = list(zip(IDS, [SIZE] * 3, BOXES, KINDS, AREAS, CROWDS))


def as_dicts(row):
    """Return the objects of an image as a list of dicts."""
    return [dict(zip(row, values)) for values in zip(*row.values())]


def renamed(row, **names):
    return {names.get(name, name): values for name, values in row.items()}


def columns_of(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def with_boxes(rows, change):
    return [row | {"bbox": [change(*map(float, box)) for box in row["bbox"]]} for row in rows]


def as_text(value):
    return str(value) if not isinstance(value, list) else [as_text(each) for each in value]


ROWS = rows_of()
# columns, and options that are needed to read them
SPELLINGS = {
    "dict of lists": ({"objects": ROWS}, {}),
    "list of dicts": ({"objects": [as_dicts(row) for row in ROWS]}, {}),
    "usual names": (
        {"annotations": [renamed(row, bbox="boxes", category="labels", iscrowd="is_crowd") for row in ROWS]},
        {},
    ),
    "JSON": ({"objects": [json.dumps(row) for row in ROWS]}, {}),
    "JSON of dicts": ({"objects": [json.dumps(as_dicts(row)) for row in ROWS]}, {}),
    "columns": (columns_of(ROWS), {}),
    "columns of JSON": (columns_of([{name: json.dumps(values) for name, values in row.items()} for row in ROWS]), {}),
    "other names": (
        {"digits": [renamed(row, bbox="rectangles", category="kind") for row in ROWS]},
        {"columns": {"objects": "digits", "bbox": "rectangles", "category": "kind"}},
    ),
    "columns of other names": (
        columns_of([renamed(row, bbox="rectangles", category="kind") for row in ROWS]),
        {"columns": {"bbox": "rectangles", "category": "kind"}},
    ),
    "JSON of other names": (
        {"text": [json.dumps(renamed(row, category="kind")) for row in ROWS]},
        {"columns": {"objects": "text", "category": "kind"}},
    ),
    "corners": (
        {"objects": with_boxes(ROWS, lambda x, y, w, h: [x, y, x + w, y + h])},
        {"box_format": "xyxy"},
    ),
    "named sides": (
        {"objects": with_boxes(ROWS, lambda x, y, w, h: {"width": w, "x": x, "height": h, "y": y})},
        {},
    ),
    "named corners": (
        {"objects": with_boxes(ROWS, lambda x, y, w, h: {"xmax": x + w, "xmin": x, "ymax": y + h, "ymin": y})},
        {"box_format": "xyxy"},
    ),
    "numbers as text": (
        {"objects": [row | {key: as_text(row[key]) for key in ("bbox", "area", "iscrowd")} for row in ROWS]},
        {},
    ),
    "truth values": ({"objects": [row | {"iscrowd": [bool(value) for value in row["iscrowd"]]} for row in ROWS]}, {}),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_table_reads_equal_in_every_spelling(images, name):
    columns, options = SPELLINGS[name]
    data = read(make_table(images, image_id=IDS, **columns), **options)
    assert contents(data) == EXPECTED
    assert data.categories == {0: "ant", 1: "zebra"}
    assert data.warnings == {}


@pytest.mark.parametrize(
    "change",
    [int, float, str, lambda number: f" {number} ", lambda number: json.loads(f"{number}.0")],
    ids=["int", "float", "text", "text with blanks", "JSON"],
)
@pytest.mark.parametrize("form", ["typed", "JSON"])
def test_categories_that_are_numbers_keep_them_in_every_spelling(images, change, form):
    rows = rows_of([[change(number) for number in numbers] for numbers in NUMBERS])
    objects = rows if form == "typed" else [json.dumps(row) for row in rows]
    data = read(make_table(images, objects=objects))
    assert data.categories == {2: "2", 3: "3", 10: "10"}
    assert [image.category_ids.tolist() for image in data.images] == NUMBERS


@pytest.mark.parametrize("change", [int, float, str])
def test_ids_and_sizes_in_every_spelling(images, change):
    sides = {"height": [change(SIZE[0])] * 3, "width": [change(SIZE[1])] * 3}
    data = read(
        make_table(
            images, objects=ROWS, image_id=[change(id_) for id_ in IDS] if change is not float else IDS, **sides
        )
    )
    assert contents(data) == EXPECTED


def test_missing_sizes_are_read_from_the_images(images):
    data = read(make_table(images, objects=ROWS, image_id=IDS, height=[None, 0, 40], width=[60, 60, None]))
    assert contents(data) == EXPECTED


def as_features(category):
    box = datasets.Sequence(datasets.Value("float64"), 4)
    objects = datasets.Sequence({"bbox": box, "category": category})
    return datasets.Features({"image": datasets.Image(), "objects": objects})


def test_names_of_a_class_label_are_used(images):
    objects = [{"bbox": row["bbox"], "category": numbers} for row, numbers in zip(ROWS, [[1, 0], [], [1]])]
    data = read(make_table(images, as_features(datasets.ClassLabel(names=["ant ", "zebra", "bee"])), objects=objects))
    assert data.categories == {0: "ant", 1: "zebra", 2: "bee"}
    assert [names for _, _, _, names, _, _ in contents(data)] == KINDS


@pytest.mark.parametrize("value", [-1, 3, None])
def test_a_number_that_a_class_label_does_not_have_is_an_error(images, value):
    feature = datasets.ClassLabel(names=["a", "b", "c"])
    objects = [{"bbox": [[1, 2, 3, 4]], "category": [0]}] * 2 + [{"bbox": [[1, 2, 3, 4]], "category": [value]}]
    features = as_features(datasets.Value("int64"))
    table = make_table(images, features, objects=objects)
    table._info.features = as_features(feature)  # as another program may have written it
    with pytest.raises(InputError, match=rf"row 2: .*/c\.png: unknown categories: {value}\. Give each object"):
        read(table)


@pytest.mark.parametrize("value", [None, math.nan, 1.5, True, [1], {"id": 1}, 2**63])
def test_a_category_that_is_neither_a_name_nor_a_whole_number_is_an_error(images, value):
    objects = [json.dumps({"bbox": [[1, 2, 3, 4]] * 2, "category": [7, category]}) for category in (8, value, 9)]
    table = make_table(images, objects=objects)
    with pytest.raises(
        InputError, match=rf"cells \(train\), row 1: .*/b\.png: unknown categories: {re.escape(repr(value))}"
    ):
        read(table)
    errors = []
    data = read(table, on_error=errors.append)
    assert len(errors) == 1
    assert [image.category_ids.tolist() for image in data.images] == [[7, 8], [7], [7, 9]]


def test_categories_that_are_numbers_and_names_are_an_error(images):
    objects = [json.dumps({"bbox": [[1, 2, 3, 4]], "category": [category]}) for category in (8, "cat", 9)]
    with pytest.raises(
        InputError,
        match=r"cells: categories are both numbers and names, such as 8 \(cells \(train\), row 0\) and 'cat' "
        r"\(cells \(train\), row 1\)\. Write all of them in one way",
    ):
        read(make_table(images, objects=objects))


def test_numbers_among_names_are_names(images):
    data = read(make_table(images, objects=rows_of([["10", "ant"], [], ["2"]])))
    assert data.categories == {0: "10", 1: "2", 2: "ant"}
    assert [names for _, _, _, names, _, _ in contents(data)] == [["10", "ant"], [], ["2"]]


def test_names_that_differ_by_blanks_at_their_ends_are_one_class(images):
    data = read(make_table(images, objects=rows_of([["cat ", "\tcat"], [], ["cat"]])))
    assert data.categories == {0: "cat"}
    assert data.warnings == {
        "class names have blanks at their ends: removed": [f"cells (train), row 0: {images[0]}"] * 2
    }


LABELS = {"bbox": [[[1, 2, 3, 4]]] * 3, "label": [["x"]] * 3}
NOT_FOUND = {
    "a column of another name": (
        {"digits": rows_of(NUMBERS)},
        r"digits: \{bbox: .*\}\. Add --columns objects=digits$",
    ),
    "fields of other names": (
        {"things": [[{"coords": [1.0, 2, 3, 4], "kind": "x"}]] * 3},
        r"things: list of \{coords: list of float64, kind: string\}\. "
        "Add --columns objects=things bbox=coords category=kind$",
    ),
    "columns of other names": (renamed(LABELS, bbox="rectangles"), r"Add --columns bbox=rectangles$"),
    "no categories": (
        {"faces": [{"bbox": [[1, 2, 3, 4]], "blur": [1], "pose": [0]}] * 3},
        r"got image: Image, faces: \{.*\}\. faces has boxes but no categories: give each object one$",
    ),
    "images only": ({}, r"got image: Image\. Name them with --columns objects=NAME bbox=NAME category=NAME$"),
    "an object in each row": (
        {"xmin": [1] * 3, "label": ["x"] * 3},
        r"got image: Image, xmin: int64, label: string\. Name them",
    ),
    "text without them": ({"objects": ['{"kind": ["x"]}'] * 3}, r"got objects: \{kind\}\.$"),
}


@pytest.mark.parametrize("name", NOT_FOUND)
def test_objects_that_are_not_found_are_named_with_the_option(images, name):
    columns, message = NOT_FOUND[name]
    with pytest.raises(InputError, match=r"^cells \(train\): the objects of an image need boxes \(bbox, .*" + message):
        read(make_table(images, **columns))


def test_the_option_that_a_message_names_is_enough(images, tmp_path, capsys):
    table = make_table(images, digits=[as_dicts(renamed(row, bbox="rectangles", category="kind")) for row in ROWS])
    datasets.DatasetDict(train=table, validation=table).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(InputError) as error:
        read_data(tmp_path / "saved")
    options = str(error.value).partition("Add ")[2].split()
    assert options == ["--columns", "objects=digits", "bbox=rectangles", "category=kind"]
    capsys.readouterr()
    assert hf_dino(["data", "check", tmp_path / "saved", *options]) == 0
    assert "zebra" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["image", "objects", "bbox", "category"])
def test_a_column_that_is_not_there_is_an_error(images, content):
    with pytest.raises(
        InputError,
        match=rf"--columns {content}=gone not found\. Its columns are image: Image, objects: \{{bbox: list of list",
    ):
        read(make_table(images, objects=ROWS), columns={content: "gone"})


def test_contents_that_cannot_be_named_are_an_error(images):
    with pytest.raises(InputError, match="columns may be given for image, objects, bbox and category, got area"):
        read(make_table(images, objects=ROWS), columns={"area": "size"})


def test_objects_in_two_columns_are_an_error_until_one_is_named(images):
    table = make_table(images, image_id=IDS, objects=ROWS, annotations=rows_of([["x", "x"], [], ["x"]]))
    with pytest.raises(
        InputError, match=r"objects are in objects, annotations\. Name one of them with --columns objects="
    ):
        read(table)
    assert contents(read(table, columns={"objects": "objects"})) == EXPECTED


def test_a_test_split_may_have_no_annotations_but_others_must(images):
    table = make_table(images, objects=ROWS)
    splits = {"train": table, "test": table.remove_columns("objects")}
    given = {split: TableSplit(each, splits) for split, each in splits.items()}
    data = read_tables(given, "cells", ReadOptions())
    assert len(data["test"].images) == 3
    assert data["test"].categories == data["train"].categories
    assert {kind: len(names) for kind, names in data["test"].warnings.items()} == {
        "images have no annotations: treated as images without objects": 3
    }
    for wrong in ({"train": given["test"]}, {"test": given["test"]}):
        with pytest.raises(InputError, match="the objects of an image need boxes"):
            read_tables(wrong, "cells", ReadOptions())


BOX = [[1, 2, 3, 4]]
WRONG_ROWS = {
    "fewer categories": (
        {"bbox": BOX * 2, "category": [1]},
        "as many of each for its objects, got 2 bbox, 1 category",
    ),
    "no categories": ({"bbox": BOX, "category": None}, "got 1 bbox, 0 category"),
    "fewer areas": ({"bbox": BOX, "category": [1], "area": []}, "got 1 bbox, 1 category, 0 area"),
    "more crowds": ({"bbox": BOX, "category": [1], "iscrowd": [0, 0]}, "got 1 bbox, 1 category, 2 iscrowd"),
    "one object": (
        {"bbox": [1, 2, 3, 4], "category": 1},
        "category must be a list with one item for each object or JSON, got 1",
    ),
    "a name": ({"bbox": BOX, "category": "cat"}, r"category must be a list .* or JSON \(Expecting value.*, got 'cat'"),
    "unknown sides": (
        {"bbox": [{"cx": 1, "cy": 2, "w": 3, "h": 4}], "category": [1]},
        "a box must be a list of 4 numbers, or have x, y, width, height or .* got {'cx': 1",
    ),
    "a number": (7, "must be a list of dicts or a dict of lists, got 7"),
    "nothing in a list": ([None], r"must be a list of dicts or a dict of lists, got \[None\]"),
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_a_row_that_is_not_as_expected_is_named(images, name):
    row, message = WRONG_ROWS[name]
    objects = [json.dumps({"bbox": BOX, "category": [1]}), json.dumps(row), ""]
    with pytest.raises(InputError, match=rf"^cells \(train\), row 1: .*{message}"):
        read(make_table(images, objects=objects))


def test_text_that_is_not_json_is_named(images):
    with pytest.raises(InputError, match=r"row 1: its objects must be .* JSON \(Expecting .*\), got \"{'bbox'"):
        read(make_table(images, objects=["", "{'bbox': [[1, 2, 3, 4]], 'category': [1]}", ""]))


@pytest.mark.parametrize("side", ["4O", -40, 40.5, [40]])
def test_a_side_that_is_not_a_positive_integer_is_named(images, side):
    table = make_table(images, objects=ROWS, height=[side] * 3, width=[60] * 3)
    with pytest.raises(
        InputError, match=rf"row 0: height and width must be positive integers, got {re.escape(repr(side))} and 60"
    ):
        read(table)


@pytest.mark.parametrize("ids", [[3, 3, 4], [1.5, 2.5, 3.5], ["x", "y", "z"], [None, 2, 3]])
def test_ids_that_are_not_used_are_said(images, ids):
    data = read(make_table(images, objects=ROWS, image_id=ids))
    assert [image.image_id for image in data.images] == [1, 2, 3]
    (warning,) = data.warnings
    assert warning == "images have no id of their own that is a whole number: numbered"


def test_a_table_without_ids_is_numbered_without_a_word(images):
    data = read(make_table(images, objects=ROWS, image_id=[None] * 3))
    assert [image.image_id for image in data.images] == [1, 2, 3]
    assert data.warnings == {}


# in place of any value
STRANGE = (None, "", "x", math.nan, math.inf, 1.5, True, [], {}, [1], {"x": 1})
REMOVED = object()
OTHER_VALUES = {"bbox": (1.5,), "area": (1.5,), "category": ("x",), "iscrowd": (True,)}


def paths_in(value):
    """Return the keys and indices that lead to each value in a row."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, inside in items for path in [(key,), *((key, *rest) for rest in paths_in(inside))]]


def mutate(value, path, strange):
    """Return a copy of a row with one value replaced or removed."""
    key, *rest = path
    changed = copy.copy(value)
    if rest or strange is not REMOVED:
        changed[key] = mutate(value[key], rest, strange) if rest else strange
    else:
        del changed[key]
    return changed


@pytest.mark.parametrize("form", ["dict of lists", "list of dicts"])
def test_no_mutation_changes_a_box_or_a_class_without_a_word(images, form):
    objects = {"bbox": [[1, 2, 30, 20], [5, 5, 10, 12]], "category": [7, 8], "area": [600, 120], "iscrowd": [0, 0]}
    row = objects if form == "dict of lists" else as_dicts(objects)
    expected = contents(read(make_table(images[:1], objects=[json.dumps(row)])))
    counts = {"error": 0, "warning": 0, "equal": 0}
    for path in paths_in(row):
        (content,) = {*path} & {*objects} or {""}
        for strange in (*STRANGE, REMOVED):
            if strange in OTHER_VALUES.get(content, ()) or (strange is REMOVED and not content):
                continue  # another value, or fewer objects
            errors = []
            try:
                data = read(
                    make_table(images[:1], objects=[json.dumps(mutate(row, path, strange))]),
                    on_error=errors.append,
                )
            except InputError as error:
                errors.append(str(error))
            outcome = "error" if errors else "warning" if data.warnings else "equal"
            counts[outcome] += 1
            assert outcome != "equal" or contents(data) == expected, (path, strange)
            assert all(error.startswith("cells") and "\n" not in error for error in errors), errors
    assert min(counts.values()) > 3, counts


def metadata(*names, **more):
    """Return the text of a metadata file: one object in each image."""
    objects = {"bbox": [[1, 2, 3, 4]], "categories": ["cell"]}
    return "".join(json.dumps({"file_name": name, "objects": objects, **more}) + "\n" for name in names)


def lay_out(folder, images=(), **files):
    for seed, name in enumerate(images):
        draw(folder / name, SIZE, seed)
    for name, text in files.items():
        write(folder / name.replace("__", "/").replace("metadata", "metadata.jsonl"), text)
    return folder


def file_names(data):
    return {split: [Path(image.path.file_name).name for image in each.images] for split, each in data.items()}


STATIONS = ("a.png", "test_tube.png", "train_station.png", "val/eval.png")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["cells", "test data [1]", "pre*test"])
def test_names_of_images_are_no_names_of_splits(tmp_path, name, streaming):
    folder = lay_out(tmp_path / name, STATIONS, metadata=metadata(*STATIONS))
    data = read_data(folder, streaming=streaming, cache_dir=tmp_path / "cache" if streaming else None)
    assert file_names(data) == {"train": [Path(name).name for name in STATIONS]}
    assert data["train"].warnings == {}


def test_names_of_images_in_splits_are_no_names_of_splits(tmp_path):
    images = [f"{split}/{name}" for split in ("train", "val") for name in STATIONS]
    folder = lay_out(
        tmp_path / "cells", images, train__metadata=metadata(*STATIONS), val__metadata=metadata(*STATIONS)
    )
    names = [Path(name).name for name in STATIONS]
    assert file_names(read_data(folder)) == {"train": names, "validation": names}


def test_one_metadata_file_for_directories_of_splits(tmp_path):
    folder = lay_out(
        tmp_path, ("val/1.png", "train/2.png", "val/3.png"), metadata=metadata("val/1.png", "train/2.png", "val/3.png")
    )
    assert file_names(read_data(folder)) == {"train": ["2.png"], "validation": ["1.png", "3.png"]}
    assert file_names(read_data(folder, splits=["validation"])) == {"validation": ["1.png", "3.png"]}


def test_metadata_that_links_to_another_directory_belongs_to_the_images_beside_it(tmp_path):
    folder = lay_out(tmp_path / "cells", ("1.png",), linked=metadata("1.png"))
    (folder / "linked").rename(tmp_path / "blob")
    (folder / "metadata.jsonl").symlink_to(tmp_path / "blob")
    assert file_names(read_data(folder)) == {"train": ["1.png"]}


def test_images_that_the_metadata_does_not_list_are_said(tmp_path):
    folder = lay_out(tmp_path, ("1.png", "2.png", "masks/1.png"), metadata=metadata("1.png"))
    data = read_data(folder)["train"]
    assert len(data.images) == 1
    assert data.warnings == {UNUSED_WARNING: [str(folder / "2.png"), str(folder / "masks" / "1.png")]}


@pytest.mark.parametrize("size", [{}, {"height": 40, "width": 60}])
def test_images_that_are_missing_are_an_error(tmp_path, size):
    folder = lay_out(tmp_path, ("1.png",), metadata=metadata("1.png", "2.png", **size))
    with pytest.raises(
        InputError, match=r"1 image not found: .*/2\.png \(row 1\)\. Restore them, or remove their rows"
    ):
        read_data(folder)
    errors = []
    data = read_data(folder, options=ReadOptions(on_error=errors.append))
    assert file_names(data) == {"train": ["1.png"]}
    assert len(errors) == 1


@pytest.mark.parametrize("name", [r"images\1.png", r"C:\data\images\1.png", "1.PNG", "images/0a1b2c3d-1.png"])
def test_images_are_found_by_names_of_other_machines(tmp_path, name):
    folder = lay_out(tmp_path, ("images/1.png",), metadata=metadata(name))
    data = read_data(folder)["train"]
    assert str(data.images[0].path).endswith("images/1.png")
    assert bool(data.warnings) == (name != r"images\1.png")


def test_directories_that_are_not_read_are_said(tmp_path, caplog):
    images = ("train/1.png", "val/1.png", "extra/1.png")
    folder = lay_out(tmp_path, images, train__metadata=metadata("1.png"), extra__metadata=metadata("1.png"))
    assert file_names(read_data(folder)) == {"train": ["1.png"]}
    assert "have no metadata or are not named after splits: left out: extra, val" in caplog.text


def test_the_configuration_of_a_card_is_followed(tmp_path):
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: '**'\n---\n"
    folder = lay_out(tmp_path, ("train/1.png",), metadata=metadata("train/1.png"))
    (folder / "README.md").write_text(card)
    assert file_names(read_data(folder)) == {"test": ["1.png"]}


WRONG_FILES = {
    "empty": ({"metadata.jsonl": ""}, "metadata.jsonl: is empty"),
    "no rows": ({"metadata.csv": "\n"}, "cannot load it"),
    "truncated": ({"metadata.jsonl": metadata("1.png")[:40]}, r"cannot load it \(JSON parse error"),
    "names and numbers": (
        {"metadata.jsonl": '{"file_name": "1.png", "objects": {"categories": [1, "x"]}}'},
        "changed from number to string",
    ),
    "no file names": ({"metadata.jsonl": '{"name": "1.png"}'}, "`file_name`, .* must be present"),
    "no file name": (
        {"metadata.jsonl": metadata("1.png") + '{"objects": null}'},
        r"1 image not found: no name \(row 1\)",
    ),
    "a file name of another machine": (
        {"metadata.jsonl": metadata("/data/1.png")},
        "'/data/1.png': `file_name` must be a relative path",
    ),
    "a list": ({"metadata.jsonl": "[1, 2]"}, "line 1 is not a JSON object"),
    "csv": ({"metadata.csv": 'file_name\n"1.png'}, r"cannot load it \(Error tokenizing data"),
    "csv in another encoding": ({"metadata.csv": "file_name\n\udce9"}, "'utf-8' codec can't decode"),
    "parquet": ({"data/train.parquet": "PAR1"}, "cannot load it"),
    "two files": ({"metadata.jsonl": metadata("1.png"), "metadata.csv": "file_name\n1.png"}, "different extensions"),
    "two places": (
        {"metadata.jsonl": metadata("1.png"), "train/metadata.jsonl": metadata("1.png")},
        "has metadata.jsonl in itself and in train. Remove one of them",
    ),
    "saved": ({"state.json": "{}", "dataset_info.json": "{}"}, "cannot load it \\(KeyError: "),
    "saved, truncated": ({"state.json": "{", "dataset_info.json": "{}"}, "cannot load it \\(Expecting"),
    "saved, without tables": ({"dataset_dict.json": '{"splits": ["train"]}'}, "cannot load it"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_files_that_datasets_cannot_load_are_one_error_of_one_line(tmp_path, name):
    files, message = WRONG_FILES[name]
    is_parquet = "data/train.parquet" in files
    folder = lay_out(tmp_path / "cells", () if is_parquet else ("1.png", "train/1.png"), data__notes="")
    for file, text in files.items():
        (folder / file).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=rf"^.*cells.*{message}[^\n]*$"):
        read_data(folder)


def encoded(path):
    return Path(path).read_bytes()


IMAGES = {
    "paths": lambda path: path,
    "URLs": lambda path: f"file://{path}",
    "bytes": encoded,
    "structs": lambda path: {"bytes": encoded(path), "path": "1.png"},
}


def test_flags_of_two_names_are_an_error(images):
    rows = [json.dumps(row if index else renamed(row, iscrowd="is_crowd")) for index, row in enumerate(ROWS)]
    with pytest.raises(InputError, match="objects have both iscrowd and is_crowd"):
        read(make_table(images, objects=rows))


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_parquet_files_are_named(images, tmp_path, streaming):
    table = datasets.Dataset.from_dict({"photo": images, "digits": ROWS, "image_id": IDS})
    (tmp_path / "cells").mkdir()
    table.to_parquet(str(tmp_path / "cells" / "train.parquet"))
    data = read_data(
        tmp_path / "cells",
        streaming=streaming,
        cache_dir=tmp_path / "cache" if streaming else None,
        options=ReadOptions(columns={"image": "photo", "objects": "digits"}),
    )
    assert contents(data["train"]) == EXPECTED


@pytest.mark.parametrize("name", IMAGES)
def test_images_of_every_form_are_read_if_their_column_is_named(images, name):
    table = datasets.Dataset.from_dict(
        {"photo": [IMAGES[name](path) for path in images], "objects": ROWS, "image_id": IDS}
    )
    with pytest.raises(
        InputError, match=r"has no column of images\. Its columns are photo: .* add --columns image=NAME"
    ):
        read(table)
    data = read(table, columns={"image": "photo"})
    assert contents(data) == EXPECTED
    assert [image.read().tobytes() for image in data.images] == [
        image.read().tobytes() for image in read(make_table(images, objects=ROWS)).images
    ]


def test_a_column_that_is_no_image_is_named(images):
    table = make_table(images, objects=ROWS, number=[1, 2, 3])
    with pytest.raises(InputError, match=r"cells \(train\), column number: `datasets` cannot load it"):
        read(table, columns={"image": "number"})


def test_text_that_is_no_path_is_shown_shortened(images):
    table = make_table(images, objects=ROWS, text=["x" * 9999] * 3)
    with pytest.raises(InputError, match=r"3 images not found: x{200} \(row 0\), .*Restore"):
        read(table, columns={"image": "text"})


def test_one_of_several_columns_of_images_must_be_named(images):
    table = make_table(images, objects=ROWS, image_id=IDS).rename_column("image", "photo")
    table = table.add_column("mask", images[::-1]).cast_column("mask", datasets.Image())
    with pytest.raises(InputError, match=r"several columns of images\. Its columns are photo: Image"):
        read(table)
    assert contents(read(table, columns={"image": "photo"})) == EXPECTED
    assert contents(read(table.rename_column("photo", "image"))) == EXPECTED


def test_a_row_without_an_image_is_an_error(images):
    table = make_table([images[0], None, images[2]], objects=ROWS, height=[40] * 3, width=[60] * 3)
    with pytest.raises(InputError, match=r"1 image not found: no name \(row 1\)"):
        read(table)


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (("default",), ["train"]),
        (("test",), ["test"]),
        (("val", "train_2017"), ["train", "validation"]),
        (("train", "extra"), ["train"]),
        (("full", "extra"), "no split named train, validation, test found in full, extra. Write a dataset with"),
        (("train", "training"), "the train split may be any of train, training"),
    ],
)
def test_names_of_splits(images, tmp_path, caplog, splits, expected):
    table = make_table(images, objects=ROWS)
    datasets.DatasetDict(dict.fromkeys(splits, table)).save_to_disk(str(tmp_path / "saved"))
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            read_data(tmp_path / "saved")
    else:
        assert list(read_data(tmp_path / "saved")) == expected
        assert ("not named after train, validation or test: left out: extra" in caplog.text) == ("extra" in splits)


def test_a_part_of_a_split_is_no_id_on_the_hub():
    with pytest.raises(InputError, match=r"not an id on the Hub \(OWNER/NAME\[:CONFIGURATION\]"):
        read_data("owner/cells:train[:80%]")


@pytest.mark.parametrize("box_format", ["xywh", "xyxy"])
def test_boxes_that_are_not_four_numbers_are_dropped_in_every_format(images, box_format):
    boxes = [[1, 2, 30, 20], None, [1, 2, 3], [1, 2, 3, 4, 5], "1234", [[1, 2, 3, 4]], ["a", 2, 3, 4]]
    rows = [json.dumps({"bbox": boxes, "category": [0] * len(boxes)})] + [""] * 2
    data = read(make_table(images, objects=rows), box_format=box_format)
    assert data.images[0].boxes.tolist() == boxes_to_xywh(boxes[:1], box_format).tolist()
    assert len(data.warnings["boxes are not four finite numbers: dropped"]) == len(boxes) - 1


def test_an_unknown_format_of_boxes_is_an_error(images):
    with pytest.raises(InputError, match=r"box_format is 'cxcywh'\. Choose from xywh, xyxy"):
        read(make_table(images, objects=ROWS), box_format="cxcywh")


@pytest.mark.parametrize("form", ["csv", "parquet", "jsonl"])
def test_metadata_in_every_form(tmp_path, images, form):
    folder = lay_out(tmp_path / "cells", NAMES)
    rows = [json.dumps(row) for row in ROWS] if form == "csv" else ROWS
    table = datasets.Dataset.from_dict({"file_name": list(NAMES), "image_id": IDS, "objects": rows})
    write_table = {"csv": table.to_csv, "parquet": table.to_parquet, "jsonl": table.to_json}[form]
    write_table(str(folder / f"metadata.{form}"))
    assert contents(read_data(folder)["train"]) == EXPECTED
