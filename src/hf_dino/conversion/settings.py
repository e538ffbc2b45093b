"""Settings of the code bases side by side, as data, and the configurations that they describe.

The official code and those of DINO's ancestors store their settings in their files, mmdetection the text of its
configuration, detrex nothing: sizes are then read from the shapes of the tensors. No configuration is executed:
Python is parsed, and only literals and calls of `dict` are evaluated.
"""

import ast
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..backbone_weights import fill_key, match_key
from ..configuration_dino_detr import UNUSED_LABEL, DinoDetrConfig
from ..family import FAMILY
from ..image_processing_dino_detr import LONGEST_EDGE, SHORTEST_EDGE
from ..utils.errors import InputError, import_extra, summarize_list
from ..utils.io import read_text
from .key_tables import (
    ANCESTORS,
    BACKBONE_RULES,
    COCO_NAMES,
    COCO_NUM_LABELS,
    CODE_BASES,
    FORMATS,
    LEVEL_EMBEDDING,
    rules_for,
)


logger = logging.getLogger(__name__)

_COST = "model.train_cfg.assigner.match_costs"
_LOSS = "model.criterion.weight_dict"
_DETREX, _MMDET = "model.transformer", "layer_cfg.self_attn_cfg"
_FFN = "layer_cfg.ffn_cfg"
_FIELDS = (
    # field of DinoDetrConfig, official, detrex, mmdet; settings inside others are joined by dots
    ("num_feature_levels", "num_feature_levels", f"{_DETREX}.num_feature_levels", "model.num_feature_levels"),
    ("d_model", "hidden_dim", None, None),
    ("encoder_layers", "enc_layers", f"{_DETREX}.encoder.num_layers", "model.encoder.num_layers"),
    (
        "encoder_ffn_dim",
        "dim_feedforward",
        f"{_DETREX}.encoder.feedforward_dim",
        f"model.encoder.{_FFN}.feedforward_channels",
    ),
    ("encoder_attention_heads", "nheads", f"{_DETREX}.encoder.num_heads", f"model.encoder.{_MMDET}.num_heads"),
    ("encoder_n_points", "enc_n_points", None, None),
    ("decoder_layers", "dec_layers", f"{_DETREX}.decoder.num_layers", "model.decoder.num_layers"),
    (
        "decoder_ffn_dim",
        "dim_feedforward",
        f"{_DETREX}.decoder.feedforward_dim",
        f"model.decoder.{_FFN}.feedforward_channels",
    ),
    ("decoder_attention_heads", "nheads", f"{_DETREX}.decoder.num_heads", f"model.decoder.{_MMDET}.num_heads"),
    ("decoder_n_points", "dec_n_points", None, None),
    ("num_queries", "num_queries", "model.num_queries", "model.num_queries"),
    ("activation_function", "transformer_activation", None, None),
    ("dropout", "dropout", f"{_DETREX}.encoder.ffn_dropout", f"model.encoder.{_FFN}.ffn_drop"),
    (
        "positional_encoding_temperature",
        "pe_temperatureH",
        "model.position_embedding.temperature",
        "model.positional_encoding.temperature",
    ),
    (
        "positional_encoding_offset",
        None,
        "model.position_embedding.offset",
        "model.positional_encoding.offset",
    ),
    ("share_decoder_heads", "dec_pred_class_embed_share", None, None),
    ("num_denoising", "dn_number", "model.dn_number", "model.dn_cfg.group_cfg.num_dn_queries"),
    ("label_noise_ratio", "dn_label_noise_ratio", "model.label_noise_ratio", "model.dn_cfg.label_noise_scale"),
    ("box_noise_scale", "dn_box_noise_scale", "model.box_noise_scale", "model.dn_cfg.box_noise_scale"),
    ("auxiliary_loss", "aux_loss", "model.aux_loss", None),
    ("class_cost", "set_cost_class", "model.criterion.matcher.cost_class", f"{_COST}.FocalLossCost.weight"),
    ("bbox_cost", "set_cost_bbox", "model.criterion.matcher.cost_bbox", f"{_COST}.BBoxL1Cost.weight"),
    ("giou_cost", "set_cost_giou", "model.criterion.matcher.cost_giou", f"{_COST}.IoUCost.weight"),
    ("cls_loss_coefficient", "cls_loss_coef", f"{_LOSS}.loss_class", "model.bbox_head.loss_cls.loss_weight"),
    ("bbox_loss_coefficient", "bbox_loss_coef", f"{_LOSS}.loss_bbox", "model.bbox_head.loss_bbox.loss_weight"),
    ("giou_loss_coefficient", "giou_loss_coef", f"{_LOSS}.loss_giou", "model.bbox_head.loss_iou.loss_weight"),
    ("focal_alpha", "focal_alpha", "model.criterion.alpha", "model.bbox_head.loss_cls.alpha"),
    ("focal_gamma", None, "model.criterion.gamma", "model.bbox_head.loss_cls.gamma"),
    ("num_select", "num_select", "model.select_box_nums_for_evaluation", "model.test_cfg.max_per_img"),
)
SETTING_OF_FIELD: dict[str, dict[str, str]] = {
    name: {row[0]: setting for row in _FIELDS if (setting := row[1 + column])} for column, name in enumerate(FORMATS)
}
"""For each format: field of DinoDetrConfig -> name of the setting."""

