import pytest
import torch
from torchvision.ops import generalized_box_iou as torchvision_generalized_box_iou

from hf_dino.boxes_dino_detr import (
    at_least_float32,
    generalized_box_iou,
    inverse_sigmoid,
    refine_bboxes,
)


def test_smaller_bound_changes_only_the_border():
    fraction = torch.tensor([0.0, 1e-4, 0.01, 0.99, 1.0])
    inside = torch.tensor([False, False, True, True, False])
    equal = inverse_sigmoid(fraction, 1e-5) == inverse_sigmoid(fraction)
    assert torch.equal(equal, inside)


def test_inverse_sigmoid_is_the_inverse_except_at_the_border():
    fraction = torch.linspace(0.002, 0.998, 50, dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(fraction).sigmoid(), fraction)
    assert inverse_sigmoid(torch.tensor([-1.0, 0.0])).unique().numel() == 1
    assert inverse_sigmoid(torch.tensor([0.0, 1.0])).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_boxes_are_refined_in_logits(dtype):
    box, delta = torch.tensor([0.2, 0.5, 0.6, 0.9]), torch.tensor([1.0, 0.0, -1.0, 2.0])
    refined = refine_bboxes(box, delta.to(dtype))
    assert refined.dtype == torch.float32
    torch.testing.assert_close(torch.logit(refined) - torch.logit(box), delta, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_boxes_are_float32_or_higher(dtype):
    assert torch.finfo(at_least_float32(torch.zeros(1, dtype=dtype)).dtype).bits >= 32


def test_generalized_iou_is_torchvisions_but_for_the_official_epsilon():
    boxes, others = torch.rand(5, 4, dtype=torch.float64) + 0.5, torch.rand(7, 4, dtype=torch.float64) + 0.5

    def corners(center_boxes):
        return torch.cat(
            [center_boxes[:, :2] - center_boxes[:, 2:] / 2, center_boxes[:, :2] + center_boxes[:, 2:] / 2], 1
        )

    ours = generalized_box_iou(boxes[:, None], others)
    torch.testing.assert_close(
        ours, torchvision_generalized_box_iou(corners(boxes), corners(others)), rtol=0, atol=1e-4
    )
    assert generalized_box_iou(torch.zeros(4), torch.zeros(4)).isfinite()  # torchvision's is NaN
