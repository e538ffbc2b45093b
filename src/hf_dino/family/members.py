"""The family of DINO: which equation each model changes in its parent, its configuration, and its published AP.

Ancestors without deformable attention, and Deformable DETR, are classes of transformers, except DN-DETR. From
DAB-Deformable-DETR on, each model is [`DinoDetrForObjectDetection`] with a few fields of its configuration changed.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling_dino_detr import DinoDetrForObjectDetection
from .dn_detr import DnDetrForObjectDetection
from .initialization import initialize_as_authors, rules_of


_OURS: dict[str, type[PreTrainedModel]] = {
    ours.__name__: ours for ours in (DinoDetrForObjectDetection, DnDetrForObjectDetection)
}


@dataclass(frozen=True)
class FamilyMember:
    """A model of the family.

    Args:
        name (`str`): Its name in the paper.
        paper (`str`): Address of the paper.
        parent (`str`, *optional*): Key in [`FAMILY`] of the model that it changes.
        change (`str`): The change, in one sentence.
        equation (`str`): The change as an equation. c is the content of a query, b its box, m a token of the memory,
            PE the sine embedding, σ the sigmoid, ⊙ the product of elements, sg the identity without a gradient.
        config (`dict`): Fields of the configuration that differ from the defaults of the class.
        published_ap (`dict[int, float]`): Published AP on COCO val2017 with a ResNet-50, as a fraction of 1, by number
            of epochs; empty if the paper's model differs from this one in more than the change.
        model_class (`str`): Class of the model, here or in transformers.
    """

    name: str
    paper: str
    parent: str | None
    change: str
    equation: str
    config: Mapping[str, Any] = field(default_factory=dict)
    published_ap: Mapping[int, float] = field(default_factory=dict)
    model_class: str = DinoDetrForObjectDetection.__name__

    @property
    def _class(self) -> type[PreTrainedModel]:
        return _OURS.get(self.model_class) or getattr(transformers, self.model_class)

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        """Class of its configuration."""
        config_class = self._class.config_class
        assert config_class is not None
        return config_class

    def make_config(self, **overrides: Any) -> PreTrainedConfig:
        """Make its configuration.

        Args:
            **overrides: Fields to change, such as sizes.
        """
        return self.config_class(**{**self.config, **overrides})

    def make_model(self, **overrides: Any) -> PreTrainedModel:
        """Build the model with random weights, as initialized by its authors.

        Args:
            **overrides: Fields of the configuration to change, such as sizes.
        """
        model = self._class(self.make_config(**overrides))
        initialize_as_authors(model, rules_of(model.config))
        return model


_DETR = "https://arxiv.org/abs/2005.12872"
_CONDITIONAL_DETR = "https://arxiv.org/abs/2108.06152"
_DEFORMABLE_DETR = "https://arxiv.org/abs/2010.04159"
_DAB_DETR = "https://arxiv.org/abs/2201.12329"
_DN_DETR = "https://arxiv.org/abs/2203.01305"
_DINO = "https://arxiv.org/abs/2203.03605"

# As in the papers, all decoder layers are trained. The default of transformers is the last one only.
_ALL_LAYERS = {"auxiliary_loss": True}
# The authors' layers have dropout in the feed-forward network and on attention weights too.
_DROPOUT = {"activation_dropout": 0.1, "attention_dropout": 0.1}
_DENSE = {**_ALL_LAYERS, **_DROPOUT}
_DEFORMABLE = {**_ALL_LAYERS, **_DROPOUT, "class_cost": 2}
# DAB-DETR's code has no dropout, and its class heads begin with this probability of each class.
_DAB = {**_ALL_LAYERS, "dropout": 0.0, "initializer_bias_prior_prob": 0.01}
_DAB_DEFORMABLE = {
    "num_queries": 300,
    "num_select": 100,
    "share_decoder_heads": False,
    "positional_encoding_temperature": 10000,
    "positional_encoding_offset": -0.5,
    "denoising": "none",
    "query_selection": "static",
    "box_refinement": "look_forward_once",
    "positional_query": "conditional",
    "decoder_norm": False,
}

FAMILY: dict[str, FamilyMember] = {
    "detr": FamilyMember(
        name="DETR",
        paper=_DETR,
        parent=None,
        change="Detection is the prediction of a set: each object is matched to one query, and nothing is suppressed.",
        equation="loss = min over permutations π of Σᵢ loss(objectᵢ, prediction_π(i))",
        config=_DENSE,
        published_ap={500: 0.420},
        model_class="DetrForObjectDetection",
    ),
    "conditional_detr": FamilyMember(
        name="Conditional DETR",
        paper=_CONDITIONAL_DETR,
        parent="detr",
        change="The positional query of cross-attention is the embedded reference point, scaled by the content.",
        equation="query = [c, MLP(c) ⊙ PE(x, y)]",
        config=_DENSE,
        published_ap={108: 0.430},
        model_class="ConditionalDetrForObjectDetection",
    ),
    "dab_detr": FamilyMember(
        name="DAB-DETR",
        paper=_DAB_DETR,
        parent="conditional_detr",
        change="The reference point becomes an anchor box, which every layer moves and whose size shapes attention.",
        equation="query = [c, MLP(c) ⊙ PE(b)], b' = σ(Δb + σ⁻¹(b))",
        config=_DAB,
        published_ap={50: 0.422},
        model_class="DabDetrForObjectDetection",
    ),
    "dn_detr": FamilyMember(
        name="DN-DETR",
        paper=_DN_DETR,
        parent="dab_detr",
        change="In training, the decoder also restores noisy copies of the objects, for which no matching is needed.",
        equation="loss += mean over groups of Σᵢ loss(objectᵢ, decode(objectᵢ + noise))",
        published_ap={50: 0.441},
        model_class=DnDetrForObjectDetection.__name__,
    ),
    "deformable_detr": FamilyMember(
        name="Deformable DETR",
        paper=_DEFORMABLE_DETR,
        parent="detr",
        change="Attention samples a few points around a reference point p on all levels instead of all cells of one.",
        equation="attention(c, p) = Σ over heads, levels l and points k of aₗₖ · W m(p + Δpₗₖ)",
        config=_DEFORMABLE,
        published_ap={50: 0.438},
        model_class="DeformableDetrForObjectDetection",
    ),
    "deformable_detr_refine": FamilyMember(
        name="Deformable DETR, iterative bounding box refinement",
        paper=_DEFORMABLE_DETR,
        parent="deformable_detr",
        change="Each decoder layer refines the box of the layer before.",
        equation="b' = σ(Δb + σ⁻¹(sg(b)))",
        config={**_DEFORMABLE, "with_box_refine": True},
        published_ap={50: 0.454},
        model_class="DeformableDetrForObjectDetection",
    ),
    "deformable_detr_two_stage": FamilyMember(
        name="Deformable DETR, two-stage",
        paper=_DEFORMABLE_DETR,
        parent="deformable_detr_refine",
        change="The queries are made of the boxes that the best encoder tokens predict.",
        equation="(c, position) = W PE(b), b = σ(Δb(m) + σ⁻¹(proposal)) of the tokens m with the best scores",
        config={**_DEFORMABLE, "with_box_refine": True, "two_stage": True},
        published_ap={50: 0.462},
        model_class="DeformableDetrForObjectDetection",
    ),
    "dab_deformable_detr": FamilyMember(
        name="DAB-Deformable-DETR",
        paper=_DAB_DETR,
        parent="deformable_detr_refine",
        change="A query is a learned anchor box and a learned content, which scales the embedded box.",
        equation="query = c + MLP(c) ⊙ MLP(PE(b))",
        config=_DAB_DEFORMABLE,
        published_ap={50: 0.469},
    ),
    "dn_deformable_detr": FamilyMember(
        name="DN-Deformable-DETR",
        paper=_DN_DETR,
        parent="dab_deformable_detr",
        change="In training, the decoder also restores noisy copies of the objects, for which no matching is needed.",
        equation="loss += mean over groups of Σᵢ loss(objectᵢ, decode(objectᵢ + noise))",
        config={**_DAB_DEFORMABLE, "denoising": "plain", "label_noise_ratio": 0.2},
        published_ap={12: 0.434, 50: 0.486},
    ),
    "dino_pure": FamilyMember(
        name="DINO's ablation: pure query selection",
        paper=_DINO,
        parent="dn_deformable_detr",
        change="The best encoder tokens are the contents of the queries, and the boxes they predict the anchors.",
        equation="c = sg(m), b = σ(Δb(m) + σ⁻¹(proposal)) of the tokens m with the best scores",
        config={"denoising": "plain", "query_selection": "pure", "box_refinement": "look_forward_once"},
    ),
    "dino_mixed": FamilyMember(
        name="DINO's ablation: mixed query selection",
        paper=_DINO,
        parent="dino_pure",
        change="The contents are learned, because a token may cover several objects or a part of one.",
        equation="c is learned, b = σ(Δb(m) + σ⁻¹(proposal)) of the tokens m with the best scores",
        config={"denoising": "plain", "box_refinement": "look_forward_once"},
    ),
    "dino_look_forward_twice": FamilyMember(
        name="DINO's ablation: look forward twice",
        paper=_DINO,
        parent="dino_mixed",
        change="The box loss of a layer also reaches the layer before, whose box it starts from.",
        equation="prediction = σ(Δb + σ⁻¹(b)), with the gradient of b",
        config={"denoising": "plain"},
    ),
    "dino_4scale": FamilyMember(
        name="DINO-4scale",
        paper=_DINO,
        parent="dino_look_forward_twice",
        change="For each noisy copy of an object there is one with more noise, which is trained to be no object.",
        equation="|noise| < λ: the object; λ < |noise| < 2 λ: no object",
        published_ap={12: 0.490, 24: 0.504, 36: 0.509},
    ),
    "dino_5scale": FamilyMember(
        name="DINO-5scale",
        paper=_DINO,
        parent="dino_4scale",
        change="The transformer also reads the maps of the backbone's first stage.",
        equation="strides of the levels: 4, 8, 16, 32, 64",
        config={"num_feature_levels": 5},
        published_ap={12: 0.494, 24: 0.513, 36: 0.512},
    ),
}


_TINY_STAGES = {"hidden_sizes": [24, 48, 96, 192], "depths": [1, 1, 2, 1]}
_TINY = {
    "encoder_layers": 2,
    "encoder_ffn_dim": 256,
    "encoder_attention_heads": 4,
    "decoder_layers": 3,
    "decoder_ffn_dim": 256,
    "decoder_attention_heads": 4,
    "num_queries": 60,
    "dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "d_model": 128,
}
_TINY_BY_CLASS: dict[str, dict[str, Any]] = {
    "DeformableDetrForObjectDetection": {"two_stage_num_proposals": 60},
    DnDetrForObjectDetection.__name__: {"num_denoising": 40, "cls_loss_coefficient": 2.0},
    DinoDetrForObjectDetection.__name__: {"num_denoising": 40, "num_select": 100, "cls_loss_coefficient": 2.0},
}


def tiny_fields(key: str) -> dict[str, Any]:
    """Return the fields that make a model of the family small enough to train on a CPU in minutes.

    All rows have a small ConvNeXt as backbone, because transformers' ancestors of DINO freeze the batch norms of a
    ResNet, with which none can be trained from random weights. The finest map that rows read has a stride of 16, but
    for DINO-5scale, which reads one more map than the others.

    Args:
        key (`str`): A key of [`FAMILY`].
    """
    member = FAMILY[key]
    names = {each.name for each in dataclasses.fields(member.config_class)}
    num_levels = member.config.get("num_feature_levels", 4) - 1 if "num_feature_levels" in names else 1
    fields = {**_TINY, "num_feature_levels": num_levels, **_TINY_BY_CLASS.get(member.model_class, {})}
    if "d_model" not in names:
        fields["hidden_size"] = fields["d_model"]
    fields = {name: value for name, value in fields.items() if name in names}
    return {**fields, "backbone_config": _tiny_backbone(num_levels)}


def _tiny_backbone(num_levels: int) -> dict[str, Any]:
    """Return a ConvNeXt whose last maps are those of the levels but one, or with a stride of 16 for a single level."""
    last = 4 if num_levels > 1 else 3
    stages = [f"stage{stage}" for stage in range(1, last + 1)]
    sizes = {name: values[:last] for name, values in _TINY_STAGES.items()}
    return {"model_type": "convnext", "num_stages": last, **sizes, "out_features": stages[-max(1, num_levels - 1) :]}


_CHOICES = (
    "denoising", "query_selection", "box_refinement", "positional_query", "decoder_norm",
    "with_box_refine", "two_stage",
)  # fmt: skip
"""Fields that tell the rows of one class apart, but for the sizes of DINO."""


def member_of(config: PreTrainedConfig) -> FamilyMember | None:
    """Return the model of the family that a configuration describes, whatever its sizes; `None` for any other.

    Example:

    ```python
    >>> from transformers import DeformableDetrConfig
    >>> member_of(DeformableDetrConfig(with_box_refine=True)).name
    'Deformable DETR, iterative bounding box refinement'

    ```
    """

    def choices(of: PreTrainedConfig) -> list[Any]:
        return [getattr(of, name, None) for name in _CHOICES]

    of_this_type = (each for each in FAMILY.values() if each.config_class is type(config))
    return next((each for each in of_this_type if choices(each.make_config()) == choices(config)), None)
