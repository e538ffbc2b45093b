"""Write a model as a checkpoint that the official code, detrex, mmdetection or code of an ancestor loads strictly.

The tables of the conversion are read backwards. Before anything is written, the new file is read as the conversion
would read it: what the model has and the format does not say is an error.
"""

import argparse
import logging
import pprint
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..backbone_weights import fill_key, match_key
from ..configuration_dino_detr import DinoDetrConfig
from ..hub import load_model_and_processor
from ..image_processing_dino_detr import LONGEST_EDGE, SHORTEST_EDGE, DinoDetrImageProcessor
from ..utils.errors import InputError, summarize_list
from ..utils.io import atomic_write, ensure_new_files
from .checkpoint import Source
from .convert import UNUSED_WEIGHTS, config_and_processor
from .key_tables import ANCESTORS, CODE_BASES, DENOISING, LABEL_EMBEDDING, Fill, Rule, fills_for, rules_for
from .settings import BACKBONES, LOSSES, OFFICIAL_STRATEGIES, SETTING_OF_FIELD, SUPPORTED_VALUES, flatten


logger = logging.getLogger(__name__)

# Fields that change only the training. Some formats do not store them, so they may differ from the model's.
TRAINING_FIELDS = (
    *("freeze_backbone_batch_norms", "dropout", "num_denoising", "num_denoising_groups", "label_noise_ratio"),
    "box_noise_scale",
    *("auxiliary_loss", "class_cost", "bbox_cost", "giou_cost", "cls_loss_coefficient", "bbox_loss_coefficient"),
    *("giou_loss_coefficient", "focal_alpha", "focal_gamma", "num_select"),
    "share_decoder_heads",  # formats that cannot share have copies of the heads
)
# Fields of a backbone's configuration that do not change what it computes outside training.
_IGNORED_OF_BACKBONE = {"drop_path_rate", "image_size", "dtype", "torch_dtype", "out_features", "transformers_version"}


def export_checkpoint(model: str, output: Path, name: str) -> None:
    """Write a model in the format of another code base.

    Args:
        model (`str`): Directory or Hub name of the model.
        output (`Path`): The file to write, which must not exist. It appears complete or not at all.
        name (`str`): The format: `"official"`, `"detrex"`, `"mmdet"`, `"dab_deformable"` or `"dn_deformable"`.

    Raises:
        InputError: If the model cannot be expressed in the format, or the file exists.

    Example:

    ```python
    >>> from hf_dino.conversion import export_checkpoint

    >>> export_checkpoint("runs/mine", Path("mine.pth"), "mmdet")  # doctest: +SKIP

    ```
    """
    if name not in CODE_BASES:
        raise InputError(f"--to {name}: must be {', '.join(CODE_BASES)}")
    ensure_new_files(output)
    detector, processor = load_model_and_processor(model)
    _check_normalization(processor)
    unused = Path(model) / UNUSED_WEIGHTS
    content = checkpoint_content(
        detector.state_dict(),
        detector.config,
        name,
        size=dict(processor.size),
        unused=load_file(unused) if unused.is_file() else {},
    )
    with atomic_write(output) as temporary:
        torch.save(content, temporary)
    tensors = content["state_dict" if name == "mmdet" else "model"]
    logger.info("wrote %s: %d tensors in the format of %s", output, len(tensors), CODE_BASES[name])
    if name == "detrex":
        changed = _detrex_overrides(detector.config)
        logger.info("detrex reads no settings from the file; set in its configuration: %s", changed)


def _check_normalization(processor: Any) -> None:
    """Check that images are normalized as all code bases do."""
    usual = DinoDetrImageProcessor()
    for field in ("image_mean", "image_std", "do_rescale", "do_normalize"):
        ours, theirs = _as_list(getattr(processor, field)), _as_list(getattr(usual, field))
        if ours != theirs:
            raise InputError(f"no format can express the image processor's {field}={ours!r}, only {theirs!r}")


