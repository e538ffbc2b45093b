"""Read checkpoint files of the three code bases without running the code that a pickle may contain."""

import argparse
import logging
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..utils.errors import InputError, summarize_list
from .key_tables import ANCESTORS, OTHER_DETECTORS, OTHER_MODELS, REPLACED_PACKAGES, SIGNATURES
from .settings import read_python


logger = logging.getLogger(__name__)


class Replaced:
    """Stands for an object of another package in a checkpoint: takes what its pickle gives it, and does nothing."""

    def __new__(cls, *_: Any) -> "Replaced":
        """Accept the arguments of any class or function."""
        return super().__new__(cls)

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass(frozen=True)
class Source:
    """The content of a checkpoint that matters to the conversion.

    Args:
        format (`str`): One of `key_tables.FORMATS` or `ANCESTORS`.
        weights (`str`): Key of the weights in the file; empty if the file is nothing but the weights.
        tensors (`dict[str, torch.Tensor]`): The weights by their keys in the file, without the prefix that
            DistributedDataParallel adds to each.
        settings (`dict`): The settings in the file, with its names; empty if it has none.
        class_names (`list[str]`, *optional*): Names of the classes, if the file has them.
        epochs (`int`, *optional*): Number of epochs trained, if the file has it.
    """

    format: str
    weights: str
    tensors: dict[str, torch.Tensor]
    settings: dict[str, Any]
    class_names: list[str] | None = None
    epochs: int | None = None


