"""Convert an official DINO checkpoint to a directory that `from_pretrained` loads.

The variant follows from the settings in the file. `key_tables.py` lists what is renamed, split, dropped or filled, and
why. Nothing is written unless every tensor of the file is used once and every tensor of the model filled once.
"""

import logging
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import BaseImageProcessor, PreTrainedModel

from ..configuration_dino_detr import UNUSED_LABEL, DinoDetrConfig
from ..hub import save_detector
from ..image_processing_dino_detr import LONGEST_EDGE, SHORTEST_EDGE, DinoDetrImageProcessor
from ..model_card import converted_card
from ..modeling_dino_detr import DinoDetrForObjectDetection
from ..utils.errors import InputError, summarize_list
from ..utils.io import atomic_directory, fsync, sha256
from .checkpoint import finished_epochs, load_checkpoint, official_settings, official_state_dict
from .key_tables import (
    BACKBONES,
    COCO_NAMES,
    COCO_NUM_LABELS,
    DEFAULT_OF_SETTING,
    EQUAL_SETTINGS,
    SETTING_OF_FIELD,
    SUPPORTED_VALUES,
    Rule,
    fills_for,
    rules_for,
)
from .known import KnownCheckpoint, find_known


logger = logging.getLogger(__name__)


def convert_checkpoint(
    checkpoint: Path,
    output_dir: Path,
    *,
    known: KnownCheckpoint | None = None,
    use_ema: bool = False,
    trust_pickle: bool = False,
    overwrite: bool = False,
) -> None:
    """Convert an official checkpoint to a model directory.

    Args:
        checkpoint (`Path`): A file that the official training code wrote.
        output_dir (`Path`): The directory to write: weights, configuration, image processor, model card and code.
            It appears complete or not at all.
        known (`KnownCheckpoint`, *optional*): The published file that it is, from [`~known.fetch_checkpoint`]. If not
            given, it is recognized by its hash, or by its name and content.
        use_ema (`bool`, *optional*, defaults to `False`): Convert the EMA weights.
        trust_pickle (`bool`, *optional*, defaults to `False`): Read the file even if that runs code stored in it.
        overwrite (`bool`, *optional*, defaults to `False`): Replace an output directory that is not empty. If it
            contains anything besides a model, the old directory is renamed instead of deleted.

    Raises:
        InputError: If the file is not a complete official checkpoint, has settings or tensors that the model cannot
            express, or the output directory is not empty.

    Example:

    ```python
    >>> from hf_dino.conversion import convert_checkpoint

    >>> convert_checkpoint(Path("checkpoint0011_4scale.pth"), Path("dino-4scale-r50"))  # doctest: +SKIP

    ```
    """
    output_dir = output_dir.resolve()
    check_output(output_dir, overwrite)
    content = load_checkpoint(checkpoint, trust_pickle)
    weights = "ema_model" if use_ema else "model"
    source = official_state_dict(content, weights)
    settings = official_settings(content)
    config, processor = config_and_processor(settings)
    state_dict = convert_state_dict(source, config)
    model = DinoDetrForObjectDetection.from_pretrained(None, config=config, state_dict=state_dict)

    logger.info("computing the SHA-256 of %s", checkpoint.name)
    digest, epochs = sha256(checkpoint), finished_epochs(content)
    # a file that was downloaded without a known hash is also compared with what its name says
    published = known if known and known.sha256 else find_known(checkpoint.name, digest, settings, epochs)
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
    write_folder(model, processor, card, output_dir)
    logger.info("wrote %s: %d tensors, %d labels", output_dir, len(state_dict), config.num_labels)


def check_output(output_dir: Path, overwrite: bool) -> None:
    """Check that the output directory may be written, before any time is spent on reading the checkpoint."""
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir {output_dir} is a file; give a directory")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not overwrite:
        raise InputError(
            f"--output_dir {output_dir} is not empty; use a different one, or replace it with --overwrite_output_dir"
        )