def checkpoint_content(
    state_dict: Mapping[str, torch.Tensor],
    config: DinoDetrConfig,
    name: str,
    size: Mapping[str, int],
    unused: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    """Return what the file of a code base contains for a model.

    Args:
        state_dict (`dict[str, torch.Tensor]`): The weights.
        config (`DinoDetrConfig`): The configuration.
        name (`str`): One of `key_tables.FORMATS` or `ANCESTORS`.
        size (`dict[str, int]`): Size of the image processor, in pixels.
        unused (`dict[str, torch.Tensor]`): Rows of the label embedding that the model never reads, by their key in the
            file that it was converted from.

    Raises:
        InputError: If the format cannot express the model.
    """
    _check_expressible(config, name)
    tensors = export_state_dict(state_dict, config, name, unused.get(LABEL_EMBEDDING[name]))
    settings = settings_of(config, name, size)
    class_names = [config.id2label[label] for label in range(config.num_labels)]
    source = Source(name, "", dict(tensors), settings if name in _STORES_ARGS else nest(settings), class_names)
    rebuilt, processor = config_and_processor(source)
    _check_same(config, rebuilt, name)
    if dict(processor.size) != dict(size):
        logger.warning("%s does not store the image size %s", CODE_BASES[name], dict(size))
    if rebuilt.id2label != config.id2label:
        logger.warning(
            "%s does not store the names of the classes; config.json of the model has them", CODE_BASES[name]
        )
    return _CONTENTS[name](tensors, settings, class_names)


def _official_content(
    tensors: Mapping[str, torch.Tensor], settings: dict[str, Any], class_names: list[str]
) -> dict[str, Any]:
    return {"model": tensors, "args": argparse.Namespace(**settings)}


def _detrex_content(
    tensors: Mapping[str, torch.Tensor], settings: dict[str, Any], class_names: list[str]
) -> dict[str, Any]:
    """Return what detectron2's checkpointer reads, and for the conversion what it ignores: settings and names."""
    return {"model": tensors, "config": nest(settings), "metadata": {"thing_classes": class_names}}


def _mmdet_content(
    tensors: Mapping[str, torch.Tensor], settings: dict[str, Any], class_names: list[str]
) -> dict[str, Any]:
    text = "".join(f"{key} = {pprint.pformat(value)}\n" for key, value in _mmdet_nested(settings).items())
    return {"meta": {"cfg": text, "dataset_meta": {"classes": tuple(class_names)}}, "state_dict": tensors}


_STORES_ARGS = ("official", *ANCESTORS)
_CONTENTS = {
    **dict.fromkeys(_STORES_ARGS, _official_content),
    "detrex": _detrex_content,
    "mmdet": _mmdet_content,
}


def _mmdet_nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings; the costs of the matching are a list there, each with its type."""
    nested = nest(settings)
    assigner = nested["model"]["train_cfg"]["assigner"]
    assigner["match_costs"] = [{"type": cost, **fields} for cost, fields in assigner["match_costs"].items()]
    return nested


def _detrex_overrides(config: DinoDetrConfig) -> str:
    embedding = ("positional_encoding_temperature", "positional_encoding_offset")
    paths = SETTING_OF_FIELD["detrex"]
    values = {paths[field]: getattr(config, field) for field in embedding} | {"model.num_classes": config.num_labels}
    return " ".join(f"{path}={value}" for path, value in values.items())


def _check_expressible(config: DinoDetrConfig, name: str) -> None:
    """Check what the tables and the settings of a format cannot show."""
    problems = []
    if config.num_ranking_labels:
        problems.append(
            f"num_ranking_labels={config.num_ranking_labels} (classes were removed with --coco80 or --keep_classes; "
            f"export a model with all its classes)"
        )
    if name in _STORES_ARGS and official_backbone(config) is None:
        backbone: Any = config.backbone_config
        problems.append(f"a {backbone.model_type} backbone that the official code does not have")
    if config.denoising not in DENOISING[name]:
        problems.append(f"denoising={config.denoising!r}")
    if problems:
        raise InputError(f"{CODE_BASES[name]} cannot express {'; '.join(problems)}")


def _check_same(config: DinoDetrConfig, rebuilt: DinoDetrConfig, name: str) -> None:
    """Compare the configuration that the new file gives with the model's."""
    ours, theirs = _comparable(config), _comparable(rebuilt)
    different = [field for field in ours if ours[field] != theirs[field]]
    refused = [
        f"{field}={ours[field]!r} (only {theirs[field]!r})" for field in different if field not in TRAINING_FIELDS
    ]
    if refused:
        raise InputError(f"{CODE_BASES[name]} cannot express {summarize_list(refused)}")
    if different:
        logger.warning(
            "%s does not store %s, which only matters for further training",
            CODE_BASES[name],
            summarize_list((f"{field}={ours[field]!r}" for field in different), 20),
        )


def _comparable(config: DinoDetrConfig) -> dict[str, Any]:
    """Return the fields of a configuration that the formats store or imply."""
    own = {field: getattr(config, field) for field in DinoDetrConfig.__annotations__ if field != "model_type"}
    backbone = own.pop("backbone_config")
    inner = {key: value for key, value in backbone.to_dict().items() if key not in _IGNORED_OF_BACKBONE}
    flat = flatten({f"backbone_config.{key}": value for key, value in inner.items()})
    return {**own, "num_labels": config.num_labels, **flat}


def export_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    config: DinoDetrConfig,
    name: str,
    unused_rows: torch.Tensor | None = None,
) -> "OrderedDict[str, torch.Tensor]":
    """Return the tensors of a model by the keys of a format.

    Args:
        state_dict (`dict[str, torch.Tensor]`): The weights.
        config (`DinoDetrConfig`): The configuration.
        name (`str`): One of `key_tables.FORMATS` or `ANCESTORS`.
        unused_rows (`torch.Tensor`, *optional*): Rows of the label embedding that no class uses, which the official
            code has one of; by default zeros.

    Raises:
        InputError: If the format has no place for a tensor.
    """
    state_dict = _with_heads_per_layer(state_dict, config) if name != "official" else state_dict
    rules = rules_for(config, name)
    exported: OrderedDict[str, torch.Tensor] = OrderedDict()
    remaining = _without_fills(state_dict, fills_for(config, name), name)
    for rule in rules:
        if rule.targets:
            exported.update(_reverse(rule, remaining))
    if remaining:
        raise InputError(f"{CODE_BASES[name]} has no place for {summarize_list(sorted(remaining))}")
    _add_label_rows(exported, config, name, unused_rows)
    for rule in rules:
        exported.update(_copies(rule, exported, config))
    return exported


