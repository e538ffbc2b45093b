"""Load, build and save models with their image processors; whatever cannot be used raises an `InputError`."""

import dataclasses
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from .backbone_weights import quiet_transformers
from .configuration_dino_detr import UNUSED_LABEL, DinoDetrConfig
from .detectors import (
    CONVENTIONS,
    adopt_processor,
    check_patches,
    convention_of,
    model_class_of,
    new_processor,
    own_processor,
)
from .family import FAMILY, initialize_as_authors, rules_of
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
DetectorAndProcessor = tuple[PreTrainedModel, BaseImageProcessor]


def load_detector(model: str, backend: str | None = None) -> DetectorAndProcessor:
    """Load a detection model of any type in [`~detectors.CONVENTIONS`], in evaluation mode, and an image processor.

    Args:
        model (`str`): A directory written by `save_pretrained`, or a name on the Hub.
        backend (`str`, *optional*): Backend of the image processor, see [`load_model_and_processor`].

    Returns:
        `tuple[PreTrainedModel, BaseImageProcessor]`: The processor is a [`DinoDetrImageProcessor`], with the settings
        of the model's own.

    Raises:
        InputError: If the model is not found, has another type or is incomplete.
    """
    config = load_detector_config(model)
    return _load_weights(model, config, config.id2label, {}), _load_processor(model, config, {"backend": backend})


def load_model_and_processor(model: str, backend: str | None = None) -> ModelAndProcessor:
    """Load a DINO model, in evaluation mode, and its image processor.

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
    return _load_weights(model, config, config.id2label, {}), _load_processor(model, config, {"backend": backend})


def load_pretrained_for_categories(
    model: str,
    categories: Mapping[int, str],
    size: Mapping[str, int] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> DetectorAndProcessor:
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
        overrides (`Mapping[str, Any]`, *optional*): Fields of the model's configuration to change.

    Returns:
        `tuple[PreTrainedModel, BaseImageProcessor]`: As from [`load_detector`].

    Raises:
        InputError: If the model is not found, has another type or is incomplete, or a field has an illegal value.
    """
    config = load_detector_config(model)
    for name in overrides or ():
        check_config_field(name, type(config))
    with _as_input_error(_OVERRIDES, f"is not a configuration of a {_name_of(type(config))} model"):
        _with_queries(type(config).from_dict({**config.to_dict(), **(overrides or {})}))
    processor = _load_processor(model, config, {"size": size})
    # updates as small as those of training are lost in half precision, in which a model may have been saved
    overrides = {**(overrides or {}), "dtype": torch.float32}
    is_dino = isinstance(config, DinoDetrConfig)
    take = overrides.pop if is_dino else overrides.get
    num_queries = take("num_queries", config.num_queries)
    if set(config.id2label.values()) - {UNUSED_LABEL} == set(categories.values()):
        return _set_num_queries(_load_weights(model, config, config.id2label, overrides), num_queries), processor
    id2label = contiguous_id2label(categories)
    known = match_names(id2label, named_classes(config.id2label))
    replace_classes = _replace_classes_of_dino if is_dino else _replace_classes
    detector = replace_classes(model, config, id2label, known, overrides)
    copied = [id2label[label] for label in known]
    new = [name for label, name in id2label.items() if label not in known]
    logger.warning(
        "%s: classes copied: %s; new: %s",
        model,
        summarize_list(copied, 20) or "none",
        summarize_list(new, 20) or "none",
    )
    return _set_num_queries(detector, num_queries), processor


def _replace_classes_of_dino(
    model: str,
    config: DinoDetrConfig,
    id2label: dict[int, str],
    known: Mapping[int, int],
    overrides: dict[str, Any],
) -> DinoDetrForObjectDetection:
    """Load a DINO model with other classes; `known` maps their labels to labels of the saved model."""
    # the classes that only rank tokens are those of the old dataset
    changed = {**overrides, "num_ranking_labels": 0}
    old_numbers = (config.num_labels, config.num_labels + config.num_ranking_labels)
    detector: Any = _load_weights(model, config, id2label, changed, may_differ=lambda _, rows: rows in old_numbers)
    detector.reset_class_layers()  # an equal number of classes may be other classes, whose weights were loaded
    if known:
        _copy_classes(_load_weights(model, config, config.id2label, overrides), detector, known)
    return detector


