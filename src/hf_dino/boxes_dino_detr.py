"""Box arithmetic: logits, refinement and generalized IoU.

Boxes are kept in float32 or higher: in bf16 a box would be off by up to 2 pixels in 1000.
"""

import torch
from torchvision.ops import box_convert


# The bound of the official implementation (IDEA-Research/DINO, util/misc.py:575). transformers uses 1e-5, which gives
# other boxes at the border of the image.
INVERSE_SIGMOID_EPSILON = 1e-3


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Upcast half precision to float32; leave float32 and float64 unchanged.

    Example:

    ```python
    >>> at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype, at_least_float32(torch.zeros(1).double()).dtype
    (torch.float32, torch.float64)

    ```
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def inverse_sigmoid(fraction: torch.Tensor, epsilon: float = INVERSE_SIGMOID_EPSILON) -> torch.Tensor:
    """Return the logit log(p / (1 - p)) of a fraction p, with both p and 1 - p bounded from below.

    Args:
        fraction (`torch.Tensor`): Any shape; clamped to [0, 1].
        epsilon (`float`, *optional*, defaults to 1e-3): The bound.

    Returns:
        `torch.Tensor` of the same shape, within ±6.91 for the default bound.

    Example:

    ```python
    >>> [round(value, 2) for value in inverse_sigmoid(torch.tensor([0.0, 0.5, 0.75, 1.0])).tolist()]
    [-6.91, 0.0, 1.1, 6.91]

    ```
    """
    p = fraction.clamp(min=epsilon, max=1.0)
    one_minus_p = (1 - fraction).clamp(min=epsilon, max=1.0)
    return torch.log(p / one_minus_p)


def refine_bboxes(
    reference_points: torch.Tensor, deltas: torch.Tensor, epsilon: float = INVERSE_SIGMOID_EPSILON
) -> torch.Tensor:
    """Move boxes by predicted changes of their logits.

    Args:
        reference_points (`torch.Tensor` of shape `(..., 4)`):
            Center x, center y, width, height, fractions; float32 or higher.
        deltas (`torch.Tensor` of shape `(..., 4)`): Output of a box head.
        epsilon (`float`, *optional*, defaults to 1e-3): See [`inverse_sigmoid`].

    Returns:
        `torch.Tensor` of shape `(..., 4)`, as `reference_points`.
    """
    return (at_least_float32(deltas) + inverse_sigmoid(reference_points, epsilon)).sigmoid()


def generalized_box_iou(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the IoU minus the fraction of the smallest enclosing box that neither box covers.

    Unlike torchvision's, it broadcasts and adds 1e-6 to both divisors, as the official implementation does, which
    changes the fourth digit for small boxes.

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
    boxes, others = (box_convert(centered, "cxcywh", "xyxy") for centered in (boxes, others))
    (top_left, bottom_right), (other_top_left, other_bottom_right) = boxes.split(2, -1), others.split(2, -1)
    intersection_size = torch.minimum(bottom_right, other_bottom_right) - torch.maximum(top_left, other_top_left)
    enclosing_size = torch.maximum(bottom_right, other_bottom_right) - torch.minimum(top_left, other_top_left)
    intersection, enclosing_area = intersection_size.clamp(min=0).prod(dim=-1), enclosing_size.prod(dim=-1)
    union = (bottom_right - top_left).prod(dim=-1) + (other_bottom_right - other_top_left).prod(dim=-1) - intersection
    return intersection / (union + 1e-6) - (enclosing_area - union) / (enclosing_area + 1e-6)
