"""Errors of multi-scale deformable attention against the reference in float64, and the fewest bytes it could move."""

import os
from typing import Any

import torch

from deformable_attention_baselines import IMPLEMENTATIONS, Tensors, fused_reference, reference
from deformable_attention_inputs import HEAD_DIM, Inputs


def run(name: str, attend: Any, inputs: Inputs, backward: bool) -> tuple[Tensors, Tensors]:
    """Run once; return outputs and, with the backward pass, gradients of value, locations and weights or logits."""
    os.environ["HF_DINO_CPU_CAPABILITY"] = IMPLEMENTATIONS[name].cpu_path
    return run_form(IMPLEMENTATIONS[name].form, attend, inputs, backward)


def run_form(form: str, attend: Any, inputs: Inputs, backward: bool) -> tuple[Tensors, Tensors]:
    """Run a function that takes inputs of a form, as [`run`] does."""
    tensors = inputs.tensors[form]
    with torch.set_grad_enabled(backward):
        outputs = attend(inputs.levels, *tensors)
    if not backward:
        return outputs, ()
    return outputs, torch.autograd.grad(outputs[0], [x for x in tensors if x.requires_grad], inputs.grad_output)


def find_expected(form: str, inputs: Inputs) -> tuple[Tensors, Tensors]:
    """Compute the expected result of `run` by the reference in float64, a few queries at a time to save memory."""
    attend: Any = {"plain": reference, "fused": fused_reference}[form]
    tensors = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs.tensors[form]]
    parts = []
    for image in range(len(tensors[0])):
        for start in range(0, tensors[1].shape[1], 4096):
            some = slice(image, image + 1), slice(start, start + 4096)
            outputs = attend(inputs.levels, tensors[0][some[0]], *(x[some] for x in tensors[1:]))
            outputs[0].backward(inputs.grad_output[some].double())
            parts.append([output.detach() for output in outputs])
    outputs = tuple(torch.cat(pieces, dim=1).unflatten(1, (len(tensors[0]), -1))[0] for pieces in zip(*parts))
    return outputs, tuple(x.grad for x in tensors if x.grad is not None)


def relative_errors(
    results: tuple[Tensors, Tensors], expected: tuple[Tensors, Tensors], off_lines: torch.Tensor
) -> tuple[float, float]:
    """Return the largest error of an output and of a gradient, in the Euclidean norm; NaN if there is one anywhere."""
    return _largest_error(results[0], expected[0], ()), _largest_error(results[1], expected[1], (off_lines,))


def relative_error(
    results: tuple[Tensors, Tensors], expected: tuple[Tensors, Tensors], off_lines: torch.Tensor
) -> float:
    """Return the largest error of all outputs and gradients, in the Euclidean norm; NaN if there is one anywhere."""
    return torch.tensor(relative_errors(results, expected, off_lines)).max().item()


def _largest_error(results: Tensors, expected: Tensors, counted: tuple[torch.Tensor, ...]) -> float:
    """Return the largest error of corresponding tensors; of the gradient of points, only where it is continuous."""
    errors = [0.0]
    for position, (one, other) in enumerate(zip(results, expected)):
        counts = counted[0] if counted and position == 1 else 1
        errors.append((((one.double() - other) * counts).norm() / (other * counts).norm()).item())
    return torch.tensor(errors).max().item()


def fewest_bytes(inputs: Inputs, grad_value: torch.Tensor, backward: bool, form: str = "plain") -> int:
    """Count every cell that some point reads, every location, weight and result, once; for gradients, inputs twice.

    Args:
        grad_value (`torch.Tensor`): The gradient of value, which is zero where nothing is read.
    """
    value, *points = inputs.tensors[form]
    cells_read = int(grad_value.any(dim=-1).sum()) * HEAD_DIM * value.element_size()
    outputs = [inputs.grad_output, *(points[-1:] if form == "fused" else [])]  # as large as gradients and logits
    forward = cells_read + size(*points) + size(*outputs)
    return 2 * forward + size(value, *points) if backward else forward


def size(*tensors: torch.Tensor) -> int:
    """Return the size of tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def rounded(number: float, digits: int) -> float:
    """Round to a number of significant digits."""
    return float(f"{number:.{digits}g}")
