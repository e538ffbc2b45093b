"""Convert a DINO checkpoint of another code base to a directory that `from_pretrained` loads.

The format is told by the keys in the file. `key_tables.py` lists what is renamed, split, reordered, dropped or filled,
and why; `settings.py` where the configuration comes from. Nothing is written unless every tensor of the file is used
once and every tensor of the model filled once.
"""

import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from transformers import BaseImageProcessor, PreTrainedModel

from ..backbone_weights import fill_key, match_key
from ..configuration_dino_detr import UNUSED_LABEL, DinoDetrConfig
from ..hub import save_detector
from ..image_processing_dino_detr import DinoDetrImageProcessor
from ..model_card import CODE_BASES, converted_card
from ..modeling_dino_detr import DinoDetrForObjectDetection
from ..utils.errors import InputError, summarize_list
from ..utils.io import atomic_directory, ensure_new_directory, fsync, sha256
from ..utils.names import match_names, named_classes
from .checkpoint import Source, load_checkpoint, read_source
from .key_tables import ANCESTORS, COCO_NAMES, COCO_NUM_LABELS, LABEL_EMBEDDING, Rule, fills_for, rules_for
from .known import KnownCheckpoint, find_known
from .settings import (
    FIXED_FIELDS,
    SETTING_OF_FIELD,
    complete,
    config_from_args,
    config_from_tensors,
    config_of_ancestor,
    evaluation_size,
    read_settings_file,
)


logger = logging.getLogger(__name__)

UNUSED_WEIGHTS = "unused_weights.safetensors"
"""File in a model directory with tensors of the checkpoint that the model never reads, for the way back."""


def convert_checkpoint(
    checkpoint: Path,
    output_dir: Path,
    *,
    known: KnownCheckpoint | None = None,
    use_ema: bool = False,
    trust_pickle: bool = False,
    overwrite: bool = False,
    settings: Path | None = None,
    positional_encoding: tuple[float, float] | None = None,
    keep_classes: Sequence[str] = (),
    coco80: bool = False,
    num_labels: int | None = None,
) -> None:
    """Convert a checkpoint of the official implementation, detrex, mmdetection, DAB-DETR or DN-DETR to a directory.

    Args:
        checkpoint (`Path`): A file that the training code wrote.
        output_dir (`Path`): The directory to write: weights, configuration, image processor, model card and code.
            It appears complete or not at all.
        known (`KnownCheckpoint`, *optional*): The published file that it is, from [`~known.fetch_checkpoint`]. If not
            given, it is recognized by its hash, or by its name and content.
        use_ema (`bool`, *optional*, defaults to `False`): Convert the EMA weights.
        trust_pickle (`bool`, *optional*, defaults to `False`): Read the file even if that runs code stored in it.
        overwrite (`bool`, *optional*, defaults to `False`): Replace an output directory that is not empty. If it
            contains anything besides a model, the old directory is renamed instead of deleted.
        settings (`Path`, *optional*): File of settings that replace those in the checkpoint; see
            [`~settings.read_settings_file`].
        positional_encoding (`tuple[float, float]`, *optional*): Temperature and offset of the position embedding,
            which detrex's files do not contain.
        keep_classes (`Sequence[str]`, *optional*): Names of the classes to keep, in their new order. The detections of
            these classes do not change.
        coco80 (`bool`, *optional*, defaults to `False`): Keep the 80 classes of COCO and drop the unused labels.
        num_labels (`int`, *optional*): Replace the class heads by new ones for so many classes.

    Raises:
        InputError: If the file is not a complete checkpoint of DINO, has settings or tensors that the model cannot
            express, or the output directory is not empty.

    Example:

    ```python
    >>> from hf_dino.conversion import convert_checkpoint

    >>> convert_checkpoint(Path("checkpoint0011_4scale.pth"), Path("dino-4scale-r50"))  # doctest: +SKIP

    ```
    """
    output_dir = output_dir.resolve()
    check_output(output_dir, overwrite)
    check_class_options(keep_classes, coco80, num_labels)
    given = read_settings_file(settings) if settings else None
    source = read_source(load_checkpoint(checkpoint, trust_pickle), use_ema, given)
    logger.info("%s: a checkpoint in the format %r", checkpoint.name, source.format)
    namesake = known
    if source.format == "detrex" and not known:  # whose files do not tell their position embedding
        namesake = find_known(checkpoint.name, "", {"format": source.format}, source.epochs)
    embedding, embedding_source = _positional_encoding(positional_encoding, namesake, source)
    config, processor = config_and_processor(source, embedding)
    with ThreadPoolExecutor(max_workers=1) as executor:
        hashing = executor.submit(sha256, checkpoint)  # takes as long as the lines below
        state_dict = convert_state_dict(source.tensors, config, source.format)
        old_config, config = config, choose_classes(state_dict, config, keep_classes, coco80, num_labels)
        model = build_model(config, state_dict, new_classes=num_labels is not None)
        digest = hashing.result()
    # an official file that was downloaded without a known hash is also compared with what its name says
    verified = known and (known.sha256 or source.format != "official")
    known = known if verified else _find_known(checkpoint.name, digest, source, old_config)
    card = converted_card(
        config,
        checkpoint=checkpoint.name,
        sha256=digest,
        weights=source.weights,
        size=processor.size,
        coco=_is_assumed_to_be_coco(source, old_config),
        epochs=source.epochs,
        published_ap=known.box_ap if known else None,
        published_hash_known=bool(known and known.sha256),
        source_format=source.format,
        source_url=known.url if known else None,
        license_name=known.license if known else None,
        embedding_source=embedding_source,
        changes=_describe_changes(old_config, config, num_labels),
        is_ema=use_ema,
    )
    leftover = unused_weights(source, config) if config is old_config else {}
    write_folder(model, processor, card, output_dir, leftover)
    logger.info("wrote %s: %d tensors, %d labels", output_dir, len(state_dict), config.num_labels)


