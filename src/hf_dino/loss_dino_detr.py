"""Matcher and set loss: pure functions of predictions and labels, with one entry point, `dino_detr_loss`.

Papers: DETR, https://arxiv.org/abs/2005.12872, section 3.1; focal loss, https://arxiv.org/abs/1708.02002; generalized
IoU, https://arxiv.org/abs/1902.09630.

The losses of all layers and images are computed in one batched pass. One tensor, `object_index`, links predictions to
objects: for each query, it is the index of the object that the query is matched to, in its image, or -1 for none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import sigmoid_focal_loss

from .boxes_dino_detr import at_least_float32, generalized_box_iou
from .configuration_dino_detr import DinoDetrConfig
from .denoising_dino_detr import NO_OBJECT, NOT_SUPERVISED


# How far a coordinate of a box may lie outside [0, 1]: enough for rounding errors, too little for pixels.
BOX_TOLERANCE = 1e-3


@dataclass(frozen=True)
class DinoDetrEffectiveBatch:
    """Object counts of one optimizer step, over all processes and micro-batches.

    Passing the same counts to every micro-batch makes the mean loss (and gradient) equal that of one large batch.

    Attributes:
        num_boxes (`float`, *optional*): Normalizer of every loss: the number of objects of all micro-batches (at least
            1), divided by the number of micro-batches. `None` counts the objects of the micro-batch itself; see
            `get_num_boxes`.
        max_num_objects (`int`, *optional*, defaults to 0): Maximum number of objects per image over all micro-batches,
            which determines the number and the size of denoising groups.
    """

    num_boxes: float | None = None
    max_num_objects: int = 0


class DinoDetrTargets(NamedTuple):
    """Objects of all images, padded to one more than the maximum number of objects; see `pad_targets`.

    Attributes:
        classes (`torch.Tensor` of shape `(batch_size, max_num_objects + 1)` and dtype int64):
            Labels; `num_labels` where there is no object.
        boxes (`torch.Tensor` of shape `(batch_size, max_num_objects + 1, 4)`):
            Center x, center y, width, height, fractions of the unpadded image; float32 or higher. Finite but without
            meaning where there is no object.
    """

    classes: torch.Tensor
    boxes: torch.Tensor


def dino_detr_loss(
    logits: torch.Tensor,
    pred_boxes: torch.Tensor,
    denoising_logits: torch.Tensor,
    denoising_boxes: torch.Tensor,
    denoising_object_index: torch.Tensor,
    num_denoising_groups: int,
    labels: list[dict[str, torch.Tensor]],
    config: DinoDetrConfig,
    num_boxes: torch.Tensor | float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute the training loss of DINO.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_layers, num_queries, num_labels)`):
            Class logits of the encoder (absent if query selection is static), followed by those of each supervised
            decoder layer.
        pred_boxes (`torch.Tensor` of shape `(batch_size, num_layers, num_queries, 4)`):
            Boxes of the same layers: center x, center y, width, height, fractions of the unpadded image.
        denoising_logits
            (`torch.Tensor` of shape `(batch_size, num_decoder_layers, num_denoising_queries, num_labels)`):
            Class logits of the denoising queries, of each supervised decoder layer.
        denoising_boxes (`torch.Tensor` of shape `(batch_size, num_decoder_layers, num_denoising_queries, 4)`):
            Boxes of the same queries and layers, units as in `pred_boxes`.
        denoising_object_index (`torch.Tensor` of shape `(batch_size, num_denoising_queries)`):
            Index of the object of each denoising query, -1 for none, -2 for a query that has no loss.
        num_denoising_groups (`int`):
            Number of denoising groups, each with a positive and, if contrastive, a negative copy of every object.
        labels (`list[dict[str, torch.Tensor]]`): Per image `class_labels` `(num_objects,)` and `boxes`
            `(num_objects, 4)`, units as in `pred_boxes`.
        config ([`DinoDetrConfig`]): Costs, coefficients, α and γ.
        num_boxes (`torch.Tensor` or `float`): Normalizer, from `get_num_boxes` or [`DinoDetrEffectiveBatch`].

    Returns:
        The weighted sum, and the unweighted terms. Their names are `loss_ce`, `loss_bbox` and `loss_giou`, followed by
        `_denoising` for the denoising queries, and by `_0`, `_1`, ... for the earlier decoder layers and nothing for
        the last one. Those of the encoder end with `_encoder`.
    """
    targets = pad_targets(labels, config.num_labels)
    object_index = hungarian_match(logits, pred_boxes, labels, config)
    denoising_object_index = denoising_object_index[:, None].expand(denoising_boxes.shape[:-1])
    matched = compute_losses(logits, pred_boxes, object_index, targets, num_boxes, config)
    denoised = compute_losses(
        denoising_logits, denoising_boxes, denoising_object_index, targets, num_boxes * num_denoising_groups, config
    )

    num_decoder_layers = denoising_logits.shape[1]
    suffixes = [*(f"_{layer}" for layer in range(num_decoder_layers - 1)), ""]
    encoder_suffixes = ["_encoder"] * (logits.shape[1] - num_decoder_layers)
    terms = flatten_losses(matched, encoder_suffixes + suffixes)
    terms |= flatten_losses(denoised, [f"_denoising{suffix}" for suffix in suffixes])
    coefficients = {
        "loss_ce": config.cls_loss_coefficient,
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
    }
    weighted = [weight * (matched[kind].sum() + denoised[kind].sum()) for kind, weight in coefficients.items()]
    return torch.stack(weighted).sum(), terms


