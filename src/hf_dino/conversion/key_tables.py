"""Keys of DINO's tensors in each format, side by side, as data; conversion reads the tables in both directions.

Sources: IDEA-Research/DINO, commit faa8520 ("official"); IDEA-Research/detrex, commit e244e6c, `projects/dino`, with
detectron2's backbones; mmdetection 3.3.0, `configs/dino` ("mmdet"); IDEA-Research/DAB-DETR, commit 723ddb8,
`models/dab_deformable_detr`; IDEA-Research/DN-DETR, commit ff3902a, `models/dn_dab_deformable_detr`. Every line that
does more than rename gives a reason.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..backbone_weights import TORCHVISION_RESNET_KEYS
from ..configuration_dino_detr import DinoDetrConfig
from ..utils.errors import InputError


FORMATS = ("official", "detrex", "mmdet")

# Formats of DINO's ancestors, of which DINO's official code is a descendant: most keys are the same.
ANCESTORS = ("dab_deformable", "dn_deformable")

CODE_BASES = {
    "official": "IDEA-Research/DINO",
    "detrex": "detrex",
    "mmdet": "MMDetection 3",
    "dab_deformable": "IDEA-Research/DAB-DETR",
    "dn_deformable": "IDEA-Research/DN-DETR",
}


@dataclass(frozen=True)
class Rule:
    """Rename, split, reorder, drop or copy the tensors whose key matches a template.

    Templates are those of [`~backbone_weights.match_key`].

    Args:
        source (`str`): Template of keys of the file.
        targets (`tuple[str, ...]`): Templates of our keys. If empty, the tensor is dropped. If there are several, it
            is split along its first axis into as many equal parts, in this order.
        reason (`str`): Reason for the rule, unless it only renames.
        equals (`str`, *optional*): Template of the key in the file of which the tensor must be an exact copy.
        first_rows (`bool`, *optional*, defaults to `False`): Keep only the first `num_labels` rows.
        reorder (`tuple[Callable, Callable]`, *optional*): Function from their tensor to ours, and its inverse.
        computed_from (`tuple[str, Callable]`, *optional*): Template of another key in the file and the function from
            its tensor to this one, which is dropped because it is computed when needed.
    """

    source: str
    targets: tuple[str, ...] = ()
    reason: str = ""
    equals: str | None = None
    first_rows: bool = False
    reorder: tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]] | None = None
    computed_from: tuple[str, Callable[[torch.Tensor], torch.Tensor]] | None = None


@dataclass(frozen=True)
class Fill:
    """Fill our tensors that match `target`, which have no counterpart in the file, with a constant.

    A model that is written in the format must have that constant there, unless the tensor is not `used`.
    """

    target: str
    value: int
    reason: str
    used: bool = True


Row = Sequence[str]
"""Templates of one module or tensor: ours, official, detrex, mmdet."""


def _rows(prefixes: Row, *rows: Row) -> dict[str, tuple[Rule, ...]]:
    """Return the rules of each format that rename the rows of a table, each after the prefix of its column."""
    ours, *theirs = zip(*([prefix + name for prefix, name in zip(prefixes, row)] for row in rows))
    return {name: _renamed(*zip(sources, ours)) for name, sources in zip(FORMATS, theirs)}


def _renamed(*pairs: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple(Rule(source, (target,)) for source, target in pairs)


_BODY = "model.backbone.body."

_DETECTRON_RESNET_KEYS = (
    ("stem.conv1.weight", "embedder.embedder.convolution.weight"),
    ("stem.conv1.norm.@", "embedder.embedder.normalization.@"),
    *(
        (f"res{stage + 2}.*.{source}", f"encoder.stages.{stage}.layers.*.{target}")
        for stage in range(4)
        for source, target in (
            ("shortcut.weight", "shortcut.convolution.weight"),
            ("shortcut.norm.@", "shortcut.normalization.@"),
            *((f"conv{index + 1}.weight", f"layer.{index}.convolution.weight") for index in range(3)),
            *((f"conv{index + 1}.norm.@", f"layer.{index}.normalization.@") for index in range(3)),
        )
    ),
)


def _backbone(prefix: str, pairs: tuple[tuple[str, str], ...]) -> tuple[Rule, ...]:
    return _renamed(*((f"{prefix}.{source}", _BODY + target) for source, target in pairs))


RESNET = {
    **dict.fromkeys(("official", *ANCESTORS), _backbone("backbone.0.body", TORCHVISION_RESNET_KEYS)),
    "detrex": _backbone("backbone", _DETECTRON_RESNET_KEYS),
    "mmdet": _backbone("backbone", TORCHVISION_RESNET_KEYS),
}


def unfold_to_blocks(merged: torch.Tensor) -> torch.Tensor:
    """Reorder the last axis of a patch merging from mmdetection's order to the official one.

    mmdetection's `nn.Unfold` goes through the channels and, for each of them, row by row through the 2 x 2 patches.
    The official code concatenates the patches in the order (0, 0), (1, 0), (0, 1), (1, 1) of (row, column).
    """
    patches = merged.unflatten(-1, (-1, 4)).transpose(-1, -2)[..., [0, 2, 1, 3], :]
    return patches.flatten(-2).contiguous()


def blocks_to_unfold(merged: torch.Tensor) -> torch.Tensor:
    """Invert [`unfold_to_blocks`]."""
    return merged.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].transpose(-1, -2).flatten(-2).contiguous()


def relative_position_index(bias_table: torch.Tensor) -> torch.Tensor:
    """Return the row of Swin's bias table for each pair of cells in a window, `(window_size**2, window_size**2)`.

    Example:

    ```python
    >>> relative_position_index(torch.zeros(9, 1))[0].tolist()
    [4, 3, 1, 0]

    ```
    """
    side = round(len(bias_table) ** 0.5)  # 2 * window_size - 1
    cells = torch.cartesian_prod(*[torch.arange((side + 1) // 2)] * 2)
    rows, columns = (cells[:, None] - cells[None] + side // 2).unbind(-1)
    return rows * side + columns


_OUR_BLOCK = f"{_BODY}swin.encoder.layers.*.blocks.*."
_BLOCKS = (_OUR_BLOCK, "backbone.0.layers.*.blocks.*.", "backbone.layers.*.blocks.*.", "backbone.stages.*.blocks.*.")
_SWIN = _rows(
    (f"{_BODY}swin.embeddings.", *["backbone.0.patch_embed.", "backbone.patch_embed.", "backbone.patch_embed."]),
    ("patch_embeddings.projection.@", "proj.@", "proj.@", "projection.@"),
    ("norm.@", "norm.@", "norm.@", "norm.@"),
)
_SWIN_BLOCKS = _rows(
    _BLOCKS,
    ("layernorm_before.@", "norm1.@", "norm1.@", "norm1.@"),
    ("layernorm_after.@", "norm2.@", "norm2.@", "norm2.@"),
    ("mlp.fc1.@", "mlp.fc1.@", "mlp.fc1.@", "ffn.layers.0.0.@"),
    ("mlp.fc2.@", "mlp.fc2.@", "mlp.fc2.@", "ffn.layers.1.@"),
    ("attention.o_proj.@", "attn.proj.@", "attn.proj.@", "attn.w_msa.proj.@"),
    (
        "attention.relative_position_bias.relative_position_bias_table",
        "attn.relative_position_bias_table",
        "attn.relative_position_bias_table",
        "attn.w_msa.relative_position_bias_table",
    ),
)
# transformers counts stages from 1
_OUTPUT_NORMS = tuple((f"norm{stage}.@", f"{_BODY}hidden_states_norms.stage{stage + 1}.@") for stage in range(4))
_PREFIX = {"official": "backbone.0.", "detrex": "backbone.", "mmdet": "backbone."}
_OUR_MERGING = f"{_BODY}swin.encoder.layers.*.downsample.@.@"
_SWIN_MERGING = {
    "official": _renamed(("backbone.0.layers.*.downsample.@.@", _OUR_MERGING)),
    "detrex": _renamed(("backbone.layers.*.downsample.@.@", _OUR_MERGING)),
    "mmdet": (
        Rule(
            "backbone.stages.*.downsample.@.@",
            (_OUR_MERGING,),
            reason="mmdetection's patch merging goes through the 2 x 2 patches channel by channel",
            reorder=(unfold_to_blocks, blocks_to_unfold),
        ),
    ),
}


def _swin(name: str, block: str, attention: str) -> tuple[Rule, ...]:
    return (
        *_SWIN[name],
        *_SWIN_BLOCKS[name],
        *_SWIN_MERGING[name],
        *_renamed(*((_PREFIX[name] + source, target) for source, target in _OUTPUT_NORMS)),
        Rule(
            f"{block}{attention}.qkv.@",
            tuple(f"{_OUR_BLOCK}attention.{part}_proj.@" for part in "qkv"),
            reason="query, key and value are one projection there",
        ),
        Rule(
            f"{block}{attention}.relative_position_index",
            reason="computed from the window size when needed",
            computed_from=(f"{block}{attention}.relative_position_bias_table", relative_position_index),
        ),
        Rule(f"{block}attn_mask", reason="computed from the image size when needed"),
    )


SWIN = {
    name: _swin(name, block, attention)
    for name, block, attention in zip(FORMATS, _BLOCKS[1:], ("attn", "attn", "attn.w_msa"))
}

_CONVNEXT_BLOCKS = _rows(
    (f"{_BODY}encoder.stages.*.layers.*.", *(f"{prefix}stages.*.*." for prefix in _PREFIX.values())),
    ("dwconv.@", "dwconv.@", "dwconv.@", "depthwise_conv.@"),
    ("layernorm.@", "norm.@", "norm.@", "norm.@"),
    ("pwconv1.@", "pwconv1.@", "pwconv1.@", "pointwise_conv1.@"),
    ("pwconv2.@", "pwconv2.@", "pwconv2.@", "pointwise_conv2.@"),
    ("layer_scale_parameter", "gamma", "gamma", "gamma"),
)
_CONVNEXT = (
    ("downsample_layers.0.0.@", f"{_BODY}embeddings.patch_embeddings.@"),
    ("downsample_layers.0.1.@", f"{_BODY}embeddings.layernorm.@"),
    ("downsample_layers.#.*.@", f"{_BODY}encoder.stages.#.downsampling_layer.*.@"),
    *_OUTPUT_NORMS,
)
CONVNEXT = {
    name: (*_CONVNEXT_BLOCKS[name], *_renamed(*((_PREFIX[name] + source, target) for source, target in _CONVNEXT)))
    for name in ("detrex", "mmdet")  # the official code has only one that was never trained
}

BACKBONE_RULES: dict[str, dict[str, tuple[Rule, ...]]] = {"resnet": RESNET, "swin": SWIN, "convnext": CONVNEXT}

LEVEL_EMBEDDING = _rows(
    ("", "", "", ""),
    ("model.backbone.level_embed", "transformer.level_embed", "transformer.level_embeds", "level_embed"),
)


def _neck(name: str, config: DinoDetrConfig) -> tuple[Rule, ...]:
    """Return the rules for the projections: one table, but detrex and mmdetection count the added levels from 0."""
    ours, norm = "model.backbone.input_proj", {"detrex": "norm", "mmdet": "gn"}.get(name)
    if name == "official":
        return _renamed(("input_proj.*.0.@", f"{ours}.*.0.@"), ("input_proj.*.1.@", f"{ours}.*.1.@"))
    added = range(config.num_feature_levels - config.num_backbone_levels)
    return _renamed(
        *(
            (f"neck.{source}.{their_part}.@", f"{ours}.{target}.{part}.@")
            for part, their_part in enumerate(("conv", norm))
            for source, target in [
                *((f"convs.{level}", level) for level in range(config.num_backbone_levels)),
                *((f"extra_convs.{level}", config.num_backbone_levels + level) for level in added),
            ]
        )
    )


_LAYERS = (
    ("model.encoder.layers.*.", "transformer.encoder.layers.*.", "transformer.encoder.layers.*.", "encoder.layers.*."),
    ("model.decoder.layers.*.", "transformer.decoder.layers.*.", "transformer.decoder.layers.*.", "decoder.layers.*."),
)
ENCODER = _rows(
    _LAYERS[0],
    ("self_attn.@.@", "self_attn.@.@", "attentions.0.@.@", "self_attn.@.@"),
    ("self_attn_layer_norm.@", "norm1.@", "norms.0.@", "norms.0.@"),
    ("mlp.fc1.@", "linear1.@", "ffns.0.layers.0.0.@", "ffn.layers.0.0.@"),
    ("mlp.fc2.@", "linear2.@", "ffns.0.layers.1.@", "ffn.layers.1.@"),
    ("final_layer_norm.@", "norm2.@", "norms.1.@", "norms.1.@"),
)
_DECODER_LAYERS = _rows(
    _LAYERS[1],
    ("self_attn.o_proj.@", "self_attn.out_proj.@", "attentions.0.attn.out_proj.@", "self_attn.attn.out_proj.@"),
    ("encoder_attn.@.@", "cross_attn.@.@", "attentions.1.@.@", "cross_attn.@.@"),
    # the official norms are numbered in the order of their definition, not of their use: self-attention has norm2
    ("self_attn_layer_norm.@", "norm2.@", "norms.0.@", "norms.0.@"),
    ("encoder_attn_layer_norm.@", "norm1.@", "norms.1.@", "norms.1.@"),
    ("mlp.fc1.@", "linear1.@", "ffns.0.layers.0.0.@", "ffn.layers.0.0.@"),
    ("mlp.fc2.@", "linear2.@", "ffns.0.layers.1.@", "ffn.layers.1.@"),
    ("final_layer_norm.@", "norm3.@", "norms.2.@", "norms.2.@"),
)
_DECODER = _rows(
    ("model.decoder.", "transformer.decoder.", "transformer.decoder.", "decoder."),
    ("layer_norm.@", "norm.@", "norm.@", "norm.@"),
    ("ref_point_head.layers.*.@", *["ref_point_head.layers.*.@"] * 3),
)
DECODER = {
    name: (
        *_DECODER_LAYERS[name],
        *_DECODER[name],
        Rule(
            f"{layers}{attention}.in_proj_@",
            tuple(f"model.decoder.layers.*.self_attn.{part}_proj.@" for part in "qkv"),
            reason="nn.MultiheadAttention keeps query, key and value in one matrix",
        ),
    )
    for name, layers, attention in zip(FORMATS, _LAYERS[1][1:], ("self_attn", "attentions.0.attn", "self_attn.attn"))
}

_OUR_BOX_HEAD = "model.decoder.bbox_embed"
_SECOND_REFERENCES = tuple(
    Rule(f"transformer.decoder.{key}", reason="the decoder has a second reference to the heads", equals=key)
    for key in ("class_embed.*.@", "bbox_embed.*.layers.*.@")
)


def _official_heads(config: DinoDetrConfig) -> tuple[Rule, ...]:
    shared = config.share_decoder_heads
    layer = "0" if shared else "*"
    copied = "all decoder layers share one head, and the file contains a copy of it per layer"
    copies = (
        Rule("class_embed.#.@", reason=copied, equals="class_embed.0.@"),
        Rule("bbox_embed.#.layers.*.@", reason=copied, equals="bbox_embed.0.layers.*.@"),
    )
    return (
        *_renamed(
            (f"class_embed.{layer}.@", f"class_embed.{layer}.@"),
            (f"bbox_embed.{layer}.layers.*.@", f"{_OUR_BOX_HEAD}.{layer}.layers.*.@"),
        ),
        *(copies if shared else ()),
        *_SECOND_REFERENCES,
    )


def _heads_per_layer(
    config: DinoDetrConfig, class_head: str, box_head: str, box_layers: tuple[str, ...]
) -> tuple[Rule, ...]:
    """Return the rules for one head per layer, of which the one after the last layer's is the encoder's."""
    encoder, selection = config.decoder_layers, "model.query_selection"
    heads = [(layer, f"class_embed.{layer}", f"{_OUR_BOX_HEAD}.{layer}") for layer in range(encoder)]
    heads.append((encoder, f"{selection}.class_embed", f"{selection}.bbox_embed"))
    return _renamed(
        *((f"{class_head}.{index}.@", f"{target}.@") for index, target, _ in heads),
        *(
            (f"{box_head}.{index}.{layer}.@", f"{target}.layers.{number}.@")
            for index, _, target in heads
            for number, layer in enumerate(box_layers)
        ),
    )


def _heads(name: str, config: DinoDetrConfig) -> tuple[Rule, ...]:
    if name == "official":
        return _official_heads(config)
    if name in ANCESTORS:
        return _ANCESTOR_HEADS
    if name == "detrex":
        layers = ("layers.0", "layers.1", "layers.2")
        return (*_heads_per_layer(config, "class_embed", "bbox_embed", layers), *_SECOND_REFERENCES)
    return _heads_per_layer(config, "bbox_head.cls_branches", "bbox_head.reg_branches", ("0", "2", "4"))


_ANCESTOR_HEADS = (
    *_renamed(("class_embed.*.@", "class_embed.*.@"), ("bbox_embed.*.layers.*.@", f"{_OUR_BOX_HEAD}.*.layers.*.@")),
    _SECOND_REFERENCES[1],
)


def append_one(rows: torch.Tensor) -> torch.Tensor:
    """Append the indicator of denoising queries to contents."""
    return nn.functional.pad(rows, (0, 1), value=1.0)


def append_zero(rows: torch.Tensor) -> torch.Tensor:
    """Append the indicator of matching queries to contents."""
    return nn.functional.pad(rows, (0, 1))


def drop_indicator(rows: torch.Tensor) -> torch.Tensor:
    """Invert [`append_one`] and [`append_zero`]."""
    return rows[:, :-1].contiguous()


_FROM_TOKENS = _rows(
    ("model.query_selection.", "transformer.", "transformer.", ""),
    ("enc_output.@", "enc_output.@", "enc_output.@", "memory_trans_fc.@"),
    ("enc_output_norm.@", "enc_output_norm.@", "enc_output_norm.@", "memory_trans_norm.@"),
)
_OFFICIAL_ENCODER_HEADS = _renamed(
    ("transformer.enc_out_class_embed.@", "model.query_selection.class_embed.@"),
    ("transformer.enc_out_bbox_embed.layers.*.@", "model.query_selection.bbox_embed.layers.*.@"),
)
_CONTENTS = _rows(
    ("model.query_selection.", "", "", ""),
    ("content_queries.@", "transformer.tgt_embed.@", "transformer.tgt_embed.@", "query_embedding.@"),
)
_ANCHORS = _renamed(("transformer.refpoint_embed.@", "model.query_selection.anchors.@"))
_ANCESTOR_ANCHORS = _renamed(("refpoint_embed.@", "model.query_selection.anchors.@"))
_INDICATOR = "DN-DETR stores contents without their last number, which tells denoising queries, 1, from others, 0"
QUERY_SELECTION = {
    "official": {
        "mixed": (*_FROM_TOKENS["official"], *_OFFICIAL_ENCODER_HEADS, *_CONTENTS["official"]),
        "pure": (*_FROM_TOKENS["official"], *_OFFICIAL_ENCODER_HEADS),
        "static": (*_CONTENTS["official"], *_ANCHORS),
    },
    **{
        name: {"mixed": (*_FROM_TOKENS[name], *_CONTENTS[name]), "pure": _FROM_TOKENS[name]}
        for name in ("detrex", "mmdet")
    },
    "dab_deformable": {
        "static": (*_renamed(("tgt_embed.@", "model.query_selection.content_queries.@")), *_ANCESTOR_ANCHORS)
    },
    "dn_deformable": {
        "static": (
            Rule(
                "tgt_embed.@",
                ("model.query_selection.content_queries.@",),
                reason=_INDICATOR,
                reorder=(append_zero, drop_indicator),
            ),
            *_ANCESTOR_ANCHORS,
        )
    },
}

# Denoising of the models that each format can express
DENOISING = {
    "official": ("contrastive", "none"),
    "detrex": ("contrastive",),
    "mmdet": ("contrastive",),
    "dab_deformable": ("none",),
    "dn_deformable": ("plain",),
}

LABEL_EMBEDDING = {
    "official": "label_enc.weight",
    "detrex": "label_enc.weight",
    "mmdet": "dn_query_generator.label_embedding.weight",
    "dab_deformable": "",
    "dn_deformable": "label_enc.weight",
}
_ANCESTOR_LABELS = {
    "dab_deformable": (),
    "dn_deformable": (
        Rule(
            LABEL_EMBEDDING["dn_deformable"],
            ("model.denoising.label_embed.weight",),
            reason=f"only one row per class is ever used, of num_classes + 1; {_INDICATOR}",
            first_rows=True,
            reorder=(append_one, drop_indicator),
        ),
    ),
}


def _denoising(name: str, config: DinoDetrConfig) -> tuple[Rule, ...]:
    if name in ANCESTORS:
        return _ANCESTOR_LABELS[name]
    if config.denoising == "none":
        return (Rule(LABEL_EMBEDDING[name], reason="labels are embedded only for denoising"),)
    reason = "only one row per class is ever used; the official implementation has dn_labelbook_size + 1"
    return (Rule(LABEL_EMBEDDING[name], ("model.denoising.label_embed.weight",), reason=reason, first_rows=True),)


_NO_BIAS = Fill("model.backbone.input_proj.*.0.bias", 0, "mmdetection's convolution before a norm has no bias")
_NOT_EMBEDDED = Fill("model.backbone.level_embed", 0, "the official code does not embed a single level")
_NORMS = ("embedder.embedder", "encoder.stages.*.layers.*.shortcut", "encoder.stages.*.layers.*.layer.*")
FILLS = {
    "resnet": tuple(
        Fill(f"{_BODY}{norm}.normalization.num_batches_tracked", 0, "a frozen batch norm never reads it", used=False)
        for norm in _NORMS
    ),
    "swin": (
        Fill(f"{_BODY}swin.layernorm.weight", 1, "the result of this norm is not used", used=False),
        Fill(f"{_BODY}swin.layernorm.bias", 0, "the result of this norm is not used", used=False),
    ),
    "convnext": (),
}


def backbone_type(config: DinoDetrConfig) -> str:
    """Return the `model_type` of the backbone."""
    backbone: Any = config.backbone_config
    return str(backbone.model_type)


def rules_for(config: DinoDetrConfig, name: str = "official") -> tuple[Rule, ...]:
    """Return all rules for the files of a format with a model of this configuration; no key matches two of them.

    Args:
        config (`DinoDetrConfig`): Decides on backbone, levels, layers, heads, query selection and denoising.
        name (`str`, *optional*, defaults to `"official"`): One of `FORMATS` or `ANCESTORS`.

    Raises:
        InputError: If the format has no table for the backbone or the query selection.
    """
    backbone = backbone_type(config)
    if name not in BACKBONE_RULES.get(backbone, {}):
        known = ", ".join(kind for kind, rules in BACKBONE_RULES.items() if name in rules)
        raise InputError(f"{name} checkpoints have one of the backbones {known}, not {backbone}")
    if config.query_selection not in QUERY_SELECTION[name]:
        known = " or ".join(map(repr, QUERY_SELECTION[name]))
        raise InputError(f"{name} checkpoints have query_selection {known}, not {config.query_selection!r}")
    alike = "official" if name in ANCESTORS else name
    return (
        *BACKBONE_RULES[backbone][name],
        *LEVEL_EMBEDDING[alike],
        *_neck(alike, config),
        *ENCODER[alike],
        *DECODER[alike],
        *_heads(name, config),
        *QUERY_SELECTION[name][config.query_selection],
        *_denoising(name, config),
        *EXTRA_RULES[name],
    )


_QUERY_SCALE = ("transformer.decoder.query_scale.layers.*.@", "model.decoder.positional_query.query_scale.layers.*.@")
EXTRA_RULES = {
    "official": (),
    **dict.fromkeys(ANCESTORS, _renamed(_QUERY_SCALE)),
    "detrex": (),
    "mmdet": (Rule("steps", reason="counts the updates of the EMA weights"),),
}


def fills_for(config: DinoDetrConfig, name: str = "official") -> tuple[Fill, ...]:
    """Return the fills of our tensors that have no counterpart in the files of a format."""
    if name == "mmdet":  # its batch norms are only set to evaluation mode, and have counters
        return (*(() if backbone_type(config) == "resnet" else FILLS[backbone_type(config)]), _NO_BIAS)
    one_level = (_NOT_EMBEDDED,) if name == "official" and config.num_feature_levels == 1 else ()
    return (*FILLS[backbone_type(config)], *one_level)


_MMDETECTION_2 = "an MMDetection 2, EasyCV or Co-DETR checkpoint; use it with the code that wrote it"

_DAB_DEFORMABLE = (
    *("refpoint_embed.weight", "tgt_embed.weight", "transformer.level_embed"),
    "transformer.decoder.query_scale.layers.0.weight",
)
# Keys that a file of a format must have to be taken for one; without them it may be another model of the code base.
SIGNATURES = {
    "dn_deformable": (*_DAB_DEFORMABLE, "label_enc.weight"),
    "dab_deformable": _DAB_DEFORMABLE,
    "mmdet": (
        "bbox_head.cls_branches.0.weight",
        "memory_trans_fc.weight",
        "dn_query_generator.label_embedding.weight",
    ),
    "detrex": (
        "neck.convs.0.conv.weight",
        "neck.convs.0.norm.weight",
        "transformer.enc_output.weight",
        "label_enc.weight",
    ),
}

# Checkpoints of other models, recognized by one key that no DINO file has. The first match wins, because descendants
# of DETR keep its names.
OTHER_MODELS = (
    (r"(bbox_head|query_head)\.transformer\..+", _MMDETECTION_2),
    (r"language_model\..+", "a Grounding DINO checkpoint; use GroundingDinoForObjectDetection of transformers"),
    (r"sem_seg_head\..+", "a MaskDINO or Mask2Former checkpoint; use it with the code that wrote it"),
    (
        r"(model\.)?(encoder|decoder)\.layers\.\d+\.(fc1|mlp\.fc1|self_attn\.q_proj)\.weight|model\.backbone\..+",
        "a transformers checkpoint, which from_pretrained loads without conversion",
    ),
    (
        r"transformer\.(reference_points|pos_trans)\..+",
        "a Deformable DETR checkpoint; use DeformableDetrForObjectDetection of transformers",
    ),
    (
        r"query_embed\.weight",
        "a DETR or Conditional DETR checkpoint; use DetrForObjectDetection or ConditionalDetrForObjectDetection of "
        "transformers",
    ),
    (
        r"(student|teacher|(layers\.\d+\.)?blocks\.\d+\.attn\.qkv\.weight)",
        "a vision backbone, such as those of the self-supervised method that is also called DINO, or of Swin; "
        "only detectors can be converted",
    ),
    (
        r"(layer\d+\.\d+\.conv1|stages\.\d+\.\d+\.dwconv)\.weight",
        "a classification backbone (ResNet, ConvNeXt); only detectors can be converted",
    ),
)
# The same, if the file lacks a key of the signatures.
OTHER_DETECTORS = (
    (
        r"refpoint_embed\.weight",
        "a DAB-DETR or DN-DETR checkpoint; use DabDetrForObjectDetection of transformers or the code that wrote it, "
        "since only those with deformable attention can be converted",
    ),
    (
        r"(bbox_head|roi_head|rpn_head|memory_trans_fc|dn_query_generator)\..+",
        "an MMDetection 3 checkpoint of a detector other than DINO; use it with MMDetection",
    ),
    (r"neck\.convs\.\d+\.conv\.weight", "a detrex checkpoint of a detector other than DINO; use it with detrex"),
)

# Packages and modules whose types stand beside the weights in a checkpoint. They are replaced by objects that do
# nothing, because neither the weights nor the settings are made of them.
REPLACED_PACKAGES = (
    *("mmengine", "mmcv", "mmdet", "detectron2", "detrex", "fvcore", "omegaconf"),
    *("numpy", "builtins.getattr"),
)


# The 80 categories of COCO detection by their original category ids; the ids in between were never used.
COCO_NUM_LABELS = 91
COCO_NAMES = {
    1: "person",
    2: "bicycle",
    3: "car",
    4: "motorcycle",
    5: "airplane",
    6: "bus",
    7: "train",
    8: "truck",
    9: "boat",
    10: "traffic light",
    11: "fire hydrant",
    13: "stop sign",
    14: "parking meter",
    15: "bench",
    16: "bird",
    17: "cat",
    18: "dog",
    19: "horse",
    20: "sheep",
    21: "cow",
    22: "elephant",
    23: "bear",
    24: "zebra",
    25: "giraffe",
    27: "backpack",
    28: "umbrella",
    31: "handbag",
    32: "tie",
    33: "suitcase",
    34: "frisbee",
    35: "skis",
    36: "snowboard",
    37: "sports ball",
    38: "kite",
    39: "baseball bat",
    40: "baseball glove",
    41: "skateboard",
    42: "surfboard",
    43: "tennis racket",
    44: "bottle",
    46: "wine glass",
    47: "cup",
    48: "fork",
    49: "knife",
    50: "spoon",
    51: "bowl",
    52: "banana",
    53: "apple",
    54: "sandwich",
    55: "orange",
    56: "broccoli",
    57: "carrot",
    58: "hot dog",
    59: "pizza",
    60: "donut",
    61: "cake",
    62: "chair",
    63: "couch",
    64: "potted plant",
    65: "bed",
    67: "dining table",
    70: "toilet",
    72: "tv",
    73: "laptop",
    74: "mouse",
    75: "remote",
    76: "keyboard",
    77: "cell phone",
    78: "microwave",
    79: "oven",
    80: "toaster",
    81: "sink",
    82: "refrigerator",
    84: "book",
    85: "clock",
    86: "vase",
    87: "scissors",
    88: "teddy bear",
    89: "hair drier",
    90: "toothbrush",
}
