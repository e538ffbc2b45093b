"""Turn an official DINO checkpoint into a folder that `from_pretrained` loads.

    python conversion/convert_original.py --checkpoint checkpoint0011_4scale.pth --output dino-4scale-r50

Which variant a file holds is read from the settings inside it. What is renamed, cut, left out or filled, and why,
stands in `key_tables.py`; every tensor of the file must be used once and every tensor of the model filled once, or
nothing is written. Code pickled into a checkpoint is not run.
"""

import argparse
import hashlib
import logging
import os
import pickle
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from hf_dino import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrImageProcessor
from hf_dino.configuration_dino_detr import UNUSED_LABEL
from hf_dino.hub import save_detector
from hf_dino.image_processing_dino_detr import LONGEST_EDGE, SHORTEST_EDGE
from hf_dino.model_card import converted_card
from key_tables import (
    BACKBONES,
    COCO_NAMES,
    COCO_NUM_LABELS,
    DEFAULT_OF_SETTING,
    OTHER_MODELS,
    PUBLISHED,
    SETTING_OF_FIELD,
    SUPPORTED_VALUES,
    PublishedCheckpoint,
    Rule,
    fills_for,
    rules_for,
)


logger = logging.getLogger("convert_original")


class ConversionError(ValueError):
    """A file or folder that the conversion cannot work with. The message says what was found and what to do."""


