"""Find the columns of a table that contain images and objects: by usual names, or by those that the user gives."""

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

from ...utils.errors import InputError, import_extra, summarize_list


# names of columns in datasets on the Hub, the first that exists is used
_OBJECTS = ("objects", "annotations")
FIELDS = {
    "bbox": ("bbox", "bboxes", "boxes", "box"),
    "category": ("category", "categories", "category_id", "category_ids", "label", "labels", "class_labels"),
    "area": ("area",),
    "iscrowd": ("iscrowd", "is_crowd"),
}
REQUIRED = dict.fromkeys(("bbox", "category")).keys()  # a set in this order


class Field(NamedTuple):
    """Type of what is annotated for the objects of an image.

    Attributes:
        feature (`Any`): The feature of `datasets`, without the lists around it.
        depth (`int`): Number of lists around it: 1 for one value per object, 2 for a list per object.
    """

    feature: Any
    depth: int


class Columns(NamedTuple):
    """Where a table contains the objects of its images.

    Attributes:
        objects (`str` or `None`): Name of the column; `None` if the fields are columns of the table.
        fields (`dict[str, Field]` or `None`): By name; `None` if they are known for each row only, as in JSON.
    """

    objects: str | None
    fields: Mapping[str, Field] | None


class ObjectsNotFoundError(InputError):
    """Raised for a table without a column of objects, or without boxes or categories in it."""


def import_datasets() -> ModuleType:
    """Import the package `datasets`, which is optional."""
    return import_extra("datasets", "hub-data", "reading Hugging Face datasets")


def find_image_column(features: Mapping[str, Any], names: Mapping[str, str], title: str) -> str:
    """Find the column that the user names, or else the only one of images or that called `image`."""
    if unknown := names.keys() - {"image", "objects", *REQUIRED}:
        raise InputError(f"columns may be given for image, objects, bbox and category, got {summarize_list(unknown)}")
    images = [name for name, feature in features.items() if isinstance(feature, import_datasets().Image)]
    found = [name for name in images if name == "image"] or images
    problem = f"has {'several columns' if found else 'no column'} of images"
    if "image" in names:
        found = [name for name in features if name == names["image"]]
        problem = f"--columns image={names['image']} not found"
    if len(found) != 1:
        raise InputError(
            f"{title}: {problem}. Its columns are {_describe_columns(features)}. If one contains images, paths, URLs "
            "or encoded bytes, add --columns image=NAME"
        )
    return found[0]


def find_columns(features: Mapping[str, Any], names: Mapping[str, str], title: str) -> Columns:
    """Find the objects: in the column that the user names, or else in one with a usual name or in those of the table.

    Raises:
        InputError: If they are not found, or in several columns.
    """
    tables = _tables(features)
    if missing := [f"{content}={name}" for content, name in names.items() if not _may_have(features, content, name)]:
        columns = _describe_columns(features)
        raise ObjectsNotFoundError(f"{title}: --columns {' '.join(missing)} not found. Its columns are {columns}")
    usual = [*(name for name in _OBJECTS if name in features), None]
    searched = [names["objects"]] if "objects" in names else usual
    complete = [name for name in searched if find_fields(tables[name], names).keys() >= REQUIRED]
    found = complete or [name for name in searched if name and _is_open(features[name])]
    if not found:
        raise objects_not_found(title, _describe_columns(features), _suggest(tables))
    if len(found) > 1:
        several = summarize_list(name or "columns of the table" for name in found)
        raise InputError(f"{title}: objects are in {several}. Name one of them with --columns objects=NAME")
    return Columns(found[0], tables[found[0]] if complete else None)


def find_fields(keys: Iterable[str], names: Mapping[str, str]) -> dict[str, str]:
    """Map contents to the names of their fields: those that the user gives, or the first usual one."""
    keys = {*keys}
    choices = {content: (names[content],) if content in names else usual for content, usual in FIELDS.items()}
    found = {content: [name for name in usual if name in keys] for content, usual in choices.items()}
    return {content: usual[0] for content, usual in found.items() if usual}


