"""Denoising queries: noisy copies of the objects, which the decoder is trained to restore without matching.

Papers: DN-DETR, https://arxiv.org/abs/2203.01305, section 4; DINO, https://arxiv.org/abs/2203.03605, section 3.3.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from .boxes_dino_detr import at_least_float32, inverse_sigmoid
from .configuration_dino_detr import DinoDetrConfig
from .initialization_dino_detr import init_as, normal_embedding


NO_OBJECT = -1  # index of the object of a query that is matched to none
NOT_SUPERVISED = -2  # of a query that no loss reads


class DinoDetrDenoisingQueries(NamedTuple):
    r"""
    Denoising queries, which precede the matching queries. `num_denoising_queries` is zero outside training and for
    `denoising="none"`. Otherwise it is the same for all images of a batch: an image with fewer objects than another,
    or than the `max_num_objects` of [`DinoDetrEffectiveBatch`], gets empty queries too.

    Args:
        inputs_embeds (`torch.Tensor` of shape `(batch_size, num_denoising_queries, d_model)`):
            Embedded noisy classes; zero for empty queries.
        reference_points (`torch.Tensor` of shape `(batch_size, num_denoising_queries, 4)`):
            Noisy boxes: center x, center y, width, height, fractions of the unpadded image.
        object_index (`torch.Tensor` of shape `(batch_size, num_denoising_queries)` and dtype int64):
            Index of the object that a positive query is a copy of; -1 for negative and, if contrastive, for empty
            queries; -2 for the empty queries of `denoising="plain"`, which no loss reads.
        num_groups (`int`):
            Number of groups, each with a positive and, if contrastive, a negative copy of every object; at least 1,
            even if the groups are empty.
        matching_queries (`torch.Tensor` of shape `(batch_size, num_matching_queries, d_model)`):
            Contents of the matching queries; if `denoising="plain"`, told apart by their last number.
    """

    inputs_embeds: torch.Tensor
    reference_points: torch.Tensor
    object_index: torch.Tensor
    num_groups: int
    matching_queries: torch.Tensor


def denoising_attention_mask(
    num_groups: int, group_size: int, num_matching_queries: int, device: torch.device | None = None
) -> torch.Tensor:
    """Return which query may attend to which in the decoder's self-attention.

    Denoising queries contain the ground truth. So that it cannot leak, a matching query attends to no denoising query
    and a denoising query to no other group. Denoising queries attend to the matching queries, which
    contain no ground truth.

    Args:
        num_groups (`int`):
            Number of denoising groups, each with a positive and, if contrastive, a negative copy of every object.
        group_size (`int`):
            Queries per group: the maximum number of objects per image, twice that if contrastive.
        num_matching_queries (`int`): Matching queries, which follow the denoising ones.
        device (`torch.device`, *optional*): Where to make the mask.

    Returns:
        `torch.Tensor` of shape `(num_total_queries, num_total_queries)` and dtype bool, with `num_total_queries =
        num_groups * group_size + num_matching_queries`; `True` where the query of that row may attend to the query of
        that column.

    Example:

    ```python
    >>> denoising_attention_mask(num_groups=2, group_size=1, num_matching_queries=1).int().tolist()
    [[1, 0, 1], [0, 1, 1], [0, 0, 1]]

    ```
    """
    group = torch.arange(num_groups, device=device).repeat_interleave(group_size)
    group = torch.cat([group, group.new_full((num_matching_queries,), num_groups)])  # the last group
    return (group[:, None] == group[None, :]) | (group[None, :] == num_groups)


def make_decoder_attention_mask(
    denoising: DinoDetrDenoisingQueries, num_matching_queries: int, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return `denoising_attention_mask` as it is added to the scores of self-attention, or `None` if it hides nothing.

    Its size is quadratic in the number of queries. Outside training there are no denoising queries to be hidden.

    Args:
        denoising ([`DinoDetrDenoisingQueries`]): The denoising queries, which may be none.
        num_matching_queries (`int`): Matching queries, which follow the denoising ones.
        dtype (`torch.dtype`): A floating-point type.

    Returns:
        `torch.Tensor` of shape `(1, 1, num_total_queries, num_total_queries)`, *optional*, with `num_total_queries =
        num_denoising_queries + num_matching_queries`: 0 where a query may attend, the lowest finite value elsewhere.
    """
    if not (num_denoising := denoising.inputs_embeds.shape[1]):
        return None
    group_size = num_denoising // denoising.num_groups
    # The queries' device, not the model's: offloaded weights are on the meta device.
    device = denoising.inputs_embeds.device
    can_attend = denoising_attention_mask(denoising.num_groups, group_size, num_matching_queries, device)
    min_value = torch.finfo(dtype).min  # finite, because a row of -inf would be NaN
    return torch.zeros_like(can_attend, dtype=dtype).masked_fill_(~can_attend, min_value)[None, None]