def load_checkpoint(path: Path, trust_pickle: bool = False) -> dict[str, Any]:
    """Read a checkpoint file.

    Official files store their settings as an `argparse.Namespace`, the only type allowed here besides those that
    `torch.load` allows by default. Files straight from a training with mmdetection or detrex contain objects of these
    packages beside the weights, which are replaced by [`Replaced`].

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
        content = _load_trusted(path, zipped) if trust_pickle else _load_safely(path, zipped)
    except pickle.UnpicklingError as error:
        raise InputError(_explain_unpickling_error(path, zipped, error)) from error
    except _DAMAGED as error:
        if "TorchScript" in str(error):
            raise InputError(f"{path.name} is a TorchScript program; give the checkpoint of the training") from error
        raise InputError(f"{_truncated(path)} ({_first_line(error)})") from error
    except (AttributeError, ImportError) as error:  # only with trust_pickle
        raise InputError(
            f"{path.name} needs code that cannot be imported here ({_first_line(error)}); "
            f"run the conversion with the training code on PYTHONPATH"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path.name} contains a {type(content).__name__}; a DINO checkpoint is a dict")
    return content


# A damaged file ends in any of these, depending on the damaged byte.
_DAMAGED = (
    *(EOFError, RuntimeError, ValueError, TypeError, LookupError, OverflowError, AssertionError, MemoryError),
    *(zipfile.BadZipFile, struct.error),
)


def _load_trusted(path: Path, zipped: bool) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False, mmap=zipped)


def _load_safely(path: Path, zipped: bool) -> Any:
    """Load a file with the types that are allowed, and one type more for each attempt that ends at one to replace."""
    allowed: dict[str, type] = {"argparse.Namespace": argparse.Namespace}
    while True:
        try:
            with torch.serialization.safe_globals(list(allowed.values())):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            name = _unsupported_type(error)
            if name in allowed or not f"{name}.".startswith(tuple(f"{each}." for each in REPLACED_PACKAGES)):
                raise
            module, _, type_name = name.rpartition(".")
            allowed[name] = type(type_name, (Replaced,), {"__module__": module})


def _unsupported_type(error: pickle.UnpicklingError) -> str:
    found = re.search(r"Unsupported .*?GLOBAL ([\w.]+)", str(error), flags=re.DOTALL)
    name = found[1] if found else ""
    return name if "." in name else f"builtins.{name}"


def _is_zip_checkpoint(path: Path) -> bool:
    """Return whether a file has PyTorch's zip format rather than the older one."""
    if path.is_dir():
        raise InputError(f"{path}: is a directory, not a checkpoint; to write a checkpoint from a model, give --to")
    if not path.is_file():
        raise InputError(f"{path}: is not a file")
    with path.open("rb") as file:
        header = file.read(64)
    if header[8:9] == b"{":
        raise InputError(f"{path.name} is a safetensors file, which from_pretrained loads without conversion")
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
    if zipped and types:
        with torch.serialization.safe_globals([argparse.Namespace]):
            types = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if not types and "Can only" not in str(error):
        return f"{_truncated(path)} ({_first_line(error)})"
    return (
        f"{path.name} is pickled together with {summarize_list(sorted(types)) or 'unknown objects'}, and reading "
        f"these could run any code. If you wrote the file yourself or trust its author, repeat with --trust_pickle"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_source(
    content: Mapping[str, Any], use_ema: bool = False, settings: Mapping[str, Any] | None = None
) -> Source:
    """Tell the format of a checkpoint by its keys, and take the weights and the settings from it.

    Args:
        content (`dict`): The checkpoint.
        use_ema (`bool`, *optional*, defaults to `False`): Take the EMA weights.
        settings (`dict`, *optional*): Settings that replace those in the file.

    Raises:
        InputError: If the checkpoint belongs to another model, or does not contain these weights or its settings.
    """
    name = recognize_format(content)
    weights, tensors = _weights(content, name, use_ema)
    return Source(
        format=name,
        weights=weights,
        tensors=_without_prefix(tensors, weights),
        settings=dict(settings) if settings is not None else _SETTINGS_READERS[name](content),
        class_names=_class_names(content),
        epochs=finished_epochs(content),
    )


_PARTS = ("model", "ema_model", "ema_state", "state_dict", "ema_state_dict")


def recognize_format(content: Mapping[str, Any]) -> str:
    """Return the format of a checkpoint.

    Raises:
        InputError: If it belongs to another model or framework; the message names it, if its keys tell.
    """
    parts = [content, *(content[part] for part in _PARTS if isinstance(content.get(part), Mapping))]
    keys = sorted({str(key).removeprefix("module.") for part in parts for key in part})
    _refuse(OTHER_MODELS, keys)
    for name, signature in SIGNATURES.items():
        if set(signature) <= set(keys):
            return name
    _refuse(OTHER_DETECTORS, keys)
    return "official"


def _refuse(models: tuple[tuple[str, str], ...], keys: list[str]) -> None:
    for pattern, description in models:
        found = next((key for key in keys if re.fullmatch(pattern, key)), None)
        if found is not None:
            raise InputError(f"not a DINO checkpoint: the key {found} shows that this is {description}")


_WEIGHTS = {
    "official": ("model", "ema_model"),
    "detrex": ("model", "ema_state"),
    "mmdet": ("state_dict", ""),
    **dict.fromkeys(ANCESTORS, ("model", "ema_model")),
}
"""Names of the weights and of the EMA weights in a file."""


def _weights(content: Mapping[str, Any], name: str, use_ema: bool) -> tuple[str, Mapping[str, Any]]:
    """Return the name of the weights in the file, and the weights."""
    raw, ema = _WEIGHTS[name]
    if name == "mmdet" and "ema_state_dict" in content:  # its EMAHook swaps the two when it saves
        raw, ema = "ema_state_dict", "state_dict"
    if not any(part in content for part in _PARTS) and any(isinstance(v, torch.Tensor) for v in content.values()):
        raw, content = "", {"": content}
    wanted, other = (ema, raw) if use_ema else (raw, ema)
    if isinstance(content.get(wanted), Mapping):
        if not use_ema and ema in content:
            logger.info("the file also contains EMA weights (%r); --use_ema converts them instead", ema)
        return wanted, content[wanted]
    if use_ema and raw in content:
        raise InputError(
            f"the file contains no {ema or 'ema_state_dict'!r}, only {_names(content)}: it was trained without EMA, "
            f"or they were removed; repeat without --use_ema"
        )
    if isinstance(content.get(other), Mapping):
        raise InputError(f"the file contains only EMA weights ({other!r}); repeat with --use_ema")
    raise InputError(
        f"not a DINO checkpoint: it should contain 'model' and 'args', or 'state_dict' and 'meta', but contains "
        f"{_names(content)}"
    )


def _names(content: Mapping[str, Any]) -> str:
    return summarize_list(sorted(map(str, content)), 12) or "nothing"


def _without_prefix(tensors: Mapping[str, Any], weights: str) -> dict[str, torch.Tensor]:
    """Return tensors by their keys without the prefix that DistributedDataParallel adds to each key."""
    source: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise InputError(f"the file's {weights!r} contains a {type(value).__name__} as {key!r}, not a tensor")
        stripped = key.removeprefix("module.")
        if stripped in source:
            raise InputError(f"{stripped} is duplicated in the file, with and without the prefix 'module.'")
        source[stripped] = value
    # detrex's EMA weights have each tensor once, under its first name, which for the heads is the decoder's
    second = {key.removeprefix("transformer.decoder."): source[key] for key in source if _IS_DECODER_HEAD(key)}
    return {**second, **source}


_IS_DECODER_HEAD = re.compile(r"transformer\.decoder\.(class|bbox)_embed\..+").fullmatch


_GIVE_SETTINGS = (
    "give them with --settings FILE: the configuration (.py) that it was trained with, or config_args_all.json from "
    "the output directory of the training"
)


def official_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a checkpoint, its `args`, as a dict with the official names."""
    args = content.get("args")
    if args is None:
        contained = "its settings ('args') are None" if "args" in content else "it contains no settings ('args')"
        raise InputError(f"the file has weights, but {contained}; {_GIVE_SETTINGS}")
    if not isinstance(args, Mapping | argparse.Namespace):
        raise InputError(f"the file's settings ('args') are a {type(args).__name__}, not a Namespace or a dict")
    settings = dict(args) if isinstance(args, Mapping) else dict(vars(args))
    if unread := [name for name, value in settings.items() if isinstance(value, Replaced)]:
        logger.warning("settings of the file that were not read: %s", summarize_list(unread))
    return {name: value for name, value in settings.items() if not isinstance(value, Replaced)}


def _detrex_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that only our own export writes into a detrex file."""
    config = content.get("config")
    return dict(config) if isinstance(config, Mapping) else {}


def _mmdet_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    config = _meta(content).get("cfg")
    if isinstance(config, Mapping):
        return dict(config)
    try:
        return read_python(config) if isinstance(config, str) else {}
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(
            f"the file's settings (meta['cfg']) are not Python ({_first_line(error)}); {_GIVE_SETTINGS}"
        ) from None


_SETTINGS_READERS = {
    **dict.fromkeys(("official", *ANCESTORS), official_settings),
    "detrex": _detrex_settings,
    "mmdet": _mmdet_settings,
}


def _meta(content: Mapping[str, Any]) -> Mapping[str, Any]:
    meta = content.get("meta")
    return meta if isinstance(meta, Mapping) else {}


def _class_names(content: Mapping[str, Any]) -> list[str] | None:
    """Return the class names: mmdetection's in either spelling, or those that our own export writes for detrex."""
    for holder, name in (("dataset_meta", "classes"), ("dataset_meta", "CLASSES"), ("", "CLASSES")):
        found = _meta(content).get(holder, {}) if holder else _meta(content)
        if isinstance(found, Mapping) and isinstance(names := found.get(name), list | tuple):
            return [str(each) for each in names]
    metadata = content.get("metadata")
    names = metadata.get("thing_classes") if isinstance(metadata, Mapping) else None
    return [str(each) for each in names] if isinstance(names, list | tuple) else None


def finished_epochs(content: Mapping[str, Any]) -> int | None:
    """Return the number of epochs trained, if known. The official code stores the last one, counted from 0."""
    if isinstance(content.get("epoch"), int):
        return content["epoch"] + 1
    epoch = _meta(content).get("epoch")
    return epoch if isinstance(epoch, int) else None