# Settings that the ancestors' deformable models do not read, although their files have them: these are for another
# model of the repository (DAB-DETR, models/dab_deformable_detr/{position_encoding,deformable_transformer}.py).
_NOT_READ = ("positional_encoding_temperature", "activation_function", "num_select")
_NOT_STORED = ("share_decoder_heads", "num_denoising", "label_noise_ratio", "box_noise_scale")
_OF_ANCESTORS = {
    field: setting
    for field, setting in SETTING_OF_FIELD["official"].items()
    if field not in (*_NOT_READ, *_NOT_STORED)
}
SETTING_OF_FIELD |= {
    "dab_deformable": _OF_ANCESTORS,
    "dn_deformable": {
        **_OF_ANCESTORS,
        "num_denoising_groups": "scalar",
        "label_noise_ratio": "label_noise_scale",
        "box_noise_scale": "box_noise_scale",
    },
}


def _fixed(name: str) -> dict[str, Any]:
    """Return the fields of an ancestor that are none of its settings."""
    fields = FAMILY[f"{name}_detr"].config
    return {field: fields[field] for field in fields.keys() - SETTING_OF_FIELD[name].keys()}


# Fields that no setting of the code base changes, where they differ from the defaults of DinoDetrConfig.
FIXED_FIELDS: dict[str, dict[str, Any]] = {
    "official": {},
    "detrex": {"share_decoder_heads": False, "box_noise_scale": 1.0},
    # the decoder moves its reference points with 1e-3 (dino_layers.py:102), the head predicts with the default of
    # 1e-5 (deformable_detr_head.py:119)
    "mmdet": {"share_decoder_heads": False, "box_noise_scale": 1.0, "box_prediction_epsilon": 1e-5},
    **{name: _fixed(name) for name in ANCESTORS},
}

# Values that the code assumes for settings that a file lacks: for the official code, its `try: args.x except:` blocks,
# for mmdetection, the defaults of its classes where they are not DINO's.
DEFAULT_OF_SETTING: dict[str, dict[str, Any]] = {
    "official": {
        "dec_pred_class_embed_share": True,
        "dec_pred_bbox_embed_share": True,
        "use_detached_boxes_dec_out": False,
        "no_interm_box_loss": False,
        "interm_loss_coef": 1.0,
    },
    "detrex": {},
    "mmdet": {
        "model.positional_encoding.temperature": 10000,
        "model.positional_encoding.offset": 0.0,
        "model.positional_encoding.normalize": False,
        "model.data_preprocessor.bgr_to_rgb": False,
    },
    "dab_deformable": {},
    "dn_deformable": {"contrastive": False, "use_mqs": False, "use_lft": False},
}

