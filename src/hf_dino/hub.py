"""Load, build and save models with their image processors; whatever cannot be used raises an `InputError`."""

import dataclasses
import functools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from torchvision.models import get_model
from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor, PreTrainedModel
from transformers.utils import logging as transformers_logging

from .configuration_dino_detr import UNUSED_LABEL, DinoDetrConfig
from .image_processing_dino_detr import (
    LONGEST_EDGE,
    SHORTEST_EDGE,
    DinoDetrImageProcessor,
    DinoDetrImageProcessorPil,
)
from .registration import DinoDetrForObjectDetection  # with the auto classes, which then load DINO models
from .utils.errors import InputError, summarize_list
from .utils.io import read_text
from .utils.names import match_names, named_classes


logger = logging.getLogger(__name__)

ModelAndProcessor = tuple[DinoDetrForObjectDetection, BaseImageProcessor]


def load_model_and_processor(model: str, backend: str | None = None) -> ModelAndProcessor:
    """Load a model, in evaluation mode, and its image processor.

    Args:
        model (`str`): A directory written by `save_pretrained`, or a name on the Hub.
        backend (`str`, *optional*): Backend of the image processor: `"torchvision"`, or `"pil"`, which resizes exactly
            as the official implementation. By default the best that is installed.

    Returns:
        `tuple[DinoDetrForObjectDetection, BaseImageProcessor]`.

    Raises:
        InputError: If the model is not found, has another type or is incomplete.
    """
    config = load_config(model)
    return _load_weights(model, config.id2label, {}), _load_processor(model, {"backend": backend})


