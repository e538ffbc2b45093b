"""Turn the encoder's memory into object queries, by the query selections that the DINO paper compares.

Papers: DINO, https://arxiv.org/abs/2203.03605, section 3.4 and figure 5; Deformable DETR,
https://arxiv.org/abs/2010.04159, appendix A.4 (two-stage); DAB-DETR, https://arxiv.org/abs/2201.12329.
"""

from typing import NamedTuple

import torch
from torch import nn

from .backbone_dino_detr import DinoDetrFeatureLevels
from .boxes_dino_detr import at_least_float32
from .configuration_dino_detr import DinoDetrConfig
from .initialization_dino_detr import init_as, normal_embedding, xavier, xavier_embedding
from .prediction_heads_dino_detr import make_bbox_head, make_class_head
from .reference_points_dino_detr import normalized_cell_centers


PROPOSAL_BASE_SIZE = 0.05  # fraction of the image on the finest level; doubled on each coarser level

# A proposal in the padding, or with a coordinate not farther than 0.01 from 0 or 1, is invalid. As in the official
# implementation it is still scored, but its memory is zeroed, and its box is (1, 1, 1, 1): its logits are infinite, so
# no output of the box head changes them.
# Of 50 cells, the centers of the first and the last are exactly 0.01 and 0.99. The millionth decides for every runtime
# what would depend on the rounding of a division, which OpenVINO computes as 49.5 * (1 / 50) < 0.99. It changes no
# other proposal of maps of up to 9,000 cells.
PROPOSAL_MARGIN = 0.01 + 1e-6


class DinoDetrObjectQueries(NamedTuple):
    r"""
    Args:
        inputs_embeds (`torch.Tensor` of shape `(batch_size, num_queries, d_model)`): Content queries.
        reference_points (`torch.Tensor` of shape `(batch_size, num_queries, 4)`):
            Initial boxes: center x, center y, width, height, fractions of the unpadded image.
        enc_outputs_class (`torch.Tensor` of shape `(batch_size, num_queries, num_labels)`, *optional*):
            Class logits of the selected encoder tokens; `None` for `query_selection="static"`.
        enc_outputs_coord_logits (`torch.Tensor` of shape `(batch_size, num_queries, 4)`, *optional*):
            Box logits of the selected encoder tokens.
    """

    inputs_embeds: torch.Tensor
    reference_points: torch.Tensor
    enc_outputs_class: torch.Tensor | None = None
    enc_outputs_coord_logits: torch.Tensor | None = None


def gen_encoder_output_proposals(levels: DinoDetrFeatureLevels) -> tuple[torch.Tensor, torch.Tensor]:
    """Generate one candidate box per token: centered on its cell, twice as large on each coarser level.

    Args:
        levels ([`DinoDetrFeatureLevels`]): Only shapes, mask and valid ratios are read.

    Returns:
        The boxes, `(batch_size, sequence_length, 4)`: center x, center y, width, height as fractions of the unpadded
        image; and the mask of valid ones, `(batch_size, sequence_length)` bool: not in the padding, and all four
        values between `PROPOSAL_MARGIN` and 1 − `PROPOSAL_MARGIN`.
    """
    # Rounded to whole cells: the rounding error of a ratio could move a proposal across PROPOSAL_MARGIN.
    centers = normalized_cell_centers(levels, round_sizes=True)
    sizes = [
        centers.new_full((height * width, 2), PROPOSAL_BASE_SIZE * 2**level)
        for level, (height, width) in enumerate(levels.spatial_shapes_list)
    ]
    proposals = torch.cat([centers, torch.cat(sizes).expand_as(centers)], dim=-1)
    inside = ((proposals > PROPOSAL_MARGIN) & (proposals < 1 - PROPOSAL_MARGIN)).all(dim=-1)
    return proposals, inside & levels.mask