def _with_heads_per_layer(state_dict: Mapping[str, torch.Tensor], config: DinoDetrConfig) -> dict[str, torch.Tensor]:
    """Give every decoder layer the shared heads, which formats without sharing compute the same from."""
    heads = ("class_embed.*.@", "model.decoder.bbox_embed.*.layers.*.@")
    copies = {
        fill_key(template, (str(layer), *parts[1:])): tensor
        for template in heads
        for key, tensor in state_dict.items()
        if config.share_decoder_heads and (parts := match_key(template, key)) is not None
        for layer in range(config.decoder_layers)
    }
    return {**state_dict, **copies}


def _reverse(rule: Rule, remaining: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return their tensors that a rule makes ours from, and take ours out of `remaining`."""
    first = rule.targets[0]
    made = {}
    for parts in [found for key in remaining if (found := match_key(first, key)) is not None]:
        tensors = [remaining.pop(fill_key(target, parts)) for target in rule.targets]
        whole = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        made[fill_key(rule.source, parts)] = rule.reorder[1](whole) if rule.reorder else whole
    return made


def _without_fills(
    state_dict: Mapping[str, torch.Tensor], fills: tuple[Fill, ...], name: str
) -> dict[str, torch.Tensor]:
    """Take out what the format takes for granted, and check that it is."""
    remaining = dict(state_dict)
    for fill in fills:
        for key in [key for key in remaining if match_key(fill.target, key) is not None]:
            if bool((remaining.pop(key) != fill.value).any()) and fill.used:
                raise InputError(f"{CODE_BASES[name]} cannot express {key}, which is not {fill.value}: {fill.reason}")
    return remaining


def _add_label_rows(
    exported: dict[str, torch.Tensor], config: DinoDetrConfig, name: str, unused_rows: torch.Tensor | None
) -> None:
    """Add the row of the label embedding that the official code and DN-DETR's have for no class."""
    if name not in ("official", "dn_deformable"):
        return
    key = LABEL_EMBEDDING[name]
    rows = exported.get(key, torch.empty(0, config.d_model))
    if unused_rows is None or len(rows) + len(unused_rows) <= config.num_labels:
        unused_rows = rows.new_zeros(config.num_labels + 1 - len(rows), rows.shape[1])
    exported[key] = torch.cat([rows, unused_rows])


def _copies(rule: Rule, exported: Mapping[str, torch.Tensor], config: DinoDetrConfig) -> dict[str, torch.Tensor]:
    """Return the tensors that a rule drops because they are copies of others, or computed from them."""
    if rule.computed_from:
        template, compute = rule.computed_from
        found = _matching(template, exported)
        return {fill_key(rule.source, parts): compute(tensor) for parts, tensor in found}
    if not rule.equals:
        return {}
    layers = [(str(layer),) for layer in range(1, config.decoder_layers)] if "#" in rule.source else [()]
    found = _matching(rule.equals, exported)
    return {fill_key(rule.source, (*layer, *parts)): tensor for parts, tensor in found for layer in layers}


def _matching(template: str, tensors: Mapping[str, torch.Tensor]) -> list[tuple[tuple[str, ...], torch.Tensor]]:
    return [(parts, tensor) for key, tensor in tensors.items() if (parts := match_key(template, key)) is not None]


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Invert [`~settings.flatten`], but for lists.

    Example:

    ```python
    >>> nest({"head.weight": 2, "head.costs.iou": 1})
    {'head': {'weight': 2, 'costs': {'iou': 1}}}

    ```
    """
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    return nested


def official_backbone(config: DinoDetrConfig) -> str | None:
    """Return the official name of a backbone, if it has one."""
    backbone: Any = config.backbone_config
    return next((name for name, fields in BACKBONES.items() if _has(backbone, fields)), None)


def _has(backbone: Any, fields: Mapping[str, Any]) -> bool:
    compared = fields.keys() - {"drop_path_rate"}  # for training alone
    return all(_as_list(getattr(backbone, field, None)) == fields[field] for field in compared)


def _as_list(value: Any) -> Any:
    """Return a tuple as a list, and anything else as it is."""
    return list(value) if isinstance(value, tuple) else value


def settings_of(config: DinoDetrConfig, name: str, size: Mapping[str, int]) -> dict[str, Any]:
    """Return the flat settings with which a code base describes a model, as far as it can.

    Args:
        config (`DinoDetrConfig`): The model's configuration.
        name (`str`): One of `key_tables.FORMATS` or `ANCESTORS`.
        size (`dict[str, int]`): Size of the image processor, in pixels.
    """
    settings = {setting: values[0] for setting, values in SUPPORTED_VALUES[name].items()}
    settings |= {setting: getattr(config, field) for field, setting in SETTING_OF_FIELD[name].items()}
    if name == "detrex":
        return {**settings, "model.num_classes": config.num_labels}
    if name in ANCESTORS:
        return {**settings, "backbone": official_backbone(config)}
    if name == "mmdet":
        del settings["model.backbone.style"]
        pipeline = {"test_pipeline": [{"type": "LoadImageFromFile"}, _resize(size), {"type": "PackDetInputs"}]}
        return settings | pipeline | {f"model.{path}": value for path, value in _mmdet_modules(config).items()}
    backbone: Any = config.backbone_config
    settings["embed_init_tgt"] = True  # means nothing without two stages
    for field, strategies in OFFICIAL_STRATEGIES.items():
        settings |= strategies[getattr(config, field)]
    return settings | {
        "backbone": official_backbone(config),
        "return_interm_indices": [index - 1 for index in backbone.out_indices],
        "pe_temperatureW": config.positional_encoding_temperature,
        "dec_pred_bbox_embed_share": config.share_decoder_heads,
        "use_dn": config.denoising != "none",
        "num_classes": config.num_labels,
        "dn_labelbook_size": config.num_labels,
        "data_aug_scales": [size.get("shortest_edge", SHORTEST_EDGE)],
        "data_aug_max_size": size.get("longest_edge", LONGEST_EDGE),
        "data_aug_scale_overlap": None,
    }


def _resize(size: Mapping[str, int]) -> dict[str, Any]:
    """Return mmdetection's step that resizes images; its scale is (width, height)."""
    keep_ratio = "longest_edge" in size
    scale = [size["longest_edge"], size["shortest_edge"]] if keep_ratio else [size["width"], size["height"]]
    return {"type": "Resize", "scale": scale, "keep_ratio": keep_ratio}


# Settings of mmdetection's DINO that are the same for every model that the format can express.
_MMDET_CONSTANTS = {
    "data_preprocessor.type": "DetDataPreprocessor",
    "data_preprocessor.pad_size_divisor": 1,
    "neck.type": "ChannelMapper",
    "neck.kernel_size": 1,
    "neck.act_cfg": None,
    "neck.norm_cfg.type": "GN",
    "decoder.return_intermediate": True,
    "decoder.post_norm_cfg": None,
    "bbox_head.sync_cls_avg_factor": True,
    **{setting.removeprefix("model."): loss for setting, loss in LOSSES.items()},
    "dn_cfg.group_cfg.dynamic": True,
    "dn_cfg.group_cfg.num_groups": None,
    "train_cfg.assigner.type": "HungarianAssigner",
    "train_cfg.assigner.match_costs.BBoxL1Cost.box_format": "xywh",
    "train_cfg.assigner.match_costs.IoUCost.iou_mode": "giou",
}


def _mmdet_modules(config: DinoDetrConfig) -> dict[str, Any]:
    """Return the flat settings of mmdetection's modules that do not stand for a field of `DinoDetrConfig` alone."""
    width, levels = config.d_model, config.num_feature_levels
    backbone, channels = _mmdet_backbone(config)
    deformable = {"embed_dims": width, "num_levels": levels, "dropout": config.dropout}
    encoder = {**deformable, "num_points": config.encoder_n_points}
    decoder = {**deformable, "num_points": config.decoder_n_points, "num_heads": config.decoder_attention_heads}
    modules = {
        "backbone": backbone,
        "neck": {"in_channels": channels, "out_channels": width, "num_outs": levels},
        "encoder.layer_cfg.self_attn_cfg": encoder,
        "encoder.layer_cfg.ffn_cfg": {"embed_dims": width},
        "decoder.layer_cfg.self_attn_cfg": {"embed_dims": width, "dropout": config.dropout},
        "decoder.layer_cfg.cross_attn_cfg": decoder,
        "decoder.layer_cfg.ffn_cfg": {"embed_dims": width, "ffn_drop": config.dropout},
        "positional_encoding": {"num_feats": width // 2},
        "bbox_head": {"num_classes": config.num_labels},
    }
    flat = {f"{module}.{name}": value for module, fields in modules.items() for name, value in fields.items()}
    return {**_MMDET_CONSTANTS, **flat}


def _mmdet_backbone(config: DinoDetrConfig) -> tuple[dict[str, Any], list[int]]:
    """Return the settings of the backbone, and the channels of its outputs."""
    backbone: Any = config.backbone_config
    stages = [index - 1 for index in backbone.out_indices]
    sizes = {
        "resnet": lambda: {"type": "ResNet", "depth": 3 * sum(backbone.depths) + 2, "style": "pytorch"},
        "swin": lambda: {
            "type": "SwinTransformer",
            "pretrain_img_size": backbone.image_size,
            "embed_dims": backbone.embed_dim,
            "depths": list(backbone.depths),
            "num_heads": list(backbone.num_heads),
            "window_size": backbone.window_size,
            "drop_path_rate": backbone.drop_path_rate,
        },
        "convnext": lambda: {
            "type": "mmpretrain.ConvNeXt",
            "arch": {"depths": list(backbone.depths), "channels": list(backbone.hidden_sizes)},
            "gap_before_final_norm": False,
        },
    }
    width = getattr(backbone, "embed_dim", None) or backbone.hidden_sizes[0]
    fields = sizes[backbone.model_type]()
    return {**fields, "out_indices": stages}, [width * 2**stage for stage in stages]