def _replace_classes(
    model: str,
    config: PreTrainedConfig,
    id2label: dict[int, str],
    known: Mapping[int, int],
    overrides: dict[str, Any],
) -> PreTrainedModel:
    """Load a model of transformers with other classes; `known` maps their labels to labels of the saved model.

    Rows behind those of the classes, such as that of "no object", are kept. New rows begin as from scratch.
    """
    names: Collection[str] = weights_with_rows_per_class(config)
    detector = _load_weights(model, config, id2label, overrides, may_differ=lambda name, _: name in names)
    saved = _load_weights(model, config, config.id2label, overrides).state_dict()
    fresh = model_class_of(config)(detector.config)  # the loaded classes may be others in equal number
    initialize_as_authors(fresh, rules_of(config))
    new = fresh.state_dict()
    labels, from_labels = list(known), list(known.values())
    names = [name for name in names if name in saved]  # not all, if an override turns denoising off
    for name in names:
        new[name][labels] = saved[name][from_labels]
        new[name][len(id2label) :] = saved[name][config.num_labels :]
    detector.load_state_dict({name: new[name] for name in names}, strict=False)
    return detector


def weights_with_rows_per_class(config: PreTrainedConfig) -> set[str]:
    """Return the names of a model's weights whose number of rows depends on the number of classes."""

    def shapes(num_labels: int) -> dict[str, torch.Size]:
        changed = deepcopy(config)
        changed.num_labels = num_labels
        with torch.device("meta"):
            return {name: value.shape for name, value in model_class_of(config)(changed).state_dict().items()}

    fewer, more = shapes(config.num_labels), shapes(config.num_labels + 1)
    return {name for name, shape in fewer.items() if shape != more[name]}


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


def _set_num_queries(detector: PreTrainedModel, num_queries: int) -> PreTrainedModel:
    """Change the number of queries of a DINO model; additional ones begin as copies of the others."""
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
    architecture: str | None = None,
) -> DetectorAndProcessor:
    """Build a model with random weights for the classes of a dataset.

    Args:
        config (`Path`, *optional*): JSON file, see [`read_config`]; by default DINO with a ResNet-50 and 4 feature
            levels.
        categories (`Mapping[int, str]`): Names of the dataset's classes by category id.
        size (`Mapping[str, int]`, *optional*): Image size for the image processor; by default that of the model's
            authors.
        overrides (`Mapping[str, Any]`, *optional*): Fields of the configuration that take precedence over the file.
        architecture (`str`, *optional*): Key of [`~family.FAMILY`] whose fields the file and the overrides change.

    Raises:
        InputError: If the file cannot be read, or has an unknown field or an illegal value.
    """
    model_config = read_config(config, contiguous_id2label(categories), overrides, architecture)
    with _as_input_error(config or _OVERRIDES, "is not a configuration of a detection model"):
        model = model_class_of(model_config)(model_config)
        initialize_as_authors(model, rules_of(model_config))
        return model, new_processor(model_config, size)


def warn_if_batch_norms_frozen(model: PreTrainedModel) -> None:
    """Warn if randomly initialized batch norms are frozen."""
    kinds = {type(layer).__name__ for layer in model.modules()}
    field = "freeze_backbone_batch_norms"
    if getattr(model.config, field, False) and any(kind.endswith("BatchNorm2d") for kind in kinds):
        logger.warning("training from scratch with frozen batch norms: set %s to false", field)
    elif any(kind.endswith("FrozenBatchNorm2d") for kind in kinds):
        logger.warning(
            "training from scratch with frozen batch norms, which a model of type %r always has: give "
            "--backbone_weights, or a backbone_config without batch norms, such as a ConvNeXt",
            model.config.model_type,
        )


def load_config(model: str) -> DinoDetrConfig:
    """Read the configuration of a DINO model.

    Args:
        model (`str`): A directory written by `save_pretrained`, or a name on the Hub.

    Raises:
        InputError: If the model is not found or has another type.
    """
    config = _read_model_config(model)
    if not isinstance(config, DinoDetrConfig):
        raise InputError(
            f"{model}: contains a model of type {config.model_type!r}, not {DinoDetrConfig.model_type!r}; only train, "
            "evaluate, predict and push take other DETRs"
        )
    return config