def load_pretrained_for_categories(
    model: str,
    categories: Mapping[int, str],
    size: Mapping[str, int] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> ModelAndProcessor:
    """Load a model for fine-tuning on the classes of a dataset, in float32.

    A model that already has exactly these classes is loaded unchanged, including its label ids. Otherwise the classes
    are numbered from 0 in ascending order of category id. Classes that the model has under the same name keep their
    rows of the class heads and the label embedding; the rows of all others are reinitialized. Names match regardless
    of case and of spaces, hyphens and underscores. All other weights are kept. The copied and the new classes are
    logged.

    Args:
        model (`str`): A directory written by `save_pretrained`, or a name on the Hub.
        categories (`Mapping[int, str]`): Names of the dataset's classes by category id.
        size (`Mapping[str, int]`, *optional*): Image size for the image processor; by default unchanged.
        overrides (`Mapping[str, Any]`, *optional*): Fields of [`DinoDetrConfig`] to change.

    Raises:
        InputError: If the model is not found, has another type or is incomplete, or a field has an illegal value.
    """
    config = load_config(model)
    processor = _load_processor(model, {"size": size})
    # updates as small as those of training are lost in half precision, in which a model may have been saved
    overrides = {**(overrides or {}), "dtype": torch.float32}
    num_queries = overrides.pop("num_queries", config.num_queries)
    if set(config.id2label.values()) - {UNUSED_LABEL} == set(categories.values()):
        return _set_num_queries(_load_weights(model, config.id2label, overrides), num_queries), processor
    id2label = contiguous_id2label(categories)
    # the classes that only rank tokens are those of the old dataset
    changed = {**overrides, "num_ranking_labels": 0}
    old_numbers = (config.num_labels, config.num_labels + config.num_ranking_labels)
    detector = _load_weights(model, id2label, changed, old_numbers)
    detector.reset_class_layers()  # an equal number of classes may be other classes, whose weights were loaded
    known = match_names(id2label, named_classes(config.id2label))
    if known:
        _copy_classes(_load_weights(model, config.id2label, overrides), detector, known)
    copied = [id2label[label] for label in known]
    new = [name for label, name in id2label.items() if label not in known]
    logger.warning(
        "%s: classes copied: %s; new: %s",
        model,
        summarize_list(copied, 20) or "none",
        summarize_list(new, 20) or "none",
    )
    return _set_num_queries(detector, num_queries), processor


def contiguous_id2label(categories: Mapping[int, str]) -> dict[int, str]:
    """Assign labels from 0 to the categories of a dataset, in ascending order of category id.

    Example:

    ```python
    >>> contiguous_id2label({7: "cat", 3: "dog"})
    {0: 'dog', 1: 'cat'}

    ```
    """
    return {label: categories[category_id] for label, category_id in enumerate(sorted(categories))}


_QUERY_WEIGHTS = ("query_selection.content_queries.weight", "query_selection.anchors.weight")
"""Ends of the names of weights with a row per query."""


def _set_num_queries(detector: DinoDetrForObjectDetection, num_queries: int) -> DinoDetrForObjectDetection:
    """Change the number of queries; additional ones begin as copies of the others."""
    config, old = deepcopy(detector.config), detector.config.num_queries
    if num_queries == old:
        return detector
    with _as_input_error(_OVERRIDES, "is not a configuration of a DINO model"):
        config.num_queries = num_queries
        changed = DinoDetrForObjectDetection(config)
    rows = torch.arange(num_queries) % old
    weights = detector.state_dict()
    learned = {name: value[rows] for name, value in weights.items() if name.endswith(_QUERY_WEIGHTS)}
    changed.load_state_dict({**weights, **learned})
    logger.warning("the model has %d queries instead of %d: learned ones are repeated or left out", num_queries, old)
    return changed.eval()


@torch.no_grad()
def _copy_classes(
    source: DinoDetrForObjectDetection, target: DinoDetrForObjectDetection, labels_of_source: Mapping[int, int]
) -> None:
    """Copy rows of all layers that have one row per class.

    `labels_of_source` maps labels of `target` to labels of `source`.
    """
    labels, from_labels = list(labels_of_source), list(labels_of_source.values())
    for layer, source_layer in zip(target.class_specific_layers(), source.class_specific_layers(), strict=True):
        for parameter, source_parameter in zip(layer.parameters(), source_layer.parameters(), strict=True):
            parameter[labels] = source_parameter[from_labels]


def build_model_and_processor(
    config: Path | None,
    categories: Mapping[int, str],
    size: Mapping[str, int] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> ModelAndProcessor:
    """Build a model with random weights for the classes of a dataset.

    Args:
        config (`Path`, *optional*): JSON file, see [`read_config`]; by default DINO with a ResNet-50 and 4 feature
            levels.
        categories (`Mapping[int, str]`): Names of the dataset's classes by category id.
        size (`Mapping[str, int]`, *optional*): Image size for the image processor; by default that of the official
            implementation.
        overrides (`Mapping[str, Any]`, *optional*): Fields of [`DinoDetrConfig`] that take precedence over the file.

    Raises:
        InputError: If the file cannot be read, or has an unknown field or an illegal value.
    """
    model_config = read_config(config, contiguous_id2label(categories), overrides)
    with _as_input_error(config or _OVERRIDES, "is not a configuration of a DINO model"):
        model = DinoDetrForObjectDetection(model_config)
    return model, DinoDetrImageProcessor(**_drop_none({"size": size}))


def warn_if_batch_norms_frozen(model: DinoDetrForObjectDetection) -> None:
    """Warn if randomly initialized batch norms are frozen."""
    if model.config.freeze_backbone_batch_norms and any(
        isinstance(layer, nn.BatchNorm2d) for layer in model.modules()
    ):
        logger.warning("training from scratch with frozen batch norms: set freeze_backbone_batch_norms to false")


def load_config(model: str) -> DinoDetrConfig:
    """Read the configuration of a model.

    Args:
        model (`str`): A directory written by `save_pretrained`, or a name on the Hub.

    Raises:
        InputError: If the model is not found or has another type.
    """
    is_local = Path(model).exists()
    if is_local and not (Path(model) / "config.json").is_file():
        raise InputError(f"{model}: is not a model directory (it has no config.json)")
    problem = "has no usable config.json" if is_local else "is neither a directory nor a model on the Hub"
    with _as_input_error(model, problem):
        config = AutoConfig.from_pretrained(model)
    if not isinstance(config, DinoDetrConfig):
        raise InputError(f"{model}: contains a model of type {config.model_type!r}, not {DinoDetrConfig.model_type!r}")
    return config


def read_config(
    path: Path | None, id2label: dict[int, str], overrides: Mapping[str, Any] | None = None
) -> DinoDetrConfig:
    """Read the configuration of a new model from a JSON file with fields of [`DinoDetrConfig`].

    Args:
        path (`Path`, *optional*): The file. Fields that it omits have their defaults.
        id2label (`dict[int, str]`): Class names by label, which take precedence over the file.
        overrides (`Mapping[str, Any]`, *optional*): Fields that take precedence over the file.

    Raises:
        InputError: If the file cannot be read, or has an unknown field or an illegal value.
    """
    fields = _read_fields(path) if path else {}
    with _as_input_error(path or _OVERRIDES, "is not a configuration of a DINO model"):
        return DinoDetrConfig(**{**fields, **(overrides or {}), "id2label": id2label})


def _read_fields(path: Path) -> dict[str, Any]:
    text = read_text(path)
    with _as_input_error(path, "cannot be read as JSON"):
        fields = json.loads(text)
    if not isinstance(fields, dict):
        raise InputError(f"{path}: must contain an object with fields of DinoDetrConfig, got {type(fields).__name__}")
    for name in fields.keys() - {"model_type", "id2label", "label2id"}:
        try:
            check_config_field(name)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    return fields


def check_config_field(name: str) -> None:
    """Check that a field of [`DinoDetrConfig`] can be set. The class itself accepts any keyword, also misspelled ones.

    Raises:
        InputError: If there is no field of this name, where the message suggests a similar one, or if the field
            follows from the classes of the dataset.
    """
    if name in _CLASS_FIELDS:
        raise InputError(f"{name} cannot be set: the classes are those of the dataset; remove it")
    fields = [field.name for field in dataclasses.fields(DinoDetrConfig)]
    if name not in fields:
        close = get_close_matches(name, fields, n=1)
        hint = f"did you mean {close[0]}?" if close else "python -m pydoc hf_dino.DinoDetrConfig lists them"
        raise InputError(f"DinoDetrConfig has no field {name!r}; {hint}")


def _load_processor(model: str, options: Mapping[str, Any]) -> BaseImageProcessor:
    with _as_input_error(model, "has no usable image processor, preprocessor_config.json"):
        processor = AutoImageProcessor.from_pretrained(model, **_drop_none(options))
        if not isinstance(processor, DinoDetrImageProcessor | DinoDetrImageProcessorPil):
            raise TypeError(f"it is a {type(processor).__name__}, not a {DinoDetrImageProcessor.__name__}")
        _check_size(dict(processor.size))
    return processor


def _check_size(size: Mapping[str, int]) -> None:
    if size.keys() not in ({"shortest_edge", "longest_edge"}, {"height", "width"}) or min(size.values()) < 1:
        raise ValueError(f"size must be a positive shortest_edge and longest_edge, or height and width, not {size}")


def _load_weights(
    model: str, id2label: dict[int, str], overrides: Mapping[str, Any], old_numbers: Sequence[int] = ()
) -> DinoDetrForObjectDetection:
    """Load all weights. Those with one row per class may have been saved with one of `old_numbers` of rows."""
    with _as_input_error(model, "has no usable weights"), _quiet_transformers():
        detector, info = DinoDetrForObjectDetection.from_pretrained(
            model, id2label=id2label, ignore_mismatched_sizes=True, output_loading_info=True, **overrides
        )
    wrong = [name for name, saved, _ in info["mismatched_keys"] if saved[0] not in old_numbers]
    if incomplete := sorted({*wrong, *info["missing_keys"]}):
        raise InputError(
            f"{model}: its weights are not those of a complete detector; {len(incomplete)} are missing or do not have "
            f"the shape that follows from config.json, such as {incomplete[0]}"
        )
    return detector


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers from listing weights that do not fit; the caller checks them and raises an error."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _drop_none(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


_OVERRIDES = "--config_overrides"
_CLASS_FIELDS = ("id2label", "label2id", "num_labels")

_LIBRARY_ERRORS = (
    OSError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)


@contextmanager
def _as_input_error(source: str | Path, problem: str) -> Iterator[None]:
    """Convert errors of several libraries to an `InputError` of one line that names the source."""
    try:
        yield
    except _LIBRARY_ERRORS as error:
        # the message of a strict dataclass names the field and gives the reason only in its cause
        reason = str(error.__cause__ if isinstance(error, StrictDataclassError) else error).strip()
        first_line = reason.partition("\n")[0]
        raise InputError(f"{source}: {problem} ({first_line})") from error


_TORCHVISION = "torchvision/"

TORCHVISION_RESNET_KEYS = (
    ("conv1.@", "embedder.embedder.convolution.@"),
    ("bn1.@", "embedder.embedder.normalization.@"),
    *(
        (f"layer{stage + 1}.*.{source}", f"encoder.stages.{stage}.layers.*.{target}")
        for stage in range(4)
        for source, target in (
            ("downsample.0.@", "shortcut.convolution.@"),
            ("downsample.1.@", "shortcut.normalization.@"),
            *((f"conv{index + 1}.@", f"layer.{index}.convolution.@") for index in range(3)),
            *((f"bn{index + 1}.@", f"layer.{index}.normalization.@") for index in range(3)),
        )
    ),
)
"""Templates, see [`match_key`], of the keys of a ResNet of torchvision, and of those of transformers.

torchvision counts stages, convolutions and norms from 1, transformers from 0.
"""


def match_key(template: str, key: str) -> tuple[str, ...] | None:
    """Return the parts of a key at the wildcards of a template, or `None` if the template does not match the key.

    Args:
        template (`str`): A key in which `*` stands for any index, `#` for any index but 0, and `@` for any name
            between two dots.
        key (`str`): Key of a tensor in a state dict.

    Example:

    ```python
    >>> match_key("layers.*.norm.@", "layers.3.norm.bias"), match_key("layers.#.norm.@", "layers.0.norm.bias")
    (('3', 'bias'), None)

    ```
    """
    match = _template_pattern(template).fullmatch(key)
    return match.groups() if match else None


@functools.cache
def _template_pattern(template: str) -> re.Pattern[str]:
    pattern = template.replace(".", r"\.").replace("*", r"(\d+)").replace("#", r"([1-9]\d*)")
    return re.compile(pattern.replace("@", r"(\w+)"))


def fill_key(template: str, parts: Sequence[str]) -> str:
    """Return the key that a template gives with these parts at its wildcards.

    Example:

    ```python
    >>> fill_key("encoder.layer.*.layer_norm.@", ("3", "bias"))
    'encoder.layer.3.layer_norm.bias'

    ```
    """
    remaining = iter(parts)
    return re.sub(r"[*#@]", lambda _: next(remaining), template)


def load_backbone_weights(model: DinoDetrForObjectDetection, name: str) -> None:
    """Load pretrained weights into the backbone of a detector.

    Args:
        model (`DinoDetrForObjectDetection`): The detector; its `config.backbone_config` describes the architecture of
            the weights.
        name (`str`): `torchvision/resnet50` and the like for the ImageNet weights of torchvision (IMAGENET1K_V1), from
            which the authors of DINO trained their ResNets. Or the Hub name or directory of a backbone or classifier
            of transformers, such as `microsoft/swin-large-patch4-window12-384-in22k`, the authors' Swin-L.

    Raises:
        InputError: If the weights are not found or do not fit.
    """
    body = model.model.backbone.body
    read = _read_torchvision if name.startswith(_TORCHVISION) else _read_transformers
    try:
        body.load_state_dict(read(name, body))
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{name}: cannot be loaded as the weights of the backbone that the configuration describes, a "
            f"{body.config.model_type} ({reason[:300]})"
        ) from None


def _read_torchvision(name: str, body: PreTrainedModel) -> Mapping[str, torch.Tensor]:
    weights = get_model(name.removeprefix(_TORCHVISION), weights="IMAGENET1K_V1").state_dict()
    return {_resnet_key(key): tensor for key, tensor in weights.items() if not key.startswith("fc.")}


def _resnet_key(key: str) -> str:
    matches = ((match_key(source, key), target) for source, target in TORCHVISION_RESNET_KEYS)
    return next((fill_key(target, parts) for parts, target in matches if parts is not None), key)


def _read_transformers(name: str, body: PreTrainedModel) -> Mapping[str, torch.Tensor]:
    backbone, info = type(body).from_pretrained(name, config=deepcopy(body.config), output_loading_info=True)
    # a classifier has no norms for the features of single stages; these keep their initial values
    if missing := [key for key in info["missing_keys"] if not key.startswith("hidden_states_norms.")]:
        raise ValueError(f"the weights lack {missing[0]}")
    return backbone.state_dict()


def save_detector(folder: Path, model: PreTrainedModel, processor: BaseImageProcessor, card: str) -> None:
    """Write weights, configuration, image processor, model code and model card.

    Files are replaced one by one, not atomically: pass a temporary directory and rename it afterwards.

    Args:
        folder (`Path`): Created if it does not exist.
        model (`PreTrainedModel`): A `DinoDetrForObjectDetection`.
        processor (`BaseImageProcessor`): Its image processor.
        card (`str`): Its model card, from [`~model_card.converted_card`] or [`~model_card.finetuned_card`].
    """
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    readme = folder / "README.md"
    readme.write_text(card, encoding="utf-8")
    for weights in folder.glob("*.safetensors"):
        weights.chmod(readme.stat().st_mode)  # safetensors makes its files readable only for their owner


def parse_image_size(words: Sequence[str]) -> dict[str, int]:
    """Parse the size that an image processor resizes images to.

    Args:
        words (`Sequence[str]`): Values of `--image_size`, in pixels: the shortest and the longest edge, or the
            shortest edge alone for a longest edge in the proportion of the official implementation, or `HEIGHTxWIDTH`
            for exactly that size.

    Returns:
        `dict[str, int]`: `shortest_edge` and `longest_edge`, or `height` and `width`.

    Raises:
        InputError: If the values are something else, not positive, or in the wrong order.

    Example:

    ```python
    >>> parse_image_size(["800"]), parse_image_size(["480x640"])
    ({'shortest_edge': 800, 'longest_edge': 1333}, {'height': 480, 'width': 640})

    ```
    """
    given = " ".join(words)
    try:
        if "x" in given:
            height, width = map(int, given.split("x"))
            size = {"height": height, "width": width}
        else:
            shortest, *longest = map(int, words)
            (longest_edge,) = longest or [round(shortest * LONGEST_EDGE / SHORTEST_EDGE)]
            size = {"shortest_edge": shortest, "longest_edge": longest_edge}
    except ValueError:
        raise InputError(f"--image_size {given}: expected SHORTEST, SHORTEST LONGEST or HEIGHTxWIDTH") from None
    if min(size.values()) < 1 or size.get("shortest_edge", 0) > size.get("longest_edge", 0):
        raise InputError(f"--image_size {given}: must be positive, and LONGEST not less than SHORTEST")
    return size