def _is_assumed_to_be_coco(source: Source, config: DinoDetrConfig) -> bool:
    return source.class_names is None and config.num_labels == CODE_BASES[source.format].num_labels


def check_output(output_dir: Path, overwrite: bool) -> None:
    """Check that the output directory may be written, before any time is spent on reading the checkpoint."""
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir {output_dir} is a file; give a directory")
    if not output_dir.exists():
        ensure_new_directory(output_dir)
    if output_dir.is_dir() and any(output_dir.iterdir()) and not overwrite:
        raise InputError(
            f"--output_dir {output_dir} is not empty; use a different one, or replace it with --overwrite_output_dir"
        )


def check_class_options(keep_classes: Sequence[str], coco80: bool, num_labels: int | None) -> None:
    """Check that at most one option changes the classes."""
    given = {"--keep_classes": bool(keep_classes), "--coco80": coco80, "--num_labels": num_labels is not None}
    if sum(given.values()) > 1:
        raise InputError(f"{' and '.join(name for name in given if given[name])} exclude each other; give one of them")
    if num_labels is not None and num_labels < 1:
        raise InputError(f"--num_labels must be at least 1, got {num_labels}")


def _find_known(name: str, digest: str, source: Source, config: DinoDetrConfig) -> KnownCheckpoint | None:
    content = {"num_feature_levels": config.num_feature_levels, "num_classes": config.num_labels}
    if source.format == "official":
        content["backbone"] = source.settings["backbone"]
    return find_known(name, digest, {"format": source.format, **content}, source.epochs)


def _positional_encoding(
    given: tuple[float, float] | None, known: KnownCheckpoint | None, source: Source
) -> tuple[tuple[float, float] | None, str]:
    """Return temperature and offset of the position embedding, `None` for those in the settings, and their source."""
    fields = ("positional_encoding_temperature", "positional_encoding_offset")
    paths = [path for field in fields if (path := SETTING_OF_FIELD[source.format].get(field))]
    settings = complete(source.settings, source.format)
    fixed = tuple(FIXED_FIELDS[source.format][field] for field in fields if field in FIXED_FIELDS[source.format])
    in_file = fixed or tuple(settings[path] for path in paths if path in settings)
    if given:
        if in_file and (*in_file, 0.0)[:2] != tuple(given):
            logger.warning(
                "--positional_encoding %s: replaces %s of the %s",
                _comma(given),
                _comma((*in_file, 0.0)[:2]),
                "code that wrote the file" if fixed else "settings",
            )
        return given, "given with `--positional_encoding`"
    if fixed:
        return None, "fixed in the code that wrote the file"
    if in_file or source.format == "official":  # whose settings are all required
        return None, "read from the file's settings"
    if known:
        temperature, offset = known.positional_encoding or (10000, -0.5)
        return (temperature, offset), "known for this published file"
    raise InputError(
        f"the file ({source.format}) does not tell its position embedding, and a wrong one costs accuracy: give "
        f"--positional_encoding 10000,-0.5 (detrex's default, all its published files but one) or "
        f"--positional_encoding 20,0 (its dino_r50_4scale_24ep, and the official and mmdetection's default), or the "
        f"training's configuration with --settings"
    )