def convert(
    checkpoint: Path, output: Path, *, use_ema: bool = False, trust_pickle: bool = False, overwrite: bool = False
) -> None:
    """Convert one official checkpoint file into one model folder.

    Args:
        checkpoint (`Path`): A file that the official training code wrote.
        output (`Path`): The folder to write: weights, configuration, image processor, model card and model code. It
            appears complete or not at all.
        use_ema (`bool`, *optional*, defaults to `False`): Take the moving average of the weights.
        trust_pickle (`bool`, *optional*, defaults to `False`): Read the file even if that runs code stored in it.
        overwrite (`bool`, *optional*, defaults to `False`): Replace an output folder that is not empty.

    Raises:
        ConversionError: If the file is not a complete official checkpoint, holds settings or tensors that the model
            has no place for, or the output folder is taken.
    """
    output = output.resolve()
    check_output(output, overwrite)
    content = load_checkpoint(checkpoint, trust_pickle)
    weights = "ema_model" if use_ema else "model"
    source = official_state_dict(content, weights)
    settings = official_settings(content)
    try:
        config = config_from_args(settings)
    except (TypeError, ValueError, StrictDataclassError) as error:
        if isinstance(error, ConversionError):
            raise
        reason = " ".join(str(error).split())
        raise ConversionError(f"the file's settings ('args') make no DINO: {reason}") from error
    state_dict = convert_state_dict(source, config)
    model = DinoDetrForObjectDetection.from_pretrained(None, config=config, state_dict=state_dict)
    processor = DinoDetrImageProcessor(size=evaluation_size(settings))

    logger.info("computing the SHA-256 of %s", checkpoint.name)
    digest, epochs = sha256(checkpoint), finished_epochs(content)
    published = published_checkpoint(checkpoint.name, digest, settings, epochs)
    card = converted_card(
        config,
        checkpoint=checkpoint.name,
        sha256=digest,
        weights=weights,
        size=processor.size,
        coco=config.num_labels == COCO_NUM_LABELS,
        epochs=epochs,
        published_ap=published.box_ap if published else None,
        published_hash_known=bool(published and published.sha256),
    )
    write_folder(model, processor, card, output)
    logger.info("wrote %s: %d tensors, %d labels", output, len(state_dict), config.num_labels)


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, before any time is spent on reading the checkpoint."""
    if output.exists() and not output.is_dir():
        raise ConversionError(f"--output {output} is a file; give a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ConversionError(f"--output {output} is not empty; choose another folder, or replace it with --overwrite")


def load_checkpoint(path: Path, trust_pickle: bool = False) -> dict[str, Any]:
    """Read a checkpoint file without running code from it.

    Official files hold their settings as an `argparse.Namespace`, the only type allowed here beyond torch's own list.
    """
    if not path.is_file():
        raise ConversionError(f"--checkpoint {path} is not a file")
    with path.open("rb") as file:
        beginning = file.read(64)
    zipped = zipfile.is_zipfile(path)
    if not zipped and not beginning.startswith(b"\x80"):  # neither torch's zip format nor a pickle of old
        if beginning.startswith(b"PK"):
            raise ConversionError(_truncated(path))
        raise ConversionError(
            f"{path.name} is not a PyTorch checkpoint: it begins with {beginning[:24]!r}. "
            f"If it was downloaded, the server may have sent a page instead of the file"
        )
    if trust_pickle:
        logger.warning("--trust-pickle: reading %s may run code that is stored in it", path.name)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=not trust_pickle, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise ConversionError(_unsafe(path, zipped, error)) from error
    except (EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise ConversionError(f"{_truncated(path)} ({_first_line(error)})") from error
    except (AttributeError, ImportError) as error:  # only with trust_pickle
        raise ConversionError(
            f"{path.name} needs code that cannot be imported here ({_first_line(error)}); "
            f"run the conversion where the training code is on PYTHONPATH"
        ) from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path.name} holds a {type(content).__name__}, an official DINO checkpoint is a dict")
    return content


def _truncated(path: Path) -> str:
    return f"{path.name} is damaged or incomplete ({path.stat().st_size:,} bytes); download or copy it again"


def _unsafe(path: Path, zipped: bool, error: Exception) -> str:
    wanted: Iterable[str] = ()
    if zipped:
        with torch.serialization.safe_globals([argparse.Namespace]):
            wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if not wanted:
        if not isinstance(error, pickle.UnpicklingError) or "Unsupported" not in str(error):
            return f"{_truncated(path)} ({_first_line(error)})"
        wanted = re.findall(r"GLOBAL ([\w.]+)", str(error))
    return (
        f"{path.name} is pickled together with {', '.join(sorted(wanted)) or 'unknown objects'}, and reading that "
        f"could run any code. If you made the file yourself, or trust who did, repeat with --trust-pickle"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def official_state_dict(content: Mapping[str, Any], weights: str = "model") -> dict[str, torch.Tensor]:
    """Take the weights out of a checkpoint, without the prefix that DistributedDataParallel puts before each key.

    Args:
        content (`dict`): The checkpoint.
        weights (`str`, *optional*, defaults to `"model"`): `"model"` or `"ema_model"`.
    """
    recognize_other_model(content)
    if weights not in content and "model" in content:
        raise ConversionError(
            f"the file holds no {weights!r}, only {', '.join(sorted(content))}: "
            f"it was trained without use_ema; repeat without --use-ema"
        )
    if not isinstance(content.get(weights), Mapping):
        raise ConversionError(
            f"not an official DINO checkpoint: it should hold 'model' and 'args', but holds {_some(content)}"
        )
    source: dict[str, torch.Tensor] = {}
    for key, value in content[weights].items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ConversionError(f"the file's {weights!r} holds a {type(value).__name__} as {key!r}, not a tensor")
        stripped = key.removeprefix("module.")
        if stripped in source:
            raise ConversionError(f"the file holds {stripped} twice, with and without 'module.' before it")
        source[stripped] = value
    return source


def recognize_other_model(content: Mapping[str, Any]) -> None:
    """Say which other model a file is of, if its keys tell."""
    keys = set(content)
    for part in ("model", "state_dict"):
        if isinstance(content.get(part), Mapping):
            keys |= set(content[part])
    keys = {str(key).removeprefix("module.") for key in keys}
    for pattern, name in OTHER_MODELS:
        found = next((key for key in sorted(keys) if re.fullmatch(pattern, key)), None)
        if found is not None:
            raise ConversionError(f"not an official DINO checkpoint: the key {found} says that this is {name}")


def official_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the official code, as a dict, from a checkpoint's `args`."""
    args = content.get("args")
    if args is None:
        raise ConversionError(
            f"the file holds no settings ('args'), only {', '.join(sorted(content))}: convert the file that the "
            f"official training wrote, before anything was taken out of it"
        )
    if not isinstance(args, Mapping | argparse.Namespace):
        raise ConversionError(f"the file's settings ('args') are a {type(args).__name__}, not a Namespace or a dict")
    return dict(args) if isinstance(args, Mapping) else dict(vars(args))


