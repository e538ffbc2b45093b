"""Open a trained DINO with its image processor, or make a new one, or say plainly why that cannot be done."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
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
from .data.dataset import contiguous_id2label
from .image_processing_dino_detr import DinoDetrImageProcessor, DinoDetrImageProcessorPil
from .registration import DinoDetrForObjectDetection  # with the auto classes, which then load DINO models
from .utils.arguments import check_config_field
from .utils.errors import InputError, summarize_list
from .utils.io import read_text


logger = logging.getLogger(__name__)

Detector = tuple[DinoDetrForObjectDetection, BaseImageProcessor]


def load_model_and_processor(model: str, backend: str | None = None) -> Detector:
    """Load a model, in evaluation mode, and its image processor.

    Args:
        model (`str`): A folder written by `save_pretrained`, or a name on the Hub.
        backend (`str`, *optional*): The image processor's, `"torchvision"` or `"pil"`, which resizes exactly as the
            original does. By default the best that is installed.

    Returns:
        `tuple[DinoDetrForObjectDetection, BaseImageProcessor]`.

    Raises:
        InputError: If there is no model, one of another kind, or only a part of one.
    """
    config = load_config(model)
    return _load_weights(model, config.id2label, {}), _load_processor(model, {"backend": backend})


def load_pretrained_for_categories(
    model: str,
    categories: Mapping[int, str],
    size: Mapping[str, int] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Detector:
    """Load a model to be trained further, with the classes of a dataset.

    A model that has these very classes keeps its heads and the numbers of its labels. Otherwise classes are numbered
    as the dataset has them: those that the model knows by the same name, whatever their case and whether words are
    joined by spaces, hyphens or underscores, keep what class heads and label embedding learned of them, and others
    start anew. All else is kept, in float32 whatever it was saved in. One line of the log tells which is which.

    Args:
        model (`str`): A folder written by `save_pretrained`, or a name on the Hub.
        categories (`Mapping[int, str]`): The dataset's, names by category id.
        size (`Mapping[str, int]`, *optional*): Of images, for the image processor; by default as it was.
        overrides (`Mapping[str, Any]`, *optional*): Fields of [`DinoDetrConfig`] that are to differ.

    Raises:
        InputError: If there is no model, one of another kind, or only a part of one, or a field has an illegal value.
    """
    config = load_config(model)
    processor = _load_processor(model, {"size": size})
    # steps as small as training's get lost in 16 bits, which a model may have been saved in
    overrides = {**(overrides or {}), "dtype": torch.float32}
    if set(config.id2label.values()) - {UNUSED_LABEL} == set(categories.values()):
        return _load_weights(model, config.id2label, overrides), processor
    id2label = contiguous_id2label(categories)
    detector = _load_weights(model, id2label, overrides, num_labels_before=config.num_labels)
    detector.reset_class_heads()  # as many classes may be other ones
    known = _labels_before(id2label, config.id2label)
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
    return detector, processor


def _labels_before(id2label: Mapping[int, str], id2label_before: Mapping[int, str]) -> dict[int, int]:
    """Labels to the labels that classes of the same name had, of those that there were."""
    before = {name: label for label, name in id2label_before.items() if name != UNUSED_LABEL}
    before_by_words = {_words(name): label for name, label in before.items()}
    found = {label: before.get(name, before_by_words.get(_words(name))) for label, name in id2label.items()}
    return {label: label_before for label, label_before in found.items() if label_before is not None}


def _words(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


@torch.no_grad()
def _copy_classes(
    source: DinoDetrForObjectDetection, target: DinoDetrForObjectDetection, labels_of_source: Mapping[int, int]
) -> None:
    """Copy the rows of classes, given by label of the target to label of the source."""
    labels, from_labels = list(labels_of_source), list(labels_of_source.values())
    for layer, source_layer in zip(target.class_specific_layers(), source.class_specific_layers(), strict=True):
        for parameter, source_parameter in zip(layer.parameters(), source_layer.parameters(), strict=True):
            parameter[labels] = source_parameter[from_labels]


def build_model_and_processor(
    config: Path | None,
    categories: Mapping[int, str],
    size: Mapping[str, int] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Detector:
    """Make a model with random weights for the classes of a dataset.

    Args:
        config (`Path`, *optional*): JSON file, see [`read_config`]; by default DINO with a ResNet-50 and 4 levels.
        categories (`Mapping[int, str]`): The dataset's, names by category id.
        size (`Mapping[str, int]`, *optional*): Of images, for the image processor; by default the original's.
        overrides (`Mapping[str, Any]`, *optional*): Fields of [`DinoDetrConfig`] that are to differ from the file's.

    Raises:
        InputError: If the file cannot be read, or names an unknown field or an illegal value.
    """
    fields = read_config(config, contiguous_id2label(categories), overrides)
    with _one_error(config or "--config-override", "is no configuration of a DINO"):
        model = DinoDetrForObjectDetection(fields)
    return model, DinoDetrImageProcessor(**_given({"size": size}))


def warn_if_batch_norms_frozen(model: DinoDetrForObjectDetection) -> None:
    """Log that batch norms which nobody trained are not to be trained either, if it is so."""
    if model.config.freeze_backbone_batch_norms and any(
        isinstance(layer, nn.BatchNorm2d) for layer in model.modules()
    ):
        logger.warning("training from scratch with frozen batch norms: set freeze_backbone_batch_norms to false")


def load_config(model: str) -> DinoDetrConfig:
    """Read a model's configuration.

    Args:
        model (`str`): A folder written by `save_pretrained`, or a name on the Hub.

    Raises:
        InputError: If there is no model, or one of another kind.
    """
    is_here = Path(model).exists()
    if is_here and not (Path(model) / "config.json").is_file():
        raise InputError(f"{model}: is no folder with a model in it (it has no config.json)")
    with _one_error(model, "has no usable config.json" if is_here else "is neither a folder nor a model of the Hub"):
        config = AutoConfig.from_pretrained(model)
    if not isinstance(config, DinoDetrConfig):
        raise InputError(f"{model}: holds a model of type {config.model_type!r}, not {DinoDetrConfig.model_type!r}")
    return config


def read_config(
    path: Path | None, id2label: dict[int, str], overrides: Mapping[str, Any] | None = None
) -> DinoDetrConfig:
    """Make the configuration of a new model from a JSON file with fields of [`DinoDetrConfig`].

    Args:
        path (`Path`, *optional*): The file. Fields that it leaves out have their defaults.
        id2label (`dict[int, str]`): The classes, which no file can know before the dataset does.
        overrides (`Mapping[str, Any]`, *optional*): Fields that are to differ from the file's.

    Raises:
        InputError: If the file cannot be read, or names an unknown field or an illegal value.
    """
    fields = _read_fields(path) if path else {}
    with _one_error(path or "--config-override", "is no configuration of a DINO"):
        return DinoDetrConfig(**{**fields, **(overrides or {}), "id2label": id2label})


def _read_fields(path: Path) -> dict[str, Any]:
    text = read_text(path)
    with _one_error(path, "cannot be read as JSON"):
        fields = json.loads(text)
    if not isinstance(fields, dict):
        raise InputError(f"{path}: must hold an object with fields of DinoDetrConfig, got {type(fields).__name__}")
    for name in fields.keys() - {"model_type"}:
        try:
            check_config_field(name)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    return fields


def _load_processor(model: str, options: Mapping[str, Any]) -> BaseImageProcessor:
    with _one_error(model, "has no usable image processor, preprocessor_config.json"):
        processor = AutoImageProcessor.from_pretrained(model, **_given(options))
        if not isinstance(processor, DinoDetrImageProcessor | DinoDetrImageProcessorPil):
            raise TypeError(f"it is a {type(processor).__name__}, not a {DinoDetrImageProcessor.__name__}")
        _check_size(dict(processor.size))
    return processor


def _check_size(size: Mapping[str, int]) -> None:
    if size.keys() not in ({"shortest_edge", "longest_edge"}, {"height", "width"}) or min(size.values()) < 1:
        raise ValueError(f"size must be a positive shortest_edge and longest_edge, or height and width, not {size}")


def _load_weights(
    model: str, id2label: dict[int, str], overrides: Mapping[str, Any], num_labels_before: int | None = None
) -> DinoDetrForObjectDetection:
    """Load every weight; those with a row per class may have had another number of rows before."""
    with _one_error(model, "has no usable weights"), _without_report():
        detector, info = DinoDetrForObjectDetection.from_pretrained(
            model, id2label=id2label, ignore_mismatched_sizes=True, output_loading_info=True, **overrides
        )
    wrong = [name for name, saved, _ in info["mismatched_keys"] if saved[0] != num_labels_before]
    if incomplete := sorted({*wrong, *info["missing_keys"]}):
        raise InputError(
            f"{model}: its weights are not those of a whole detector, {len(incomplete)} are missing or of another "
            f"shape than config.json says, such as {incomplete[0]}"
        )
    return detector


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from listing the weights that do not fit: what matters of it, one line or an error says."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


_ERRORS_OF_LIBRARIES = (
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
def _one_error(source: str | Path, problem: str) -> Iterator[None]:
    """Turn the errors of several libraries into one line that names the source."""
    try:
        yield
    except _ERRORS_OF_LIBRARIES as error:
        # a strict dataclass names the field and leaves the reason to the next line
        reason = str(error.__cause__ if isinstance(error, StrictDataclassError) else error).strip()
        first_line = reason.partition("\n")[0]
        raise InputError(f"{source}: {problem} ({first_line})") from error


_TORCHVISION = "torchvision/"
_NEW = "hidden_states_norms."

# torchvision's names of a ResNet's parts and transformers' names; torchvision counts most of them from 1
_RESNET_NAMES = (
    (r"^conv1\.", "embedder.embedder.convolution."),
    (r"^bn1\.", "embedder.embedder.normalization."),
    (r"\.downsample\.0\.", ".shortcut.convolution."),
    (r"\.downsample\.1\.", ".shortcut.normalization."),
    *((rf"^layer{stage + 1}\.", f"encoder.stages.{stage}.layers.") for stage in range(4)),
    *((rf"\.conv{index + 1}\.", f".layer.{index}.convolution.") for index in range(3)),
    *((rf"\.bn{index + 1}\.", f".layer.{index}.normalization.") for index in range(3)),
)


def load_backbone_weights(model: DinoDetrForObjectDetection, name: str) -> None:
    """Replace the random weights of a detector's backbone.

    Args:
        model (`DinoDetrForObjectDetection`): Its `config.backbone_config` is of the architecture of the weights.
        name (`str`): `torchvision/resnet50` and the like for ImageNet weights of torchvision, IMAGENET1K_V1, which the
            authors of DINO started their ResNets from. Or the Hub name or folder of a backbone or a classifier of
            transformers, such as `microsoft/swin-large-patch4-window12-384-in22k`, their Swin-L.

    Raises:
        InputError: If there are no such weights, or they do not fit.
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
    return {_resnet_name(key): tensor for key, tensor in weights.items() if not key.startswith("fc.")}


