"""Open a trained DINO with its image processor, or say plainly why the folder is not one."""

import dataclasses
import json
from pathlib import Path

from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor

from .configuration_dino_detr import DinoDetrConfig
from .data.errors import InputError
from .modeling_dino_detr import DinoDetrForObjectDetection


def load_config(model: str) -> DinoDetrConfig:
    """Read a model's configuration.

    Args:
        model (`str`): A folder written by `save_pretrained`, or a name on the Hub.

    Raises:
        InputError: If there is no model, or one of another kind.
    """
    if Path(model).exists() and not (Path(model) / "config.json").is_file():
        raise InputError(f"{model}: is no folder with a model in it (it has no config.json)")
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{model}: is neither a folder with a model nor a model of the Hub ({reason})") from error
    if not isinstance(config, DinoDetrConfig):
        raise InputError(f"{model}: holds a model of type {config.model_type!r}, not {DinoDetrConfig.model_type!r}")
    return config


def read_config(path: Path, id2label: dict[int, str]) -> DinoDetrConfig:
    """Make the configuration of a fresh model from a JSON file with fields of [`DinoDetrConfig`].

    Args:
        path (`Path`): The file. Fields that it leaves out have their defaults.
        id2label (`dict[int, str]`): The classes, which no file can know before the data set does.

    Raises:
        InputError: If the file cannot be read, or names an unknown field or an illegal value.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: must hold an object with fields of DinoDetrConfig, got {type(fields).__name__}")
    # a configuration takes any keyword and keeps it, so that a misspelt field would train another model
    known = {field.name for field in dataclasses.fields(DinoDetrConfig)}
    if unknown := sorted(fields.keys() - known - {"model_type"}):
        raise InputError(
            f"{path}: DinoDetrConfig has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        )
    classes = {"id2label": id2label, "label2id": {name: label for label, name in id2label.items()}}
    try:
        return DinoDetrConfig(**{**fields, **classes})
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error


def load_detector(model: str, backend: str | None = None) -> tuple[DinoDetrForObjectDetection, BaseImageProcessor]:
    """Load a model, in evaluation mode, and its image processor.

    Args:
        model (`str`): A folder written by `save_pretrained`, or a name on the Hub.
        backend (`str`, *optional*): The image processor's, `"torchvision"` or `"pil"`, which resizes exactly as the
            original does. By default the best that is installed.

    Returns:
        `tuple[DinoDetrForObjectDetection, BaseImageProcessor]`.

    Raises:
        InputError: If there is no model, or one of another kind.
    """
    load_config(model)
    chosen = {} if backend is None else {"backend": backend}
    processor = AutoImageProcessor.from_pretrained(model, **chosen)
    return DinoDetrForObjectDetection.from_pretrained(model), processor
