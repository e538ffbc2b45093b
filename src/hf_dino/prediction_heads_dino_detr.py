"""Prediction heads, which turn a query or an encoder token into class logits and a change of its box.

Paper: DINO, https://arxiv.org/abs/2203.03605, figure 2; DETR, https://arxiv.org/abs/2005.12872, section 3.2.
"""

import torch
from torch import nn

from .configuration_dino_detr import DinoDetrConfig
from .initialization_dino_detr import InitRule, class_prior, init_as, pytorch_default, zeros


class DinoDetrMLPPredictionHead(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        dims (`list[int]`): Width of the input, of each hidden layer and of the output.
        rule (`InitRule`): Initializes all layers but the last.
        last_rule (`InitRule`): Initializes the last layer.
    """

    def __init__(self, dims: list[int], *, rule: InitRule, last_rule: InitRule):
        super().__init__()
        rules = [rule] * (len(dims) - 2) + [last_rule]
        self.layers = nn.ModuleList(
            init_as(rule, nn.Linear(dim_in, dim_out)) for rule, dim_in, dim_out in zip(rules, dims, dims[1:])
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states).relu()
        return self.layers[-1](hidden_states)


def make_bbox_head(d_model: int) -> DinoDetrMLPPredictionHead:
    """Make a head that predicts the change of a box's four logits. A new one predicts no change."""
    return DinoDetrMLPPredictionHead([d_model, d_model, d_model, 4], rule=pytorch_default, last_rule=zeros)


def make_class_head(d_model: int, num_labels: int) -> nn.Linear:
    """Make a head that predicts one logit per class. A new one gives every class a low probability."""
    return init_as(class_prior, nn.Linear(d_model, num_labels))


def num_prediction_heads(config: DinoDetrConfig) -> int:
    """Return the number of class heads, and of box heads, of the decoder: one for all layers, or one per layer."""
    return 1 if config.share_decoder_heads else config.decoder_layers


def get_layer_head(heads: nn.ModuleList, layer: int) -> nn.Module:
    """Return the head of a decoder layer, which may be shared by all of them."""
    return heads[layer % len(heads)]
