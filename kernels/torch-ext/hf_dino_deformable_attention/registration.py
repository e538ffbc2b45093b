"""Register the shapes of the results of the operators, and their gradients.

Autocast needs no rule of its own: under it, the operators get 16-bit values and 32-bit locations, which they take. The
functions of this package convert other mixtures of dtypes.
"""

from typing import Any

import torch

from ._ops import add_op_namespace_prefix, ops


def _shapes_of_forward(value, spatial_shapes, sampling_locations, attention_weights):  # type: ignore[no-untyped-def]
    return value.new_empty(value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3])


def _shapes_of_backward(  # type: ignore[no-untyped-def]
    grad_output, value, spatial_shapes, sampling_locations, attention_weights, deterministic
):
    return tuple(map(_contiguous_like, (value, sampling_locations, attention_weights)))


def _shapes_of_fused_forward(  # type: ignore[no-untyped-def]
    value, spatial_shapes, reference_points, sampling_offsets, attention_logits
):
    output = _shapes_of_forward(value, spatial_shapes, sampling_offsets, attention_logits)
    return output, _contiguous_like(attention_logits)


def _shapes_of_fused_backward(  # type: ignore[no-untyped-def]
    grad_output,
    grad_weights,
    value,
    spatial_shapes,
    reference_points,
    sampling_offsets,
    attention_weights,
    deterministic,
):
    return tuple(map(_contiguous_like, (value, reference_points, sampling_offsets, attention_weights)))


def _contiguous_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    value, ctx.spatial_shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _gradients(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
    value, locations, weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = ops.deformable_attention_backward(
        grad_output, value, ctx.spatial_shapes, locations, weights, torch.are_deterministic_algorithms_enabled()
    )
    return grad_value, None, grad_locations, grad_weights


def _keep_fused(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    value, ctx.spatial_shapes, references, offsets, _ = inputs
    ctx.set_materialize_grads(False)  # the weights that are returned rarely have a gradient
    ctx.save_for_backward(value, references, offsets, output[1])


def _fused_gradients(ctx: Any, grad_output: torch.Tensor | None, grad_weights: torch.Tensor | None) -> tuple[Any, ...]:
    value, references, offsets, weights = ctx.saved_tensors
    if grad_output is None:
        batch_size, num_queries, num_heads = weights.shape[:3]
        grad_output = value.new_zeros(batch_size, num_queries, num_heads * value.shape[3])
    grad_value, grad_references, grad_offsets, grad_logits = ops.fused_deformable_attention_backward(
        grad_output,
        grad_weights,
        value,
        ctx.spatial_shapes,
        references,
        offsets,
        weights,
        torch.are_deterministic_algorithms_enabled(),
    )
    return grad_value, None, grad_references, grad_offsets, grad_logits


def _raise_on_double_backward(ctx: Any, *grads: torch.Tensor) -> None:
    raise RuntimeError(
        "the compiled deformable attention can be differentiated once only; for second derivatives use the reference "
        "implementation in PyTorch (in hf_dino: HF_DINO_KERNELS=off)"
    )


_FAKES = {
    "deformable_attention": _shapes_of_forward,
    "deformable_attention_backward": _shapes_of_backward,
    "fused_deformable_attention": _shapes_of_fused_forward,
    "fused_deformable_attention_backward": _shapes_of_fused_backward,
}
for _name, _shapes in _FAKES.items():
    torch.library.register_fake(add_op_namespace_prefix(_name), _shapes)
torch.library.register_autograd(add_op_namespace_prefix("deformable_attention"), _gradients, setup_context=_keep)
torch.library.register_autograd(
    add_op_namespace_prefix("fused_deformable_attention"), _fused_gradients, setup_context=_keep_fused
)
for _name in ("deformable_attention_backward", "fused_deformable_attention_backward"):
    torch.library.register_autograd(add_op_namespace_prefix(_name), _raise_on_double_backward)

__all__ = ["ops"]
