"""Initial weights of DINO's ancestors as in their official implementations, for training from scratch.

transformers initializes its own models otherwise, since they are mostly fine-tuned: linear layers and queries with a
standard deviation of 0.02, so that all queries of a model begin in nearly the same place, and class heads with scores
of 0.5, so that the first focal loss is a thousand times as large.

Sources: `_reset_parameters` of the transformers, and the constructors of the detectors, in facebookresearch/detr,
Atten4Vis/ConditionalDETR, IDEA-Research/DAB-DETR and fundamentalvision/Deformable-DETR.
"""

import re
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..initialization_dino_detr import (
    InitRule,
    class_prior,
    init_as,
    initialize,
    normal_embedding,
    pytorch_default,
    xavier,
    xavier_zero_bias,
    zeros,
)


Rules = dict[str, InitRule]

# `nn.MultiheadAttention` has one matrix for queries, keys and values, which decides their Xavier bound.
_joint_projection = partial(xavier_zero_bias, gain=0.5**0.5)


def small_boxes(module: Any) -> None:
    """Initialize the last layer of a box head such that all boxes have the width and height σ(-2) = 0.12."""
    zeros(module)
    with torch.no_grad():
        module.bias[2:] = -2.0


_QUERIES: Rules = {r"model\.query_(position|refpoint)_embeddings": normal_embedding}
_TRANSFORMER: Rules = {
    r"model\.(encoder|decoder)\..*\.(o|out|output)_proj": xavier_zero_bias,
    r"model\.(encoder|decoder)\..*": xavier,
}
_FOCAL_HEADS: Rules = {
    r"(class_labels_classifier|class_embed)": class_prior,
    r"(model\.decoder\.bbox_embed|bbox_predictor)\.layers\.2": zeros,
}
_DEFAULTS: Rules = {
    r"(model\.decoder\.bbox_embed|bbox_predictor)\.layers\..*|model\.input_projection": pytorch_default
}
_FIRST_BOXES, _OTHER_BOXES = (rf"(model\.decoder\.)?bbox_embed\.{index}\.layers\.2" for index in ("0", r"\d+"))
_JOINT_IN_ENCODER: Rules = {r"model\.encoder\..*\.[qkv]_proj": _joint_projection}

RULES: dict[str, Rules] = {
    "detr": {
        **_QUERIES,
        r"class_labels_classifier": pytorch_default,
        **_DEFAULTS,
        r"model\.(encoder|decoder)\..*\.[qkv]_proj": _joint_projection,
        **_TRANSFORMER,
    },
    "conditional_detr": {**_QUERIES, **_FOCAL_HEADS, **_DEFAULTS, **_JOINT_IN_ENCODER, **_TRANSFORMER},
    "dab-detr": {**_QUERIES, **_FOCAL_HEADS, **_DEFAULTS, **_JOINT_IN_ENCODER, **_TRANSFORMER},
    "deformable_detr": {
        **_QUERIES,
        r"(model\.decoder\.)?class_embed\.\d+": class_prior,
        **dict.fromkeys((_FIRST_BOXES, _OTHER_BOXES), small_boxes),
        r"(model\.decoder\.)?bbox_embed\..*": pytorch_default,
        r"model\.input_proj\..*|model\.reference_points": xavier_zero_bias,
        r"model\.decoder\..*\.self_attn\.[qkv]_proj": _joint_projection,
        r"model\.decoder\..*\.self_attn\.o_proj": xavier_zero_bias,
        r"model\.(encoder|decoder)\..*\.mlp\..*|model\.enc_output|model\.pos_trans": xavier,
    },
}
"""Rules by `config.model_type`, and by names of layers: the first pattern that fits a name counts."""

# Without box refinement all heads are one. With it, only the first box of a query is absolute, and none in two stages.
_ZEROED_BY_FIELD = {"with_box_refine": _OTHER_BOXES, "two_stage": _FIRST_BOXES}


def rules_of(config: PreTrainedConfig) -> Rules:
    """Return the rules of a model; none of one that is not an ancestor, or has them itself."""
    rules = RULES.get(config.model_type, {})
    zeroed = [pattern for name, pattern in _ZEROED_BY_FIELD.items() if pattern in rules and getattr(config, name)]
    return {**rules, **dict.fromkeys(zeroed, zeros)}


@torch.no_grad()
def initialize_as_authors(model: PreTrainedModel, rules: Rules) -> None:
    """Initialize the transformer and the heads of a model as its authors; all else keeps its values.

    Args:
        model (`PreTrainedModel`): A model of transformers.
        rules (`dict`): From [`rules_of`].
    """
    for name, layer in model.named_modules():
        rule = next((rule for pattern, rule in rules.items() if re.fullmatch(pattern, name)), None)
        if rule is not None and isinstance(layer, (nn.Embedding, nn.Linear, nn.Conv2d)):
            initialize(init_as(rule, layer), force=True)