def config_and_processor(settings: Mapping[str, Any]) -> tuple[DinoDetrConfig, BaseImageProcessor]:
    """Translate the settings in a checkpoint, with one error for all values that are not usable."""
    try:
        return config_from_args(settings), DinoDetrImageProcessor(size=evaluation_size(settings))
    except InputError:
        raise
    except (TypeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the file's settings ('args') do not describe a DINO model: {reason}") from error


def config_from_args(args: Mapping[str, Any]) -> DinoDetrConfig:
    """Translate the settings of the official code.

    Args:
        args (`dict`): The settings, with the official names.

    Returns:
        `DinoDetrConfig`: With COCO's names for 91 classes (the official count: largest category id plus one), and
        `class_0`, `class_1`, ... for any other number.

    Raises:
        InputError: If a setting is missing, or has a value that the model cannot express.
    """
    settings: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in (DEFAULT_OF_SETTING | dict(args)).items()
    }
    check_settings(settings)
    two_stage = settings["two_stage_type"] == "standard"
    stages = [index + 1 for index in settings["return_interm_indices"]]  # in transformers the stem is stage 0
    return DinoDetrConfig(
        backbone_config={**BACKBONES[settings["backbone"]], "out_indices": stages},
        denoising="contrastive" if settings["use_dn"] and settings["dn_number"] > 0 else "none",
        query_selection=("mixed" if settings["embed_init_tgt"] else "pure") if two_stage else "static",
        box_refinement="look_forward_once" if settings["use_detached_boxes_dec_out"] else "look_forward_twice",
        id2label=make_id2label(settings["num_classes"]),
        **{field: settings[name] for field, name in SETTING_OF_FIELD.items()},
    )


