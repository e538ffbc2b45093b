"""Give a new detector a backbone that was trained for classification, as every published DINO began."""

import re
from collections.abc import Mapping
from copy import deepcopy

import torch
from torchvision.models import get_model
from transformers import PreTrainedModel

from .errors import InputError
from .modeling_dino_detr import DinoDetrForObjectDetection


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