def flatten_losses(losses: dict[str, torch.Tensor], suffixes: list[str]) -> dict[str, torch.Tensor]:
    """Return one named value per kind of loss and layer, given one vector per kind and one suffix per layer."""
    return {f"{kind}{suffix}": value for kind, values in losses.items() for suffix, value in zip(suffixes, values)}


def compute_losses(
    logits: torch.Tensor,
    pred_boxes: torch.Tensor,
    object_index: torch.Tensor,
    targets: DinoDetrTargets,
    num_boxes: torch.Tensor | float,
    config: DinoDetrConfig,
) -> dict[str, torch.Tensor]:
    """Compute the focal loss of all queries and the box losses of the queries that are matched to an object.

    The queries, `num_queries` in number, are the matching or the denoising queries.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_layers, num_queries, num_labels)`)
        pred_boxes (`torch.Tensor` of shape `(batch_size, num_layers, num_queries, 4)`)
        object_index (`torch.Tensor` of shape `(batch_size, num_layers, num_queries)`): -1 for none, -2 for a query
            that has no loss.
        targets ([`DinoDetrTargets`]): The objects.
        num_boxes (`torch.Tensor` or `float`): The normalizer.
        config ([`DinoDetrConfig`]): α and γ.

    Returns:
        `loss_ce`, `loss_bbox`, `loss_giou`, each a `torch.Tensor` of shape `(num_layers,)`.
    """
    logits = at_least_float32(logits)
    is_supervised, object_index = object_index != NOT_SUPERVISED, object_index.clamp(min=NO_OBJECT)
    batch_index = torch.arange(len(object_index), device=object_index.device)[:, None, None]
    target_classes = targets.classes[batch_index, object_index]
    target_boxes = targets.boxes[batch_index, object_index].to(pred_boxes.dtype)
    is_matched = object_index != NO_OBJECT

    one_hot = logits.new_zeros(*logits.shape[:-1], logits.shape[-1] + 1)  # the last column is "no object"
    one_hot = one_hot.scatter_(-1, target_classes[..., None], 1.0)[..., :-1]
    focal = sigmoid_focal_loss(logits, one_hot, alpha=config.focal_alpha, gamma=config.focal_gamma)
    focal = focal * is_supervised[..., None]
    distance = (pred_boxes - target_boxes).abs().sum(dim=-1)
    giou = generalized_box_iou(pred_boxes, target_boxes)
    return {
        "loss_ce": focal.sum(dim=(0, 2, 3)) / num_boxes,
        "loss_bbox": (distance * is_matched).sum(dim=(0, 2)) / num_boxes,
        "loss_giou": ((1 - giou) * is_matched).sum(dim=(0, 2)) / num_boxes,
    }


