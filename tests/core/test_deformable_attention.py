import pytest
import torch
from torch import nn

from hf_dino.backbone_dino_detr import DinoDetrFeatureLevels
from hf_dino.deformable_attention_dino_detr import (
    DinoDetrMultiscaleDeformableAttention,
    MultiScaleDeformableAttention,
    compute_sampling_locations,
    multi_scale_deformable_attention,
)


def slow_reference(value, spatial_shapes, locations, weights):
    """Equation 3 of Deformable DETR as loops; a point's four neighbors are read one by one."""
    batch_size, _, num_heads, head_dim = value.shape
    num_queries, num_levels, num_points = locations.shape[1], len(spatial_shapes), locations.shape[4]
    output = value.new_zeros(batch_size, num_queries, num_heads, head_dim)
    for index in torch.cartesian_prod(
        *map(torch.arange, (batch_size, num_queries, num_heads, num_levels, num_points))
    ):
        b, q, m, level, k = index.tolist()
        height, width = spatial_shapes[level]
        start = sum(h * w for h, w in spatial_shapes[:level])
        x, y = (locations[b, q, m, level, k] * torch.tensor([width, height]) - 0.5).unbind()
        for row in (y.floor().long().item(), y.floor().long().item() + 1):
            for column in (x.floor().long().item(), x.floor().long().item() + 1):
                if 0 <= row < height and 0 <= column < width:
                    share = (1 - (y - row).abs()) * (1 - (x - column).abs())
                    cell = value[b, start + row * width + column, m]
                    output[b, q, m] = output[b, q, m] + weights[b, q, m, level, k] * share * cell
    return output.flatten(2)


def random_inputs(batch_size=2, num_queries=3, num_heads=2, head_dim=3, shapes=((3, 4), (2, 1)), num_points=2):
    generator = torch.Generator().manual_seed(0)
    sequence = sum(h * w for h, w in shapes)

    def random(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    value = random(batch_size, sequence, num_heads, head_dim) - 0.5
    locations = random(batch_size, num_queries, num_heads, len(shapes), num_points, 2) * 1.4 - 0.2  # some outside
    weights = random(batch_size, num_queries, num_heads, len(shapes) * num_points).softmax(-1)
    return value, list(shapes), locations, weights.view(*weights.shape[:3], len(shapes), num_points)


@pytest.mark.parametrize("shapes", [((3, 4), (2, 1)), ((1, 1),), ((5, 2), (3, 3), (1, 2))])
def test_equals_the_equation_with_its_gradients(shapes):
    value, shapes, locations, weights = random_inputs(shapes=shapes)
    results = []
    for function in (slow_reference, multi_scale_deformable_attention):
        inputs = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]
        output = function(inputs[0], shapes, inputs[1], inputs[2])
        results.append((output, *torch.autograd.grad((output**2).sum(), inputs)))
    for slow, fast in zip(*results):
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    value, shapes, locations, weights = random_inputs(batch_size=1, num_queries=2)
    inputs = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    assert torch.autograd.gradcheck(lambda v, x, w: multi_scale_deformable_attention(v, shapes, x, w), inputs)


@pytest.mark.parametrize("sizes", [{"batch_size": 0}, {"num_queries": 0}])
def test_empty(sizes):
    value, shapes, locations, weights = random_inputs(**sizes)
    value.requires_grad_()
    output = multi_scale_deformable_attention(value, shapes, locations, weights)
    assert output.shape == (value.shape[0], locations.shape[1], 6)
    output.sum().backward()
    assert value.grad.abs().sum() == 0


def test_points_outside_read_zero():
    value, shapes, locations, weights = random_inputs()
    assert multi_scale_deformable_attention(value, shapes, locations + 5, weights).abs().max() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_points_that_are_not_finite_read_zero(bad):
    value, shapes, locations, weights = random_inputs()
    locations[..., 0, :] = bad
    weights.requires_grad_()
    output = multi_scale_deformable_attention(value, shapes, locations, weights)
    assert output.isfinite().all()
    output.sum().backward()
    assert weights.grad[..., 0].abs().max() == 0