def _comma(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" if isinstance(value, int | float) else str(value) for value in values)


def config_and_processor(
    source: Source, positional_encoding: tuple[float, float] | None = None
) -> tuple[DinoDetrConfig, BaseImageProcessor]:
    """Return configuration and image processor of a checkpoint, with one error for all values that are not usable."""
    try:
        config = _config(source)
        if positional_encoding:
            config.positional_encoding_temperature, config.positional_encoding_offset = positional_encoding
        config.validate_architecture()
        return config, DinoDetrImageProcessor(size=evaluation_size(complete(source.settings, source.format)))
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the file's settings ('args') do not describe a DINO model: {reason}") from error


def _config(source: Source) -> DinoDetrConfig:
    if source.format == "official":
        return config_from_args(source.settings)
    if source.format in ANCESTORS:
        return config_of_ancestor(source.settings, source.format, source.tensors)
    return config_from_tensors(source.tensors, source.format, source.settings, source.class_names)


Problems = defaultdict[str, list[str]]
"""Keys of tensors by what is wrong with them."""


def convert_state_dict(
    source: Mapping[str, torch.Tensor], config: DinoDetrConfig, name: str = "official"
) -> dict[str, torch.Tensor]:
    """Rename, split, reorder and complete the tensors of a file.

    Args:
        source (`dict[str, torch.Tensor]`): The tensors by their keys in the file.
        config (`DinoDetrConfig`): Configuration of the model.
        name (`str`, *optional*, defaults to `"official"`): Format of the file, one of `key_tables.FORMATS` or
            `ANCESTORS`.

    Returns:
        `dict[str, torch.Tensor]`: The state dict of `DinoDetrForObjectDetection(config)`, in the dtypes of `source`.

    Raises:
        InputError: Unless every tensor of `source` is used exactly once and every tensor of the model filled exactly
            once, in its shape. The message lists all problems.
    """
    problems: Problems = defaultdict(list)
    converted = _apply_rules(source, config, name, problems)
    with torch.device("meta"):
        expected = DinoDetrForObjectDetection(config).state_dict()
    _fill_missing(converted, expected, config, name, problems)
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
    source: Mapping[str, torch.Tensor], config: DinoDetrConfig, name: str, problems: Problems
) -> dict[str, torch.Tensor]:
    """Return our tensors that come from the file."""
    rules = rules_for(config, name)
    converted: dict[str, torch.Tensor] = {}
    for key, tensor in source.items():
        matches = [(parts, rule) for rule in rules if (parts := match_key(rule.source, key)) is not None]
        if len(matches) != 1:
            problems["tensors of the file without a place in the model"].append(key)
            continue
        parts, rule = matches[0]
        if rule.equals and not _same(tensor, source.get(other := _copied_key(rule, parts))):
            problems["tensors of the file that should equal another one"].append(f"{key} (= {other})")
        for target, part in zip((fill_key(target, parts) for target in rule.targets), _split(tensor, rule, config)):
            if target in converted:
                problems["tensors of the model that are filled twice"].append(f"{target} (from {key})")
            converted[target] = part
    return converted


def _copied_key(rule: Rule, parts: Sequence[str]) -> str:
    """Return the key of which a tensor must be a copy; a copy's own index, `#`, is no part of it."""
    return fill_key(rule.equals or "", parts[1:] if "#" in rule.source else parts)


def _split(tensor: torch.Tensor, rule: Rule, config: DinoDetrConfig) -> tuple[torch.Tensor, ...]:
    """Return the tensor for each target of a rule."""
    if rule.first_rows:
        tensor = tensor[: config.num_labels].clone()
    if rule.reorder:
        tensor = rule.reorder[0](tensor)
    if len(rule.targets) <= 1:
        return (tensor,)
    return tuple(part.clone() for part in tensor.chunk(len(rule.targets)))  # safetensors rejects shared memory