def contrastive_box_noise(boxes: torch.Tensor, scale: float) -> torch.Tensor:
    """Move the corners of boxes: up to λ for the positive copy, between λ and 2 λ for the negative one (DINO, 3.3).

    Args:
        boxes (`torch.Tensor` of shape `(batch_size, num_groups, 2, num_objects, 4)`):
            Positive copies, then negative ones, along the third axis. Center x, center y, width, height; fractions.
        scale (`float`): λ, as a fraction of half the width and height of the box.

    Returns:
        `torch.Tensor` of the same shape. Corners are clamped to the image. A negative copy's corner can cross the
        opposite one, which gives a negative width or height. `inverse_sigmoid` later clamps it to its lower bound of
        1e-3, as in the official implementation.
    """
    centers, half_sizes = boxes[..., None, :2], boxes[..., None, 2:] / 2
    corner_direction = 2 * torch.arange(2, device=boxes.device)[:, None] - 1  # top left, bottom right
    corners = centers + corner_direction * half_sizes  # (batch, groups, 2 copies, objects, 2 corners, x y)
    min_noise = torch.arange(2, device=boxes.device)[:, None, None, None]  # 0 for positive copies, 1 for negative ones
    sign = torch.randint_like(corners, 2) * 2 - 1
    corners = corners + sign * (torch.rand_like(corners) + min_noise) * half_sizes * scale
    top_left, bottom_right = corners.clamp(0, 1).unbind(-2)
    return torch.cat([(top_left + bottom_right) / 2, bottom_right - top_left], dim=-1)


def plain_box_noise(boxes: torch.Tensor, scale: float) -> torch.Tensor:
    """Shift centers by up to λ times half the width and height, and scale both by 1 ± λ (DN-DETR, section 4.2).

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`): Center x, center y, width, height; fractions.
        scale (`float`): λ, both λ₁ and λ₂ of the paper.

    Returns:
        `torch.Tensor` of the same shape, clamped to [0, 1].
    """
    max_change = torch.cat([boxes[..., 2:] / 2, boxes[..., 2:]], dim=-1)
    return (boxes + (2 * torch.rand_like(boxes) - 1) * max_change * scale).clamp(0, 1)


def empty_denoising_queries(matching_queries: torch.Tensor) -> DinoDetrDenoisingQueries:
    """Return zero denoising queries for matching queries of shape `(batch_size, num_matching_queries, d_model)`."""
    empty = matching_queries[:, :0]
    return DinoDetrDenoisingQueries(
        inputs_embeds=empty,
        reference_points=empty.new_zeros(empty.shape[0], 0, 4, dtype=torch.float32),
        object_index=empty.new_zeros(empty.shape[0], 0, dtype=torch.int64),
        num_groups=1,
        matching_queries=matching_queries,
    )


class DinoDetrNoDenoising(nn.Module):
    """Deformable DETR and DAB-DETR: training without denoising queries."""

    def __init__(self, config: DinoDetrConfig):
        super().__init__()

    def class_specific_layers(self) -> list[nn.Module]:
        return []

    def forward(
        self, labels: list[dict[str, torch.Tensor]] | None, matching_queries: torch.Tensor, max_num_objects: int = 0
    ) -> DinoDetrDenoisingQueries:
        return empty_denoising_queries(matching_queries)


