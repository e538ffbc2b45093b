"""DINO: backbone, encoder, query selection, denoising, decoder with box refinement, heads.

Paper: DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object Detection,
https://arxiv.org/abs/2203.03605, figure 2.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .backbone_dino_detr import DinoDetrBackbone, DinoDetrFeatureLevels, backbone_attn_implementation, cell_centers
from .boxes_dino_detr import (
    DinoDetrMLPPredictionHead,
    at_least_float32,
    inverse_sigmoid,
    make_bbox_head,
    make_class_head,
    sine_box_embedding,
)
from .configuration_dino_detr import DinoDetrConfig
from .deformable_attention_dino_detr import DinoDetrMultiscaleDeformableAttention
from .denoising_dino_detr import (
    DENOISING_STRATEGIES,
    DinoDetrDenoisingQueries,
    DinoDetrEffectiveBatch,
    denoising_attention_mask,
)
from .initialization_dino_detr import init_as, initialize
from .loss_dino_detr import check_labels, dino_detr_loss, get_num_boxes
from .query_selection_dino_detr import QUERY_SELECTIONS, DinoDetrObjectQueries


@dataclass
class DinoDetrEncoderOutput(ModelOutput):
    r"""
    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, sequence_length, d_model)`): The memory.
        hidden_states (`tuple[torch.Tensor]`, *optional*): Input of the first layer and output of each.
        attentions (`tuple[torch.Tensor]`, *optional*):
            Of each layer, `(batch_size, sequence_length, num_heads, num_feature_levels, num_points)`.
    """

    last_hidden_state: torch.Tensor = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class DinoDetrDecoderOutput(ModelOutput):
    r"""
    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, num_queries, d_model)`): Normed, of the last layer.
        intermediate_hidden_states (`torch.Tensor` of shape `(batch_size, decoder_layers, num_queries, d_model)`):
            Normed output of each layer.
        intermediate_boxes (`torch.Tensor` of shape `(batch_size, decoder_layers, num_queries, 4)`):
            The boxes that each layer predicts: center x, center y, width, height, fractions of the unpadded image.
        intermediate_reference_points (`torch.Tensor` of shape `(batch_size, decoder_layers, num_queries, 4)`):
            The boxes that each layer hands to the next one to look around; same units.
        hidden_states, attentions, cross_attentions (`tuple[torch.Tensor]`, *optional*):
            Input of the first layer and output of each; weights of self-attention, `(batch_size, num_heads,
            num_queries, num_queries)`, and of deformable attention.
    """

    last_hidden_state: torch.Tensor = None
    intermediate_hidden_states: torch.Tensor = None
    intermediate_boxes: torch.Tensor = None
    intermediate_reference_points: torch.Tensor = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class DinoDetrDenoisingOutput(ModelOutput):
    r"""
    What the decoder made of the denoising queries, for the loss alone.

    Args:
        intermediate_hidden_states (`torch.Tensor` of shape `(batch_size, decoder_layers, num_queries, d_model)`)
        intermediate_boxes (`torch.Tensor` of shape `(batch_size, decoder_layers, num_queries, 4)`)
        object_index (`torch.Tensor` of shape `(batch_size, num_queries)`): See [`DinoDetrDenoisingQueries`].
        num_groups (`int`): How often each object was copied.
    """

    intermediate_hidden_states: torch.Tensor = None
    intermediate_boxes: torch.Tensor = None
    object_index: torch.Tensor = None
    num_groups: int | None = None


@dataclass
class DinoDetrModelOutput(ModelOutput):
    r"""
    Of the matching queries only; what became of denoising queries is apart, in `denoising`.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, num_queries, d_model)`): Decoder output.
        intermediate_hidden_states (`torch.Tensor` of shape `(batch_size, decoder_layers, num_queries, d_model)`):
            Output of each decoder layer.
        intermediate_boxes (`torch.Tensor` of shape `(batch_size, decoder_layers, num_queries, 4)`):
            Boxes predicted by each layer: center x, center y, width, height, fractions of the unpadded image.
        init_reference_points (`torch.Tensor` of shape `(batch_size, num_queries, 4)`): Boxes the decoder starts from.
        intermediate_reference_points (`torch.Tensor` of shape `(batch_size, decoder_layers, num_queries, 4)`):
            Boxes that each decoder layer hands on.
        encoder_last_hidden_state (`torch.Tensor` of shape `(batch_size, sequence_length, d_model)`): The memory.
        enc_outputs_class (`torch.Tensor` of shape `(batch_size, num_queries, num_labels)`, *optional*):
            Class logits of the encoder tokens that queries were made of; `None` for `query_selection="static"`.
        enc_outputs_coord_logits (`torch.Tensor` of shape `(batch_size, num_queries, 4)`, *optional*):
            Their boxes, before the sigmoid.
        denoising ([`DinoDetrDenoisingOutput`]): Of length zero outside training.
        decoder_hidden_states, decoder_attentions, cross_attentions, encoder_hidden_states, encoder_attentions
            (`tuple[torch.Tensor]`, *optional*): With `output_hidden_states=True` and `output_attentions=True`.
    """

    last_hidden_state: torch.Tensor = None
    intermediate_hidden_states: torch.Tensor = None
    intermediate_boxes: torch.Tensor = None
    init_reference_points: torch.Tensor = None
    intermediate_reference_points: torch.Tensor = None
    encoder_last_hidden_state: torch.Tensor = None
    enc_outputs_class: torch.Tensor | None = None
    enc_outputs_coord_logits: torch.Tensor | None = None
    denoising: DinoDetrDenoisingOutput = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class DinoDetrObjectDetectionOutput(ModelOutput):
    r"""
    Args:
        loss (`torch.Tensor`, *optional*): The weighted sum of `loss_dict`, if labels were given.
        loss_dict (`dict[str, torch.Tensor]`, *optional*): The unweighted terms; see [`dino_detr_loss`].
        logits (`torch.Tensor` of shape `(batch_size, num_queries, num_labels)`):
            Class scores before the sigmoid; there is no "no object" class.
        pred_boxes (`torch.Tensor` of shape `(batch_size, num_queries, 4)`):
            Center x, center y, width, height as fractions of the unpadded image, at least float32. Use
            [`~DinoDetrImageProcessor.post_process_object_detection`] to get boxes in pixels.
        auxiliary_outputs (`list[dict[str, torch.Tensor]]`, *optional*):
            `logits` and `pred_boxes` of every decoder layer but the last, if `config.auxiliary_loss`.
        last_hidden_state (`torch.Tensor` of shape `(batch_size, num_queries, d_model)`): Decoder output.
        intermediate_hidden_states, init_reference_points, intermediate_reference_points, encoder_last_hidden_state,
            enc_outputs_class, enc_outputs_coord_logits, decoder_hidden_states, decoder_attentions, cross_attentions,
            encoder_hidden_states, encoder_attentions: As in [`DinoDetrModelOutput`].
    """

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor = None
    pred_boxes: torch.Tensor = None
    auxiliary_outputs: list[dict[str, torch.Tensor]] | None = None
    last_hidden_state: torch.Tensor = None
    intermediate_hidden_states: torch.Tensor = None
    init_reference_points: torch.Tensor = None
    intermediate_reference_points: torch.Tensor = None
    encoder_last_hidden_state: torch.Tensor = None
    enc_outputs_class: torch.Tensor | None = None
    enc_outputs_coord_logits: torch.Tensor | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention spelled out, for those who want its weights; tensors are `(batch_size, heads, length, head_dim)`."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.dropout(weights.softmax(dim=-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class DinoDetrSelfAttention(nn.Module):
    """Multi-head attention among queries; positions are added to queries and keys, not to values."""

    is_causal = False

    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.decoder_attention_heads
        self.head_dim = config.d_model // self.num_heads
        self.scaling = self.head_dim**-0.5
        # In the original the three are one matrix of 3 d_model rows, and its Xavier bound is that of its shape.
        as_one_matrix = {"gain": 0.5**0.5}
        self.q_proj = init_as("xavier_zero_bias", nn.Linear(config.d_model, config.d_model), **as_one_matrix)
        self.k_proj = init_as("xavier_zero_bias", nn.Linear(config.d_model, config.d_model), **as_one_matrix)
        self.v_proj = init_as("xavier_zero_bias", nn.Linear(config.d_model, config.d_model), **as_one_matrix)
        self.o_proj = init_as("xavier_zero_bias", nn.Linear(config.d_model, config.d_model))

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        def split_heads(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

        positioned = hidden_states + position_embeddings
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            split_heads(self.q_proj(positioned)),
            split_heads(self.k_proj(positioned)),
            split_heads(self.v_proj(hidden_states)),
            attention_mask,
            dropout=self.config.dropout if self.training else 0.0,
            scaling=self.scaling,
        )
        return self.o_proj(output.flatten(2)), weights


class DinoDetrMLP(nn.Module):
    """The feed-forward block of a layer."""

    def __init__(self, config: DinoDetrConfig, ffn_dim: int):
        super().__init__()
        self.dropout = config.dropout
        self.activation = ACT2FN[config.activation_function]
        if hasattr(self.activation, "inplace"):
            self.activation.inplace = True  # only it needs what fc1 returns, the largest tensor of a layer
        self.fc1 = init_as("xavier", nn.Linear(config.d_model, ffn_dim))
        self.fc2 = init_as("xavier", nn.Linear(ffn_dim, config.d_model))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = self.activation(self.fc1(hidden_states))
        return self.fc2(nn.functional.dropout(inner, p=self.dropout, training=self.training))


class DinoDetrEncoderLayer(GradientCheckpointingLayer):
    """Every position looks at a few points of every level; then the feed-forward block."""

    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.self_attn = DinoDetrMultiscaleDeformableAttention(
            config.d_model,
            num_heads=config.encoder_attention_heads,
            num_levels=config.num_feature_levels,
            num_points=config.encoder_n_points,
        )
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.mlp = DinoDetrMLP(config, config.encoder_ffn_dim)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: torch.Tensor,
        reference_points: torch.Tensor,
        levels: DinoDetrFeatureLevels,
    ) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states, position_embeddings, hidden_states, reference_points, levels)
        hidden_states = self.self_attn_layer_norm(hidden_states + self.dropout(attended))
        return self.final_layer_norm(hidden_states + self.dropout(self.mlp(hidden_states)))


class DinoDetrDecoderLayer(GradientCheckpointingLayer):
    """Queries look at each other, then at the memory around their boxes; then the feed-forward block."""

    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.self_attn = DinoDetrSelfAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.encoder_attn = DinoDetrMultiscaleDeformableAttention(
            config.d_model,
            num_heads=config.decoder_attention_heads,
            num_levels=config.num_feature_levels,
            num_points=config.decoder_n_points,
        )
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.mlp = DinoDetrMLP(config, config.decoder_ffn_dim)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: torch.Tensor,
        reference_points: torch.Tensor,
        memory: torch.Tensor,
        attention_mask: torch.Tensor,
        levels: DinoDetrFeatureLevels,
    ) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states, position_embeddings, attention_mask)
        hidden_states = self.self_attn_layer_norm(hidden_states + self.dropout(attended))
        attended, _ = self.encoder_attn(hidden_states, position_embeddings, memory, reference_points, levels)
        hidden_states = self.encoder_attn_layer_norm(hidden_states + self.dropout(attended))
        return self.final_layer_norm(hidden_states + self.dropout(self.mlp(hidden_states)))


class DinoDetrPreTrainedModel(PreTrainedModel):
    """What all parts of DINO that transformers can save and load have in common."""

    config: DinoDetrConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["DinoDetrBackbone", "DinoDetrEncoderLayer", "DinoDetrDecoderLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    # The mask between denoising groups is dense, which flash attention does not take.
    _supports_flash_attn = False
    # Computed and dropped by transformers' Swin backbone; checkpoints of Swin lack it.
    _keys_to_ignore_on_load_missing = [r"backbone\.body\.swin\.layernorm\."]
    _keys_to_ignore_on_load_unexpected = [r"num_batches_tracked"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not initialize(module):
            super()._init_weights(module)

    def get_input_embeddings(self) -> None:
        """Images have none. Accelerate asks, when it shares out the weights (FSDP2), and takes no error for that."""

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any) -> None:
        """As in transformers, but one name may be given for a model whose backbone has no attention."""
        if isinstance(attn_implementation, str):
            of_backbone = backbone_attn_implementation(self.config.backbone_config, attn_implementation)
            attn_implementation = {"": attn_implementation, "backbone_config": of_backbone}
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, save_original_format: bool = False, **kwargs: Any
    ) -> None:
        """As in transformers, but every auto class is told of the code, and the backbone's keys stay as they are.

        transformers would write a Swin backbone under older names, which `from_pretrained` undoes but `Trainer`, which
        resumes by `load_state_dict(strict=False)`, does not: it would go on with a fresh backbone.
        """
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)


class DinoDetrEncoder(DinoDetrPreTrainedModel):
    """Deformable self-attention over all levels: from feature levels to memory."""

    _can_record_outputs = {
        "hidden_states": DinoDetrEncoderLayer,
        "attentions": OutputRecorder(DinoDetrMultiscaleDeformableAttention, index=1),
    }

    def __init__(self, config: DinoDetrConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(DinoDetrEncoderLayer(config) for _ in range(config.encoder_layers))
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, levels: DinoDetrFeatureLevels, **kwargs: Any) -> DinoDetrEncoderOutput:
        reference_points = get_reference_points(levels)
        hidden_states = levels.features
        for layer in self.layers:
            hidden_states = layer(hidden_states, levels.position_embeddings, reference_points, levels)
        return DinoDetrEncoderOutput(last_hidden_state=hidden_states)


def get_reference_points(levels: DinoDetrFeatureLevels) -> torch.Tensor:
    """Where each memory position lies on each level.

    Returns:
        `torch.Tensor` of shape `(batch_size, sequence_length, num_feature_levels, 2)`: (x, y) as fractions of the
        padded map of that level.
    """
    centers = []
    for level, (height, width) in enumerate(levels.spatial_shapes_list):
        cells = cell_centers(height, width, levels.valid_ratios.device)
        valid_size = levels.valid_ratios[:, None, level] * levels.spatial_shapes[level].flip(0)
        centers.append(cells / valid_size)  # fractions of the unpadded image
    return torch.cat(centers, dim=1)[:, :, None] * levels.valid_ratios[:, None]


def move_boxes(change: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Add a predicted change to the logits of boxes; in and out are fractions, at least float32."""
    return (at_least_float32(change) + inverse_sigmoid(boxes)).sigmoid()


# What the next layer's prediction starts from, given this layer's box with its gradient (DINO, section 3.5).
BOX_REFINEMENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "look_forward_twice": lambda boxes: boxes,
    "look_forward_once": torch.Tensor.detach,
}


class DinoDetrDecoder(DinoDetrPreTrainedModel):
    """From object queries to detections, each layer moving the boxes that the layer before left."""

    _can_record_outputs = {
        "hidden_states": DinoDetrDecoderLayer,
        "attentions": OutputRecorder(DinoDetrSelfAttention, index=1),
        "cross_attentions": OutputRecorder(DinoDetrMultiscaleDeformableAttention, index=1),
    }

    def __init__(self, config: DinoDetrConfig):
        super().__init__(config)
        width = config.d_model
        self.layers = nn.ModuleList(DinoDetrDecoderLayer(config) for _ in range(config.decoder_layers))
        self.layer_norm = nn.LayerNorm(width)
        self.ref_point_head = DinoDetrMLPPredictionHead([2 * width, width, width], rule="xavier", last_rule="xavier")
        self.bbox_embed = nn.ModuleList(make_bbox_head(width) for _ in range(num_prediction_heads(config)))
        self.look_forward = BOX_REFINEMENTS[config.box_refinement]
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: torch.Tensor,
        reference_points: torch.Tensor,
        attention_mask: torch.Tensor,
        memory: torch.Tensor,
        levels: DinoDetrFeatureLevels,
        **kwargs: Any,
    ) -> DinoDetrDecoderOutput:
        """
        Args:
            inputs_embeds (`torch.Tensor` of shape `(batch_size, num_queries, d_model)`): Content queries.
            reference_points (`torch.Tensor` of shape `(batch_size, num_queries, 4)`):
                First boxes: center x, center y, width, height, fractions of the unpadded image.
            attention_mask (`torch.Tensor` of shape `(1, 1, num_queries, num_queries)`):
                Added to the scores of self-attention.
            memory (`torch.Tensor` of shape `(batch_size, sequence_length, d_model)`): The encoder's output.
            levels ([`DinoDetrFeatureLevels`]): Where the memory's positions lie.
        """
        to_padded = torch.cat([levels.valid_ratios, levels.valid_ratios], dim=-1)[:, None]  # (batch, 1, levels, 4)
        hidden_states, starting_boxes = inputs_embeds, reference_points
        all_hidden_states, all_boxes, all_reference_points = [], [], []
        for index, layer in enumerate(self.layers):
            level_boxes = reference_points[:, :, None] * to_padded  # (batch, queries, levels, 4)
            # The positional query sees the box in the padded frame of the finest level, as in the original.
            sines = sine_box_embedding(level_boxes[:, :, 0], self.config.d_model // 2)
            positions = self.ref_point_head(sines.to(inputs_embeds.dtype))
            hidden_states = layer(hidden_states, positions, level_boxes, memory, attention_mask, levels)

            head = head_of_layer(self.bbox_embed, index)
            normed = self.layer_norm(hidden_states)
            all_hidden_states.append(normed)
            all_boxes.append(move_boxes(head(normed), starting_boxes))
            moved = move_boxes(head(hidden_states), reference_points)
            starting_boxes, reference_points = self.look_forward(moved), moved.detach()
            all_reference_points.append(reference_points)
        return DinoDetrDecoderOutput(
            last_hidden_state=all_hidden_states[-1],
            intermediate_hidden_states=torch.stack(all_hidden_states, dim=1),
            intermediate_boxes=torch.stack(all_boxes, dim=1),
            intermediate_reference_points=torch.stack(all_reference_points, dim=1),
        )


def num_prediction_heads(config: DinoDetrConfig) -> int:
    """Prediction heads of each kind in the decoder: one for all layers, or one each."""
    return 1 if config.share_decoder_heads else config.decoder_layers


def head_of_layer(heads: nn.ModuleList, layer: int) -> nn.Module:
    return heads[layer % len(heads)]


class DinoDetrModel(DinoDetrPreTrainedModel):
    """DINO without its class heads: from images to object queries that know their box.

    Args:
        config ([`DinoDetrConfig`]): Sizes and strategies.
    """

    def __init__(self, config: DinoDetrConfig):
        super().__init__(config)
        config.validate_architecture()  # fields may have been overridden one by one since the config was made
        self.backbone = DinoDetrBackbone(config)
        self.encoder = DinoDetrEncoder(config)
        self.query_selection = QUERY_SELECTIONS[config.query_selection](config)
        self.denoising = DENOISING_STRATEGIES[config.denoising](config)
        self.decoder = DinoDetrDecoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        effective_batch: DinoDetrEffectiveBatch | None = None,
        **kwargs: Any,
    ) -> DinoDetrModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`):
                Normalized images, padded to the right and below; see [`DinoDetrImageProcessor`].
            pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*):
                1 is image, 0 is padding. All image if not given.
            labels (`list[dict[str, torch.Tensor]]`, *optional*):
                Per image `class_labels` `(num_objects,)` and `boxes` `(num_objects, 4)`, of which denoising queries
                are made in training mode.
            effective_batch ([`DinoDetrEffectiveBatch`], *optional*): See [`DinoDetrForObjectDetection`].
            output_hidden_states, output_attentions (`bool`, *optional*): What else to return.

        Raises:
            ValueError: If labels cannot be right, or the images are too small for `num_queries`.
        """
        if labels is not None:
            check_labels(labels, len(pixel_values), self.config.num_labels)
        if pixel_mask is None:
            pixel_mask = torch.ones_like(pixel_values[:, 0])

        levels = self.backbone(pixel_values.to(self.dtype), pixel_mask)
        encoded = self.encoder(levels, **kwargs)
        memory = encoded.last_hidden_state
        selected = self.query_selection(memory, levels)
        max_num_objects = 0 if effective_batch is None else effective_batch.max_num_objects
        denoising = self.denoising(labels if self.training else None, selected.inputs_embeds, max_num_objects)
        decoded = self.decoder(
            inputs_embeds=torch.cat([denoising.inputs_embeds, selected.inputs_embeds], dim=1),
            reference_points=torch.cat([denoising.reference_points, selected.reference_points], dim=1),
            attention_mask=self.attention_mask(denoising, selected),
            memory=memory,
            levels=levels,
            **kwargs,
        )
        return split_outputs(encoded, selected, denoising, decoded)

    def attention_mask(self, denoising: DinoDetrDenoisingQueries, selected: DinoDetrObjectQueries) -> torch.Tensor:
        """The mask of the decoder's self-attention as it is added to the scores: 0 or the lowest number there is."""
        num_denoising, num_queries = denoising.inputs_embeds.shape[1], selected.inputs_embeds.shape[1]
        # The queries' device, not the model's: offloaded weights are nowhere until they are needed.
        device = selected.inputs_embeds.device
        group_size = num_denoising // denoising.num_groups
        may_look = denoising_attention_mask(denoising.num_groups, group_size, num_queries, device)
        lowest = torch.finfo(self.dtype).min  # finite: a row of -inf would be NaN
        return torch.zeros_like(may_look, dtype=self.dtype).masked_fill(~may_look, lowest)[None, None]