_OF_DAB_DEFORMABLE: dict[str, tuple[Any, ...]] = {
    "backbone": ("resnet50", "resnet101"),
    "position_embedding": ("sine", "v2"),
    "num_patterns": (0,),
    **dict.fromkeys(("two_stage", "dilation", "masks"), (False,)),
}
_MEAN, _STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # of ImageNet, for pixels from 0 to 255
# Settings that change what the network computes or how it is trained, and the values that this model can express.
SUPPORTED_VALUES: dict[str, dict[str, tuple[Any, ...]]] = {
    "official": {
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
    },
    "detrex": {
        "model.position_embedding.normalize": (True,),
        "model.criterion.two_stage_binary_cls": (False,),
        "model.input_format": ("RGB",),
        "model.pixel_mean": (_MEAN,),
        "model.pixel_std": (_STD,),
    },
    "mmdet": {
        "model.type": ("DINO",),
        "model.bbox_head.type": ("DINOHead",),
        "model.with_box_refine": (True,),
        "model.as_two_stage": (True,),
        "model.positional_encoding.normalize": (True,),
        "model.backbone.style": ("pytorch",),
        "model.neck.norm_cfg.num_groups": (32,),
        "model.bbox_head.loss_cls.use_sigmoid": (True,),
        "model.data_preprocessor.bgr_to_rgb": (True,),
        "model.data_preprocessor.mean": (_MEAN,),
        "model.data_preprocessor.std": (_STD,),
    },
    "dab_deformable": {**_OF_DAB_DEFORMABLE, "modelname": ("dab_deformable_detr",)},
    "dn_deformable": {
        **_OF_DAB_DEFORMABLE,
        "modelname": ("dn_dab_deformable_detr",),
        "use_dn": (True,),
        **dict.fromkeys(("contrastive", "use_mqs", "use_lft"), (False,)),
    },
}

# Losses of mmdetection with which this model can be trained further. A file that was trained with others is converted.
LOSSES = {
    "model.bbox_head.loss_cls.type": "FocalLoss",
    "model.bbox_head.loss_bbox.type": "L1Loss",
    "model.bbox_head.loss_iou.type": "GIoULoss",
}

# Pairs of official settings for which the model has one field.
EQUAL_SETTINGS = (
    ("pe_temperatureH", "pe_temperatureW"),
    ("dec_pred_class_embed_share", "dec_pred_bbox_embed_share"),
)

# Strategies of DinoDetrConfig and the official settings that mean them.
OFFICIAL_STRATEGIES: dict[str, dict[str, dict[str, Any]]] = {
    "query_selection": {
        "mixed": {"two_stage_type": "standard", "embed_init_tgt": True},
        "pure": {"two_stage_type": "standard", "embed_init_tgt": False},
        "static": {"two_stage_type": "no"},
    },
    "box_refinement": {
        "look_forward_twice": {"use_detached_boxes_dec_out": False},
        "look_forward_once": {"use_detached_boxes_dec_out": True},
    },
}

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
"""Official name -> fields of the configuration of the backbone."""

# Backbones of detrex and mmdetection, by type and (width of the first stage, blocks per stage).
SIZES = {
    "resnet": {(256, (3, 4, 6, 3)): "ResNet-50", (256, (3, 4, 23, 3)): "ResNet-101"},
    "swin": {
        (96, (2, 2, 6, 2)): "Swin-T",
        (96, (2, 2, 18, 2)): "Swin-S",
        (128, (2, 2, 18, 2)): "Swin-B",
        (192, (2, 2, 18, 2)): "Swin-L",
    },
    "convnext": {
        (96, (3, 3, 9, 3)): "ConvNeXt-T",
        (96, (3, 3, 27, 3)): "ConvNeXt-S",
        (128, (3, 3, 27, 3)): "ConvNeXt-B",
        (192, (3, 3, 27, 3)): "ConvNeXt-L",
    },
}
_CONVERTIBLE = ", ".join(name for sizes in SIZES.values() for name in sizes.values())

