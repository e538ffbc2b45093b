"""DN-DETR with dense attention: DAB-DETR, which in training also restores noisy copies of the objects.

Paper: DN-DETR, https://arxiv.org/abs/2203.01305. Official implementation: IDEA-Research/DN-DETR, models/DN_DAB_DETR.
The backbone, encoder and decoder are those of DAB-DETR in transformers. The denoising queries and the loss are DINO's.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import DabDetrConfig, DabDetrForObjectDetection
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.dab_detr.modeling_dab_detr import DabDetrDecoderOutput, DabDetrObjectDetectionOutput
from transformers.utils import can_return_tuple

from ..boxes_dino_detr import refine_bboxes
from ..denoising_dino_detr import DinoDetrDenoisingQueries, DinoDetrPlainDenoising, make_decoder_attention_mask
from ..initialization_dino_detr import class_prior, init_as, initialize, normal_embedding
from ..loss_dino_detr import DinoDetrEffectiveBatch, check_labels, dino_detr_loss, get_num_boxes
from .initialization import RULES, initialize_as_authors


# The bound of DAB-DETR in transformers, so that evaluation equals it; DINO's is 1e-3.
BOX_EPSILON = 1e-5


@strict
class DnDetrConfig(DabDetrConfig):
    r"""
    Configuration of [`DnDetrForObjectDetection`]: that of DAB-DETR in transformers, and the fields of denoising. The
    defaults are the published ones of DN-DETR with a ResNet-50, also those that differ from transformers' DAB-DETR.

    Args:
        dropout (`float`, *optional*, defaults to 0.0): Dropout in all layers of the transformer.
        auxiliary_loss (`bool`, *optional*, defaults to `True`): Train all decoder layers instead of the last one only.
        initializer_bias_prior_prob (`float`, *optional*, defaults to 0.01):
            Probability of each class that a new class head gives to every query.
        cls_loss_coefficient (`float`, *optional*, defaults to 1.0):
            Weight of the class loss. transformers' DAB-DETR does not read it and uses 1.
        focal_gamma (`float`, *optional*, defaults to 2.0): γ of the focal loss and of the matching's focal cost.
        num_denoising (`int`, *optional*, defaults to 100):
            Maximum number of objects of an image that get noisy copies; of more objects, some are sampled.
        num_denoising_groups (`int`, *optional*, defaults to 5): Number of groups, each with a copy of every object.
        label_noise_ratio (`float`, *optional*, defaults to 0.2):
            Probability of replacing the class of a copy by a random one.
        box_noise_scale (`float`, *optional*, defaults to 0.4):
            Noise of boxes: centers move by up to this fraction of half the size, and sizes change by this fraction.
    """

    model_type = "dn_detr"
    attribute_map = DabDetrConfig.attribute_map | {"d_model": "hidden_size"}

    dropout: float | int = 0.0
    auxiliary_loss: bool = True
    initializer_bias_prior_prob: float | None = 0.01
    cls_loss_coefficient: float | int = 1.0
    focal_gamma: float | int = 2.0
    num_denoising: int = 100
    num_denoising_groups: int = 5
    label_noise_ratio: float | int = 0.2
    box_noise_scale: float | int = 0.4

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.validate_architecture()  # `@strict` calls it too, but wraps the error

    def validate_architecture(self) -> None:
        """Check the fields of denoising, and that there are no patterns. Called by `@strict`.

        Raises:
            ValueError: If a value is not allowed, naming the field, the value and the allowed ones.
        """
        super().validate_architecture()
        for field, lowest, highest in (
            ("num_denoising", 1, float("inf")),
            ("num_denoising_groups", 1, float("inf")),
            ("label_noise_ratio", 0, 1),
            ("box_noise_scale", 0, float("inf")),
            ("num_patterns", 0, 0),  # they would replace the content by which queries know that they are no copies
        ):
            if not lowest <= getattr(self, field) <= highest:
                raise ValueError(f"{field} must be between {lowest} and {highest}, got {getattr(self, field)}")


def add_attention_mask(self_attention: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Pass its mask to self-attention: a hook, because the decoder of transformers passes none to its layers."""
    return args, {**kwargs, "attention_mask": self_attention.denoising_mask}


