"""The configuration: every hyper-parameter of the DINO model and its loss, typed, documented and validated.

Paper: DINO, https://arxiv.org/abs/2203.03605. Defaults are the published ones of DINO-4scale with a ResNet-50
(IDEA-Research/DINO, config/DINO/DINO_4scale.py).
"""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN


# The three contributions of the paper, and the positional query; DINO's strategy first, then those of its ancestors.
DENOISING_NAMES = ("contrastive", "plain", "none")
QUERY_SELECTION_NAMES = ("mixed", "pure", "static")
BOX_REFINEMENT_NAMES = ("look_forward_twice", "look_forward_once")
POSITIONAL_QUERY_NAMES = ("anchor", "conditional")

UNUSED_LABEL = "N/A"  # name of labels without a category, such as the gaps in COCO's category ids

# First ResNet stage used, by number of feature levels: with four levels DINO adds one level to those of stages 2 to 4,
# and only with five levels it uses the large maps of stage 1 (DINO_5scale.py).
FIRST_RESNET_STAGE = {1: 4, 2: 3, 3: 2, 4: 2, 5: 1}


@strict
class DinoDetrConfig(PreTrainedConfig):
    r"""
    Configuration of [`DinoDetrModel`] and [`DinoDetrForObjectDetection`]. The defaults are those of DINO-4scale with a
    ResNet-50. An unknown strategy, a width that is not divisible by the number of heads or a value outside its range
    raises a `ValueError` that names the field and its allowed values; a wrong type raises a
    `StrictDataclassFieldValidationError`.

    Args:
        backbone_config (`dict`, `PreTrainedConfig` or `str`, *optional*):
            Any backbone of transformers' `AutoBackbone` (ResNet, Swin, ConvNeXt, ...). Its `out_features` are the
            finest feature levels. A string is the name of a timm model, whose last stages are used. `None` is a
            ResNet-50.
        freeze_backbone_batch_norms (`bool`, *optional*, defaults to `True`):
            Freeze the statistics and the affine parameters of the backbone's batch norms. Recommended for a
            pre-trained backbone and small batches; set it to `False` to train from scratch.
        num_feature_levels (`int`, *optional*, defaults to 4):
            Feature levels of the transformer, 1 to 5. Levels in addition to the backbone's are made by 3 x 3
            convolutions of stride 2.
        d_model (`int`, *optional*, defaults to 256):
            Width of the transformer; a multiple of 32 (group norm) and of both numbers of heads.
        encoder_layers (`int`, *optional*, defaults to 6): Encoder layers.
        encoder_ffn_dim (`int`, *optional*, defaults to 2048): Inner width of the encoder's feed-forward blocks.
        encoder_attention_heads (`int`, *optional*, defaults to 8): Heads of the encoder's attention.
        encoder_n_points (`int`, *optional*, defaults to 4): Sampling points per head and level in the encoder.
        decoder_layers (`int`, *optional*, defaults to 6): Decoder layers.
        decoder_ffn_dim (`int`, *optional*, defaults to 2048): Inner width of the decoder's feed-forward blocks.
        decoder_attention_heads (`int`, *optional*, defaults to 8): Heads of both attentions of the decoder.
        decoder_n_points (`int`, *optional*, defaults to 4): Sampling points per head and level in the decoder.
        num_queries (`int`, *optional*, defaults to 900):
            Object queries of the decoder.
        activation_function (`str`, *optional*, defaults to `"relu"`): Activation inside the feed-forward blocks.
        dropout (`float`, *optional*, defaults to 0.0): Dropout in all layers of the transformer. DINO uses none.
        positional_encoding_temperature (`float`, *optional*, defaults to 20):
            Temperature of the sine embedding of feature map cells. detrex uses 10000.
        positional_encoding_offset (`float`, *optional*, defaults to 0.0):
            Added to the row and the column of a cell, which count from 1, before they are normalized; detrex uses
            -0.5.
        share_decoder_heads (`bool`, *optional*, defaults to `True`):
            One class head and one box head for all decoder layers. `False` gives each layer its own, as in detrex's
            and mmdetection's checkpoints.
        denoising (`str`, *optional*, defaults to `"contrastive"`):
            `"contrastive"` (DINO: positive and negative noisy copies of the objects), `"plain"` (DN-DETR: positive
            copies in a fixed number of groups; the last number of a query's content tells, in inference too, if it is
            a denoising query) or `"none"`.
        query_selection (`str`, *optional*, defaults to `"mixed"`):
            Source of the object queries: `"mixed"` (DINO: positions from the best encoder tokens, contents learned),
            `"pure"` (pure query selection of the DINO paper's comparison: both from the tokens) or `"static"`
            (DAB-DETR: both learned). Two-stage Deformable DETR is none of them: it makes both halves of a query from
            the sine embedding of the proposal.
        box_refinement (`str`, *optional*, defaults to `"look_forward_twice"`):
            `"look_forward_twice"` (DINO: the box loss of a layer also reaches the layer before) or
            `"look_forward_once"` (Deformable DETR).
        positional_query (`str`, *optional*, defaults to `"anchor"`):
            `"anchor"` (DINO: the embedded box of the query) or `"conditional"` (DAB-DETR: after the first layer, that
            embedding times a scale which an MLP makes of the content).
        decoder_norm (`bool`, *optional*, defaults to `True`):
            Normalize the output of each decoder layer once more before the heads read it. Deformable DETR and the
            models built on it, DAB-Deformable-DETR and DN-Deformable-DETR, do not.
        box_prediction_epsilon (`float`, *optional*, defaults to 0.001):
            Lower bound of p and 1 - p in the logit log(p / (1 - p)) of the box that a decoder layer's prediction
            starts from. mmdetection uses 1e-5. In the logits of reference points, from layer to layer, the bound is
            1e-3 in all implementations. The difference shows only at the border of the image.
        num_ranking_labels (`int`, *optional*, defaults to 0):
            Labels besides the `num_labels` by which query selection ranks encoder tokens, but which are never
            predicted. `hf-dino convert` keeps the classes that it removes here, so that the detections of the others
            do not change.
        num_denoising (`int`, *optional*, defaults to 100):
            Maximum number of denoising queries per image (of pairs, if `"contrastive"`; per group, if `"plain"`). The
            number of contrastive groups is `num_denoising` divided by the largest object count of any image, rounded
            down, but at least 1. An image with more than `num_denoising` objects uses a random subset of them in each
            step.
        num_denoising_groups (`int`, *optional*, defaults to 5): Groups of `"plain"` denoising.
        label_noise_ratio (`float`, *optional*, defaults to 0.5):
            Noise of the classes of denoising queries, in [0, 1]. `"plain"` samples a new class with this probability,
            `"contrastive"` with half of it, each as in the code of its paper.
        box_noise_scale (`float`, *optional*, defaults to 0.4):
            λ of the box noise, as a fraction of half the width and height of the box. The training scripts of the
            official implementation pass 1.0.
        auxiliary_loss (`bool`, *optional*, defaults to `True`): Supervise every decoder layer, not only the last.
        class_cost (`float`, *optional*, defaults to 2.0): Weight of the focal cost in the matching.
        bbox_cost (`float`, *optional*, defaults to 5.0): Weight of the L1 box cost in the matching.
        giou_cost (`float`, *optional*, defaults to 2.0): Weight of the generalized-IoU cost in the matching.
        cls_loss_coefficient (`float`, *optional*, defaults to 1.0): Weight of the focal loss.
        bbox_loss_coefficient (`float`, *optional*, defaults to 5.0): Weight of the L1 box loss.
        giou_loss_coefficient (`float`, *optional*, defaults to 2.0): Weight of the generalized-IoU loss.
        focal_alpha (`float`, *optional*, defaults to 0.25): α of the focal loss and of the matching's focal cost.
        focal_gamma (`float`, *optional*, defaults to 2.0): γ of the focal loss and of the matching's focal cost.
        num_select (`int`, *optional*, defaults to 300):
            Detections kept per image in evaluation, to be passed as `top_k` to
            [`~DinoDetrImageProcessor.post_process_object_detection`].
        id2label (`dict[int, str]`, *optional*):
            Names of the labels 0, 1, 2, ...; their number is `num_labels`. `label2id` is derived from it.

    Example:

    ```python
    >>> from hf_dino import DinoDetrConfig
    >>> config = DinoDetrConfig(num_queries=300, id2label={0: "cat", 1: "dog"})
    >>> config.num_labels, config.backbone_config.model_type, config.denoising
    (2, 'resnet', 'contrastive')
    >>> DinoDetrConfig(denoising="contrast")
    Traceback (most recent call last):
    ValueError: denoising must be one of 'contrastive', 'plain', 'none', got 'contrast'

    ```
    """

    model_type = "dino_detr"
    sub_configs = {"backbone_config": AutoConfig}
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_hidden_layers": "encoder_layers",
    }
    # Trainer gathers all outputs but these over the whole evaluation set.
    keys_to_ignore_at_inference = [
        "auxiliary_outputs",
        "last_hidden_state",
        "intermediate_hidden_states",
        "init_reference_points",
        "intermediate_reference_points",
        "encoder_last_hidden_state",
        "enc_outputs_class",
        "enc_outputs_coord_logits",
    ]

    backbone_config: dict | PreTrainedConfig | str | None = None
    freeze_backbone_batch_norms: bool = True
    num_feature_levels: int = 4
    d_model: int = 256
    encoder_layers: int = 6
    encoder_ffn_dim: int = 2048
    encoder_attention_heads: int = 8
    encoder_n_points: int = 4
    decoder_layers: int = 6
    decoder_ffn_dim: int = 2048
    decoder_attention_heads: int = 8
    decoder_n_points: int = 4
    num_queries: int = 900
    activation_function: str = "relu"
    dropout: float | int = 0.0
    positional_encoding_temperature: float | int = 20
    positional_encoding_offset: float | int = 0.0
    share_decoder_heads: bool = True
    denoising: str = "contrastive"
    query_selection: str = "mixed"
    box_refinement: str = "look_forward_twice"
    positional_query: str = "anchor"
    decoder_norm: bool = True
    box_prediction_epsilon: float = 1e-3
    num_ranking_labels: int = 0
    num_denoising: int = 100
    num_denoising_groups: int = 5
    label_noise_ratio: float | int = 0.5
    box_noise_scale: float | int = 0.4
    auxiliary_loss: bool = True
    class_cost: float | int = 2.0
    bbox_cost: float | int = 5.0
    giou_cost: float | int = 2.0
    cls_loss_coefficient: float | int = 1.0
    bbox_loss_coefficient: float | int = 5.0
    giou_loss_coefficient: float | int = 2.0
    focal_alpha: float | int = 0.25
    focal_gamma: float | int = 2.0
    num_select: int = 300

    def __post_init__(self, **kwargs: Any) -> None:
        self.backbone_config = resolve_backbone_config(self.backbone_config, self.num_feature_levels)
        super().__post_init__(**kwargs)
        self.label2id = make_label2id(self.id2label)
        self.validate_architecture()  # `@strict` calls it too, but wraps the error

    def validate_architecture(self) -> None:
        """Check the strategies, the ranges of numbers, and the fields that depend on each other.

        Called by `@strict` on creation and saving, and when a model is built.

        Raises:
            ValueError: If a value is not allowed, naming the field, the value and the allowed ones.
        """
        for field, allowed in {
            "denoising": DENOISING_NAMES,
            "query_selection": QUERY_SELECTION_NAMES,
            "box_refinement": BOX_REFINEMENT_NAMES,
            "positional_query": POSITIONAL_QUERY_NAMES,
            "activation_function": tuple(ACT2FN),
        }.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {str(allowed)[1:-1]}, got {getattr(self, field)!r}")
        for field, lowest, highest in _RANGES:
            if not lowest <= getattr(self, field) <= highest or math.isinf(getattr(self, field)):
                raise ValueError(f"{field} must be between {lowest} and {highest}, got {getattr(self, field)}")
        for divisor in (32, self.encoder_attention_heads, self.decoder_attention_heads):
            if self.d_model % divisor:
                raise ValueError(
                    f"d_model must be a multiple of 32 (group norm), of encoder_attention_heads and of "
                    f"decoder_attention_heads, got d_model={self.d_model}, which {divisor} does not divide"
                )
        if self.denoising != "none" and self.num_denoising < 1:
            raise ValueError(
                f"num_denoising must be at least 1 with denoising={self.denoising!r}, got {self.num_denoising}; "
                f"to train without denoising use denoising='none'"
            )
        if self.positional_query == "conditional" and self.decoder_layers < 2:
            raise ValueError(
                f"decoder_layers must be at least 2 with positional_query='conditional', which changes the layers "
                f"after the first, got {self.decoder_layers}"
            )
        if not (self.auxiliary_loss or self.share_decoder_heads):
            raise ValueError(
                "auxiliary_loss=False with share_decoder_heads=False would leave the class heads of all decoder "
                "layers but the last untrained: set one of them to True"
            )
        if self.class_cost == self.bbox_cost == self.giou_cost == 0:
            raise ValueError("class_cost, bbox_cost and giou_cost are all 0: at least one must be positive")
        if self.num_backbone_levels > self.num_feature_levels:
            raise ValueError(
                f"num_feature_levels={self.num_feature_levels} is fewer than the {self.num_backbone_levels} feature "
                f"maps of backbone_config: raise num_feature_levels or shorten backbone_config's out_features"
            )
        if self.id2label is not None and sorted(self.id2label) != list(range(len(self.id2label))):
            raise ValueError(f"id2label must have the keys 0 to {len(self.id2label) - 1}, got {sorted(self.id2label)}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a config as transformers does, and derive `label2id` from an `id2label` passed to `from_pretrained`."""
        if kwargs.get("id2label") is not None:
            kwargs["label2id"] = make_label2id(kwargs["id2label"])
        return super().from_dict(config_dict, **kwargs)

    @property
    def num_backbone_levels(self) -> int:
        """Return the number of feature levels that come from the backbone; the neck makes the others."""
        backbone = self.backbone_config
        return len(getattr(backbone, "out_indices", None) or getattr(backbone, "out_features", None) or [-1])


def make_label2id(id2label: dict[int, str]) -> dict[str, int]:
    """Derive `label2id` from `id2label`, without unused labels, which all have the same name."""
    return {name: label for label, name in id2label.items() if name != UNUSED_LABEL}


def resolve_backbone_config(backbone_config: Any, num_feature_levels: int) -> PreTrainedConfig:
    """Return the config of a backbone given as `None`, name of a timm model, dictionary or config.

    Unlike the resolution of transformers, this never accesses the Hub.
    """
    if backbone_config is None:
        first_stage = FIRST_RESNET_STAGE.get(num_feature_levels, 2)  # `validate_architecture` reports other numbers
        return CONFIG_MAPPING["resnet"](out_features=[f"stage{stage}" for stage in range(first_stage, 5)])
    if isinstance(backbone_config, str):
        stages = 5 - FIRST_RESNET_STAGE.get(num_feature_levels, 2)
        backbone_config = {
            "model_type": "timm_backbone",
            "backbone": backbone_config,
            "out_indices": list(range(-stages, 0)),
        }
    if isinstance(backbone_config, dict):
        model_type = backbone_config.get("model_type")
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"backbone_config must have a 'model_type' that transformers knows (such as 'resnet', 'swin', "
                f"'convnext', 'timm_backbone'), got {model_type!r}"
            )
        backbone_config = CONFIG_MAPPING[model_type].from_dict(backbone_config)
    if not hasattr(backbone_config, "out_indices"):
        raise ValueError(f"backbone_config has the model_type {backbone_config.model_type!r}, which is not a backbone")
    return backbone_config