# Templates of keys after `backbone.` or `backbone.0.` by which other backbones are recognized.
OTHER_BACKBONES = {
    "layers.*.blocks.*.modulation.@.@": "FocalNet",
    "layers.*.blocks.*.attn.logit_scale": "Swin V2",
    "levels.*.blocks.*.@.@.@": "InternImage",
    "net.blocks.*.@.@": "a plain vision transformer (ViTDet, EVA)",
    "net.blocks.*.@.@.@": "a plain vision transformer (ViTDet, EVA)",
    "model.@.@": "a backbone of timm or torchvision",
    "stages.*.*.@.grn.@": "ConvNeXt V2",
}


def read_settings_file(path: Path) -> dict[str, Any]:
    """Read a file of settings without executing it.

    Args:
        path (`Path`): A `.py` configuration of the official code or of mmdetection, the official
            `config_args_all.json`, or detrex's `config.yaml`.

    Raises:
        InputError: If it cannot be read as one.
    """
    readers = {".py": _read_python_file, ".json": _read_json, ".yaml": _read_yaml, ".yml": _read_yaml}
    if path.suffix not in readers:
        raise InputError(f"--settings {path}: must be a {', '.join(readers)} file")
    try:
        settings = readers[path.suffix](path)
    except InputError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"--settings {path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise InputError(f"--settings {path}: must contain named settings, got a {type(settings).__name__}")
    return settings


def _read_json(path: Path) -> Any:
    return json.loads(read_text(path))


def _read_yaml(path: Path) -> Any:
    yaml = import_extra("yaml", "train", f"--settings {path}")
    try:
        return yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(error) from None