def test_inputs_need_not_be_contiguous():
    value, shapes, locations, weights = random_inputs()
    strided = value.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    expected = multi_scale_deformable_attention(value, shapes, locations, weights)
    torch.testing.assert_close(multi_scale_deformable_attention(strided, shapes, locations, weights), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    """PyTorch's own grid_sample overflows on maps of this size in half precision on the CPU, and has crashed."""
    value, shapes, locations, weights = random_inputs(batch_size=1, shapes=((200, 334), (13, 21)), num_queries=50)
    value = value.to(dtype)
    expected = multi_scale_deformable_attention(value.float(), shapes, locations.float(), weights.float())
    output = multi_scale_deformable_attention(value, shapes, locations.float(), weights.float())
    assert output.dtype == dtype
    assert torch.equal(output, expected.to(dtype))


def test_wrong_shapes_are_named():
    value, _, locations, weights = random_inputs()
    with pytest.raises(ValueError, match="spatial_shapes cover 15 positions but value has 14"):
        multi_scale_deformable_attention(value, [(3, 4), (3, 1)], locations, weights)


def test_the_stateless_layer_takes_the_seven_arguments_of_the_hub_kernel():
    value, shapes, locations, weights = random_inputs()
    layer = MultiScaleDeformableAttention()
    assert not list(layer.parameters())
    output = layer(value, torch.tensor(shapes), shapes, torch.tensor([0, 12]), locations, weights, 64)
    torch.testing.assert_close(output, multi_scale_deformable_attention(value, shapes, locations, weights))


def test_locations_around_points_are_in_cells_and_around_boxes_in_half_sizes():
    shapes = torch.tensor([[10, 20]])  # height, width
    offsets = torch.tensor([1.0, 1.0]).view(1, 1, 1, 1, 1, 2)
    point = compute_sampling_locations(offsets, torch.tensor([[[[0.5, 0.5]]]]), shapes)
    torch.testing.assert_close(point.flatten(), torch.tensor([0.55, 0.6]))
    offsets = torch.tensor([[4.0, 0.0]] * 4).view(1, 1, 1, 1, 4, 2)  # num_points cells reach the edge
    box = compute_sampling_locations(offsets, torch.tensor([[[[0.5, 0.5, 0.2, 0.4]]]]), shapes)
    torch.testing.assert_close(box[0, 0, 0, 0, 0], torch.tensor([0.6, 0.5]))


def test_equals_transformers_layer():
    """The same weights in transformers' Deformable DETR give the same output and attention weights."""
    modeling = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    config = modeling.DeformableDetrConfig(d_model=32, encoder_attention_heads=4, num_feature_levels=2)
    theirs = modeling.DeformableDetrMultiscaleDeformableAttention(config, num_heads=4, n_points=4)
    ours = DinoDetrMultiscaleDeformableAttention(32, num_heads=4, num_levels=2, num_points=4)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs.load_state_dict(ours.state_dict())

    shapes = [(4, 6), (2, 3)]
    memory, queries, positions = torch.randn(2, 30, 32), torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    mask = torch.rand(2, 30) < 0.8
    levels = DinoDetrFeatureLevels(
        features=memory,
        position_embeddings=torch.zeros_like(memory),
        mask=mask,
        valid_ratios=torch.ones(2, 2, 2),
        spatial_shapes=torch.tensor(shapes),
        level_start_index=torch.tensor([0, 24]),
        spatial_shapes_list=shapes,
    )
    for num_coordinates in (2, 4):
        reference_points = torch.rand(2, 5, 2, num_coordinates)
        output, weights = ours(queries, positions, memory, reference_points, levels)
        expected, expected_weights = theirs(
            queries,
            attention_mask=mask,
            encoder_hidden_states=memory,
            position_embeddings=positions,
            reference_points=reference_points,
            spatial_shapes=levels.spatial_shapes,
            spatial_shapes_list=shapes,
            level_start_index=levels.level_start_index,
        )
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(weights, expected_weights)
