"""Matcher and set loss: pure functions of predictions and labels, and one entry point, `dino_detr_loss`.

Papers: DETR, https://arxiv.org/abs/2005.12872, section 3.1; focal loss, https://arxiv.org/abs/1708.02002; generalized
IoU, https://arxiv.org/abs/1902.09630.

Everything is computed for all decoder layers, the encoder and all images at once. What links predictions to objects
is one tensor, `object_index`: for each query the object of its image that it answers for, or -1 for none.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert, sigmoid_focal_loss

from .boxes_dino_detr import at_least_float32
from .configuration_dino_detr import DinoDetrConfig
from .denoising_dino_detr import NO_OBJECT


# How far a number of a box may lie outside [0, 1] before it is an error: rounding is not, pixels are.
BOX_TOLERANCE = 1e-3


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
    """The training loss of DINO.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_layers, num_queries, num_labels)`):
            Of each supervised decoder layer, in order, and before them of the encoder if queries were chosen there.
        pred_boxes (`torch.Tensor` of shape `(batch_size, num_layers, num_queries, 4)`):
            Boxes to the logits: center x, center y, width, height, fractions of the unpadded image.
        denoising_logits, denoising_boxes (`torch.Tensor`): The same of the denoising queries of the decoder layers.
        denoising_object_index (`torch.Tensor` of shape `(batch_size, num_denoising_queries)`):
            Object of each denoising query, -1 for none.
        num_denoising_groups (`int`): How often each object was copied.
        labels (`list[dict[str, torch.Tensor]]`): Per image `class_labels` `(num_objects,)` and `boxes`
            `(num_objects, 4)`, units as in `pred_boxes`.
        config ([`DinoDetrConfig`]): Costs, coefficients, α and γ.
        num_boxes (`torch.Tensor` or `float`): What all is divided by, from `get_num_boxes` or, where a step is made of
            several batches, from [`DinoDetrEffectiveBatch`].

    Returns:
        The weighted sum, and the unweighted terms `loss_ce`, `loss_bbox` and `loss_giou` of the last layer, with the
        suffixes `_0`, `_1`, ... of the earlier layers, `_encoder`, and `_denoising`, `_denoising_0`, ...
    """
    classes, boxes = pad_targets(labels, config.num_labels)
    boxes = boxes.to(pred_boxes.dtype)
    object_index = match(logits, pred_boxes, labels, config)
    matched = compute_losses(logits, pred_boxes, object_index, classes, boxes, num_boxes, config)
    denoised = compute_losses(
        denoising_logits,
        denoising_boxes,
        denoising_object_index[:, None].expand(denoising_boxes.shape[:-1]),
        classes,
        boxes,
        num_boxes * num_denoising_groups,
        config,
    )

    num_decoder_layers = denoising_logits.shape[1]
    suffixes = [*(f"_{layer}" for layer in range(num_decoder_layers - 1)), ""]
    encoder_suffixes = ["_encoder"] * (logits.shape[1] - num_decoder_layers)
    terms = name_terms(matched, encoder_suffixes + suffixes)
    terms |= name_terms(denoised, [f"_denoising{suffix}" for suffix in suffixes])
    coefficients = {
        "loss_ce": config.cls_loss_coefficient,
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
    }
    weighted = [weight * (matched[kind].sum() + denoised[kind].sum()) for kind, weight in coefficients.items()]
    return torch.stack(weighted).sum(), terms


def name_terms(losses: dict[str, torch.Tensor], suffixes: list[str]) -> dict[str, torch.Tensor]:
    """Give each layer's value of each kind of loss a name of its own."""
    return {f"{kind}{suffix}": value for kind, values in losses.items() for suffix, value in zip(suffixes, values)}


def compute_losses(
    logits: torch.Tensor,
    pred_boxes: torch.Tensor,
    object_index: torch.Tensor,
    classes: torch.Tensor,
    boxes: torch.Tensor,
    num_boxes: torch.Tensor | float,
    config: DinoDetrConfig,
) -> dict[str, torch.Tensor]:
    """Focal loss of all queries, and box losses of those that answer for an object.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_layers, num_queries, num_labels)`)
        pred_boxes (`torch.Tensor` of shape `(batch_size, num_layers, num_queries, 4)`)
        object_index (`torch.Tensor` of shape `(batch_size, num_layers, num_queries)`): -1 for none.
        classes, boxes: As given by `pad_targets`.
        num_boxes (`torch.Tensor` or `float`): The normalizer.
        config ([`DinoDetrConfig`]): α and γ.

    Returns:
        `loss_ce`, `loss_bbox`, `loss_giou`, each a `torch.Tensor` of shape `(num_layers,)`.
    """
    logits = at_least_float32(logits)
    image = torch.arange(len(classes), device=classes.device)[:, None, None]
    wanted_class, wanted_box = classes[image, object_index], boxes[image, object_index]
    is_object = object_index != NO_OBJECT

    one_hot = logits.new_zeros(*logits.shape[:-1], logits.shape[-1] + 1)  # the last column is "no object"
    one_hot = one_hot.scatter_(-1, wanted_class[..., None], 1.0)[..., :-1]
    focal = sigmoid_focal_loss(logits, one_hot, alpha=config.focal_alpha, gamma=config.focal_gamma)
    distance = (pred_boxes - wanted_box).abs().sum(dim=-1)
    overlap = generalized_box_iou(pred_boxes, wanted_box)
    return {
        "loss_ce": focal.sum(dim=(0, 2, 3)) / num_boxes,
        "loss_bbox": (distance * is_object).sum(dim=(0, 2)) / num_boxes,
        "loss_giou": ((1 - overlap) * is_object).sum(dim=(0, 2)) / num_boxes,
    }


def pad_targets(labels: list[dict[str, torch.Tensor]], num_labels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes and boxes of all images in tables with one more column, "no object", which index -1 reads.

    Returns:
        Classes, `(batch_size, max_objects + 1)`, `num_labels` where there is no object; and boxes,
        `(batch_size, max_objects + 1, 4)`, of no meaning but finite where there is no object.

    Example:

    ```python
    >>> one = {"class_labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.1, 0.1]])}
    >>> none = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    >>> pad_targets([one, none], num_labels=5)[0].tolist()
    [[2, 5], [5, 5]]

    ```
    """
    classes = pad_sequence([label["class_labels"] for label in labels], batch_first=True, padding_value=num_labels)
    boxes = pad_sequence([at_least_float32(label["boxes"]) for label in labels], batch_first=True)
    no_object = (0, 0, 0, 1)  # one more row after the objects
    return nn.functional.pad(classes, (0, 1), value=num_labels), nn.functional.pad(boxes, no_object, value=0.5)