def pad_targets(labels: list[dict[str, torch.Tensor]], num_labels: int) -> DinoDetrTargets:
    """Stack the objects of all images, padded, and append a row "no object", which the index -1 reads.

    Example:

    ```python
    >>> one = {"class_labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.1, 0.1]])}
    >>> none = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    >>> pad_targets([one, none], num_labels=5).classes.tolist()
    [[2, 5], [5, 5]]

    ```
    """
    classes = pad_sequence([label["class_labels"] for label in labels], batch_first=True, padding_value=num_labels)
    boxes = pad_sequence([at_least_float32(label["boxes"]) for label in labels], batch_first=True)
    pad_one_row = (0, 0, 0, 1)
    return DinoDetrTargets(
        classes=nn.functional.pad(classes, (0, 1), value=num_labels),
        boxes=nn.functional.pad(boxes, pad_one_row, value=0.5),
    )


def get_num_boxes(labels: list[dict[str, torch.Tensor]], device: torch.device, average: bool) -> torch.Tensor:
    """Return the number of objects, at least 1, which normalizes every loss as in the official implementation.

    Args:
        labels (`list[dict[str, torch.Tensor]]`): See `dino_detr_loss`.
        device (`torch.device`): Device of the result.
        average (`bool`):
            Return the mean over all processes. Data-parallel training averages gradients, so this gives the gradient
            of one process that has the objects of all.
    """
    # not `torch.tensor`, which would wait for the device
    num_boxes = torch.full((), float(sum(len(label["boxes"]) for label in labels)), device=device)
    if average and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(num_boxes)
        num_boxes = num_boxes / torch.distributed.get_world_size()
    return num_boxes.clamp(min=1)


@torch.no_grad()
def hungarian_match(
    logits: torch.Tensor, pred_boxes: torch.Tensor, labels: list[dict[str, torch.Tensor]], config: DinoDetrConfig
) -> torch.Tensor:
    """Match every object to a query: for each layer and image, the one-to-one assignment with the lowest total cost.

    The costs of all layers and images are moved to the host in one transfer, and the result is moved back in one.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_layers, num_queries, num_labels)`)
        pred_boxes (`torch.Tensor` of shape `(batch_size, num_layers, num_queries, 4)`)
        labels (`list[dict[str, torch.Tensor]]`): See `dino_detr_loss`.
        config ([`DinoDetrConfig`]): Costs, α and γ.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_layers, num_queries)` and dtype int64: index of the object in its
        image, -1 for none. If there are more objects than queries, some objects stay unmatched, such that the total
        cost is lowest.
    """
    batch_size, num_layers, num_queries = pred_boxes.shape[:3]
    costs = [
        matching_cost(image_logits, image_boxes, label["class_labels"], label["boxes"], config)
        for image_logits, image_boxes, label in zip(logits, pred_boxes, labels)
    ]
    # After an overflow in fp16 costs are NaN, for which scipy raises; the loss is NaN too, and the step is skipped.
    all_costs = torch.cat([cost.flatten() for cost in costs]).nan_to_num(nan=0.0).cpu()
    object_index = torch.full((batch_size, num_layers, num_queries), NO_OBJECT)
    for image, image_costs in enumerate(all_costs.split([cost.numel() for cost in costs])):
        for layer, cost in enumerate(image_costs.view(num_layers, num_queries, -1)):
            queries, objects = linear_sum_assignment(cost.numpy())
            object_index[image, layer, torch.from_numpy(queries)] = torch.from_numpy(objects)
    return object_index.to(logits.device, non_blocking=True)


def matching_cost(
    logits: torch.Tensor,
    pred_boxes: torch.Tensor,
    class_labels: torch.Tensor,
    boxes: torch.Tensor,
    config: DinoDetrConfig,
) -> torch.Tensor:
    """Compute the cost of matching each query of an image to each of its objects.

    Args:
        logits (`torch.Tensor` of shape `(num_layers, num_queries, num_labels)`)
        pred_boxes (`torch.Tensor` of shape `(num_layers, num_queries, 4)`)
        class_labels (`torch.Tensor` of shape `(num_objects,)`)
        boxes (`torch.Tensor` of shape `(num_objects, 4)`)
        config ([`DinoDetrConfig`]): Costs, α and γ.

    Returns:
        `torch.Tensor` of shape `(num_layers, num_queries, num_objects)`.
    """
    probability = at_least_float32(logits)[..., class_labels].sigmoid()  # (layers, queries, objects)
    alpha, gamma = config.focal_alpha, config.focal_gamma
    positive_class_cost = alpha * (1 - probability) ** gamma * -(probability + 1e-8).log()
    negative_class_cost = (1 - alpha) * probability**gamma * -(1 - probability + 1e-8).log()
    pred_boxes, target_boxes = pred_boxes[..., :, None, :], at_least_float32(boxes)
    return (
        config.class_cost * (positive_class_cost - negative_class_cost)
        + config.bbox_cost * (pred_boxes - target_boxes).abs().sum(dim=-1)
        - config.giou_cost * generalized_box_iou(pred_boxes, target_boxes)
    )