class DinoDetrDenoising(nn.Module):
    """Make groups of noisy queries, each with a positive and, if contrastive, a negative copy of every object."""

    copies_per_object: int  # within a group; the first copy is the positive one
    empty_slot: int  # object index of a query without an object
    label_noise_factor: float  # fraction of `label_noise_ratio` that is the probability of replacing a class
    add_box_noise: Callable[[torch.Tensor, float], torch.Tensor]

    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        self.num_denoising = config.num_denoising
        self.num_denoising_groups = config.num_denoising_groups
        self.num_labels = config.num_labels
        self.label_noise_probability = config.label_noise_ratio * self.label_noise_factor
        self.box_noise_scale = config.box_noise_scale
        self.label_embed = init_as(normal_embedding, nn.Embedding(config.num_labels, config.d_model))

    def class_specific_layers(self) -> list[nn.Module]:
        """Return the layers with a row of weights per class."""
        return [self.label_embed]

    def get_num_groups(self, max_objects: int) -> int:
        """Return the number of groups, given the largest number of objects of an image."""
        raise NotImplementedError

    def indicate(self, contents: torch.Tensor, indicator: float) -> torch.Tensor:
        """Return contents that tell denoising queries, 1, from matching queries, 0, if the strategy does so."""
        raise NotImplementedError

    def forward(
        self, labels: list[dict[str, torch.Tensor]] | None, matching_queries: torch.Tensor, max_num_objects: int = 0
    ) -> DinoDetrDenoisingQueries:
        """
        Args:
            labels (`list[dict[str, torch.Tensor]]`, *optional*): Per image `class_labels` `(num_objects,)` and
                `boxes` `(num_objects, 4)` as fractions of the unpadded image. Without labels there are no queries.
                With labels but without objects there are none either, or only empty ones if `max_num_objects` is
                positive; the label embedding is called all the same, so that it gets a gradient of zero, which
                data-parallel training needs.
            matching_queries (`torch.Tensor` of shape `(batch_size, num_matching_queries, d_model)`):
                The content queries that follow the denoising queries.
            max_num_objects (`int`, *optional*, defaults to 0):
                Make as many queries as for an image with this number of objects, even if no image of the batch has
                that many; see [`DinoDetrEffectiveBatch`].
        """
        matching_queries = self.indicate(matching_queries, 0.0)
        if not labels:
            return empty_denoising_queries(matching_queries)
        device = matching_queries.device
        sampled = [sample_objects(len(label["boxes"]), self.num_denoising, device) for label in labels]
        min_slots = min(max_num_objects, self.num_denoising)
        object_index = pad_and_stack(sampled, min_slots, self.empty_slot)
        boxes = pad_and_stack([label["boxes"][index] for label, index in zip(labels, sampled)], min_slots)
        classes = pad_and_stack([label["class_labels"][index] for label, index in zip(labels, sampled)], min_slots)

        batch_size, max_objects = object_index.shape
        num_groups = self.get_num_groups(max_objects)
        slots = (batch_size, num_groups, self.copies_per_object, max_objects)
        object_index, classes = object_index[:, None, None].expand(slots), classes[:, None, None].expand(slots)
        boxes = at_least_float32(boxes)[:, None, None].expand(*slots, 4)
        is_object = (object_index > NO_OBJECT)[..., None]
        is_positive = torch.arange(self.copies_per_object, device=device)[:, None] == 0

        contents = self.indicate(self.label_embed(self.add_label_noise(classes)), 1.0) * is_object
        # An empty slot has logits of zero, which is the box (0.5, 0.5, 0.5, 0.5).
        box_logits = inverse_sigmoid(self.add_box_noise(boxes, self.box_noise_scale)) * is_object
        return DinoDetrDenoisingQueries(
            inputs_embeds=contents.flatten(1, 3),
            reference_points=box_logits.sigmoid().flatten(1, 3),
            object_index=object_index.masked_fill(~is_positive, NO_OBJECT).flatten(1),
            num_groups=num_groups,
            matching_queries=matching_queries,
        )

    def add_label_noise(self, classes: torch.Tensor) -> torch.Tensor:
        """Replace some classes by uniformly sampled ones, which can be the same again."""
        is_noised = torch.rand(classes.shape, device=classes.device) < self.label_noise_probability
        return torch.where(is_noised, torch.randint_like(classes, self.num_labels), classes)


class DinoDetrContrastiveDenoising(DinoDetrDenoising):
    """DINO: for each positive query a negative one with more noise, which is trained to predict "no object"."""

    copies_per_object = 2
    empty_slot = NO_OBJECT
    label_noise_factor = 0.5
    add_box_noise = staticmethod(contrastive_box_noise)

    def get_num_groups(self, max_objects: int) -> int:
        return max(1, self.num_denoising // max(1, max_objects))

    def indicate(self, contents: torch.Tensor, indicator: float) -> torch.Tensor:
        return contents


class DinoDetrPlainDenoising(DinoDetrDenoising):
    """DN-DETR: positive queries only, in a fixed number of groups, told from matching queries by an indicator."""

    copies_per_object = 1
    empty_slot = NOT_SUPERVISED
    label_noise_factor = 1.0
    add_box_noise = staticmethod(plain_box_noise)

    def get_num_groups(self, max_objects: int) -> int:
        return self.num_denoising_groups

    def indicate(self, contents: torch.Tensor, indicator: float) -> torch.Tensor:
        """Replace the last number of contents by the indicator (DN-DETR, section 4, label embedding)."""
        return nn.functional.pad(contents[..., :-1], (0, 1), value=indicator)


def pad_and_stack(tensors: list[torch.Tensor], min_length: int, padding_value: int = 0) -> torch.Tensor:
    """Stack tensors of different lengths, padded to the longest of them or to `min_length` if that is longer.

    Example:

    ```python
    >>> pad_and_stack([torch.tensor([1, 2]), torch.tensor([3])], min_length=3).tolist()
    [[1, 2, 0], [3, 0, 0]]

    ```
    """
    filler = tensors[0].new_empty(min_length, *tensors[0].shape[1:])
    return pad_sequence([*tensors, filler], batch_first=True, padding_value=padding_value)[:-1]


def sample_objects(count: int, limit: int, device: torch.device) -> torch.Tensor:
    """Return the indices of all objects of an image or, if there are more than `limit`, of a random sample of them.

    Without the limit, one crowded image would make twice as many queries as it has objects, at a cost that is
    quadratic in self-attention.
    """
    if count <= limit:
        return torch.arange(count, device=device)
    return torch.randperm(count, device=device)[:limit]


DENOISING_STRATEGIES: dict[str, type[DinoDetrDenoising] | type[DinoDetrNoDenoising]] = {
    "contrastive": DinoDetrContrastiveDenoising,
    "plain": DinoDetrPlainDenoising,
    "none": DinoDetrNoDenoising,
}
