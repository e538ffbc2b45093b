"""Denoising queries: noisy copies of the objects, which the decoder learns to clean without any matching.

Papers: DN-DETR, https://arxiv.org/abs/2203.01305, section 4; DINO, https://arxiv.org/abs/2203.03605, section 3.3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import ModelOutput

from .boxes_dino_detr import at_least_float32, inverse_sigmoid
from .configuration_dino_detr import DinoDetrConfig
from .initialization_dino_detr import init_as


NO_OBJECT = -1


@dataclass(frozen=True)
class DinoDetrEffectiveBatch:
    """What a batch must know of the optimizer step that it is a part of to be learned as within one big batch.

    A step's images may come in several batches, in several processes and one after the other. The mean over the
    losses of these batches, and so over their gradients, is that of one batch of all images if each was given this.

    Attributes:
        num_boxes (`float`): Objects of an average batch: those of all batches, at least 1, divided by their number.
            The normalizer of every loss.
        max_num_objects (`int`): Objects of the fullest of all images, which decides how many denoising groups there are
            and how many queries each has.
    """

    num_boxes: float
    max_num_objects: int


@dataclass
class DinoDetrDenoisingQueries(ModelOutput):
    r"""
    Denoising queries come before the matching queries. There are none outside training and when no image has an
    object: then every tensor has a length of zero along `num_denoising_queries` and all goes on as usual.

    Args:
        inputs_embeds (`torch.Tensor` of shape `(batch_size, num_denoising_queries, d_model)`):
            Embedded noisy classes; zero where an image has fewer objects than the fullest one.
        reference_points (`torch.Tensor` of shape `(batch_size, num_denoising_queries, 4)`):
            Noisy boxes: center x, center y, width, height, fractions of the unpadded image.
        object_index (`torch.Tensor` of shape `(batch_size, num_denoising_queries)` and dtype int64):
            Which of its image's objects a positive query stands for; -1 for negative and for empty queries.
        num_groups (`int`): Groups, each a noisy copy of all objects.
    """

    inputs_embeds: torch.Tensor = None
    reference_points: torch.Tensor = None
    object_index: torch.Tensor = None
    num_groups: int | None = None


def denoising_attention_mask(
    num_groups: int, group_size: int, num_queries: int, device: torch.device | None = None
) -> torch.Tensor:
    """Say which query may look at which in the decoder's self-attention.

    Denoising queries carry the answer, so two leaks are closed: a matching query sees no denoising query, and a
    denoising group sees no other group. Denoising queries do see the matching queries, which know nothing.

    Args:
        num_groups (`int`): Denoising groups, each a noisy copy of every object in the image.
        group_size (`int`): Queries per group: two (one positive, one negative) for each object of the fullest image.
        num_queries (`int`): Matching queries, which follow the denoising ones.
        device (`torch.device`, *optional*): Where to make the mask.

    Returns:
        `torch.Tensor` of shape `(num_groups * group_size + num_queries,) * 2` and dtype bool, `True` where the query
        of that row may attend to the query of that column.

    Example:

    ```python
    >>> denoising_attention_mask(num_groups=2, group_size=1, num_queries=1).int().tolist()
    [[1, 0, 1], [0, 1, 1], [0, 0, 1]]

    ```
    """
    group = torch.arange(num_groups, device=device).repeat_interleave(group_size)
    group = torch.cat([group, group.new_full((num_queries,), num_groups)])  # matching queries are the last group
    return (group[:, None] == group[None, :]) | (group[None, :] == num_groups)


def contrastive_box_noise(boxes: torch.Tensor, scale: float) -> torch.Tensor:
    """Move the corners of boxes: by up to λ for the positive copy, between λ and 2 λ for the negative one (DINO).

    Args:
        boxes (`torch.Tensor` of shape `(batch_size, num_groups, 2, num_objects, 4)`):
            Positive copies, then negative ones, along the third axis. Center x, center y, width, height; fractions.
        scale (`float`): λ, in half-sides of the box.

    Returns:
        `torch.Tensor` of the same shape. Corners stay inside the image. A negative corner can cross its opposite:
        such a box has a negative side, which the decoder sees as the smallest one, as in the original.
    """
    centers, half_sides = boxes[..., None, :2], boxes[..., None, 2:] / 2
    top_left_and_bottom_right = 2 * torch.arange(2, device=boxes.device)[:, None] - 1
    least = torch.arange(2, device=boxes.device)[:, None, None, None]  # of positive and of negative copies
    corners = centers + top_left_and_bottom_right * half_sides  # (batch, groups, 2, objects, 2 corners, x y)
    sign = torch.randint_like(corners, 2) * 2 - 1
    corners = corners + sign * (torch.rand_like(corners) + least) * half_sides * scale
    top_left, bottom_right = corners.clamp(0, 1).unbind(-2)
    return torch.cat([(top_left + bottom_right) / 2, bottom_right - top_left], dim=-1)


def plain_box_noise(boxes: torch.Tensor, scale: float) -> torch.Tensor:
    """Shift centers by up to λ half-sides and scale sides by 1 ± λ (DN-DETR, section 4.2).

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`): Center x, center y, width, height; fractions.
        scale (`float`): λ, both λ₁ and λ₂ of the paper.

    Returns:
        `torch.Tensor` of the same shape, clamped to [0, 1].
    """
    reach = torch.cat([boxes[..., 2:] / 2, boxes[..., 2:]], dim=-1)
    return (boxes + (2 * torch.rand_like(boxes) - 1) * reach * scale).clamp(0, 1)


def no_denoising_queries(matching_queries: torch.Tensor) -> DinoDetrDenoisingQueries:
    """Denoising queries of length zero, to go before matching queries `(batch_size, num_queries, d_model)`."""
    none = matching_queries[:, :0]
    return DinoDetrDenoisingQueries(
        inputs_embeds=none,
        reference_points=none.new_zeros(len(none), 0, 4, dtype=torch.float32),
        object_index=none.new_zeros(len(none), 0, dtype=torch.int64),
        num_groups=1,
    )


class DinoDetrNoDenoising(nn.Module):
    """Deformable DETR and DAB-DETR: train without denoising queries."""

    def __init__(self, config: DinoDetrConfig):
        super().__init__()

    def forward(
        self, labels: list[dict[str, torch.Tensor]] | None, matching_queries: torch.Tensor, max_num_objects: int = 0
    ) -> DinoDetrDenoisingQueries:
        return no_denoising_queries(matching_queries)


class DinoDetrDenoising(nn.Module):
    """Make groups of noisy queries, each group a copy of every object, as many groups as `num_denoising` allows."""

    copies_per_object: int  # within a group; the first copy is the positive one
    redraw_factor: float  # how likely a class is redrawn, for a label_noise_ratio of 1
    add_box_noise: Callable[[torch.Tensor, float], torch.Tensor]

    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        self.num_denoising = config.num_denoising
        self.num_labels = config.num_labels
        self.redraw_probability = config.label_noise_ratio * self.redraw_factor
        self.box_noise_scale = config.box_noise_scale
        self.label_embed = init_as("normal", nn.Embedding(config.num_labels, config.d_model))

    def forward(
        self, labels: list[dict[str, torch.Tensor]] | None, matching_queries: torch.Tensor, max_num_objects: int = 0
    ) -> DinoDetrDenoisingQueries:
        """
        Args:
            labels (`list[dict[str, torch.Tensor]]`, *optional*): Per image `class_labels` `(num_objects,)` and
                `boxes` `(num_objects, 4)` as fractions of the unpadded image. Without labels there are no queries;
                with labels but no objects there are none either, but the label embedding gets its gradient of zero.
            matching_queries (`torch.Tensor` of shape `(batch_size, num_queries, d_model)`):
                The content queries that these will be put before; only their shape and device matter.
            max_num_objects (`int`, *optional*, defaults to 0): Make room for an image with as many objects, even if none
                of this batch has them; see [`DinoDetrEffectiveBatch`].
        """
        if not labels:
            return no_denoising_queries(matching_queries)
        device = matching_queries.device
        chosen = [sample_objects(len(label["boxes"]), self.num_denoising, device) for label in labels]
        room = min(max_num_objects, self.num_denoising)
        object_index = pad_rows(chosen, room, NO_OBJECT)
        boxes = pad_rows([label["boxes"][index] for label, index in zip(labels, chosen)], room)
        classes = pad_rows([label["class_labels"][index] for label, index in zip(labels, chosen)], room)

        batch_size, max_objects = object_index.shape
        num_groups = max(1, self.num_denoising // max(1, max_objects))
        slots = (batch_size, num_groups, self.copies_per_object, max_objects)
        object_index, classes = object_index[:, None, None].expand(slots), classes[:, None, None].expand(slots)
        boxes = at_least_float32(boxes)[:, None, None].expand(*slots, 4)
        is_object = (object_index != NO_OBJECT)[..., None]
        is_positive = torch.arange(self.copies_per_object, device=device)[:, None] == 0

        contents = self.label_embed(self.add_label_noise(classes)) * is_object
        box_logits = inverse_sigmoid(self.add_box_noise(boxes, self.box_noise_scale)) * is_object
        return DinoDetrDenoisingQueries(
            inputs_embeds=contents.flatten(1, 3),
            reference_points=box_logits.sigmoid().flatten(1, 3),
            object_index=object_index.masked_fill(~is_positive, NO_OBJECT).flatten(1),
            num_groups=num_groups,
        )

    def add_label_noise(self, classes: torch.Tensor) -> torch.Tensor:
        """Redraw some classes uniformly; now and then one is drawn again."""
        redraw = torch.rand(classes.shape, device=classes.device) < self.redraw_probability
        return torch.where(redraw, torch.randint_like(classes, self.num_labels), classes)


class DinoDetrContrastiveDenoising(DinoDetrDenoising):
    """DINO: beside each positive query a negative one, farther off, which must learn to find nothing."""

    copies_per_object = 2
    redraw_factor = 0.5
    add_box_noise = staticmethod(contrastive_box_noise)


class DinoDetrPlainDenoising(DinoDetrDenoising):
    """DN-DETR: positive queries only."""

    copies_per_object = 1
    redraw_factor = 1.0
    add_box_noise = staticmethod(plain_box_noise)


def pad_rows(rows: list[torch.Tensor], least: int, value: int = 0) -> torch.Tensor:
    """Stack tensors of different lengths, filling all up to the longest of them and to no less than `least`.

    Example:

    ```python
    >>> pad_rows([torch.tensor([1, 2]), torch.tensor([3])], least=3).tolist()
    [[1, 2, 0], [3, 0, 0]]

    ```
    """
    filler = rows[0].new_empty(least, *rows[0].shape[1:])
    return pad_sequence([*rows, filler], batch_first=True, padding_value=value)[:-1]


def sample_objects(count: int, limit: int, device: torch.device) -> torch.Tensor:
    """Indices of all objects of an image or, where there are more than `limit`, of a random choice of that many.

    Without the limit one crowded image would make twice as many queries as it has objects, and self-attention pays
    for their square.
    """
    if count <= limit:
        return torch.arange(count, device=device)
    return torch.randperm(count, device=device)[:limit]


DENOISING_STRATEGIES = {
    "contrastive": DinoDetrContrastiveDenoising,
    "plain": DinoDetrPlainDenoising,
    "none": DinoDetrNoDenoising,
}