def _read_python_file(path: Path) -> dict[str, Any]:
    settings = read_python(read_text(path))
    bases = settings.pop("_base_", [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        merged = _merge(merged, _read_python_file(path.parent / base))
    return _merge(merged, settings)


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Override settings by others, dictionaries inside dictionaries too, as the configurations do with their bases."""
    kept = {} if changes.get("_delete_") else dict(base)
    for name, value in changes.items():
        inner = isinstance(value, Mapping) and isinstance(kept.get(name), Mapping)
        kept[name] = _merge(kept[name], value) if inner else value
    return kept


def read_python(text: str) -> dict[str, Any]:
    """Return the values assigned at the top level of a Python configuration, without executing it.

    Example:

    ```python
    >>> read_python("levels = 4\\nmodel = dict(neck=dict(num_outs=levels), dims=[2, -1], seed=random())")
    {'levels': 4, 'model': {'neck': {'num_outs': 4}, 'dims': [2, -1], 'seed': 'random()'}}

    ```
    """
    values: dict[str, Any] = {}
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            values[statement.targets[0].id] = _evaluate(statement.value, values)
    return values


def _evaluate(node: ast.expr | None, names: Mapping[str, Any]) -> Any:
    """Return the value of an expression, or its text if it is not made of literals, `dict` and known names."""
    match node:
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
            return {word.arg: _evaluate(word.value, names) for word in keywords if word.arg}
        case ast.Dict(keys=keys, values=values):
            return {_evaluate(key, names): _evaluate(value, names) for key, value in zip(keys, values) if key}
        case ast.List(elts=entries) | ast.Tuple(elts=entries):
            return [_evaluate(entry, names) for entry in entries]
    try:
        return ast.literal_eval(node or "None")
    except ValueError:
        return ast.unparse(node) if node else None


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Add to settings those inside them, with the names joined by dots; in a list, the type of an entry is its name.

    Types lose the module in which they are defined.

    Example:

    ```python
    >>> list(flatten({"head": {"costs": [{"type": "IoUCost", "weight": 2}]}}))[-1]
    'head.costs.IoUCost.weight'

    ```
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        path = f"{prefix}{name}"
        flat[path] = list(value) if isinstance(value, tuple) else value
        if name == "type":
            flat[path] = _type_name(value)
        if isinstance(value, list | tuple):
            value = {_type_name(each["type"]): each for each in value if isinstance(each, Mapping) and "type" in each}
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{path}.")
    return flat


def _type_name(value: Any) -> str:
    return str(value).rpartition(".")[-1]


def check_settings(settings: Mapping[str, Any], name: str = "official") -> None:
    """Check that the model can express the settings and, for code that stores all, that none lacks."""
    required = {"official": REQUIRED_SETTINGS}.get(name, SETTINGS_OF_ANCESTORS.get(name, set()))
    if missing := sorted(required - settings.keys()):
        whose = "official configuration" if name == "official" else f"file of {CODE_BASES[name]}"
        raise InputError(f"the file's settings lack {summarize_list(map(repr, missing))}, which every {whose} sets")
    backbones = {"backbone": tuple(BACKBONES)} if name == "official" else {}
    for setting, supported in (SUPPORTED_VALUES[name] | backbones).items():
        if setting in settings and settings[setting] not in supported:
            legal = " or ".join(map(repr, supported))
            raise InputError(
                f"the file was trained with {setting}={settings[setting]!r}; only {legal} can be converted"
            )
    for first, second in EQUAL_SETTINGS if name == "official" else ():
        if settings[first] != settings[second]:
            raise InputError(
                f"the file was trained with {first}={settings[first]!r} and {second}={settings[second]!r}; "
                f"only equal values can be converted"
            )


REQUIRED_SETTINGS = {
    *SETTING_OF_FIELD["official"].values(),
    *SUPPORTED_VALUES["official"],
    *(name for pair in EQUAL_SETTINGS for name in pair),
    *("backbone", "use_dn", "embed_init_tgt", "use_detached_boxes_dec_out", "num_classes"),
}

SETTINGS_OF_ANCESTORS = {name: {*SETTING_OF_FIELD[name].values(), *SUPPORTED_VALUES[name]} for name in ANCESTORS}


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
    settings = complete(args, "official")
    check_settings(settings)
    stages = [index + 1 for index in settings["return_interm_indices"]]  # in transformers the stem is stage 0
    strategies = {field: _strategy(field, settings) for field in OFFICIAL_STRATEGIES}
    return DinoDetrConfig(
        backbone_config={**BACKBONES[settings["backbone"]], "out_indices": stages},
        denoising="contrastive" if settings["use_dn"] and settings["dn_number"] > 0 else "none",
        id2label=make_id2label(settings["num_classes"]),
        **strategies,
        **{field: settings[name] for field, name in SETTING_OF_FIELD["official"].items()},
    )


def config_of_ancestor(args: Mapping[str, Any], name: str, source: Mapping[str, torch.Tensor]) -> DinoDetrConfig:
    """Translate the settings of DAB-DETR's or DN-DETR's code.

    Args:
        args (`dict`): The settings, with their names.
        name (`str`): One of `key_tables.ANCESTORS`.
        source (`dict[str, torch.Tensor]`): The tensors, which tell the number of classes.

    Raises:
        InputError: If a setting is missing, or has a value that the model cannot express.
    """
    settings = complete(args, name)
    check_settings(settings, name)
    if "class_embed.0.bias" not in source:
        raise InputError(f"the file is not a complete model of {CODE_BASES[name]}: it has no class_embed.0.bias")
    fields = {field: settings[setting] for field, setting in SETTING_OF_FIELD[name].items()}
    stages = [2, 3, 4] if fields["num_feature_levels"] > 1 else [4]
    return DinoDetrConfig(
        backbone_config={**BACKBONES[settings["backbone"]], "out_indices": stages},
        id2label=make_id2label(len(source["class_embed.0.bias"])),
        **FIXED_FIELDS[name] | fields,
    )


def complete(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return flat settings with the values that the code base assumes for missing ones."""
    return {**(DEFAULT_OF_SETTING[name] if settings else {}), **flatten(settings)}


def _strategy(field: str, settings: Mapping[str, Any]) -> str:
    strategies = OFFICIAL_STRATEGIES[field]
    for strategy, wanted in strategies.items():
        if all(settings[setting] == value for setting, value in wanted.items()):
            return strategy
    got = {setting: settings[setting] for wanted in strategies.values() for setting in wanted}
    raise InputError(
        f"the file was trained with {summarize_list(f'{name}={value!r}' for name, value in got.items())}, "
        f"which is no {field} of DINO; only True or False can be converted"
    )


def make_id2label(num_classes: int) -> dict[int, str]:
    """Return names by label. Labels of official COCO models are the category ids, so some labels are unused."""
    if num_classes == COCO_NUM_LABELS:
        return {label: COCO_NAMES.get(label, UNUSED_LABEL) for label in range(num_classes)}
    return {label: f"class_{label}" for label in range(num_classes)}


def _contiguous_id2label(num_classes: int, names: Sequence[str]) -> dict[int, str]:
    """Return names by label for detrex and mmdetection, where labels count from 0; 80 without names are COCO's."""
    if names and len(names) != num_classes:
        logger.warning("the file names %d classes but has %d: its names are not used", len(names), num_classes)
    elif names or num_classes == len(COCO_NAMES):
        return dict(enumerate(names or COCO_NAMES.values()))
    return {label: f"class_{label}" for label in range(num_classes)}


def evaluation_size(settings: Mapping[str, Any]) -> dict[str, int]:
    """Return the image size of the code base's evaluation, in pixels.

    The official one is the largest training scale; mmdetection's is that of its test pipeline.
    """
    for pipeline in ("test_pipeline", "test_dataloader.dataset.pipeline"):
        if pipeline in settings:
            return _size_of_pipeline(settings, pipeline)
    scale = settings.get("data_aug_scale_overlap") or 1
    return {
        "shortest_edge": int(max(settings.get("data_aug_scales") or [SHORTEST_EDGE]) * scale),
        "longest_edge": int((settings.get("data_aug_max_size") or LONGEST_EDGE) * scale),
    }


def _size_of_pipeline(settings: Mapping[str, Any], pipeline: str) -> dict[str, int]:
    match settings.get(f"{pipeline}.Resize.scale"), settings.get(f"{pipeline}.Resize.keep_ratio", False):
        case [int(width), int(height)], True:
            return {"shortest_edge": min(width, height), "longest_edge": max(width, height)}
        case [int(width), int(height)], False:
            return {"height": height, "width": width}
    logger.warning(
        "the image size of the file's %s is not known; %d/%d is used", pipeline, SHORTEST_EDGE, LONGEST_EDGE
    )
    return {"shortest_edge": SHORTEST_EDGE, "longest_edge": LONGEST_EDGE}


def config_from_tensors(
    source: Mapping[str, torch.Tensor],
    name: str,
    settings: Mapping[str, Any],
    class_names: Sequence[str] | None = None,
) -> DinoDetrConfig:
    """Read a configuration from the tensors of a detrex or mmdetection file, and what they do not show from settings.

    Args:
        source (`dict[str, torch.Tensor]`): The tensors by their keys in the file; only the shapes are read.
        name (`str`): `"detrex"` or `"mmdet"`.
        settings (`dict`): The settings, as far as they are known.
        class_names (`Sequence[str]`, *optional*): Names of the classes.

    Raises:
        InputError: If the tensors are not those of a complete DINO, the backbone is not one that can be converted, or
            a setting has a value that the model cannot express.
    """
    known = complete(settings, name)
    check_settings(known, name)
    for setting, loss in LOSSES.items():
        if known.get(setting, loss) != loss:
            logger.warning("the file was trained with %s=%s; further training uses %s", setting, known[setting], loss)
    fields = {field: known[path] for field, path in SETTING_OF_FIELD[name].items() if path in known}
    try:
        layout = _layout(source, name)
        shapes = _our_shapes(source, layout, name)
        fields = {**FIXED_FIELDS[name], **_architecture(shapes, fields), **fields}
        num_labels = shapes["class_embed.0.bias"][0]
    except KeyError as error:
        raise InputError(
            f"the file is not a complete {CODE_BASES[name]} DINO: it has no tensor for {error.args[0]}"
        ) from None
    id2label = _contiguous_id2label(num_labels, class_names or ())
    return DinoDetrConfig(query_selection=layout.query_selection, id2label=id2label, **fields)


def _layout(source: Mapping[str, torch.Tensor], name: str) -> DinoDetrConfig:
    """Return a configuration with all that decides on the names of the tensors; its other fields mean nothing."""
    [embedding] = LEVEL_EMBEDDING[name]
    levels = _count(source, "neck.convs.*.conv.weight")
    contents = rules_for(DinoDetrConfig(share_decoder_heads=False), name)
    content_key = next(rule.source for rule in contents if "content_queries" in "".join(rule.targets))
    has_contents = any(match_key(content_key, key) for key in source)
    return DinoDetrConfig(
        backbone_config={
            "model_type": _backbone_type(source, name),
            "out_indices": list(range(5 - min(levels, 4), 5)),
        },
        num_feature_levels=len(source[embedding.source]),
        decoder_layers=max(_count(source, fill_key(_LAST_NORM[name], ("*", "weight"))), 1),
        share_decoder_heads=False,
        query_selection="mixed" if has_contents else "pure",
    )


_LAST_NORM = {"detrex": "transformer.decoder.layers.*.norms.2.@", "mmdet": "decoder.layers.*.norms.2.@"}


def _backbone_type(source: Mapping[str, torch.Tensor], name: str) -> str:
    prefix = "backbone.0." if name == "official" else "backbone."
    for template, backbone in OTHER_BACKBONES.items():
        if any(match_key(prefix + template, key) is not None for key in source):
            raise InputError(f"the file has the backbone {backbone}; only {_CONVERTIBLE} can be converted")
    for backbone, rules in BACKBONE_RULES.items():
        if any(match_key(rules[name][_STEM[backbone]].source, key) is not None for key in source):
            return backbone
    first = next((key for key in source if key.startswith("backbone.")), "no key")
    raise InputError(f"the file has an unknown backbone ({first}); only {_CONVERTIBLE} can be converted")


def _count(keys: Iterable[str], template: str) -> int:
    """Return one more than the largest first index among the keys that match a template."""
    found = (match_key(template, key) for key in keys)
    return max((int(parts[0]) + 1 for parts in found if parts), default=0)


def _our_shapes(source: Mapping[str, torch.Tensor], layout: DinoDetrConfig, name: str) -> dict[str, torch.Size]:
    """Return the shapes of the tensors by our keys; a tensor that will be split has its whole shape."""
    shapes: dict[str, torch.Size] = {}
    for rule in rules_for(layout, name):
        for key, tensor in source.items():
            if rule.targets and (parts := match_key(rule.source, key)) is not None:
                shapes |= {fill_key(target, parts): tensor.shape for target in rule.targets}
    return shapes


def _architecture(shapes: Mapping[str, torch.Size], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the configuration that the shapes of our tensors show.

    The numbers of heads and of points show only in their product: 8 heads are assumed unless they are `known`.
    """
    levels, d_model = shapes["model.backbone.level_embed"]
    fields: dict[str, Any] = {
        "num_feature_levels": levels,
        "d_model": d_model,
        "num_queries": _num_queries(shapes, known),
        "backbone_config": _backbone(shapes),
    }
    for part, attention in (("encoder", "self_attn"), ("decoder", "encoder_attn")):
        heads = known.get(f"{part}_attention_heads", 8)
        product = shapes[f"model.{part}.layers.0.{attention}.attention_weights.weight"][0]
        if product % (heads * levels):
            raise InputError(
                f"the {part} has {product} attention weights per query, not a multiple of {heads} heads times "
                f"{levels} levels: give the number of heads with --settings"
            )
        fields[f"{part}_attention_heads"] = heads
        fields[f"{part}_n_points"] = product // (heads * levels)
        fields[f"{part}_layers"] = _count(shapes, f"model.{part}.layers.*.mlp.fc1.weight")
        fields[f"{part}_ffn_dim"] = shapes[f"model.{part}.layers.0.mlp.fc1.weight"][0]
    return fields


def _num_queries(shapes: Mapping[str, torch.Size], known: Mapping[str, Any]) -> int:
    contents = shapes.get("model.query_selection.content_queries.weight")
    if contents is None and "num_queries" not in known:
        logger.warning("the file does not tell its number of queries: 900 are assumed, or give it with --settings")
    return contents[0] if contents is not None else 900


_BODY = "model.backbone.body"
_BLOCK_OF = {
    "resnet": f"{_BODY}.encoder.stages.{{}}.layers.*.layer.0.convolution.weight",
    "swin": f"{_BODY}.swin.encoder.layers.{{}}.blocks.*.layernorm_before.weight",
    "convnext": f"{_BODY}.encoder.stages.{{}}.layers.*.dwconv.weight",
}
_WIDTH_OF = {
    "resnet": f"{_BODY}.encoder.stages.0.layers.0.layer.2.convolution.weight",
    "swin": f"{_BODY}.swin.embeddings.patch_embeddings.projection.weight",
    "convnext": f"{_BODY}.embeddings.patch_embeddings.weight",
}
_STEM = {"resnet": 0, "swin": 0, "convnext": 5}  # index of the rule for the first layer


def _backbone(shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """Return the configuration of the backbone."""
    kind = next(kind for kind in _BLOCK_OF if _count(shapes, _BLOCK_OF[kind].format(0)))
    depths = tuple(_count(shapes, _BLOCK_OF[kind].format(stage)) for stage in range(4))
    width = shapes.get(_WIDTH_OF[kind], (0,))[0]  # a ResNet of basic blocks has no third convolution
    if (width, depths) not in SIZES[kind]:
        raise InputError(
            f"the file has a {kind} with {depths} blocks in its stages and {width or 'unknown'} channels in the "
            f"first; only {_CONVERTIBLE} can be converted"
        )
    channels = [width * 2**stage for stage in range(4)]
    projections = (shape for key, shape in shapes.items() if match_key("model.backbone.input_proj.*.0.weight", key))
    stages = sorted(channels.index(shape[1]) + 1 for shape in projections if shape[2:] == (1, 1))
    return {"model_type": kind, **_BACKBONE_FIELDS[kind](shapes, width, list(depths)), "out_indices": stages}


def _swin_fields(shapes: Mapping[str, torch.Size], width: int, depths: list[int]) -> dict[str, Any]:
    table = f"{_BODY}.swin.encoder.layers.{{}}.blocks.0.attention.relative_position_bias.relative_position_bias_table"
    window_size = (math.isqrt(shapes[table.format(0)][0]) + 1) // 2
    return {
        "image_size": {12: 384}.get(window_size, 224),  # of the pretraining; the network does not depend on it
        "embed_dim": width,
        "depths": depths,
        "num_heads": [shapes[table.format(stage)][1] for stage in range(4)],
        "window_size": window_size,
        "drop_path_rate": 0.2,
    }


_BACKBONE_FIELDS = {
    "resnet": lambda shapes, width, depths: {"depths": depths},
    "swin": _swin_fields,
    "convnext": lambda shapes, width, depths: {
        "depths": depths,
        "hidden_sizes": [width * 2**stage for stage in range(4)],
    },
}