def get_num_boxes(labels: list[dict[str, torch.Tensor]], device: torch.device, average: bool) -> torch.Tensor:
    """Objects per process, averaged over processes if asked, at least 1: the original's normalizer of every loss.

    Data-parallel training averages gradients, so with this the sum over all processes' objects is divided by the
    number of all processes' objects, as if one process had them all.
    """
    # `full` rather than `tensor`, which would wait for the device
    num_boxes = torch.full((), float(sum(len(label["boxes"]) for label in labels)), device=device)
    if average and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(num_boxes)
        num_boxes = num_boxes / torch.distributed.get_world_size()
    return num_boxes.clamp(min=1)


@torch.no_grad()
def match(
    logits: torch.Tensor, pred_boxes: torch.Tensor, labels: list[dict[str, torch.Tensor]], config: DinoDetrConfig
) -> torch.Tensor:
    """Give every object the query that answers for it: in each layer and image the cheapest one-to-one assignment.

    The costs of all layers and images go to the host in one transfer, and the answer comes back in one.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_layers, num_queries, num_labels)`)
        pred_boxes (`torch.Tensor` of shape `(batch_size, num_layers, num_queries, 4)`)
        labels (`list[dict[str, torch.Tensor]]`): See `dino_detr_loss`.
        config ([`DinoDetrConfig`]): Costs, α and γ.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_layers, num_queries)` and dtype int64: index of the object in its
        image, -1 for none. Of more objects than queries, the ones that cost most stay without.
    """
    batch_size, num_layers, num_queries = pred_boxes.shape[:3]
    costs = [
        matching_cost(image_logits, image_boxes, label["class_labels"], label["boxes"], config)
        for image_logits, image_boxes, label in zip(logits, pred_boxes, labels)
    ]
    # A prediction that overflowed in 16-bit training makes the loss NaN, for the loss scaler to see; not scipy fail.
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
    """What it would cost to let each query of an image answer for each of its objects.

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
    if_object = alpha * (1 - probability) ** gamma * -(probability + 1e-8).log()
    if_nothing = (1 - alpha) * probability**gamma * -(1 - probability + 1e-8).log()
    predicted, wanted = pred_boxes[..., :, None, :], at_least_float32(boxes)
    return (
        config.class_cost * (if_object - if_nothing)
        + config.bbox_cost * (predicted - wanted).abs().sum(dim=-1)
        - config.giou_cost * generalized_box_iou(predicted, wanted)
    )


def generalized_box_iou(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Intersection over union, minus the part of the common hull that neither covers.

    Torchvision's, but for two things: it broadcasts, and both divisors are 1e-6 larger, as in the original, which for
    small boxes shows in the fourth digit.

    Args:
        boxes, others (`torch.Tensor` of shape `(..., 4)`): Center x, center y, width, height; fractions.

    Returns:
        `torch.Tensor` of the broadcast shape `(...)`, in [-1, 1].

    Example:

    ```python
    >>> left, right = torch.tensor([0.25, 0.5, 0.5, 1.0]), torch.tensor([0.75, 0.5, 0.5, 1.0])
    >>> generalized_box_iou(left, torch.stack([left, right])).round(decimals=2).tolist()
    [1.0, 0.0]

    ```
    """
    boxes, others = (box_convert(each, "cxcywh", "xyxy") for each in (boxes, others))
    (top_left, bottom_right), (other_top_left, other_bottom_right) = boxes.split(2, -1), others.split(2, -1)
    overlap = (torch.minimum(bottom_right, other_bottom_right) - torch.maximum(top_left, other_top_left)).clamp(min=0)
    hull = (torch.maximum(bottom_right, other_bottom_right) - torch.minimum(top_left, other_top_left)).prod(dim=-1)
    intersection = overlap.prod(dim=-1)
    union = (bottom_right - top_left).prod(dim=-1) + (other_bottom_right - other_top_left).prod(dim=-1) - intersection
    return intersection / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def check_labels(labels: list[dict[str, torch.Tensor]], batch_size: int, num_labels: int) -> None:
    """Refuse labels that cannot be right before anything is looked up with them, naming the image.

    On an accelerator a class out of range would end the process with an assertion of the device instead.

    Raises:
        ValueError: If images and labels differ in number, an entry is missing, classes and boxes of an image differ
            in number, a class is not in [0, num_labels), or a box is not finite, has no area or is not in fractions.
    """
    if len(labels) != batch_size:
        raise ValueError(f"labels must have one entry per image: got {len(labels)} for {batch_size} images")
    if not labels:
        return
    for image, label in enumerate(labels):
        if not {"class_labels", "boxes"} <= set(label):
            raise ValueError(f"labels[{image}] must have 'class_labels' and 'boxes', got {sorted(label)}")
        if label["class_labels"].dtype.is_floating_point:
            raise ValueError(f"labels[{image}]: class_labels must be integers, got {label['class_labels'].dtype}")
        if label["boxes"].shape != (len(label["class_labels"]), 4):
            raise ValueError(
                f"labels[{image}]: boxes must have the shape (number of class_labels, 4), "
                f"got {tuple(label['boxes'].shape)} for {len(label['class_labels'])} class_labels"
            )
    classes = torch.cat([label["class_labels"] for label in labels])
    boxes = torch.cat([label["boxes"] for label in labels])
    wrong_class = (classes < 0) | (classes >= num_labels)
    wrong_box = ~((boxes >= -BOX_TOLERANCE) & (boxes <= 1 + BOX_TOLERANCE)).all(dim=1)  # NaN is neither
    wrong_box |= ~(boxes[:, 2:] > 0).all(dim=1)
    if (wrong_class | wrong_box).any():
        _report_wrong_label(labels, wrong_class.tolist(), wrong_box.tolist(), num_labels)


def _report_wrong_label(
    labels: list[dict[str, torch.Tensor]], wrong_class: list[bool], wrong_box: list[bool], num_labels: int
) -> None:
    places = [(image, row) for image, label in enumerate(labels) for row in range(len(label["boxes"]))]
    for (image, row), bad_class, bad_box in zip(places, wrong_class, wrong_box):
        label = labels[image]
        name = f"labels[{image}]" + (f" (image_id {label['image_id'].tolist()})" if "image_id" in label else "")
        if bad_class:
            raise ValueError(
                f"{name}: class_labels[{row}] is {label['class_labels'][row].item()}, but the model has {num_labels} "
                f"labels, 0 to {num_labels - 1}: map category ids to labels, or give the config an id2label for all"
            )
        if bad_box:
            raise ValueError(
                f"{name}: boxes[{row}] is {label['boxes'][row].tolist()}, but must be center x, center y, width, "
                f"height as fractions of the image in [0, 1], with positive width and height"
            )