_RANGES = (
    ("num_feature_levels", 1, 5),  # at a sixth level, proposals would be 1.6 times the image, and never valid
    ("d_model", 32, math.inf),
    ("encoder_layers", 1, math.inf),
    ("encoder_ffn_dim", 1, math.inf),
    ("encoder_attention_heads", 1, math.inf),
    ("encoder_n_points", 1, math.inf),
    ("decoder_layers", 1, math.inf),
    ("decoder_ffn_dim", 1, math.inf),
    ("decoder_attention_heads", 1, math.inf),
    ("decoder_n_points", 1, math.inf),
    ("num_queries", 1, math.inf),
    ("dropout", 0, 1),
    ("positional_encoding_temperature", 1e-6, math.inf),
    ("box_prediction_epsilon", 1e-12, 0.5),
    ("num_ranking_labels", 0, math.inf),
    ("num_denoising", 0, math.inf),
    ("num_denoising_groups", 1, math.inf),
    ("label_noise_ratio", 0, 1),
    ("box_noise_scale", 0, math.inf),
    ("class_cost", 0, math.inf),
    ("bbox_cost", 0, math.inf),
    ("giou_cost", 0, math.inf),
    ("cls_loss_coefficient", 0, math.inf),
    ("bbox_loss_coefficient", 0, math.inf),
    ("giou_loss_coefficient", 0, math.inf),
    ("focal_alpha", 0, 1),
    ("focal_gamma", 0, math.inf),
    ("num_select", 1, math.inf),
)


__all__ = ["DinoDetrConfig"]
