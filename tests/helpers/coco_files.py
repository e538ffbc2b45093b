"""Small datasets in COCO's format for the tests of data, evaluation and examples."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def annotation(image_id: int, category_id: int, box: Sequence[Any], **more: Any) -> dict[str, Any]:
    """One object, box as x, y, width, height in pixels."""
    return {"image_id": image_id, "category_id": category_id, "bbox": list(box), **more}


def write_coco(
    folder: Path,
    annotations: Sequence[Mapping[str, Any]],
    *,
    sizes: Sequence[tuple[int, int]] = ((40, 60),),
    categories: Mapping[int, str] | None = None,
    replaced: Mapping[str, Any] | None = None,
) -> tuple[Path, Path]:
    """Write noise images of `sizes` (height, width), with ids from 1, and their annotation file; return both paths.

    `replaced` are top-level entries of the file to write instead.
    """
    image_folder = folder / "images"
    image_folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    images = []
    for image_id, (height, width) in enumerate(sizes, start=1):
        name = f"{image_id}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(image_folder / name)
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
    content = {
        "images": images,
        "annotations": [{"id": number, **entry} for number, entry in enumerate(annotations)],
        "categories": [{"id": i, "name": name} for i, name in (categories or {3: "dog", 7: "cat"}).items()],
        **(replaced or {}),
    }
    file = folder / "annotations.json"
    file.write_text(json.dumps(content))
    return image_folder, file
