"""Pretrained weights for the backbone of a detector, and templates that rename the keys of weights."""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torchvision.models import get_model
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from .detectors import convention_of
from .utils.errors import InputError


_TORCHVISION = "torchvision/"
_COUNTS = ".num_batches_tracked"

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


def load_backbone_weights(model: PreTrainedModel, name: str) -> None:
    """Load pretrained weights into the backbone of a detector.

    Args:
        model (`PreTrainedModel`): The detector; its `config.backbone_config` describes the architecture of
            the weights.
        name (`str`): `torchvision/resnet50` and the like for the ImageNet weights of torchvision (IMAGENET1K_V1), from
            which the authors of DINO trained their ResNets. Or the Hub name or directory of a backbone or classifier
            of transformers, such as `microsoft/swin-large-patch4-window12-384-in22k`, the authors' Swin-L.

    Raises:
        InputError: If the weights are not found or do not fit.
    """
    body: Any = model.get_submodule(convention_of(model.config).backbone)
    read = _read_torchvision if name.startswith(_TORCHVISION) else _read_transformers
    try:
        weights, own = read(name, body), body.state_dict()
        # transformers' ancestors of DINO have batch norms that do not count batches
        body.load_state_dict({key: value for key, value in weights.items() if key in own or not key.endswith(_COUNTS)})
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{name}: cannot be loaded as the weights of the backbone that the configuration describes, a "
            f"{body.config.model_type if isinstance(body, PreTrainedModel) else 'timm model'} ({reason[:300]})"
        ) from None


def _read_torchvision(name: str, body: nn.Module) -> Mapping[str, torch.Tensor]:
    weights = get_model(name.removeprefix(_TORCHVISION), weights="IMAGENET1K_V1").state_dict()
    key_of = _resnet_key if isinstance(body, PreTrainedModel) else str  # timm has the names of torchvision
    return {key_of(key): tensor for key, tensor in weights.items() if not key.startswith("fc.")}


def _resnet_key(key: str) -> str:
    matches = ((match_key(source, key), target) for source, target in TORCHVISION_RESNET_KEYS)
    return next((fill_key(target, parts) for parts, target in matches if parts is not None), key)


def _read_transformers(name: str, body: nn.Module) -> Mapping[str, torch.Tensor]:
    if not isinstance(body, PreTrainedModel):
        raise ValueError("it takes torchvision/resnet50 and the like, or give another backbone_config")
    with quiet_transformers():
        backbone, info = type(body).from_pretrained(name, config=deepcopy(body.config), output_loading_info=True)
    # a classifier has no norms for the features of single stages; these keep their initial values
    if missing := [key for key in info["missing_keys"] if not key.startswith("hidden_states_norms.")]:
        raise ValueError(f"the weights lack {missing[0]}")
    return backbone.state_dict()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from listing weights that do not fit; the caller checks them and raises an error."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