def _same(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and torch.equal(tensor, other)


def _fill_missing(
    converted: dict[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    config: DinoDetrConfig,
    name: str,
    problems: Problems,
) -> None:
    """Add our tensors that have no counterpart in the file."""
    fills = fills_for(config, name)
    for target in expected.keys() - converted.keys():
        fill = next((fill for fill in fills if match_key(fill.target, target) is not None), None)
        if fill is None:
            problems["tensors of the model that the file does not fill"].append(target)
        else:
            slot = expected[target]
            converted[target] = torch.full(slot.shape, fill.value, dtype=slot.dtype, device="cpu")


def unused_weights(source: Source, config: DinoDetrConfig) -> dict[str, torch.Tensor]:
    """Return the rows of the label embedding that the model never reads."""
    key = LABEL_EMBEDDING[source.format]
    used = config.num_labels if config.denoising != "none" else 0
    rows = source.tensors[key][used:] if key in source.tensors else torch.empty(0)
    return {key: rows.clone()} if len(rows) else {}


def choose_classes(
    state_dict: dict[str, torch.Tensor],
    config: DinoDetrConfig,
    keep_classes: Sequence[str],
    coco80: bool,
    num_labels: int | None,
) -> DinoDetrConfig:
    """Return the configuration with the classes of the options, and keep their rows in `state_dict`."""
    if num_labels:
        return config.from_dict(config.to_dict(), id2label={label: f"class_{label}" for label in range(num_labels)})
    used = [name for name in config.id2label.values() if name != UNUSED_LABEL] if coco80 else keep_classes
    return select_classes(state_dict, config, used, coco80) if used else config


def select_classes(
    state_dict: dict[str, torch.Tensor], config: DinoDetrConfig, names: Sequence[str], coco80: bool = False
) -> DinoDetrConfig:
    """Keep some classes of a model, whose detections do not change.

    The encoder's tokens are ranked by the largest logit of any class, so the rows of the other classes are kept there,
    after those of the classes that are kept, and only there.

    Args:
        state_dict (`dict[str, torch.Tensor]`): Changed in place.
        config (`DinoDetrConfig`): Its configuration.
        names (`Sequence[str]`): Names of the classes to keep, in their new order.
        coco80 (`bool`, *optional*, defaults to `False`): Whether the unused labels are to be dropped.

    Returns:
        `DinoDetrConfig`: The new configuration.

    Raises:
        InputError: If a name is unknown or given twice, or there are no unused labels.
    """
    if coco80 and (len(names), config.num_labels) != (len(COCO_NAMES), COCO_NUM_LABELS):
        raise InputError(
            f"--coco80: the file has {config.num_labels} labels, not the {COCO_NUM_LABELS} category ids of COCO; "
            f"choose classes by their names with --keep_classes"
        )
    id2label = dict(enumerate(names))
    known = match_names(id2label, named_classes(config.id2label))
    _check_names(names, known, config)
    labels = list(known.values())
    others = [label for label in range(config.num_labels) if label not in labels]
    ranking = [] if config.query_selection == "static" else others
    rows = {"class_embed.*.@": labels, "model.denoising.label_embed.@": labels}
    rows["model.query_selection.class_embed.@"] = labels + ranking
    for template, kept in rows.items():
        for key in [key for key in state_dict if match_key(template, key) is not None]:
            state_dict[key] = state_dict[key][kept]
    fields = {label: config.id2label[old] for label, old in known.items()}
    return config.from_dict(config.to_dict(), id2label=fields, num_ranking_labels=len(ranking))


def _check_names(names: Sequence[str], known: Mapping[int, int], config: DinoDetrConfig) -> None:
    if unknown := [name for label, name in enumerate(names) if label not in known]:
        close = get_close_matches(unknown[0], map(str, config.id2label.values()), n=1)
        hint = f"did you mean {close[0]}?" if close else f"it has {summarize_list(config.id2label.values(), 12)}"
        raise InputError(f"--keep_classes: the file has no class {', '.join(map(repr, unknown))}; {hint}")
    if len(set(known.values())) < len(names):
        raise InputError(f"--keep_classes {','.join(names)}: a class is given twice; give each once")


def build_model(
    config: DinoDetrConfig, state_dict: Mapping[str, torch.Tensor], new_classes: bool = False
) -> DinoDetrForObjectDetection:
    """Build a model around tensors, without copying them; with `new_classes`, all layers with classes are new."""
    with torch.device("meta"):
        model = DinoDetrForObjectDetection(config)
    if new_classes:
        for layer in model.class_specific_layers():
            layer.to_empty(device="cpu")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same file gives the same model
            model.reset_class_layers()
        new = {key for key, tensor in model.state_dict().items() if not tensor.is_meta}
        state_dict = {key: tensor for key, tensor in state_dict.items() if key not in new}
    model.load_state_dict(state_dict, strict=not new_classes, assign=True)
    return model.eval()


def _describe_changes(old: DinoDetrConfig, new: DinoDetrConfig, num_labels: int | None) -> str:
    """Return what was done to the classes, for the model card and the log."""
    if num_labels:
        logger.warning("--num_labels %d: the class heads are new and random; train the model before use", num_labels)
        return f"The class heads are new, for {num_labels} classes, and random: train the model before use."
    if new.num_labels == old.num_labels:
        return ""
    text = f"Of the {old.num_labels} labels of the file, {new.num_labels} were kept; their detections are the same."
    logger.info(text)
    return text


def write_folder(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    card: str,
    output_dir: Path,
    unused: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a complete directory next to `output_dir`, then rename it: readers see the old content or the new."""
    new = output_dir.with_name(f".{output_dir.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # left by a killed conversion
    with atomic_directory(new) as folder:
        if unused:
            save_file(dict(unused), folder / UNUSED_WEIGHTS)
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
    foreign = sorted(names - {UNUSED_WEIGHTS} - {entry.name for entry in new.iterdir()})
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