def split_outputs(
    encoded: DinoDetrEncoderOutput,
    selected: DinoDetrObjectQueries,
    denoising: DinoDetrDenoisingQueries,
    decoded: DinoDetrDecoderOutput,
) -> DinoDetrModelOutput:
    """Part what the decoder made of denoising queries from what it made of matching queries."""
    lengths = [denoising.inputs_embeds.shape[1], selected.inputs_embeds.shape[1]]
    denoised_states, hidden_states = decoded.intermediate_hidden_states.split(lengths, dim=2)
    denoised_boxes, boxes = decoded.intermediate_boxes.split(lengths, dim=2)
    return DinoDetrModelOutput(
        last_hidden_state=hidden_states[:, -1],
        intermediate_hidden_states=hidden_states,
        intermediate_boxes=boxes,
        init_reference_points=selected.reference_points,
        intermediate_reference_points=decoded.intermediate_reference_points[:, :, lengths[0] :],
        encoder_last_hidden_state=encoded.last_hidden_state,
        enc_outputs_class=selected.enc_outputs_class,
        enc_outputs_coord_logits=selected.enc_outputs_coord_logits,
        denoising=DinoDetrDenoisingOutput(
            intermediate_hidden_states=denoised_states,
            intermediate_boxes=denoised_boxes,
            object_index=denoising.object_index,
            num_groups=denoising.num_groups,
        ),
        decoder_hidden_states=decoded.hidden_states,
        decoder_attentions=decoded.attentions,
        cross_attentions=decoded.cross_attentions,
        encoder_hidden_states=encoded.hidden_states,
        encoder_attentions=encoded.attentions,
    )