def check_labels(
    labels: list[dict[str, torch.Tensor]], batch_size: int, num_labels: int, device: torch.device | None = None
) -> None:
    """Raise an error that names the image if labels are invalid.

    On an accelerator a class out of range would otherwise end the process with a device-side assertion.

    Args:
        labels (`list[dict[str, torch.Tensor]]`): See `dino_detr_loss`.
        batch_size (`int`): Number of images.
        num_labels (`int`): Number of classes of the model.
        device (`torch.device`, *optional*): Where labels must be; anywhere by default.

    Raises:
        ValueError: If images and labels differ in number, an entry is missing, or of another type, shape or device, a
            class is not in [0, num_labels), or a box is not finite, has no area or is not in [0, 1].
    """
    if isinstance(labels, Mapping):
        raise ValueError(f"labels must be a list with one dict per image, got one dict with {list(labels)}")
    if len(labels) != batch_size:
        raise ValueError(f"labels must have one entry per image: got {len(labels)} for {batch_size} images")
    if not labels:
        return
    for image, label in enumerate(labels):
        if problem := _label_problem(label, device):
            raise ValueError(f"labels[{image}]{problem}")
    classes = torch.cat([label["class_labels"] for label in labels])
    boxes = torch.cat([label["boxes"] for label in labels])
    invalid_class = (classes < 0) | (classes >= num_labels)
    invalid_box = ~((boxes >= -BOX_TOLERANCE) & (boxes <= 1 + BOX_TOLERANCE)).all(dim=1)  # also finds NaN
    invalid_box |= ~(boxes[:, 2:] > 0).all(dim=1)
    if (invalid_class | invalid_box).any():
        _raise_invalid_label(labels, invalid_class.tolist(), invalid_box.tolist(), num_labels)


def _label_problem(label: Mapping[str, torch.Tensor], device: torch.device | None) -> str:
    """Return why the tensors of a label have the wrong type, shape or device, or an empty text if they do not."""
    if not isinstance(label, Mapping) or not {"class_labels", "boxes"} <= set(label):
        got = sorted(label) if isinstance(label, Mapping) else type(label).__name__
        return f" must have 'class_labels' and 'boxes', got {got}"
    for name in ("class_labels", "boxes"):
        if not isinstance(label[name], torch.Tensor):
            return f": {name} must be a tensor, got {type(label[name]).__name__}"
        if device is not None and label[name].device != device:
            return f": {name} is on {label[name].device}, but pixel_values is on {device}; move the labels there"
    classes, boxes = label["class_labels"], label["boxes"]
    if classes.dtype != torch.int64:
        return f": class_labels must be integers, got {classes.dtype}; convert them by .long()"
    if classes.ndim != 1:
        return f": class_labels must have the shape (number of objects,), got {tuple(classes.shape)}"
    if boxes.shape != (len(classes), 4):
        return (
            f": boxes must have the shape (number of class_labels, 4), got {tuple(boxes.shape)} for {len(classes)} "
            "class_labels"
        )
    return ""


def _raise_invalid_label(
    labels: list[dict[str, torch.Tensor]], invalid_class: list[bool], invalid_box: list[bool], num_labels: int
) -> None:
    entries = [(image, row) for image, label in enumerate(labels) for row in range(len(label["boxes"]))]
    for (image, row), class_is_invalid, box_is_invalid in zip(entries, invalid_class, invalid_box):
        label = labels[image]
        name = f"labels[{image}]" + (f" (image_id {label['image_id'].tolist()})" if "image_id" in label else "")
        if class_is_invalid:
            raise ValueError(
                f"{name}: class_labels[{row}] is {label['class_labels'][row].item()}, but the model has {num_labels} "
                f"labels, 0 to {num_labels - 1}: map category ids to labels, or give the config an id2label for all"
            )
        if box_is_invalid:
            raise ValueError(
                f"{name}: boxes[{row}] is {label['boxes'][row].tolist()}, but must be center x, center y, width, "
                f"height as fractions of the image in [0, 1], with positive width and height"
            )
