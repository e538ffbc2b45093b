"""The implementations of multi-scale deformable attention that a benchmark compares, with the same signature.

An implementation is a function of the levels and of inputs in one of two forms, and returns a tuple:

    plain: value, locations, weights             -> output
    fused: value, references, offsets, logits    -> output, weights
"""

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from transformers.models.deformable_detr import modeling_deformable_detr

from deformable_attention_inputs import Levels
from hf_dino import kernels
from hf_dino.deformable_attention_dino_detr import compute_sampling_locations, multi_scale_deformable_attention


Tensors = tuple[torch.Tensor, ...]


class UnavailableError(Exception):
    """Raised if an implementation cannot be used. The message says why."""


def reference(levels: Levels, value: torch.Tensor, locations: torch.Tensor, weights: torch.Tensor) -> Tensors:
    return (multi_scale_deformable_attention(value, levels.shapes, locations, weights),)


def fused_reference(levels: Levels, value: torch.Tensor, references: torch.Tensor, *raw: torch.Tensor) -> Tensors:
    offsets, logits = raw
    weights = logits.flatten(-2).softmax(dim=-1).view_as(logits)
    return *reference(levels, value, compute_sampling_locations(offsets, references, levels.tensor), weights), weights


def compiled(options: argparse.Namespace) -> Any:
    operators = kernels.operators(options.device)
    if operators is None:
        raise UnavailableError("no compiled operators: see hf-dino kernels")
    return operators


def make_ours(options: argparse.Namespace) -> Callable[..., Tensors]:
    attend = compiled(options).deformable_attention
    return lambda levels, value, *points: (attend(value, levels.shapes, *points),)


def make_ours_avx2(options: argparse.Namespace) -> Callable[..., Tensors]:
    if options.device != "cpu":
        raise UnavailableError("for the CPU only")
    return make_ours(options)


def make_ours_fused(options: argparse.Namespace) -> Callable[..., Tensors]:
    attend = compiled(options).fused_deformable_attention
    return lambda levels, value, *points: attend(value, levels.shapes, *points)


def of_seven_arguments(layer: Any) -> Callable[..., Tensors]:
    """Wrap a layer with transformers' signature, whose models pass everything in the dtype of the values."""

    def attend(levels: Levels, value: torch.Tensor, *points: torch.Tensor) -> Tensors:
        locations, weights = (tensor.to(value.dtype) for tensor in points)
        return (layer(value, levels.tensor, levels.shapes, levels.starts, locations, weights, len(value)),)

    return attend


def in_32_bits(function: Callable[..., torch.Tensor]) -> Callable[..., Tensors]:
    """Wrap a function without half precision, which its users call in float32."""

    def attend(levels: Levels, value: torch.Tensor, *points: torch.Tensor) -> Tensors:
        return (function(levels, *(tensor.float() for tensor in (value, *points))).to(value.dtype),)

    return attend


class OfficialFunction(torch.autograd.Function):
    """The gradient of the official operator, which comes as two bare functions."""

    @staticmethod
    def forward(ctx: Any, official: Any, step: int, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.official, ctx.step = official, step
        ctx.save_for_backward(*inputs)
        return official.ms_deform_attn_forward(*inputs, step)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        backward = ctx.official.ms_deform_attn_backward
        grads = backward(*ctx.saved_tensors, grad_outputs[0].contiguous(), ctx.step)
        return None, None, grads[0], None, None, grads[1], grads[2]


def import_for_cuda(options: argparse.Namespace, name: str) -> Any:
    if options.device == "cpu":
        raise UnavailableError("for CUDA only")
    return import_module(name)


def make_official(options: argparse.Namespace) -> Callable[..., Tensors]:
    official = import_for_cuda(options, "MultiScaleDeformableAttention")
    return in_32_bits(
        lambda levels, value, *points: OfficialFunction.apply(
            official, len(value), value, levels.tensor, levels.starts, *points
        )
    )


def make_mmcv(options: argparse.Namespace) -> Callable[..., Tensors]:
    function = import_for_cuda(options, "mmcv.ops.multi_scale_deform_attn").MultiScaleDeformableAttnFunction
    return in_32_bits(
        lambda levels, value, *points: function.apply(value, levels.tensor, levels.starts, *points, len(value))
    )


def make_triton(options: argparse.Namespace) -> Callable[..., Tensors]:
    attend = import_for_cuda(options, "msda_triton").multiscale_deformable_attention
    flags = {"padding_mode": "zeros", "align_corners": False}
    return in_32_bits(lambda levels, value, *points: attend(value, levels.tensor, *points, **flags).flatten(2))


def make_hub(options: argparse.Namespace) -> Callable[..., Tensors]:
    if not options.hub:
        raise UnavailableError("not asked for: --hub downloads it")
    library = import_for_cuda(options, "kernels")
    kernel = library.get_kernel("kernels-community/deformable-detr", version=1)  # the version that transformers takes
    return of_seven_arguments(kernel.layers.MultiScaleDeformableAttention())


class Implementation(NamedTuple):
    """An implementation, and how to load it."""

    form: str
    make: Callable[[argparse.Namespace], Callable[..., Tensors]]
    cpu_path: str = ""  # for HF_DINO_CPU_CAPABILITY: the best there is


REFERENCES = {"plain": "reference", "fused": "reference + softmax + locations"}
IMPLEMENTATIONS = {
    REFERENCES["plain"]: Implementation("plain", lambda options: reference),
    REFERENCES["fused"]: Implementation("fused", lambda options: fused_reference),
    "hf_dino": Implementation("plain", make_ours),
    "hf_dino, AVX2": Implementation("plain", make_ours_avx2, "avx2"),
    "hf_dino, fused": Implementation("fused", make_ours_fused),
    "transformers": Implementation(
        "plain", lambda options: of_seven_arguments(modeling_deformable_detr.MultiScaleDeformableAttention())
    ),
    "official operator": Implementation("plain", make_official),
    "mmcv": Implementation("plain", make_mmcv),
    "kernels-community": Implementation("plain", make_hub),
    "msda-triton": Implementation("plain", make_triton),
}


def find_implementations(options: argparse.Namespace) -> dict[str, str]:
    """Return for each implementation whether it can be used, or why not."""
    found = {}
    for name, implementation in IMPLEMENTATIONS.items():
        try:
            implementation.make(options)
            found[name] = "takes part"
        except UnavailableError as error:
            found[name] = str(error)
        except ImportError as error:
            found[name] = f"not installed ({error})"
    return found