REQUIRED_SETTINGS = {
    *SETTING_OF_FIELD.values(),
    *SUPPORTED_VALUES,
    *(name for pair in EQUAL_SETTINGS for name in pair),
    *("backbone", "use_dn", "embed_init_tgt", "use_detached_boxes_dec_out", "num_classes"),
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check that the settings of the official code are complete and that the model can express their values."""
    if missing := sorted(REQUIRED_SETTINGS - settings.keys()):
        raise InputError(
            f"the file's settings lack {summarize_list(map(repr, missing))}, which every official configuration sets"
        )
    for name, supported in {**SUPPORTED_VALUES, "backbone": tuple(BACKBONES)}.items():
        if settings[name] not in supported:
            legal = " or ".join(map(repr, supported))
            raise InputError(f"the file was trained with {name}={settings[name]!r}; only {legal} can be converted")
    for first, second in EQUAL_SETTINGS:
        if settings[first] != settings[second]:
            raise InputError(
                f"the file was trained with {first}={settings[first]!r} and {second}={settings[second]!r}; "
                f"only equal values can be converted"
            )


def make_id2label(num_classes: int) -> dict[int, str]:
    """Return names by label. Labels of official COCO models are the category ids, so some labels are unused."""
    if num_classes == COCO_NUM_LABELS:
        return {label: COCO_NAMES.get(label, UNUSED_LABEL) for label in range(num_classes)}
    return {label: f"class_{label}" for label in range(num_classes)}


def evaluation_size(settings: Mapping[str, Any]) -> dict[str, int]:
    """Return the image size of the official evaluation, in pixels: the largest training scale."""
    scale = settings.get("data_aug_scale_overlap") or 1
    return {
        "shortest_edge": int(max(settings.get("data_aug_scales") or [SHORTEST_EDGE]) * scale),
        "longest_edge": int((settings.get("data_aug_max_size") or LONGEST_EDGE) * scale),
    }


Problems = defaultdict[str, list[str]]
"""Keys of tensors by what is wrong with them."""


def convert_state_dict(source: Mapping[str, torch.Tensor], config: DinoDetrConfig) -> dict[str, torch.Tensor]:
    """Rename, split and complete the tensors of an official state dict.

    Args:
        source (`dict[str, torch.Tensor]`): The official tensors by their official keys.
        config (`DinoDetrConfig`): Configuration of the model, from [`config_from_args`].

    Returns:
        `dict[str, torch.Tensor]`: The state dict of `DinoDetrForObjectDetection(config)`, in the dtypes of `source`.

    Raises:
        InputError: Unless every tensor of `source` is used exactly once and every tensor of the model filled exactly
            once, in its shape. The message lists all problems.
    """
    problems: Problems = defaultdict(list)
    converted = _apply_rules(source, config, problems)
    with torch.device("meta"):
        expected = DinoDetrForObjectDetection(config).state_dict()
    _fill_missing(converted, expected, config, problems)
    for target in converted.keys() - expected.keys():
        problems["tensors of the file without a place in the model"].append(target)
    for target in converted.keys() & expected.keys():
        if converted[target].shape != expected[target].shape:
            problems["tensors whose shape differs from the settings in the file"].append(
                f"{target} {tuple(converted[target].shape)}, not {tuple(expected[target].shape)}"
            )
    if problems:
        details = "; ".join(f"{problem}: {summarize_list(sorted(keys), 12)}" for problem, keys in problems.items())
        raise InputError(f"the tensors of the file do not fit its settings: {details}")
    return converted


def _apply_rules(
    source: Mapping[str, torch.Tensor], config: DinoDetrConfig, problems: Problems
) -> dict[str, torch.Tensor]:
    """Return our tensors that come from official ones."""
    rules = [(re.compile(rule.source), rule) for rule in rules_for(config)]
    converted: dict[str, torch.Tensor] = {}
    for key, tensor in source.items():
        matches = [(match, rule) for pattern, rule in rules if (match := pattern.fullmatch(key))]
        if len(matches) != 1:
            problems["tensors of the file without a place in the model"].append(key)
            continue
        match, rule = matches[0]
        if rule.equals and not _same(tensor, source.get(other := match.expand(rule.equals))):
            problems["tensors of the file that should equal another one"].append(f"{key} (= {other})")
        for target, part in zip((match.expand(target) for target in rule.targets), _split(tensor, rule, config)):
            if target in converted:
                problems["tensors of the model that are filled twice"].append(f"{target} (from {key})")
            converted[target] = part
    return converted


def _split(tensor: torch.Tensor, rule: Rule, config: DinoDetrConfig) -> tuple[torch.Tensor, ...]:
    """Return the tensor for each target of a rule."""
    if rule.first_rows:
        tensor = tensor[: config.num_labels].clone()
    if len(rule.targets) <= 1:
        return (tensor,)
    return tuple(part.clone() for part in tensor.chunk(len(rule.targets)))  # safetensors rejects shared memory


def _same(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and torch.equal(tensor, other)


def _fill_missing(
    converted: dict[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    config: DinoDetrConfig,
    problems: Problems,
) -> None:
    """Add our tensors that have no counterpart in official files."""
    for target in expected.keys() - converted.keys():
        fill = next((fill for fill in fills_for(config) if re.fullmatch(fill.target, target)), None)
        if fill is None:
            problems["tensors of the model that the file does not fill"].append(target)
        else:
            slot = expected[target]
            converted[target] = torch.full(slot.shape, fill.value, dtype=slot.dtype)


def write_folder(model: PreTrainedModel, processor: BaseImageProcessor, card: str, output_dir: Path) -> None:
    """Write a complete directory next to `output_dir`, then rename it: readers see the old content or the new."""
    new = output_dir.with_name(f".{output_dir.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # left by a killed conversion
    with atomic_directory(new) as folder:
        save_detector(folder, model, processor, card)
    try:
        _replace(output_dir, new)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    fsync(output_dir.parent)


def _replace(output_dir: Path, new: Path) -> None:
    """Rename `new` to `output_dir`, and delete the old directory unless it has files that no conversion writes."""
    old = _unused_name(output_dir)
    names = {entry.name for entry in output_dir.iterdir()} if output_dir.is_dir() else set()
    foreign = sorted(names - {entry.name for entry in new.iterdir()})
    if output_dir.is_dir():
        os.rename(output_dir, old)
    try:
        os.rename(new, output_dir)
    except OSError:
        if old.exists():
            os.rename(old, output_dir)
        raise
    if foreign:
        logger.warning(
            "the replaced directory contained more than a model (%s): it was kept as %s",
            summarize_list(foreign, 12),
            old,
        )
    else:
        shutil.rmtree(old, ignore_errors=True)


def _unused_name(output_dir: Path) -> Path:
    number = 1
    while (name := output_dir.with_name(f"{output_dir.name}.replaced-{number}")).exists():
        number += 1
    return name
