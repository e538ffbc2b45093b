"""Read checkpoint files of the official implementation without running the code that a pickle may contain."""

import argparse
import logging
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..utils.errors import InputError, summarize_list
from .key_tables import OTHER_MODELS, OTHER_PACKAGES


logger = logging.getLogger(__name__)


def load_checkpoint(path: Path, trust_pickle: bool = False) -> dict[str, Any]:
    """Read a checkpoint file.

    Official files store their settings as an `argparse.Namespace`, the only type allowed here besides those that
    `torch.load` allows by default.

    Args:
        path (`Path`): The file, in PyTorch's zip format or in the format from before PyTorch 1.6.
        trust_pickle (`bool`, *optional*, defaults to `False`): Allow all types. This runs code stored in the file.

    Returns:
        `dict[str, Any]`: The content of the file, with tensors on the CPU; those of a zip file are memory-mapped.

    Raises:
        InputError: If the file is missing, truncated or not a checkpoint, or needs types that are not allowed or
            cannot be imported.
    """
    zipped = _is_zip_checkpoint(path)
    if trust_pickle:
        logger.warning("--trust_pickle: reading %s may run code that is stored in it", path.name)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=not trust_pickle, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise InputError(_explain_unpickling_error(path, zipped, error)) from error
    except (EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise InputError(f"{_truncated(path)} ({_first_line(error)})") from error
    except (AttributeError, ImportError) as error:  # only with trust_pickle
        raise InputError(
            f"{path.name} needs code that cannot be imported here ({_first_line(error)}); "
            f"run the conversion with the training code on PYTHONPATH"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path.name} contains a {type(content).__name__}; an official DINO checkpoint is a dict")
    return content


def _is_zip_checkpoint(path: Path) -> bool:
    """Return whether a file has PyTorch's zip format rather than the older one."""
    if not path.is_file():
        raise InputError(f"--checkpoint {path} is not a file")
    with path.open("rb") as file:
        header = file.read(64)
    zipped = zipfile.is_zipfile(path)
    if not zipped and header.startswith(b"PK"):  # the table of contents is at the end of a zip file
        raise InputError(_truncated(path))
    if not zipped and not header.startswith(b"\x80"):  # the first byte of a pickle
        raise InputError(
            f"{path.name} is not a PyTorch checkpoint: it begins with {header[:24]!r}. "
            f"If it was downloaded, the server may have sent a web page instead of the file"
        )
    return zipped


def _truncated(path: Path) -> str:
    return f"{path.name} is damaged or incomplete ({path.stat().st_size:,} bytes); download or copy it again"


def _explain_unpickling_error(path: Path, zipped: bool, error: pickle.UnpicklingError) -> str:
    types: Iterable[str] = re.findall(r"Unsupported .*?GLOBAL ([\w.]+)", str(error), flags=re.DOTALL)
    if zipped:
        with torch.serialization.safe_globals([argparse.Namespace]):
            types = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if not types and "Unsupported" not in str(error):
        return f"{_truncated(path)} ({_first_line(error)})"
    package = next((name for name in OTHER_PACKAGES if any(each.startswith(f"{name}.") for each in types)), None)
    if package:
        description = OTHER_PACKAGES[package]
        return f"not an official DINO checkpoint: the pickled types of {package} show that this is {description}"
    return (
        f"{path.name} is pickled together with {summarize_list(sorted(types)) or 'unknown objects'}, and reading "
        f"these could run any code. If you wrote the file yourself or trust its author, repeat with --trust_pickle"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def official_state_dict(content: Mapping[str, Any], weights: str = "model") -> dict[str, torch.Tensor]:
    """Return the weights in a checkpoint, without the prefix that DistributedDataParallel adds to each key.

    Args:
        content (`dict`): The checkpoint.
        weights (`str`, *optional*, defaults to `"model"`): `"model"`, or `"ema_model"` for the EMA weights.

    Raises:
        InputError: If the checkpoint belongs to another model, or does not contain these weights.
    """
    recognize_other_model(content)
    if weights not in content and "model" in content:
        raise InputError(
            f"the file contains no {weights!r}, only {', '.join(sorted(content))}: it was trained without use_ema; "
            f"repeat without --use_ema"
        )
    if not isinstance(content.get(weights), Mapping):
        raise InputError(
            f"not an official DINO checkpoint: it should contain 'model' and 'args', but contains "
            f"{summarize_list(sorted(map(str, content)), 12)}"
        )
    source: dict[str, torch.Tensor] = {}
    for key, value in content[weights].items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise InputError(f"the file's {weights!r} contains a {type(value).__name__} as {key!r}, not a tensor")
        stripped = key.removeprefix("module.")
        if stripped in source:
            raise InputError(f"{stripped} is duplicated in the file, with and without the prefix 'module.'")
        source[stripped] = value
    return source


def recognize_other_model(content: Mapping[str, Any]) -> None:
    """Raise an `InputError` that names the other model or framework whose checkpoint this is, if its keys tell."""
    parts = [content, *(content[part] for part in ("model", "state_dict") if isinstance(content.get(part), Mapping))]
    keys = sorted({str(key).removeprefix("module.") for part in parts for key in part})
    for pattern, description in OTHER_MODELS:
        found = next((key for key in keys if re.fullmatch(pattern, key)), None)
        if found is not None:
            raise InputError(f"not an official DINO checkpoint: the key {found} shows that this is {description}")


def official_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a checkpoint, its `args`, as a dict with the official names."""
    args = content.get("args")
    if args is None:
        raise InputError(
            f"the file contains no settings ('args'), only {', '.join(sorted(content))}: convert the file as the "
            f"official training wrote it, before anything was removed from it"
        )
    if not isinstance(args, Mapping | argparse.Namespace):
        raise InputError(f"the file's settings ('args') are a {type(args).__name__}, not a Namespace or a dict")
    return dict(args) if isinstance(args, Mapping) else dict(vars(args))


def finished_epochs(content: Mapping[str, Any]) -> int | None:
    """Return the number of epochs trained, if known. The official code stores the last one, counted from 0."""
    return content["epoch"] + 1 if isinstance(content.get("epoch"), int) else None
