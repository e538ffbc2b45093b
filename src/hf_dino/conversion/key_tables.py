"""Settings and keys of the official DINO checkpoints, all as data.

Every line that does more than rename gives a reason. The official implementation is IDEA-Research/DINO, commit
faa8520.
"""

from dataclasses import dataclass
from typing import Any

from ..configuration_dino_detr import DinoDetrConfig
from ..hub import TORCHVISION_RESNET_KEYS
from ..utils.errors import InputError


# Field of DinoDetrConfig -> name of the setting in the file's own `args`.
SETTING_OF_FIELD = {
    "num_feature_levels": "num_feature_levels",
    "d_model": "hidden_dim",
    "encoder_layers": "enc_layers",
    "encoder_ffn_dim": "dim_feedforward",
    "encoder_attention_heads": "nheads",
    "encoder_n_points": "enc_n_points",
    "decoder_layers": "dec_layers",
    "decoder_ffn_dim": "dim_feedforward",
    "decoder_attention_heads": "nheads",
    "decoder_n_points": "dec_n_points",
    "num_queries": "num_queries",
    "activation_function": "transformer_activation",
    "dropout": "dropout",
    "positional_encoding_temperature": "pe_temperatureH",
    "share_decoder_heads": "dec_pred_class_embed_share",
    "num_denoising": "dn_number",
    "label_noise_ratio": "dn_label_noise_ratio",
    "box_noise_scale": "dn_box_noise_scale",
    "auxiliary_loss": "aux_loss",
    "class_cost": "set_cost_class",
    "bbox_cost": "set_cost_bbox",
    "giou_cost": "set_cost_giou",
    "cls_loss_coefficient": "cls_loss_coef",
    "bbox_loss_coefficient": "bbox_loss_coef",
    "giou_loss_coefficient": "giou_loss_coef",
    "focal_alpha": "focal_alpha",
    "num_select": "num_select",
}

# Values that the official code assumes for files older than the setting (its `try: args.x except:` blocks).
DEFAULT_OF_SETTING = {
    "dec_pred_class_embed_share": True,
    "dec_pred_bbox_embed_share": True,
    "use_detached_boxes_dec_out": False,
    "no_interm_box_loss": False,
    "interm_loss_coef": 1.0,
}

# Settings that change what the network computes or how it is trained, and the values that this model can express.
SUPPORTED_VALUES = {
    "position_embedding": ("sine", "v2"),
    "transformer_activation": ("relu", "gelu"),
    "two_stage_type": ("standard", "no"),
    "return_interm_indices": ([0, 1, 2, 3], [1, 2, 3], [3]),
    "query_dim": (4,),
    "num_patterns": (0,),
    "pre_norm": (False,),
    "dilation": (False,),
    "masks": (False,),
    "use_deformable_box_attn": (False,),
    "add_channel_attention": (False,),
    "decoder_sa_type": ("sa",),
    "decoder_module_seq": (["sa", "ca", "ffn"],),
    "decoder_layer_noise": (False,),
    "dec_layer_number": (None,),
    "two_stage_pat_embed": (0,),
    "two_stage_add_query_num": (0,),
    "two_stage_learn_wh": (False,),
    "two_stage_keep_all_tokens": (False,),
    "two_stage_bbox_embed_share": (False,),
    "two_stage_class_embed_share": (False,),
    "matcher_type": ("HungarianMatcher",),
    "no_interm_box_loss": (False,),
    "interm_loss_coef": (1.0,),
}

# Pairs of settings for which the model has one field.
EQUAL_SETTINGS = (
    ("pe_temperatureH", "pe_temperatureW"),
    ("dec_pred_class_embed_share", "dec_pred_bbox_embed_share"),
)