def config_from_args(args: Mapping[str, Any]) -> DinoDetrConfig:
    """Translate the settings of the official code.

    Args:
        args (`dict`): The settings as the official code names them.

    Returns:
        `DinoDetrConfig`: With COCO's names for 91 classes (the official count: largest raw category id plus one), and
        `class_0`, `class_1`, ... for any other number.

    Raises:
        ConversionError: If a setting is missing, or has a value that the model cannot express.
    """
    settings = DEFAULT_OF_SETTING | dict(args)

    def value_of(name: str) -> Any:
        if name not in settings:
            raise ConversionError(f"the file's settings lack {name!r}, which every official configuration sets")
        value = settings[name]
        return list(value) if isinstance(value, tuple) else value

    for name, supported in SUPPORTED_VALUES.items():
        if value_of(name) not in supported:
            legal = " or ".join(repr(value) for value in supported)
            raise ConversionError(f"the file is trained with {name}={value_of(name)!r}; only {legal} can be converted")
    for first, second in (
        ("pe_temperatureH", "pe_temperatureW"),
        ("dec_pred_class_embed_share", "dec_pred_bbox_embed_share"),
    ):
        if value_of(first) != value_of(second):
            raise ConversionError(
                f"the file is trained with {first}={value_of(first)!r} and {second}={value_of(second)!r}; "
                f"only equal ones can be converted"
            )
    if value_of("backbone") not in BACKBONES:
        raise ConversionError(
            f"the file is trained with backbone={value_of('backbone')!r}; "
            f"only {', '.join(map(repr, BACKBONES))} can be converted"
        )

    stages = [index + 1 for index in value_of("return_interm_indices")]  # transformers counts the stem as 0
    fields = {field: value_of(name) for field, name in SETTING_OF_FIELD.items()}
    two_stage = value_of("two_stage_type") == "standard"
    return DinoDetrConfig(
        backbone_config={**BACKBONES[value_of("backbone")], "out_indices": stages},
        denoising="contrastive" if value_of("use_dn") and value_of("dn_number") > 0 else "none",
        query_selection=("mixed" if value_of("embed_init_tgt") else "pure") if two_stage else "static",
        box_refinement="look_forward_once" if value_of("use_detached_boxes_dec_out") else "look_forward_twice",
        id2label=label_names(value_of("num_classes")),
        **fields,
    )


def label_names(num_classes: int) -> dict[int, str]:
    """Names by label. Official COCO models have the raw category ids as labels, so some labels stand for nothing."""
    if num_classes == COCO_NUM_LABELS:
        return {label: COCO_NAMES.get(label, UNUSED_LABEL) for label in range(num_classes)}
    return {label: f"class_{label}" for label in range(num_classes)}


def evaluation_size(settings: Mapping[str, Any]) -> dict[str, int]:
    """The image size of the official evaluation: the largest training scale."""
    scale = settings.get("data_aug_scale_overlap") or 1
    return {
        "shortest_edge": int(max(settings.get("data_aug_scales") or [SHORTEST_EDGE]) * scale),
        "longest_edge": int((settings.get("data_aug_max_size") or LONGEST_EDGE) * scale),
    }


def convert_state_dict(source: Mapping[str, torch.Tensor], config: DinoDetrConfig) -> dict[str, torch.Tensor]:
    """Rename, cut and complete the tensors of an official state dict.

    Args:
        source (`dict[str, torch.Tensor]`): The official tensors by their official keys.
        config (`DinoDetrConfig`): What the tensors belong to, as from [`config_from_args`].

    Returns:
        `dict[str, torch.Tensor]`: The state dict of `DinoDetrForObjectDetection(config)`, in the dtypes of `source`.

    Raises:
        ConversionError: Unless every tensor of `source` is used exactly once and every tensor of the model filled
            exactly once, in its shape. Lists all that is wrong.
    """
    rules = [(re.compile(rule.source), rule) for rule in rules_for(config)]
    converted: dict[str, torch.Tensor] = {}
    problems: dict[str, list[str]] = {}

    def report(problem: str, key: str) -> None:
        problems.setdefault(problem, []).append(key)

    for key, tensor in source.items():
        matches = [(match, rule) for pattern, rule in rules if (match := pattern.fullmatch(key))]
        if len(matches) != 1:
            report("tensors of the file that have no place in the model", key)
            continue
        match, rule = matches[0]
        if rule.equals and not _same(tensor, source.get(match.expand(rule.equals))):
            report("tensors of the file that should equal another one", f"{key} (= {match.expand(rule.equals)})")
        for target, part in zip((match.expand(target) for target in rule.targets), _parts(tensor, rule, config)):
            if target in converted:
                report("tensors of the model that are filled twice", f"{target} (from {key})")
            converted[target] = part

    with torch.device("meta"):
        expected = DinoDetrForObjectDetection(config).state_dict()
    for target, slot in expected.items():
        if target not in converted:
            fill = next((fill for fill in fills_for(config) if re.fullmatch(fill.target, target)), None)
            if fill is None:
                report("tensors of the model that the file does not fill", target)
            else:
                converted[target] = torch.full(slot.shape, fill.value, dtype=slot.dtype)
        elif converted[target].shape != slot.shape:
            report(
                "tensors of another shape than the settings in the file call for",
                f"{target} {tuple(converted[target].shape)}, not {tuple(slot.shape)}",
            )
    for target in converted.keys() - expected.keys():
        report("tensors of the file that have no place in the model", target)
    if problems:
        raise ConversionError(
            "the tensors and the settings of the file do not fit each other:\n"
            + "\n".join(f"  {problem}: {_some(keys)}" for problem, keys in problems.items())
        )
    return converted