def load_detector_config(model: str) -> PreTrainedConfig:
    """Read the configuration of a detection model of any type in [`~detectors.CONVENTIONS`].

    Args:
        model (`str`): A directory written by `save_pretrained`, or a name on the Hub.

    Raises:
        InputError: If the model is not found or has another type.
    """
    config = _read_model_config(model)
    try:
        convention_of(config)
    except InputError as error:
        raise InputError(f"{model}: {error}") from None
    return config


def _read_model_config(model: str) -> PreTrainedConfig:
    is_local = Path(model).exists()
    if is_local and not (Path(model) / "config.json").is_file():
        raise InputError(f"{model}: is not a model directory (it has no config.json)")
    problem = "has no usable config.json" if is_local else "is neither a directory nor a model on the Hub"
    with _as_input_error(model, problem):
        return AutoConfig.from_pretrained(model)


def read_config(
    path: Path | None,
    id2label: dict[int, str],
    overrides: Mapping[str, Any] | None = None,
    architecture: str | None = None,
) -> PreTrainedConfig:
    """Read the configuration of a new model from a JSON file with fields of [`DinoDetrConfig`].

    Args:
        path (`Path`, *optional*): The file. Fields that it omits have their defaults. A `model_type` in it makes it
            the configuration of another model of transformers.
        id2label (`dict[int, str]`): Class names by label, which take precedence over the file.
        overrides (`Mapping[str, Any]`, *optional*): Fields that take precedence over the file.
        architecture (`str`, *optional*): Key of [`~family.FAMILY`] whose fields the file and the overrides change.

    Raises:
        InputError: If the file cannot be read, or has an unknown field or an illegal value.
    """
    given = _read_json_object(path) if path else {}
    config_class, fields = _base_config(path, given.get("model_type"), architecture)
    given = {name: value for name, value in given.items() if name not in ("model_type", "id2label", "label2id")}
    for name in given:
        try:
            check_config_field(name, config_class)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    for name in overrides or ():
        check_config_field(name, config_class)
    with _as_input_error(path or _OVERRIDES, f"is not a configuration of a {_name_of(config_class)} model"):
        return _with_queries(config_class(**{**fields, **given, **(overrides or {}), "id2label": id2label}))


def _with_queries(config: Any) -> PreTrainedConfig:
    if config.num_queries < 1:
        raise ValueError(f"num_queries must be at least 1, got {config.num_queries}")
    return config


def _name_of(config_class: type[PreTrainedConfig]) -> str:
    return "DINO" if config_class is DinoDetrConfig else config_class.model_type


def _base_config(
    path: Path | None, model_type: str | None, architecture: str | None
) -> tuple[type[PreTrainedConfig], Mapping[str, Any]]:
    """Return the class of a configuration, and the fields that an architecture sets."""
    if architecture is not None:
        member = FAMILY[architecture]
        if model_type not in (None, member.config_class.model_type):
            raise InputError(f"{path}: has the model_type {model_type!r}, which is not that of {architecture}")
        return member.config_class, member.config
    if model_type is not None and str(model_type) not in CONVENTIONS:
        raise InputError(f"{path}: the model_type {model_type!r} is none of {', '.join(CONVENTIONS)}")
    return CONFIG_MAPPING[model_type or DinoDetrConfig.model_type], {}


def check_config_fields(names: Iterable[str]) -> None:
    """Check that some configuration has each of these fields, before it is known which one is used.

    Raises:
        InputError: If none has; the message suggests a field of [`DinoDetrConfig`].
    """
    for name in names:
        if name in _CLASS_FIELDS or not any(name in _field_names(CONFIG_MAPPING[each]) for each in CONVENTIONS):
            check_config_field(name)


def _field_names(config_class: type[PreTrainedConfig]) -> Collection[str]:
    if dataclasses.is_dataclass(config_class):
        return [each.name for each in dataclasses.fields(config_class)]
    return signature(config_class).parameters


def _read_json_object(path: Path) -> dict[str, Any]:
    text = read_text(path)
    with _as_input_error(path, "cannot be read as JSON"):
        fields = json.loads(text)
    if not isinstance(fields, dict):
        raise InputError(f"{path}: must contain an object with fields of DinoDetrConfig, got {type(fields).__name__}")
    return fields