class DnDetrForObjectDetection(DabDetrForObjectDetection):
    """DAB-DETR with denoising queries.

    In evaluation mode, or without labels, it is DAB-DETR, but the content of the queries is learned, "unknown class",
    and not zero. `from_pretrained` loads the weights of a DAB-DETR if it is given a [`DnDetrConfig`] as `config`; only
    the label embedding and that content are then new.

    Args:
        config ([`DnDetrConfig`]): Sizes, noise and the weights of the loss.
    """

    config_class = DnDetrConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: DnDetrConfig):
        super().__init__(config)
        self.denoising = DinoDetrPlainDenoising(config)
        # In the official implementation it is one more row of the label embedding.
        self.unknown_class = init_as(normal_embedding, nn.Embedding(1, config.hidden_size))
        # Otherwise transformers would select DETR's softmax loss by the name of this class.
        self.loss_function = dino_detr_loss
        for layer in self.model.decoder.layers:
            layer.self_attn.register_forward_pre_hook(add_attention_mask, with_kwargs=True)
        initialize_as_authors(self, RULES["dab-detr"])
        prior = config.initializer_bias_prior_prob or 1 / (config.num_labels + 1)
        initialize(init_as(class_prior, self.class_embed, probability=prior), force=True)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not initialize(module):
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        effective_batch: DinoDetrEffectiveBatch | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> DabDetrObjectDetectionOutput:
        """
        Args:
            pixel_values, pixel_mask, labels, effective_batch (*optional*): See [`DinoDetrForObjectDetection`].
            output_attentions, output_hidden_states (`bool`, *optional*):
                Whether to return them. In training mode, those of the decoder begin with the denoising queries.

        Raises:
            ValueError: If labels are invalid.
        """
        if labels is not None:
            check_labels(labels, len(pixel_values), self.config.num_labels, pixel_values.device)
        effective_batch = effective_batch or DinoDetrEffectiveBatch()
        contents = self.unknown_class.weight.expand(len(pixel_values), self.config.num_queries, -1)
        denoising = self.denoising(labels if self.training else None, contents, effective_batch.max_num_objects)
        recorded = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        encoded, decoded = self.encode_and_decode(pixel_values, pixel_mask, denoising, **recorded)

        # As in DAB-DETR, the earlier layers predict for the loss only.
        first_layer = 0 if labels is not None and self.config.auxiliary_loss else -1
        states, reference_points = decoded.intermediate_hidden_states, decoded.reference_points
        logits, boxes = self.predict(states[first_layer:], reference_points[first_layer:])
        loss, loss_dict = None, None
        if labels is not None:
            loss, loss_dict = self.compute_loss(logits, boxes, denoising, labels, effective_batch)
        num_denoising = denoising.inputs_embeds.shape[1]
        layers = [
            {"logits": layer_logits[:, num_denoising:], "pred_boxes": layer_boxes[:, num_denoising:]}
            for layer_logits, layer_boxes in zip(logits.unbind(1), boxes.unbind(1))
        ]
        return DabDetrObjectDetectionOutput(
            **layers.pop(),
            loss=loss,
            loss_dict=loss_dict,
            auxiliary_outputs=layers or None,
            last_hidden_state=decoded.last_hidden_state[:, num_denoising:],
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
        )

    def encode_and_decode(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor | None,
        denoising: DinoDetrDenoisingQueries,
        **recorded: bool | None,
    ) -> tuple[BaseModelOutput, DabDetrDecoderOutput]:
        """Return the outputs of the encoder, and of the decoder for the denoising and then the matching queries."""
        if pixel_mask is None:
            pixel_mask = torch.ones_like(pixel_values[:, 0])
        feature_maps, position_embeddings = self.model.backbone(pixel_values, pixel_mask)
        feature_map, mask = feature_maps[-1]
        features = self.model.input_projection(feature_map).flatten(2).transpose(1, 2)
        positions, mask = position_embeddings[-1].flatten(2).transpose(1, 2), mask.flatten(1)
        encoded = self.model.encoder(features, mask, positions, return_dict=True, **recorded)

        anchors = self.model.query_refpoint_embeddings.weight.expand(len(pixel_values), -1, -1)
        noisy_anchors = denoising.reference_points.logit().to(anchors.dtype)
        attention_mask = make_decoder_attention_mask(denoising, self.config.num_queries, self.dtype)
        for layer in self.model.decoder.layers:
            layer.self_attn.denoising_mask = attention_mask
        decoded = self.model.decoder(
            inputs_embeds=torch.cat([denoising.inputs_embeds, denoising.matching_queries], dim=1),
            query_position_embeddings=torch.cat([noisy_anchors, anchors], dim=1),
            encoder_hidden_states=encoded.last_hidden_state,
            memory_key_padding_mask=mask,
            object_queries=positions,
            return_dict=True,
            **recorded,
        )
        return encoded, decoded

    def predict(self, states: torch.Tensor, reference_points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and boxes `(batch_size, num_layers, num_total_queries, ...)`, given the layers' outputs."""
        boxes = refine_bboxes(reference_points, self.bbox_predictor(states), BOX_EPSILON)
        return self.class_embed(states).transpose(0, 1), boxes.transpose(0, 1)

    def compute_loss(
        self,
        logits: torch.Tensor,
        boxes: torch.Tensor,
        denoising: DinoDetrDenoisingQueries,
        labels: list[dict[str, torch.Tensor]],
        effective_batch: DinoDetrEffectiveBatch,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss and its terms, given the predictions for all queries; see `dino_detr_loss`."""
        lengths = [denoising.inputs_embeds.shape[1], self.config.num_queries]
        denoising_logits, logits = logits.split(lengths, dim=2)
        denoising_boxes, boxes = boxes.split(lengths, dim=2)
        return self.loss_function(
            logits=logits,
            pred_boxes=boxes,
            denoising_logits=denoising_logits,
            denoising_boxes=denoising_boxes,
            denoising_object_index=denoising.object_index,
            num_denoising_groups=denoising.num_groups,
            labels=labels,
            config=self.config,
            # Not averaged over processes in evaluation, which may run on one process alone.
            num_boxes=effective_batch.num_boxes or get_num_boxes(labels, logits.device, average=self.training),
        )


__all__ = ["DnDetrConfig", "DnDetrForObjectDetection"]
