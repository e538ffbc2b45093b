"""From encoder memory to object queries: proposals, the best of them, and the three ways to make queries of them.

Papers: two-stage Deformable DETR, https://arxiv.org/abs/2010.04159, appendix A.4; DINO,
https://arxiv.org/abs/2203.03605, section 3.4 and figure 5; DAB-DETR, https://arxiv.org/abs/2201.12329.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from .backbone_dino_detr import DinoDetrFeatureLevels, cell_centers
from .boxes_dino_detr import at_least_float32, make_bbox_head, make_class_head
from .configuration_dino_detr import DinoDetrConfig
from .initialization_dino_detr import init_as


PROPOSAL_SIDE = 0.05  # of the image, on the finest level; doubled on each coarser one
PROPOSAL_BORDER = 0.01  # a proposal that comes closer than this to 0 or 1 with any of its numbers is not used


@dataclass
class DinoDetrObjectQueries(ModelOutput):
    r"""
    Args:
        inputs_embeds (`torch.Tensor` of shape `(batch_size, num_queries, d_model)`): Content queries.
        reference_points (`torch.Tensor` of shape `(batch_size, num_queries, 4)`):
            First boxes: center x, center y, width, height, fractions of the unpadded image.
        enc_outputs_class (`torch.Tensor` of shape `(batch_size, num_queries, num_labels)`, *optional*):
            Class logits of the chosen encoder tokens; `None` if queries do not come from tokens.
        enc_outputs_coord_logits (`torch.Tensor` of shape `(batch_size, num_queries, 4)`, *optional*):
            Box logits of the chosen encoder tokens.
    """

    inputs_embeds: torch.Tensor = None
    reference_points: torch.Tensor = None
    enc_outputs_class: torch.Tensor | None = None
    enc_outputs_coord_logits: torch.Tensor | None = None


def gen_encoder_output_proposals(levels: DinoDetrFeatureLevels) -> tuple[torch.Tensor, torch.Tensor]:
    """One candidate box per memory position: centered on its cell, twice as large on each coarser level.

    Args:
        levels ([`DinoDetrFeatureLevels`]): Only shapes, mask and valid ratios are read.

    Returns:
        The boxes, `(batch_size, sequence_length, 4)`: center x, center y, width, height as fractions of the unpadded
        image; and which may be used, `(batch_size, sequence_length)` bool: neither padding nor close to the border.
    """
    boxes = []
    for level, (height, width) in enumerate(levels.spatial_shapes_list):
        # Whole cells: a ratio's rounding error could carry a proposal across PROPOSAL_BORDER.
        valid_size = (levels.valid_ratios[:, level] * levels.spatial_shapes[level].flip(0)).round()
        centers = cell_centers(height, width, levels.mask.device) / valid_size[:, None]
        sides = torch.full_like(centers, PROPOSAL_SIDE * 2**level)
        boxes.append(torch.cat([centers, sides], dim=-1))
    proposals = torch.cat(boxes, dim=1)
    inside = ((proposals > PROPOSAL_BORDER) & (proposals < 1 - PROPOSAL_BORDER)).all(dim=-1)
    return proposals, inside & levels.mask


class DinoDetrTwoStageQuerySelection(nn.Module):
    """Score every encoder token, refine the boxes of the best `num_queries`, and start the queries there."""

    contents: Callable[[torch.Tensor], torch.Tensor]  # of the chosen tokens, by the strategy

    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        self.num_queries = config.num_queries
        self.enc_output = init_as("xavier", nn.Linear(config.d_model, config.d_model))
        self.enc_output_norm = nn.LayerNorm(config.d_model)
        self.class_embed = make_class_head(config.d_model, config.num_labels)
        self.bbox_embed = make_bbox_head(config.d_model)

    def forward(self, memory: torch.Tensor, levels: DinoDetrFeatureLevels) -> DinoDetrObjectQueries:
        """
        Args:
            memory (`torch.Tensor` of shape `(batch_size, sequence_length, d_model)`): The encoder's output.
            levels ([`DinoDetrFeatureLevels`]): Where the memory's positions lie.

        Raises:
            ValueError: If there are fewer positions than queries to choose.
        """
        if memory.shape[1] < self.num_queries:
            raise ValueError(
                f"the images have {memory.shape[1]} feature positions, too few to choose "
                f"num_queries={self.num_queries} from: use larger images (the image processor's `size`) or a "
                f"smaller num_queries"
            )
        proposals, usable = gen_encoder_output_proposals(levels)
        tokens = self.enc_output_norm(self.enc_output(memory.masked_fill(~usable[..., None], 0.0)))
        token_logits = self.class_embed(tokens)
        best = token_logits.amax(dim=-1).topk(self.num_queries, dim=1).indices  # (batch, num_queries)

        chosen_tokens = _take(tokens, best)
        # Proposals that may not be used lie at infinity, whence no finite change moves them: they become (1, 1, 1, 1).
        proposal_logits = torch.logit(proposals).masked_fill(~usable[..., None], float("inf"))
        box_logits = at_least_float32(self.bbox_embed(chosen_tokens)) + _take(proposal_logits, best)
        return DinoDetrObjectQueries(
            inputs_embeds=self.contents(chosen_tokens),
            reference_points=box_logits.detach().sigmoid(),
            enc_outputs_class=_take(token_logits, best),
            enc_outputs_coord_logits=box_logits,
        )


class DinoDetrMixedQuerySelection(DinoDetrTwoStageQuerySelection):
    """DINO: positions from the best tokens, contents learned: a token may cover several objects, or part of one."""

    def __init__(self, config: DinoDetrConfig):
        super().__init__(config)
        self.content_queries = init_as("xavier_embedding", nn.Embedding(config.num_queries, config.d_model))

    def contents(self, chosen_tokens: torch.Tensor) -> torch.Tensor:
        return _learned(self.content_queries, chosen_tokens)


class DinoDetrPureQuerySelection(DinoDetrTwoStageQuerySelection):
    """Two-stage Deformable DETR: positions and contents from the best tokens."""

    def contents(self, chosen_tokens: torch.Tensor) -> torch.Tensor:
        return chosen_tokens.detach()


class DinoDetrStaticQuerySelection(nn.Module):
    """DAB-DETR: anchors and contents are learned and the same for every image."""

    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        self.content_queries = init_as("xavier_embedding", nn.Embedding(config.num_queries, config.d_model))
        self.anchors = init_as("normal", nn.Embedding(config.num_queries, 4))  # logits of boxes

    def forward(self, memory: torch.Tensor, levels: DinoDetrFeatureLevels) -> DinoDetrObjectQueries:
        return DinoDetrObjectQueries(
            inputs_embeds=_learned(self.content_queries, memory),
            reference_points=at_least_float32(_learned(self.anchors, memory)).sigmoid(),
        )


def _learned(table: nn.Embedding, memory: torch.Tensor) -> torch.Tensor:
    """All rows of a table for each image: `(batch_size, num_queries, width)`.

    Looked up, since only a call brings weights that were offloaded.
    """
    rows = table(torch.arange(table.num_embeddings, device=memory.device))
    return rows.expand(len(memory), -1, -1)


def _take(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `index`, `(batch, chosen)`, of `rows`, `(batch, sequence, width)`."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


QUERY_SELECTIONS = {
    "mixed": DinoDetrMixedQuerySelection,
    "pure": DinoDetrPureQuerySelection,
    "static": DinoDetrStaticQuerySelection,
}