class DinoDetrTwoStageQuerySelection(nn.Module):
    """Score every encoder token, refine the proposals of the `num_queries` best and start the queries from them."""

    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        self.num_queries = config.num_queries
        self.enc_output = init_as(xavier, nn.Linear(config.d_model, config.d_model))
        self.enc_output_norm = nn.LayerNorm(config.d_model)
        self.num_labels = config.num_labels
        self.class_embed = make_class_head(config.d_model, config.num_labels + config.num_ranking_labels)
        self.bbox_embed = make_bbox_head(config.d_model)

    def content_queries_from(self, selected_tokens: torch.Tensor) -> torch.Tensor:
        """Return the content queries, `(batch_size, num_queries, d_model)`, for the selected tokens of that shape."""
        raise NotImplementedError

    def class_specific_layers(self) -> list[nn.Module]:
        """Return the layers with a row of weights per class."""
        return [self.class_embed]

    def forward(self, memory: torch.Tensor, levels: DinoDetrFeatureLevels) -> DinoDetrObjectQueries:
        """
        Args:
            memory (`torch.Tensor` of shape `(batch_size, sequence_length, d_model)`): The encoder's output.
            levels ([`DinoDetrFeatureLevels`]): Shapes, mask and valid ratios of the levels.

        Raises:
            ValueError: If there are fewer tokens than queries to select.
        """
        if memory.shape[1] < self.num_queries:
            raise ValueError(
                f"the images have {memory.shape[1]} encoder tokens, too few to choose "
                f"num_queries={self.num_queries} from: use larger images (the image processor's `size`) or a "
                f"smaller num_queries"
            )
        proposals, valid_mask = gen_encoder_output_proposals(levels)
        tokens = self.enc_output_norm(self.enc_output(memory.masked_fill(~valid_mask[..., None], 0.0)))
        token_logits = self.class_embed(tokens)
        best = token_logits.amax(dim=-1).topk(self.num_queries, dim=1).indices  # (batch, num_queries)

        selected_tokens = _gather_tokens(tokens, best)
        proposal_logits = torch.logit(proposals).masked_fill(~valid_mask[..., None], float("inf"))
        box_logits = at_least_float32(self.bbox_embed(selected_tokens)) + _gather_tokens(proposal_logits, best)
        return DinoDetrObjectQueries(
            inputs_embeds=self.content_queries_from(selected_tokens),
            reference_points=box_logits.detach().sigmoid(),
            enc_outputs_class=_gather_tokens(token_logits, best)[..., : self.num_labels],
            enc_outputs_coord_logits=box_logits,
        )


class DinoDetrMixedQuerySelection(DinoDetrTwoStageQuerySelection):
    """DINO: positions from the best tokens, learned contents, because a token may cover several objects or a part."""

    def __init__(self, config: DinoDetrConfig):
        super().__init__(config)
        self.content_queries = init_as(xavier_embedding, nn.Embedding(config.num_queries, config.d_model))

    def content_queries_from(self, selected_tokens: torch.Tensor) -> torch.Tensor:
        return _expand_embedding(self.content_queries, selected_tokens.shape[0], selected_tokens.device)


class DinoDetrPureQuerySelection(DinoDetrTwoStageQuerySelection):
    """Pure query selection of the DINO paper's comparison: positions and contents from the best tokens.

    Two-stage Deformable DETR differs: it makes both halves of a query from the sine embedding of the refined proposal.
    """

    def content_queries_from(self, selected_tokens: torch.Tensor) -> torch.Tensor:
        return selected_tokens.detach()


class DinoDetrStaticQuerySelection(nn.Module):
    """DAB-DETR: anchors and contents are learned and the same for every image."""

    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        self.content_queries = init_as(xavier_embedding, nn.Embedding(config.num_queries, config.d_model))
        self.anchors = init_as(normal_embedding, nn.Embedding(config.num_queries, 4))  # logits of boxes

    def class_specific_layers(self) -> list[nn.Module]:
        return []

    def forward(self, memory: torch.Tensor, levels: DinoDetrFeatureLevels) -> DinoDetrObjectQueries:
        batch_size, device = memory.shape[0], memory.device
        return DinoDetrObjectQueries(
            inputs_embeds=_expand_embedding(self.content_queries, batch_size, device),
            reference_points=at_least_float32(_expand_embedding(self.anchors, batch_size, device)).sigmoid(),
        )


def _expand_embedding(embedding: nn.Embedding, batch_size: int, device: torch.device) -> torch.Tensor:
    """Return all rows of an embedding for each image, `(batch_size, num_queries, embedding_dim)`.

    The embedding is called, not its weight read, because only a call loads offloaded weights.
    """
    rows = embedding(torch.arange(embedding.num_embeddings, device=device))
    return rows.expand(batch_size, -1, -1)


def _gather_tokens(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather the values, `(batch_size, sequence_length, dim)`, of the tokens `index`, `(batch_size, num_queries)`."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


QUERY_SELECTIONS: dict[str, type[DinoDetrTwoStageQuerySelection] | type[DinoDetrStaticQuerySelection]] = {
    "mixed": DinoDetrMixedQuerySelection,
    "pure": DinoDetrPureQuerySelection,
    "static": DinoDetrStaticQuerySelection,
}
