"""DINO: backbone, encoder, query selection, denoising, decoder with box refinement, heads.

Paper: DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object Detection,
https://arxiv.org/abs/2203.03605, figure 2.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .backbone_dino_detr import DinoDetrBackbone, DinoDetrFeatureLevels, backbone_attn_implementation
from .boxes_dino_detr import refine_bboxes
from .configuration_dino_detr import DinoDetrConfig
from .deformable_attention_dino_detr import DinoDetrMultiscaleDeformableAttention
from .denoising_dino_detr import DENOISING_STRATEGIES, DinoDetrDenoisingQueries, make_decoder_attention_mask
from .initialization_dino_detr import init_as, initialize, xavier, xavier_zero_bias
from .loss_dino_detr import DinoDetrEffectiveBatch, check_labels, dino_detr_loss, get_num_boxes
from .position_embeddings_dino_detr import POSITIONAL_QUERIES, sine_box_embedding
from .prediction_heads_dino_detr import (
    DinoDetrMLPPredictionHead,
    get_layer_head,
    make_bbox_head,
    make_class_head,
    num_prediction_heads,
)
from .query_selection_dino_detr import QUERY_SELECTIONS, DinoDetrObjectQueries
from .reference_points_dino_detr import get_reference_points


logger = logging.get_logger(__name__)

RECORDING_MODULE = capture_outputs.__module__


@dataclass
class DinoDetrEncoderOutput(ModelOutput):
    r"""
    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, sequence_length, d_model)`): The memory.
        hidden_states (`tuple[torch.Tensor]`, *optional*): Input of the first layer and output of each.
        attentions (`tuple[torch.Tensor]`, *optional*):
            Of each layer, `(batch_size, sequence_length, num_heads, num_feature_levels, num_points)`.
    """

    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class DinoDetrDecoderOutput(ModelOutput):
    r"""
    Outputs of all queries, `num_total_queries = num_denoising_queries + num_matching_queries`: first the denoising
    queries, then the matching queries.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, num_total_queries, d_model)`):
            Output of the last layer, normalized if `config.decoder_norm`.
        intermediate_hidden_states
            (`torch.Tensor` of shape `(batch_size, decoder_layers, num_total_queries, d_model)`):
            The same of each layer.
        intermediate_boxes (`torch.Tensor` of shape `(batch_size, decoder_layers, num_total_queries, 4)`):
            Boxes predicted by each layer: center x, center y, width, height, fractions of the unpadded image.
        intermediate_reference_points (`torch.Tensor` of shape `(batch_size, decoder_layers, num_total_queries, 4)`):
            Boxes that each layer passes to the next one as reference points; same units.
        hidden_states, attentions, cross_attentions (`tuple[torch.Tensor]`, *optional*):
            Input of the first layer and output of each; weights of self-attention, `(batch_size, num_heads,
            num_total_queries, num_total_queries)`, and of deformable attention, `(batch_size, num_total_queries,
            num_heads, num_feature_levels, num_points)`.
    """

    last_hidden_state: torch.Tensor | None = None
    intermediate_hidden_states: torch.Tensor | None = None
    intermediate_boxes: torch.Tensor | None = None
    intermediate_reference_points: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class DinoDetrDenoisingOutput(ModelOutput):
    r"""
    Decoder outputs of the denoising queries, which only the loss reads.

    Args:
        intermediate_hidden_states
            (`torch.Tensor` of shape `(batch_size, decoder_layers, num_denoising_queries, d_model)`)
        intermediate_boxes (`torch.Tensor` of shape `(batch_size, decoder_layers, num_denoising_queries, 4)`)
        object_index (`torch.Tensor` of shape `(batch_size, num_denoising_queries)`): See [`DinoDetrDenoisingQueries`].
        num_groups (`int`): Number of groups; see [`DinoDetrDenoisingQueries`].
    """

    intermediate_hidden_states: torch.Tensor | None = None
    intermediate_boxes: torch.Tensor | None = None
    object_index: torch.Tensor | None = None
    num_groups: int | None = None


@dataclass
class DinoDetrModelOutput(ModelOutput):
    r"""
    Outputs of the matching queries, `num_queries` as in the config; those of the denoising queries are in `denoising`.
    In training mode, `decoder_hidden_states`, `decoder_attentions` and `cross_attentions` also contain the denoising
    queries, which come first.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, num_queries, d_model)`): Decoder output.
        intermediate_hidden_states (`torch.Tensor` of shape `(batch_size, decoder_layers, num_queries, d_model)`):
            Output of each decoder layer.
        intermediate_boxes (`torch.Tensor` of shape `(batch_size, decoder_layers, num_queries, 4)`):
            Boxes predicted by each layer: center x, center y, width, height, fractions of the unpadded image.
        init_reference_points (`torch.Tensor` of shape `(batch_size, num_queries, 4)`): Initial boxes.
        intermediate_reference_points (`torch.Tensor` of shape `(batch_size, decoder_layers, num_queries, 4)`):
            Boxes that each decoder layer passes to the next one.
        encoder_last_hidden_state (`torch.Tensor` of shape `(batch_size, sequence_length, d_model)`): The memory.
        enc_outputs_class (`torch.Tensor` of shape `(batch_size, num_queries, num_labels)`, *optional*):
            Class logits of the selected encoder tokens; `None` for `query_selection="static"`.
        enc_outputs_coord_logits (`torch.Tensor` of shape `(batch_size, num_queries, 4)`, *optional*):
            Their boxes before the sigmoid.
        denoising ([`DinoDetrDenoisingOutput`]): Has zero queries outside training.
        decoder_hidden_states, decoder_attentions, cross_attentions, encoder_hidden_states, encoder_attentions
            (`tuple[torch.Tensor]`, *optional*): With `output_hidden_states=True` and `output_attentions=True`.
    """

    last_hidden_state: torch.Tensor | None = None
    intermediate_hidden_states: torch.Tensor | None = None
    intermediate_boxes: torch.Tensor | None = None
    init_reference_points: torch.Tensor | None = None
    intermediate_reference_points: torch.Tensor | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    enc_outputs_class: torch.Tensor | None = None
    enc_outputs_coord_logits: torch.Tensor | None = None
    denoising: DinoDetrDenoisingOutput | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class DinoDetrObjectDetectionOutput(ModelOutput):
    r"""
    Detections before post-processing. Fields that are not listed here are those of [`DinoDetrModelOutput`].

    Args:
        loss (`torch.Tensor`, *optional*): The weighted sum of `loss_dict`, if labels were given.
        loss_dict (`dict[str, torch.Tensor]`, *optional*): The unweighted terms; see `dino_detr_loss`.
        logits (`torch.Tensor` of shape `(batch_size, num_queries, num_labels)`):
            Class scores of the matching queries before the sigmoid; there is no "no object" class.
        pred_boxes (`torch.Tensor` of shape `(batch_size, num_queries, 4)`):
            Center x, center y, width, height as fractions of the unpadded image, float32 or higher. Use
            [`~DinoDetrImageProcessor.post_process_object_detection`] to get boxes in pixels.
        auxiliary_outputs (`list[dict[str, torch.Tensor]]`, *optional*):
            `logits` and `pred_boxes` of every decoder layer but the last, if `config.auxiliary_loss`. Computed only
            with labels or in training mode.
        last_hidden_state (`torch.Tensor` of shape `(batch_size, num_queries, d_model)`): Decoder output.
    """

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None
    auxiliary_outputs: list[dict[str, torch.Tensor]] | None = None
    last_hidden_state: torch.Tensor | None = None
    intermediate_hidden_states: torch.Tensor | None = None
    init_reference_points: torch.Tensor | None = None
    intermediate_reference_points: torch.Tensor | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
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
    """Compute attention and its weights, given query, key and value `(batch_size, num_heads, length, head_dim)`.

    Returns:
        The output, `(batch_size, query_length, num_heads, head_dim)`, and the weights, `(batch_size, num_heads,
        query_length, key_length)`.
    """
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
        # The official implementation has one matrix of 3 * d_model rows for the three, which decides its Xavier bound.
        in_proj_gain = 0.5**0.5
        self.q_proj = init_as(xavier_zero_bias, nn.Linear(config.d_model, config.d_model), gain=in_proj_gain)
        self.k_proj = init_as(xavier_zero_bias, nn.Linear(config.d_model, config.d_model), gain=in_proj_gain)
        self.v_proj = init_as(xavier_zero_bias, nn.Linear(config.d_model, config.d_model), gain=in_proj_gain)
        self.o_proj = init_as(xavier_zero_bias, nn.Linear(config.d_model, config.d_model))

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: torch.Tensor, attention_mask: torch.Tensor | None
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
            self.activation.inplace = True  # saves one tensor of width ffn_dim per layer
        self.fc1 = init_as(xavier, nn.Linear(config.d_model, ffn_dim))
        self.fc2 = init_as(xavier, nn.Linear(ffn_dim, config.d_model))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # As rows: `nn.Linear` returns a view otherwise, and to overwrite a view costs two copies in the backward pass.
        activated = self.activation(self.fc1(hidden_states.flatten(0, -2)))
        output = self.fc2(nn.functional.dropout(activated, p=self.dropout, training=self.training))
        return output.view(hidden_states.shape)


class DinoDetrEncoderLayer(GradientCheckpointingLayer):
    """Deformable self-attention of all tokens over all levels, then the MLP."""

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
    """Self-attention among queries, deformable attention to the memory around their boxes, then the MLP."""

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
        attention_mask: torch.Tensor | None,
        levels: DinoDetrFeatureLevels,
    ) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states, position_embeddings, attention_mask)
        hidden_states = self.self_attn_layer_norm(hidden_states + self.dropout(attended))
        attended, _ = self.encoder_attn(hidden_states, position_embeddings, memory, reference_points, levels)
        hidden_states = self.encoder_attn_layer_norm(hidden_states + self.dropout(attended))
        return self.final_layer_norm(hidden_states + self.dropout(self.mlp(hidden_states)))


class DinoDetrPreTrainedModel(PreTrainedModel):
    """Common parts of the DINO models: how their weights are initialized, saved and loaded."""

    config: DinoDetrConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["DinoDetrBackbone", "DinoDetrEncoderLayer", "DinoDetrDecoderLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    # Flash attention does not support the dense mask between denoising groups.
    _supports_flash_attn = False
    # transformers' Swin backbone has this norm but does not use its result; Swin checkpoints do not contain it.
    _keys_to_ignore_on_load_missing = [r"backbone\.body\.swin\.layernorm\."]
    _keys_to_ignore_on_load_unexpected = [r"num_batches_tracked"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not initialize(module):
            super()._init_weights(module)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled or copied: all but transformers' hooks that record outputs, which are closures.

        transformers installs them again, here and in the copy, before the next output is recorded.
        """
        for module in self.modules():
            hooks = module._forward_hooks
            for handle in [key for key, hook in hooks.items() if getattr(hook, "__module__", "") == RECORDING_MODULE]:
                del hooks[handle]
            vars(module).pop("_output_capturing_hooks_installed", None)
        return super().__getstate__()

    def get_input_embeddings(self) -> None:
        """Return `None`: the model has no input embeddings, but Accelerate calls this method for FSDP2."""

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any) -> None:
        """Set the attention implementation; backbones without attention keep `eager`."""
        if isinstance(attn_implementation, str):
            for_backbone = backbone_attn_implementation(self.config.backbone_config, attn_implementation)
            attn_implementation = {"": attn_implementation, "backbone_config": for_backbone}
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, save_original_format: bool = False, **kwargs: Any
    ) -> None:
        """Save as transformers does, with the code registered for every auto class and the backbone's keys unchanged.

        transformers would save a Swin backbone under older key names. `from_pretrained` maps them back, but `Trainer`
        resumes with `load_state_dict(strict=False)` and would continue with a randomly initialized backbone.
        """
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)


class DinoDetrEncoder(DinoDetrPreTrainedModel):
    """Turn the feature levels into the memory by deformable self-attention over all levels."""

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


def keep_gradient(boxes: torch.Tensor) -> torch.Tensor:
    """Return boxes as they are: a named function, because a model that keeps a lambda cannot be pickled."""
    return boxes


# Boxes from which the next layer's prediction starts: with or without a gradient to this layer (DINO, section 3.5).
BOX_REFINEMENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "look_forward_twice": keep_gradient,
    "look_forward_once": torch.Tensor.detach,
}

DECODER_NORMS: dict[bool, type[nn.Module]] = {True: nn.LayerNorm, False: nn.Identity}


class DinoDetrDecoder(DinoDetrPreTrainedModel):
    """Decode object queries layer by layer; each layer refines the boxes of the layer before."""

    _can_record_outputs = {
        "hidden_states": DinoDetrDecoderLayer,
        "attentions": OutputRecorder(DinoDetrSelfAttention, index=1),
        "cross_attentions": OutputRecorder(DinoDetrMultiscaleDeformableAttention, index=1),
    }

    def __init__(self, config: DinoDetrConfig):
        super().__init__(config)
        d_model = config.d_model
        self.layers = nn.ModuleList(DinoDetrDecoderLayer(config) for _ in range(config.decoder_layers))
        self.layer_norm = DECODER_NORMS[config.decoder_norm](d_model)
        self.ref_point_head = DinoDetrMLPPredictionHead([2 * d_model, d_model, d_model], rule=xavier, last_rule=xavier)
        self.bbox_embed = nn.ModuleList(make_bbox_head(d_model) for _ in range(num_prediction_heads(config)))
        self.positional_query = POSITIONAL_QUERIES[config.positional_query](config)
        self.look_forward = BOX_REFINEMENTS[config.box_refinement]
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: torch.Tensor,
        reference_points: torch.Tensor,
        attention_mask: torch.Tensor | None,
        memory: torch.Tensor,
        levels: DinoDetrFeatureLevels,
        **kwargs: Any,
    ) -> DinoDetrDecoderOutput:
        """
        Args:
            inputs_embeds (`torch.Tensor` of shape `(batch_size, num_total_queries, d_model)`):
                Content queries: denoising, then matching; see [`DinoDetrDecoderOutput`].
            reference_points (`torch.Tensor` of shape `(batch_size, num_total_queries, 4)`):
                Initial boxes: center x, center y, width, height, fractions of the unpadded image.
            attention_mask (`torch.Tensor` of shape `(1, 1, num_total_queries, num_total_queries)`, *optional*):
                Added to the scores of self-attention.
            memory (`torch.Tensor` of shape `(batch_size, sequence_length, d_model)`): The encoder's output.
            levels ([`DinoDetrFeatureLevels`]): Shapes, mask and valid ratios of the levels.
        """
        valid_ratios = torch.cat([levels.valid_ratios, levels.valid_ratios], dim=-1)[:, None]  # (batch, 1, levels, 4)
        hidden_states, prediction_anchors = inputs_embeds, reference_points
        all_hidden_states, all_boxes, all_reference_points = [], [], []
        for index, layer in enumerate(self.layers):
            level_boxes = reference_points[:, :, None] * valid_ratios  # (batch, queries, levels, 4)
            # As in the official implementation, positional queries embed boxes as fractions of the padded finest map.
            sines = sine_box_embedding(level_boxes[:, :, 0], self.config.d_model // 2)
            embedded_anchors = self.ref_point_head(sines.to(inputs_embeds.dtype))
            positions = self.positional_query(embedded_anchors, hidden_states, index)
            hidden_states = layer(hidden_states, positions, level_boxes, memory, attention_mask, levels)

            # The box head is applied twice, as in IDEA-Research/DINO. Its output for the states before the norm gives
            # the next layer's reference points, which are detached (models/dino/deformable_transformer.py,
            # TransformerDecoder.forward). Its output for the normalized states gives the predicted boxes; they start
            # from the refined boxes of the layer before, which are not detached (models/dino/dino.py, DINO.forward).
            bbox_head = get_layer_head(self.bbox_embed, index)
            normalized_states = self.layer_norm(hidden_states)
            predicted_boxes = refine_bboxes(
                prediction_anchors, bbox_head(normalized_states), self.config.box_prediction_epsilon
            )
            refined_boxes = refine_bboxes(reference_points, bbox_head(hidden_states))
            prediction_anchors, reference_points = self.look_forward(refined_boxes), refined_boxes.detach()

            all_hidden_states.append(normalized_states)
            all_boxes.append(predicted_boxes)
            all_reference_points.append(reference_points)
        return DinoDetrDecoderOutput(
            last_hidden_state=all_hidden_states[-1],
            intermediate_hidden_states=torch.stack(all_hidden_states, dim=1),
            intermediate_boxes=torch.stack(all_boxes, dim=1),
            intermediate_reference_points=torch.stack(all_reference_points, dim=1),
        )


@functools.cache
def is_native_on_cpu(dtype: torch.dtype) -> bool:
    """Return whether this CPU computes in a dtype natively; `True` if PyTorch does not tell."""
    probe_names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    probe = getattr(torch.ops.mkldnn, probe_names[dtype], None) if dtype in probe_names else None
    return probe is None or probe()


def warn_if_emulated(device_type: str, dtype: torch.dtype) -> None:
    """Warn once if the forward pass runs in half precision on a CPU that has no instructions for it."""
    if device_type != "cpu" or torch.compiler.is_compiling():
        return
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    if not is_native_on_cpu(dtype):
        logger.warning_once(
            f"This CPU has no instructions for {dtype}, so a forward pass can take minutes instead of seconds. Use "
            f"float32: call `model.float()`, and drop `--mixed_precision` or `torch.autocast`."
        )


class DinoDetrModel(DinoDetrPreTrainedModel):
    """Turn images into decoded object queries and their boxes: DINO without the decoder's class heads and the loss.

    Args:
        config ([`DinoDetrConfig`]): Sizes and strategies.
    """

    def __init__(self, config: DinoDetrConfig):
        super().__init__(config)
        config.validate_architecture()  # `from_pretrained` overrides fields one by one, without a check
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
        max_num_objects: int = 0,
        **kwargs: Any,
    ) -> DinoDetrModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`):
                Normalized images, padded to the right and below; see [`DinoDetrImageProcessor`].
            pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*):
                1 is image, 0 is padding. All image if not given.
            labels (`list[dict[str, torch.Tensor]]`, *optional*):
                Per image `class_labels` `(num_objects,)` and `boxes` `(num_objects, 4)`, from which denoising queries
                are made in training mode.
            max_num_objects (`int`, *optional*, defaults to 0): See [`DinoDetrEffectiveBatch`].
            output_hidden_states, output_attentions (`bool`, *optional*): Whether to return them.

        Raises:
            ValueError: If labels are invalid, or the images are too small for `num_queries`.
        """
        warn_if_emulated(pixel_values.device.type, self.dtype)
        if labels is not None:
            check_labels(labels, len(pixel_values), self.config.num_labels, pixel_values.device)
        if pixel_mask is None:
            pixel_mask = torch.ones_like(pixel_values[:, 0])

        levels = self.backbone(pixel_values.to(self.dtype), pixel_mask)
        encoded = self.encoder(levels, **kwargs)
        memory = encoded.last_hidden_state
        selected = self.query_selection(memory, levels)
        denoising = self.denoising(labels if self.training else None, selected.inputs_embeds, max_num_objects)
        decoded = self.decoder(
            inputs_embeds=torch.cat([denoising.inputs_embeds, denoising.matching_queries], dim=1),
            reference_points=torch.cat([denoising.reference_points, selected.reference_points], dim=1),
            attention_mask=make_decoder_attention_mask(denoising, selected.inputs_embeds.shape[1], self.dtype),
            memory=memory,
            levels=levels,
            **kwargs,
        )
        return split_denoising_outputs(encoded, selected, denoising, decoded)


def split_denoising_outputs(
    encoded: DinoDetrEncoderOutput,
    selected: DinoDetrObjectQueries,
    denoising: DinoDetrDenoisingQueries,
    decoded: DinoDetrDecoderOutput,
) -> DinoDetrModelOutput:
    """Return the outputs of the matching queries, with those of the denoising queries in `denoising`."""
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
        layers = range(config.decoder_layers)
        self.supervised_layers = layers if config.auxiliary_loss else layers[-1:]
        # Otherwise transformers would select DETR's softmax loss by the name of this class.
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
                center x, center y, width, height as fractions of the unpadded image. If given, the
                loss is computed.
            effective_batch ([`DinoDetrEffectiveBatch`], *optional*):
                Object counts over all micro-batches and processes of an optimizer step; with them, the step equals one
                on a single large batch. Without them, the number of denoising groups depends on this micro-batch
                alone. The loss is then divided, in training mode, by the mean number of objects per process, as in the
                official implementation, and in evaluation mode by the number of objects of this process.
            output_hidden_states, output_attentions (`bool`, *optional*): Whether to return them.

        Raises:
            ValueError: If labels are invalid, or the images are too small for `num_queries`.
        """
        effective_batch = effective_batch or DinoDetrEffectiveBatch()
        outputs = self.model(pixel_values, pixel_mask, labels, effective_batch.max_num_objects, **kwargs)
        is_supervised = self.training or labels is not None
        layers = self.supervised_layers if is_supervised else self.supervised_layers[-1:]
        logits = self.predict_classes(outputs.intermediate_hidden_states, layers)
        boxes = outputs.intermediate_boxes[:, layers.start : layers.stop]
        loss, loss_dict = None, None
        if labels is not None:
            loss, loss_dict = self.compute_loss(logits, boxes, outputs, labels, effective_batch)

        earlier_layers = zip(logits[:, :-1].unbind(1), boxes[:, :-1].unbind(1))
        auxiliary_outputs = [
            {"logits": layer_logits, "pred_boxes": layer_boxes} for layer_logits, layer_boxes in earlier_layers
        ]
        return DinoDetrObjectDetectionOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=logits[:, -1],
            pred_boxes=boxes[:, -1],
            auxiliary_outputs=auxiliary_outputs or None,
            last_hidden_state=outputs.last_hidden_state,
            intermediate_hidden_states=outputs.intermediate_hidden_states,
            init_reference_points=outputs.init_reference_points,
            intermediate_reference_points=outputs.intermediate_reference_points,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            enc_outputs_class=outputs.enc_outputs_class,
            enc_outputs_coord_logits=outputs.enc_outputs_coord_logits,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )

    def class_specific_layers(self) -> list[nn.Module]:
        """Return the layers with a row of weights per class: the class heads and the embedding of noisy classes."""
        return [
            *self.class_embed,
            *self.model.query_selection.class_specific_layers(),
            *self.model.denoising.class_specific_layers(),
        ]

    @torch.no_grad()
    def reset_class_layers(self) -> None:
        """Reinitialize the class heads and the label embedding of the denoising queries.

        Call it on a loaded model before fine-tuning it on other classes. `from_pretrained(...,
        ignore_mismatched_sizes=True)` does the same, but only where the number of classes differs.
        """
        for layer in self.class_specific_layers():
            initialize(layer, force=True)

    def predict_classes(self, hidden_states: torch.Tensor, layers: range) -> torch.Tensor:
        """Return the class logits of some decoder layers, for matching or for denoising queries.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, decoder_layers, number of queries, d_model)`)
            layers (`range`): Indices of the layers.

        Returns:
            `torch.Tensor` of shape `(batch_size, len(layers), number of queries, num_labels)`.
        """
        logits = [get_layer_head(self.class_embed, layer)(hidden_states[:, layer]) for layer in layers]
        return torch.stack(logits, dim=1)

    def compute_loss(
        self,
        logits: torch.Tensor,
        boxes: torch.Tensor,
        outputs: DinoDetrModelOutput,
        labels: list[dict[str, torch.Tensor]],
        effective_batch: DinoDetrEffectiveBatch,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss and its terms; the selected encoder tokens are supervised like one more decoder layer."""
        if outputs.enc_outputs_class is not None:
            logits = torch.cat([outputs.enc_outputs_class[:, None], logits], dim=1)
            boxes = torch.cat([outputs.enc_outputs_coord_logits.sigmoid()[:, None], boxes], dim=1)
        # Not averaged over processes in evaluation, which may run on one process alone.
        num_boxes = effective_batch.num_boxes or get_num_boxes(labels, logits.device, average=self.training)
        denoising = outputs.denoising
        layers = self.supervised_layers
        return self.loss_function(
            logits=logits,
            pred_boxes=boxes,
            denoising_logits=self.predict_classes(denoising.intermediate_hidden_states, layers),
            denoising_boxes=denoising.intermediate_boxes[:, layers.start : layers.stop],
            denoising_object_index=denoising.object_index,
            num_denoising_groups=denoising.num_groups,
            labels=labels,
            config=self.config,
            num_boxes=num_boxes,
        )


AUTO_MAP = {
    "AutoConfig": f"configuration_dino_detr.{DinoDetrConfig.__name__}",
    "AutoModel": f"modeling_dino_detr.{DinoDetrModel.__name__}",
    "AutoModelForObjectDetection": f"modeling_dino_detr.{DinoDetrForObjectDetection.__name__}",
}
DinoDetrModel.register_for_auto_class("AutoModel")
DinoDetrForObjectDetection.register_for_auto_class("AutoModelForObjectDetection")

__all__ = ["DinoDetrForObjectDetection", "DinoDetrModel", "DinoDetrPreTrainedModel"]
