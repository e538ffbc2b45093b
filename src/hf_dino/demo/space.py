"""Write a Space: a directory that Hugging Face, or `python app.py` anywhere, runs as the page.

hf_dino is in no package index, so the Space has its source next to `app.py`, where Python finds it, and the
requirements are those of the package. That also keeps a Space running as it was when it was made.
"""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import requires, version
from pathlib import Path

from ..data.images import list_images
from ..exported import is_exported
from ..hub import load_config
from ..kernels import get_builder
from ..utils.errors import InputError
from ..utils.io import atomic_directory


PACKAGE = Path(__file__).parents[1]
DRAWING_PACKAGES = ("matplotlib", "supervision")  # of the extras, what the page needs apart from gradio
MODELS, EXAMPLES = "models", "examples"
RUNNERS = {"onnxruntime": ".onnx", "openvino": ".xml"}  # of the extras, by what they run
# of a model directory or an exported model; not checkpoints of a training run, which are several times as large
MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.xml", "*.py", "*.onnx", "*.pt2", "README.md")

APP = '''"""Show the page; `hf-dino demo --space` wrote this file."""

from hf_dino.cli import main


main({arguments})
'''

README = """---
title: {title}
emoji: 🦖
colorFrom: blue
colorTo: indigo
sdk: gradio
sdk_version: {gradio}
app_file: app.py
python_version: "{python}"
{models}license: apache-2.0
pinned: false
---

Drop an image, and see the objects in it and where the model looked. This Space was written by
`hf-dino demo --space`; it needs no GPU, and runs anywhere:

```bash
pip install -r requirements.txt
python app.py
```

To publish it, make a Space on the Hub and upload this directory: `hf upload OWNER/NAME . --repo-type space`. The
license above is that of the code; add that of the model if it is another one.
"""


def write_space(folder: Path, models: Sequence[str], examples: Path | None = None) -> None:
    """Write a Space that shows the page, with the name of its directory as title.

    Args:
        folder (`Path`): The directory; must not exist, or be empty.
        models (`Sequence[str]`): Model directories and exported models, which are copied, and names on the Hub, which
            the Space downloads.
        examples (`Path`, *optional*): Directory of images to try, which are copied.

    Raises:
        InputError: If the directory is not empty or in a model, a model is not found, or two have the same name.
    """
    for name in models:
        if not is_exported(name):
            load_config(name)  # checks that it is a model
        if Path(name).resolve() in folder.resolve().parents:
            raise InputError(f"{folder}: is in the model directory {name}; write the Space to another place")
    local = {name: f"{MODELS}/{Path(name).resolve().name}" for name in models if Path(name).exists()}
    if len({*local.values()}) < len(local):
        raise InputError(f"{', '.join(local)}: have the same name; rename one, or make a Space for each")
    arguments = ["demo", *(word for name in models for word in ("--model", local.get(name, name)))]
    remote = [name for name in models if name not in local]
    with atomic_directory(folder) as space:
        _copy_package(space / PACKAGE.name)
        for name, target in local.items():
            _copy_model(Path(name), space / target)
        if examples is not None:
            (space / EXAMPLES).mkdir()
            for image in list_images([examples]):
                shutil.copy(image, space / EXAMPLES)
            arguments += ["--examples", EXAMPLES]
        files = {
            "app.py": APP.format(arguments=json.dumps(arguments)),
            "requirements.txt": "\n".join(requirements(models)) + "\n",
            "README.md": README.format(
                title=json.dumps(folder.resolve().name),
                gradio=version("gradio"),
                python=".".join(map(str, sys.version_info[:2])),
                models="models:\n" * bool(remote) + "".join(f"- {name}\n" for name in remote),
            ),
        }
        for name, content in files.items():
            (space / name).write_text(content, encoding="utf-8")


def requirements(models: Sequence[str]) -> list[str]:
    """Return the package's dependencies, what the page draws with and runs models with, and this version of gradio."""
    runners = {name for name, end in RUNNERS.items() if any(_files(Path(model), f"*{end}") for model in models)}
    lines = [line.partition(";") for line in requires("hf-dino") or []]
    needed = {
        line.strip()
        for line, _, extra in lines
        if not extra or re.split(r"[^\w.-]", line)[0].lower() in runners.union(DRAWING_PACKAGES)
    }
    return [*sorted(needed), f"gradio=={version('gradio')}"]


def _files(model: Path, pattern: str) -> list[Path]:
    """Return files of a model directory, or the model itself if it is a file; none of a model on the Hub."""
    return sorted(model.glob(pattern)) if model.is_dir() else [model] * (model.is_file() and model.match(pattern))


def _copy_package(target: Path) -> None:
    left_out = shutil.ignore_patterns("__pycache__", "*.pyc", "kernel_sources", "prebuilt")
    shutil.copytree(PACKAGE, target, ignore=left_out)
    for name in ("csrc", "torch-ext"):
        shutil.copytree(get_builder().sources / name, target / "kernel_sources" / name)


def _copy_model(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    if source.is_dir():
        target.mkdir()
    for path in {path for pattern in MODEL_FILES for path in _files(source, pattern)}:
        shutil.copy(path, target)