def _resnet_name(key: str) -> str:
    for pattern, replacement in _RESNET_NAMES:
        key = re.sub(pattern, replacement, key)
    return key


def _read_transformers(name: str, body: PreTrainedModel) -> Mapping[str, torch.Tensor]:
    backbone, info = type(body).from_pretrained(name, config=deepcopy(body.config), output_loading_info=True)
    # a classifier has no norms of the single stages; these start as they would in a new detector
    if missing := [key for key in info["missing_keys"] if not key.startswith(_NEW)]:
        raise ValueError(f"the weights lack {missing[0]}")
    return backbone.state_dict()


def save_detector(folder: Path, model: PreTrainedModel, processor: BaseImageProcessor, card: str) -> None:
    """Write weights, configuration, image processor, model code and model card.

    Files of these names are replaced one by one: give a folder that nobody reads yet, and rename it when it is whole.

    Args:
        folder (`Path`): Made if it does not exist.
        model (`PreTrainedModel`): A `DinoDetrForObjectDetection`.
        processor (`BaseImageProcessor`): Its image processor.
        card (`str`): Its model card, from [`~model_card.converted_card`] or [`~model_card.finetuned_card`].
    """
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    readme = folder / "README.md"
    readme.write_text(card, encoding="utf-8")
    for weights in folder.glob("*.safetensors"):
        weights.chmod(readme.stat().st_mode)  # safetensors lets only the owner read what it writes