BACKBONES: dict[str, dict[str, Any]] = {
    "resnet50": {"model_type": "resnet", "depths": [3, 4, 6, 3]},
    "resnet101": {"model_type": "resnet", "depths": [3, 4, 23, 3]},
    **{
        f"swin_{letter}_{image_size}_{data}": {
            "model_type": "swin",
            "image_size": image_size,
            "embed_dim": width,
            "depths": [2, 2, middle, 2],
            "num_heads": [width // 32 * 2**stage for stage in range(4)],
            "window_size": window,
            "drop_path_rate": 0.2,  # not among the settings, but the default of the official SwinTransformer
        }
        for letter, image_size, data, width, middle, window in (
            ("T", 224, "1k", 96, 6, 7),
            ("B", 224, "22k", 128, 18, 7),
            ("B", 384, "22k", 128, 18, 12),
            ("L", 224, "22k", 192, 18, 7),
            ("L", 384, "22k", 192, 18, 12),
        )
    },
}


@dataclass(frozen=True)
class Rule:
    r"""Rename, split or drop the official tensors whose key matches a pattern.

    Args:
        source (`str`): Regular expression that matches the whole official key.
        targets (`tuple[str, ...]`): Our keys, in which `\1` is the first group of `source`. If empty, the tensor is
            dropped. If there are several, it is split along its first axis into as many equal parts, in this order.
        reason (`str`): Reason for the rule, unless it only renames.
        equals (`str`, *optional*): Official key of which the tensor must be an exact copy.
        first_rows (`bool`, *optional*, defaults to `False`): Keep only the first `num_labels` rows.
    """

    source: str
    targets: tuple[str, ...] = ()
    reason: str = ""
    equals: str | None = None
    first_rows: bool = False


@dataclass(frozen=True)
class Fill:
    """Fill our keys that match `target`, which have no counterpart in the official file, with a constant."""

    target: str
    value: int
    reason: str


def _renamed(*pairs: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple(Rule(source, (target,)) for source, target in pairs)


def _modules(source: str, target: str, *names: tuple[str, str], leaf: str = "weight|bias") -> tuple[Rule, ...]:
    """Rename modules, with their parameters, of a parent whose key ends in an index."""
    return tuple(Rule(rf"{source}\.(\d+)\.{old}\.({leaf})", (rf"{target}.\1.{new}.\2",)) for old, new in names)


_BODY = "model.backbone.body"

RESNET = _renamed(
    *((rf"backbone\.0\.body\.{source}", f"{_BODY}.{target}") for source, target in TORCHVISION_RESNET_KEYS)
)

_BLOCK = r"backbone\.0\.layers\.(\d+)\.blocks\.(\d+)"
_OUR_BLOCK = rf"{_BODY}.swin.encoder.layers.\1.blocks.\2"
SWIN = (
    *_renamed(
        (r"backbone\.0\.patch_embed\.proj\.(weight|bias)", rf"{_BODY}.swin.embeddings.patch_embeddings.projection.\1"),
        (r"backbone\.0\.patch_embed\.norm\.(weight|bias)", rf"{_BODY}.swin.embeddings.norm.\1"),
        (rf"{_BLOCK}\.norm1\.(weight|bias)", rf"{_OUR_BLOCK}.layernorm_before.\3"),
        (rf"{_BLOCK}\.norm2\.(weight|bias)", rf"{_OUR_BLOCK}.layernorm_after.\3"),
        (rf"{_BLOCK}\.mlp\.(fc1|fc2)\.(weight|bias)", rf"{_OUR_BLOCK}.mlp.\3.\4"),
        (rf"{_BLOCK}\.attn\.proj\.(weight|bias)", rf"{_OUR_BLOCK}.attention.o_proj.\3"),
        (
            rf"{_BLOCK}\.attn\.relative_position_bias_table",
            rf"{_OUR_BLOCK}.attention.relative_position_bias.relative_position_bias_table",
        ),
        (
            r"backbone\.0\.layers\.(\d+)\.downsample\.(reduction|norm)\.(weight|bias)",
            rf"{_BODY}.swin.encoder.layers.\1.downsample.\2.\3",
        ),
        *(  # the official code counts output norms from 0, transformers counts stages from 1
            (rf"backbone\.0\.norm{stage}\.(weight|bias)", rf"{_BODY}.hidden_states_norms.stage{stage + 1}.\1")
            for stage in range(4)
        ),
    ),
    Rule(
        rf"{_BLOCK}\.attn\.qkv\.(weight|bias)",
        tuple(rf"{_OUR_BLOCK}.attention.{part}_proj.\3" for part in "qkv"),
        reason="query, key and value are one projection in the official implementation",
    ),
    Rule(
        rf"{_BLOCK}\.(attn\.relative_position_index|attn_mask)",
        reason="computed from the window size when needed",
    ),
)

NECK = _renamed(
    (r"input_proj\.(\d+)\.([01])\.(weight|bias)", r"model.backbone.input_proj.\1.\2.\3"),
    (r"transformer\.level_embed", "model.backbone.level_embed"),
)

_DEFORMABLE = "sampling_offsets|attention_weights|value_proj|output_proj"
ENCODER = (
    *_renamed(
        (
            rf"transformer\.encoder\.layers\.(\d+)\.self_attn\.({_DEFORMABLE})\.(weight|bias)",
            r"model.encoder.layers.\1.self_attn.\2.\3",
        ),
    ),
    *_modules(
        r"transformer\.encoder\.layers",
        "model.encoder.layers",
        ("norm1", "self_attn_layer_norm"),
        ("linear1", "mlp.fc1"),
        ("linear2", "mlp.fc2"),
        ("norm2", "final_layer_norm"),
    ),
)

DECODER = (
    *_renamed(
        (
            rf"transformer\.decoder\.layers\.(\d+)\.cross_attn\.({_DEFORMABLE})\.(weight|bias)",
            r"model.decoder.layers.\1.encoder_attn.\2.\3",
        ),
        (r"transformer\.decoder\.norm\.(weight|bias)", r"model.decoder.layer_norm.\1"),
        (
            r"transformer\.decoder\.ref_point_head\.layers\.(\d+)\.(weight|bias)",
            r"model.decoder.ref_point_head.layers.\1.\2",
        ),
    ),
    Rule(
        r"transformer\.decoder\.layers\.(\d+)\.self_attn\.in_proj_(weight|bias)",
        tuple(rf"model.decoder.layers.\1.self_attn.{part}_proj.\2" for part in "qkv"),
        reason="nn.MultiheadAttention keeps query, key and value in one matrix",
    ),
    *_modules(
        r"transformer\.decoder\.layers",
        "model.decoder.layers",
        (r"self_attn\.out_proj", "self_attn.o_proj"),
        # numbered in the order in which they are defined, not of their use: self-attention runs first and has norm2
        ("norm2", "self_attn_layer_norm"),
        ("norm1", "encoder_attn_layer_norm"),
        ("norm3", "final_layer_norm"),
        ("linear1", "mlp.fc1"),
        ("linear2", "mlp.fc2"),
    ),
    Rule(
        r"transformer\.decoder\.((?:class|bbox)_embed\..+)",
        reason="the official decoder has a second reference to the heads",
        equals=r"\1",
    ),
)

HEADS = {
    True: (  # share_decoder_heads
        *_renamed(
            (r"class_embed\.0\.(weight|bias)", r"class_embed.0.\1"),
            (r"bbox_embed\.0\.layers\.(\d+)\.(weight|bias)", r"model.decoder.bbox_embed.0.layers.\1.\2"),
        ),
        Rule(
            r"(class|bbox)_embed\.[1-9]\d*\.(.+)",
            reason="all decoder layers share one head, and the file contains a copy of it per layer",
            equals=r"\1_embed.0.\2",
        ),
    ),
    False: _renamed(
        (r"class_embed\.(\d+)\.(weight|bias)", r"class_embed.\1.\2"),
        (r"bbox_embed\.(\d+)\.layers\.(\d+)\.(weight|bias)", r"model.decoder.bbox_embed.\1.layers.\2.\3"),
    ),
}

_FROM_TOKENS = _renamed(
    (r"transformer\.(enc_output|enc_output_norm)\.(weight|bias)", r"model.query_selection.\1.\2"),
    (r"transformer\.enc_out_class_embed\.(weight|bias)", r"model.query_selection.class_embed.\1"),
    (
        r"transformer\.enc_out_bbox_embed\.layers\.(\d+)\.(weight|bias)",
        r"model.query_selection.bbox_embed.layers.\1.\2",
    ),
)
_LEARNED_CONTENTS = _renamed((r"transformer\.tgt_embed\.weight", "model.query_selection.content_queries.weight"))
QUERY_SELECTION = {
    "mixed": (*_FROM_TOKENS, *_LEARNED_CONTENTS),
    "pure": _FROM_TOKENS,
    "static": (
        *_LEARNED_CONTENTS,
        *_renamed((r"transformer\.refpoint_embed\.weight", "model.query_selection.anchors.weight")),
    ),
}

_LABEL_EMBEDDING = (
    Rule(
        r"label_enc\.weight",
        ("model.denoising.label_embed.weight",),
        reason="only one row per class is ever used; the official implementation has dn_labelbook_size + 1",
        first_rows=True,
    ),
)
DENOISING = {
    "contrastive": _LABEL_EMBEDDING,
    "plain": _LABEL_EMBEDDING,
    "none": (Rule(r"label_enc\.weight", reason="labels are embedded only for denoising"),),
}

FILLS = {
    "resnet": (
        Fill(
            r".+\.num_batches_tracked",
            0,
            "the official frozen batch norm has no counter, and a frozen one never reads it",
        ),
    ),
    "swin": (
        Fill(r".+\.swin\.layernorm\.weight", 1, "the result of this norm is not used"),
        Fill(r".+\.swin\.layernorm\.bias", 0, "the result of this norm is not used"),
    ),
}
ONE_LEVEL_FILLS = (Fill(r"model\.backbone\.level_embed", 0, "the official code does not embed a single level"),)


BACKBONE_RULES = {"resnet": RESNET, "swin": SWIN}


def _backbone_type(config: DinoDetrConfig) -> str:
    return config.to_dict()["backbone_config"]["model_type"]


def rules_for(config: DinoDetrConfig) -> tuple[Rule, ...]:
    """Return all rules for an official checkpoint with these settings; no official key matches two of them.

    Raises:
        InputError: If the configuration has a backbone that no official checkpoint has.
    """
    backbone = _backbone_type(config)
    if backbone not in BACKBONE_RULES:
        raise InputError(f"official checkpoints have one of the backbones {', '.join(BACKBONE_RULES)}, not {backbone}")
    return (
        *BACKBONE_RULES[backbone],
        *NECK,
        *ENCODER,
        *DECODER,
        *HEADS[config.share_decoder_heads],
        *QUERY_SELECTION[config.query_selection],
        *DENOISING[config.denoising],
    )


def fills_for(config: DinoDetrConfig) -> tuple[Fill, ...]:
    """Return the fills of our tensors that have no counterpart in an official checkpoint with these settings."""
    return FILLS[_backbone_type(config)] + (ONE_LEVEL_FILLS if config.num_feature_levels == 1 else ())


_MMDETECTION_2 = "an MMDetection 2, EasyCV or Co-DETR checkpoint; use it with the code that wrote it"
_MMDETECTION_3 = (
    "an MMDetection 3 checkpoint; use it with MMDetection, or convert the checkpoint that IDEA-Research/DINO published"
)
_DETREX = "a detrex checkpoint; use it with detrex, or convert the checkpoint that IDEA-Research/DINO published"

# Checkpoints of other code, recognized by one key that no official DINO file has. The first match wins, because
# descendants of DETR keep its names, and detrex and MMDetection name their neck alike.
OTHER_MODELS = (
    (r"(bbox_head|query_head)\.transformer\..+", _MMDETECTION_2),
    (r"(bbox_head|roi_head|rpn_head|memory_trans_fc|dn_query_generator)\..+", _MMDETECTION_3),
    (r"neck\.convs\.\d+\.conv\.weight", _DETREX),
    (r"sem_seg_head\..+", "a MaskDINO or Mask2Former checkpoint; use it with the code that wrote it"),
    (
        r"(model\.)?(encoder|decoder)\.layers\.\d+\.(fc1|mlp\.fc1|self_attn\.q_proj)\.weight|model\.backbone\..+",
        "a transformers checkpoint, which from_pretrained loads without conversion",
    ),
    (
        r"transformer\.(reference_points|pos_trans)\..+",
        "a Deformable DETR checkpoint; use DeformableDetrForObjectDetection of transformers",
    ),
    (r"refpoint_embed\.weight", "a DAB-DETR or DN-DETR checkpoint; use it with the code that wrote it"),
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

# Packages whose types are pickled into checkpoints of other code.
OTHER_PACKAGES = {"mmengine": _MMDETECTION_3, "mmcv": _MMDETECTION_2, "detectron2": _DETREX}


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