def objects_not_found(title: str, got: str, hint: str = "") -> ObjectsNotFoundError:
    """Return the error about a table that has `got` instead of objects."""
    boxes, categories = (summarize_list(FIELDS[content], 9) for content in REQUIRED)
    return ObjectsNotFoundError(
        f"{title}: the objects of an image need boxes ({boxes}) and categories ({categories}), as lists within a "
        f"column called {' or '.join(_OBJECTS)} or as columns of lists; got {got}.{hint}"
    )


def _may_have(features: Mapping[str, Any], content: str, name: str) -> bool:
    """Return whether a table has a column, or a field in one. The fields of JSON are known for each row only."""
    may_be_inside = any(_is_open(feature) or name in _fields(feature) for feature in features.values())
    return name in features or (content in REQUIRED and may_be_inside)


def _tables(features: Mapping[str, Any]) -> dict[str | None, dict[str, Field]]:
    """Return the fields in each column, and the columns that may be fields themselves as those of `None`.

    The latter have a value for each object: lists, and text that may be JSON.
    """
    flat = {name: _unwrap_lists(feature) for name, feature in features.items()}
    flat = {name: field for name, field in flat.items() if field.depth or _is_open(features[name])}
    return {name: _fields(feature) for name, feature in features.items()} | {None: flat}


def _fields(feature: Any) -> dict[str, Field]:
    """Return the fields of objects, whether their feature is a dict of lists or a list of dicts."""
    struct, depth = _unwrap_lists(feature)
    inside = {name: _unwrap_lists(each) for name, each in struct.items()} if isinstance(struct, dict) else {}
    return {name: Field(field.feature, field.depth + depth) for name, field in inside.items()}


def _suggest(tables: Mapping[str | None, Mapping[str, Field]]) -> str:
    """Return the option that a table may need, or what it lacks."""
    incomplete = ""
    for objects, fields in tables.items():
        boxes, categories = (_candidates(content, fields) for content in REQUIRED)
        if boxes and len(categories) == 1:
            chosen = {"objects": objects or "objects", "bbox": boxes[0], "category": categories[0]}
            usual = FIELDS | {"objects": _OBJECTS}
            unusual = [f"{content}={name}" for content, name in chosen.items() if name not in usual[content]]
            return f" Add --columns {' '.join(unusual)}"
        if boxes:
            incomplete = f" {objects or 'The table'} has boxes but no categories: give each object one"
    return incomplete or " Name them with --columns objects=NAME bbox=NAME category=NAME"


def _candidates(content: str, fields: Mapping[str, Field]) -> list[str]:
    """Return the fields that may be the boxes or the categories: that with a usual name, or those of such a type."""
    found = [name for name in FIELDS[content] if name in fields and fields[name].depth][:1]
    return found or [name for name, field in fields.items() if _has_type_of(content, field)]


def _has_type_of(content: str, field: Field) -> bool:
    kind = getattr(field.feature, "dtype", "")
    if content == "category":
        return field.depth == 1 and (hasattr(field.feature, "names") or kind == "string")
    return field.depth == 2 and str(kind).startswith(("int", "uint", "float"))


def _is_open(feature: Any) -> bool:
    """Return whether only the rows show what is in a column: in JSON, or if all of it is null."""
    leaf, depth = _unwrap_lists(feature)
    kind = getattr(leaf, "dtype", "")
    return type(leaf).__name__ == "Json" or kind == "null" or (not depth and kind in ("string", "large_string"))


def _unwrap_lists(feature: Any) -> Field:
    depth = 0
    while hasattr(feature, "feature"):
        feature, depth = feature.feature, depth + 1
    return Field(feature, depth)


def _describe_columns(features: Mapping[str, Any]) -> str:
    return summarize_list((f"{name}: {_describe(feature)}" for name, feature in features.items()), 20)


def _describe(feature: Any) -> str:
    leaf, depth = _unwrap_lists(feature)
    is_value = isinstance(leaf, import_datasets().Value)
    name = leaf.dtype if is_value else type(leaf).__name__
    return "list of " * depth + (f"{{{_describe_columns(leaf)}}}" if isinstance(leaf, dict) else name)