class DinoDetrForObjectDetection(DinoDetrPreTrainedModel):
    """DINO with its class heads and its loss.

    Args:
        config ([`DinoDetrConfig`]): Sizes, strategies and the weights of the loss.

    Example:

    ```python
    >>> import torch
    >>> from hf_dino import DinoDetrConfig, DinoDetrForObjectDetection
    >>> tiny = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
    ...         "layer_type": "basic", "out_features": ["stage3", "stage4"]}
    >>> config = DinoDetrConfig(backbone_config=tiny, num_feature_levels=3, d_model=32, encoder_layers=1,
    ...                         decoder_layers=2, num_queries=10, id2label={0: "cat", 1: "dog"})
    >>> model = DinoDetrForObjectDetection(config)
    >>> labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}]
    >>> outputs = model(torch.randn(1, 3, 96, 128), labels=labels)
    >>> outputs.logits.shape, outputs.pred_boxes.shape, sorted(outputs.loss_dict)[:3]
    (torch.Size([1, 10, 2]), torch.Size([1, 10, 4]), ['loss_bbox', 'loss_bbox_0', 'loss_bbox_denoising'])

    ```
    """

    def __init__(self, config: DinoDetrConfig):
        super().__init__(config)
        self.model = DinoDetrModel(config)
        self.class_embed = nn.ModuleList(
            make_class_head(config.d_model, config.num_labels) for _ in range(num_prediction_heads(config))
        )
        self.first_supervised_layer = 0 if config.auxiliary_loss else config.decoder_layers - 1
        # transformers would otherwise choose DETR's softmax loss by the name of this class
        self.loss_function = dino_detr_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        effective_batch: DinoDetrEffectiveBatch | None = None,
        **kwargs: Any,
    ) -> DinoDetrObjectDetectionOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`):
                Normalized images, padded to the right and below; see [`DinoDetrImageProcessor`].
            pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*):
                1 is image, 0 is padding. All image if not given.
            labels (`list[dict[str, torch.Tensor]]`, *optional*):
                Per image `class_labels` `(num_objects,)`, int64 in [0, num_labels), and `boxes` `(num_objects, 4)`:
                center x, center y, width, height as fractions of the unpadded image. With them comes a loss.
            effective_batch ([`DinoDetrEffectiveBatch`], *optional*):
                What there is in the whole of a training step that several batches make up, so that it does not matter
                how many. Without it each batch has its own denoising groups, and its loss is divided by the objects of
                the average process, as in the original.
            output_hidden_states, output_attentions (`bool`, *optional*): What else to return.

        Raises:
            ValueError: If labels cannot be right, or the images are too small for `num_queries`.
        """
        outputs = self.model(pixel_values, pixel_mask, labels, effective_batch, **kwargs)
        logits, boxes = self.logits_and_boxes(outputs.intermediate_hidden_states, outputs.intermediate_boxes)
        loss, loss_dict = None, None
        if labels is not None:
            loss, loss_dict = self.supervise(logits, boxes, outputs, labels, effective_batch)

        earlier_layers = zip(logits[:, :-1].unbind(1), boxes[:, :-1].unbind(1))
        auxiliary_outputs = [{"logits": one, "pred_boxes": other} for one, other in earlier_layers]
        passed_on: dict[str, Any] = {name: outputs[name] for name in _PASSED_ON if name in outputs}
        return DinoDetrObjectDetectionOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=logits[:, -1],
            pred_boxes=boxes[:, -1],
            auxiliary_outputs=auxiliary_outputs or None,
            **passed_on,
        )

    def class_specific_layers(self) -> list[nn.Module]:
        """The layers with a row of weights per class: class heads of decoder and encoder, denoising's embedding."""
        of_encoder = getattr(self.model.query_selection, "class_embed", None)
        of_denoising = getattr(self.model.denoising, "label_embed", None)
        return [layer for layer in (*self.class_embed, of_encoder, of_denoising) if layer is not None]

    @torch.no_grad()
    def reset_class_heads(self) -> None:
        """Forget what was learned of classes: class heads and denoising's label embedding are drawn anew.

        For a loaded model that is to learn other classes. `from_pretrained(..., ignore_mismatched_sizes=True)` does it
        where their number differs, but cannot know that as many classes are other ones.
        """
        for layer in self.class_specific_layers():
            initialize(layer, again=True)

    def logits_and_boxes(self, hidden_states: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Class logits and boxes of the supervised decoder layers.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, decoder_layers, num_queries, d_model)`)
            boxes (`torch.Tensor` of shape `(batch_size, decoder_layers, num_queries, 4)`)
        """
        layers = range(self.first_supervised_layer, self.config.decoder_layers)
        logits = [head_of_layer(self.class_embed, layer)(hidden_states[:, layer]) for layer in layers]
        return torch.stack(logits, dim=1), boxes[:, self.first_supervised_layer :]

    def supervise(
        self,
        logits: torch.Tensor,
        boxes: torch.Tensor,
        outputs: DinoDetrModelOutput,
        labels: list[dict[str, torch.Tensor]],
        effective_batch: DinoDetrEffectiveBatch | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss and its terms; the encoder's choice is supervised as one more layer before the decoder's."""
        if outputs.enc_outputs_class is not None:
            logits = torch.cat([outputs.enc_outputs_class[:, None], logits], dim=1)
            boxes = torch.cat([outputs.enc_outputs_coord_logits.sigmoid()[:, None], boxes], dim=1)
        num_boxes: torch.Tensor | float = (
            get_num_boxes(labels, logits.device, average=self.training)  # evaluation may run on one process alone
            if effective_batch is None
            else effective_batch.num_boxes
        )
        denoising = outputs.denoising
        denoising_logits, denoising_boxes = self.logits_and_boxes(
            denoising.intermediate_hidden_states, denoising.intermediate_boxes
        )
        return self.loss_function(
            logits=logits,
            pred_boxes=boxes,
            denoising_logits=denoising_logits,
            denoising_boxes=denoising_boxes,
            denoising_object_index=denoising.object_index,
            num_denoising_groups=denoising.num_groups,
            labels=labels,
            config=self.config,
            num_boxes=num_boxes,
        )


_PASSED_ON = {field.name for field in fields(DinoDetrObjectDetectionOutput)} & {
    field.name for field in fields(DinoDetrModelOutput)
}

AUTO_MAP = {
    "AutoConfig": f"configuration_dino_detr.{DinoDetrConfig.__name__}",
    "AutoModel": f"modeling_dino_detr.{DinoDetrModel.__name__}",
    "AutoModelForObjectDetection": f"modeling_dino_detr.{DinoDetrForObjectDetection.__name__}",
}
DinoDetrModel.register_for_auto_class("AutoModel")
DinoDetrForObjectDetection.register_for_auto_class("AutoModelForObjectDetection")

__all__ = ["DinoDetrForObjectDetection", "DinoDetrModel", "DinoDetrPreTrainedModel"]