def check_config_field(name: str, config_class: type[PreTrainedConfig] = DinoDetrConfig) -> None:
    """Check that a field of a configuration can be set. The class itself accepts any keyword, also misspelled ones.

    Args:
        name (`str`): The field.
        config_class (`type[PreTrainedConfig]`, *optional*): Class of the configuration.

    Raises:
        InputError: If there is no field of this name, where the message suggests a similar one, or if the field
            follows from the classes of the dataset.
    """
    if name in _CLASS_FIELDS:
        raise InputError(f"{name} cannot be set: the classes are those of the dataset; remove it")
    module, fields = config_class.__module__.partition(".")[0], _field_names(config_class)
    if name not in fields:
        close = get_close_matches(name, fields, n=1)
        hint = f"did you mean {close[0]}?" if close else f"python -m pydoc {module}.{config_class.__name__} lists them"
        raise InputError(f"{config_class.__name__} has no field {name!r}; {hint}")


def _load_processor(model: str, config: PreTrainedConfig, options: Mapping[str, Any]) -> BaseImageProcessor:
    with _as_input_error(model, "has no usable image processor, preprocessor_config.json"):
        processor = AutoImageProcessor.from_pretrained(model, **_drop_none(options))
        _check_resizing(processor.do_resize, dict(processor.size))
        if not isinstance(config, DinoDetrConfig):
            check_patches(config, dict(processor.size))
            return adopt_processor(processor, convention_of(config), options.get("backend"))
        if not isinstance(processor, DinoDetrImageProcessor | DinoDetrImageProcessorPil):
            raise TypeError(f"it is a {type(processor).__name__}, not a {DinoDetrImageProcessor.__name__}")
    return processor


def _check_resizing(do_resize: bool, size: Mapping[str, int]) -> None:
    if not do_resize:
        raise ValueError("do_resize must be true: images are trained on, batched and evaluated by their resized size")
    if size.keys() not in ({"shortest_edge", "longest_edge"}, {"height", "width"}) or min(size.values()) < 1:
        raise ValueError(f"size must be a positive shortest_edge and longest_edge, or height and width, not {size}")


def _load_weights(
    model: str,
    config: PreTrainedConfig,
    id2label: dict[int, str],
    overrides: Mapping[str, Any],
    may_differ: Callable[[str, int], bool] = lambda name, rows: False,
) -> Any:
    """Load all weights. `may_differ` tells of which ones another number of rows may have been saved."""
    with _as_input_error(model, "has no usable weights"), quiet_transformers():
        detector, info = model_class_of(config).from_pretrained(
            model, id2label=id2label, ignore_mismatched_sizes=True, output_loading_info=True, **overrides
        )
    wrong = [name for name, saved, _ in info["mismatched_keys"] if not may_differ(name, saved[0])]
    if incomplete := sorted({*wrong, *info["missing_keys"]}):
        fields = [f" and {_OVERRIDES} {name}" for name in overrides if name in _field_names(type(config))]
        raise InputError(
            f"{model}: its weights are not those of a complete detector; {len(incomplete)} are missing or do not have "
            f"the shape that follows from config.json{''.join(fields)}, such as {incomplete[0]}"
        )
    for parameter in detector.parameters():  # transformers leaves parts of split tensors as views of the whole
        if parameter.nbytes < parameter.untyped_storage().nbytes():
            parameter.data = parameter.data.clone()
    return detector


def _drop_none(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


_OVERRIDES = "--config_overrides"
_CLASS_FIELDS = ("id2label", "label2id", "num_labels")

_LIBRARY_ERRORS = (
    ImportError,  # of the package timm, which backbones of some models need
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


def save_detector(folder: Path, model: PreTrainedModel, processor: BaseImageProcessor, card: str) -> None:
    """Write weights, configuration, image processor, model code and model card.

    Files are replaced one by one, not atomically: pass a temporary directory and rename it afterwards.

    Args:
        folder (`Path`): Created if it does not exist.
        model (`PreTrainedModel`): A detection model.
        processor (`BaseImageProcessor`): A DINO image processor. The model's own, with the same settings, is written.
        card (`str`): Its model card, from [`~model_card.converted_card`] or [`~model_card.finetuned_card`].
    """
    model.save_pretrained(folder)
    own_processor(model.config, processor).save_pretrained(folder)
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
