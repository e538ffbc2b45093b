"""The loss of Deformable DETR's authors, as the part that transformers' loss lacks.

The models are equal, but the loss of transformers differs from that of fundamentalvision/Deformable-DETR:

- The encoder's predictions of a two-stage model have no loss, so the layers that propose its queries are not trained.
- The classification has weight 1 instead of 2.
- It is as many times too large as there are processes, because the number of objects is divided by theirs twice.
"""

from typing import TYPE_CHECKING, Any

import torch
from transformers import DeformableDetrConfig
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

from ..boxes_dino_detr import at_least_float32
from ..loss_dino_detr import get_num_boxes


if TYPE_CHECKING:
    from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrObjectDetectionOutput

Labels = list[dict[str, torch.Tensor]]


def deformable_detr_missing_loss(
    outputs: "DeformableDetrObjectDetectionOutput",
    labels: Labels,
    config: DeformableDetrConfig,
    num_boxes: torch.Tensor | float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute what must be added to `outputs.loss` to have the loss of the authors.

    Args:
        outputs (`DeformableDetrObjectDetectionOutput`): Outputs of the model for these labels.
        labels (`list[dict[str, torch.Tensor]]`): Per image `class_labels` `(num_objects,)` and `boxes`
            `(num_objects, 4)`, center x, center y, width, height, fractions of the unpadded image.
        config ([`DeformableDetrConfig`]): Costs and coefficients. The authors have `auxiliary_loss=True` and
            `class_cost=2`, which are not the defaults of transformers.
        num_boxes (`torch.Tensor` or `float`, *optional*): Normalizer, see [`DinoDetrEffectiveBatch`]; by default that
            of the authors, the mean number of objects over all processes.

    Returns:
        The difference, and the unweighted terms of the whole loss. They are named as in `dino_detr_loss`.
    """
    if num_boxes is None:
        num_boxes = get_num_boxes(labels, outputs.logits.device, average=True)
    weights = {
        "loss_ce": 2.0,  # cls_loss_coef of the authors' main.py; not a field of the configuration
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
    }
    scale = _applied_num_boxes(outputs, labels) / num_boxes
    terms = {**outputs.loss_dict, **encoder_loss_terms(outputs, labels, config)}
    kinds = {name: "_".join(name.split("_")[:2]) for name in terms}
    terms = {name: term * scale for name, term in terms.items() if kinds[name] in weights}
    weighted = [weights[kinds[name]] * term for name, term in terms.items()]
    return torch.stack(weighted).sum() - outputs.loss, terms


def encoder_loss_terms(
    outputs: "DeformableDetrObjectDetectionOutput", labels: Labels, config: DeformableDetrConfig
) -> dict[str, torch.Tensor]:
    """Compute the loss of the predictions of all tokens, which tell only objects, as class 0, from the background.

    Tokens that cannot propose a box have the box (1, 1, 1, 1), without a gradient, but their classes have a loss, as
    in models/deformable_detr.py:373-389 of the authors.

    Returns:
        `loss_ce_encoder`, `loss_bbox_encoder` and `loss_giou_encoder`, unweighted and with the normalizer of
        transformers; nothing if the model has one stage.
    """
    if outputs.enc_outputs_class is None:
        return {}
    predictions = {
        "logits": at_least_float32(outputs.enc_outputs_class),
        "pred_boxes": at_least_float32(outputs.enc_outputs_coord_logits).sigmoid(),
    }
    objects = [{**label, "class_labels": torch.zeros_like(label["class_labels"])} for label in labels]
    matcher = DeformableDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    criterion = DeformableDetrImageLoss(matcher, config.num_labels, config.focal_alpha, ["labels", "boxes"])
    return {f"{name}_encoder": term for name, term in criterion(predictions, objects).items()}


class _AppliedNumBoxes(DeformableDetrImageLoss):
    """Return the normalizer in place of losses: it is not among the outputs, and may be mended in transformers."""

    def get_loss(self, loss: str, outputs: Any, targets: Any, indices: Any, num_boxes: float) -> dict[str, float]:
        return {loss: num_boxes}


def _applied_num_boxes(outputs: "DeformableDetrObjectDetectionOutput", labels: Labels) -> float:
    """Return the number by which transformers divided its losses."""
    criterion = _AppliedNumBoxes(matcher=lambda *_: None, num_classes=0, focal_alpha=0.0, losses=["num_boxes"])
    return criterion({"logits": outputs.logits}, labels)["num_boxes"]