def _parts(tensor: torch.Tensor, rule: Rule, config: DinoDetrConfig) -> tuple[torch.Tensor, ...]:
    """The tensor for each target of a rule."""
    if rule.first_rows:
        tensor = tensor[: config.num_labels].clone()
    if len(rule.targets) <= 1:
        return (tensor,)
    return tuple(part.clone() for part in tensor.chunk(len(rule.targets)))  # cloned: safetensors refuses shared memory


def _same(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and torch.equal(tensor, other)


def _some(keys: Iterable[str], most: int = 12) -> str:
    names = sorted(map(str, keys))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def published_checkpoint(
    name: str, digest: str, settings: Mapping[str, Any], epochs: int | None
) -> PublishedCheckpoint | None:
    """Find the published file that this is: by its hash or, where that is not known, by all that its name says.

    Args:
        name (`str`): Name of the file.
        digest (`str`): Its SHA-256, in hexadecimal.
        settings (`dict`): The settings in it, as the official code names them.
        epochs (`int`, *optional*): From [`finished_epochs`].
    """
    for published in PUBLISHED.values():
        if published.sha256 == digest:
            return published
    namesake = PUBLISHED.get(name)
    if namesake is None:
        return None
    if namesake.sha256 is not None:
        got, expected = f"SHA-256 {digest}", namesake.sha256
    else:
        described = (namesake.backbone, namesake.num_feature_levels, COCO_NUM_LABELS, _epochs_in_name(name))
        found = (*(settings[key] for key in ("backbone", "num_feature_levels", "num_classes")), epochs)
        if found == described:
            return namesake
        got, expected = (
            "backbone {}, {} feature levels, {} classes, {} epochs".format(*each) for each in (found, described)
        )
    logger.warning(
        "%s has the name of a published file but not its content: %s instead of %s. "
        "The model card will not call it official, nor quote the published AP",
        name,
        got,
        expected,
    )
    return None


def _epochs_in_name(name: str) -> int:
    """Epochs trained, by an official file name: it counts the last one from 0."""
    return int(name.removeprefix("checkpoint")[:4]) + 1


def finished_epochs(content: Mapping[str, Any]) -> int | None:
    """Epochs trained, if a checkpoint says so. The official code stores the last one, counted from 0."""
    return content["epoch"] + 1 if isinstance(content.get("epoch"), int) else None


def write_folder(
    model: DinoDetrForObjectDetection, processor: DinoDetrImageProcessor, card: str, output: Path
) -> None:
    """Write everything beside `output`, then rename: who looks at `output` sees all of it or what was there before."""
    output.parent.mkdir(parents=True, exist_ok=True)
    workshop = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        made = workshop / "made"  # not the workshop itself, which only its owner may read
        save_detector(made, model, processor, card)
        _replace(output, made, workshop / "replaced")
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _replace(output: Path, made: Path, aside: Path) -> None:
    """Rename `made` to `output`. What was there goes, except for files that no conversion writes."""
    foreign: list[str] = []
    if output.is_dir():
        foreign = sorted({entry.name for entry in output.iterdir()} - {entry.name for entry in made.iterdir()})
        if foreign:
            aside = _unused_name(output)
        os.rename(output, aside)
    try:
        os.rename(made, output)
    except OSError:
        if aside.exists():
            os.rename(aside, output)
        raise
    if foreign:
        logger.warning("the folder replaced held more than a model (%s): it was kept as %s", _some(foreign), aside)


def _unused_name(output: Path) -> Path:
    number = 1
    while (name := output.with_name(f"{output.name}.replaced-{number}")).exists():
        number += 1
    return name


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 if a model was written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="file written by the official code")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--use-ema", action="store_true", help="convert the moving average of the weights")
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder that is not empty")
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="read a file whose settings hold objects of other code; this RUNS CODE FROM THE FILE",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        convert(
            options.checkpoint,
            options.output,
            use_ema=options.use_ema,
            trust_pickle=options.trust_pickle,
            overwrite=options.overwrite,
        )
    except (ConversionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
