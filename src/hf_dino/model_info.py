"""Count the parameters and FLOPs of a model by part, measure a forward pass, and read where a model came from."""

import ctypes
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import BaseImageProcessor, PreTrainedModel

import hf_dino

from . import kernels
from .configuration_dino_detr import UNUSED_LABEL
from .kernels.compilers import NAMESPACE
from .model_card import backbone_name
from .utils.errors import InputError, summarize_list


# Beginning of the name of a module -> the part of the model that it belongs to; the longest that fits.
PARTS = {
    "model.backbone.body": "backbone",
    "model.backbone": "neck",
    "model.encoder": "encoder",
    "model.query_selection": "query selection",
    "model.decoder": "decoder",
    "model.decoder.bbox_embed": "heads",
    "class_embed": "heads",
    "model.denoising": "denoising (training only)",
}
OTHER = "other"

# Per sampling point and channel, multiply-adds of four cells and one of the attention weight.
FLOPS_PER_SAMPLE = 10

Shape = Sequence[int]


def part_of(name: str) -> str:
    """Return the part of the model that a module or parameter belongs to.

    Example:

    ```python
    >>> part_of("model.backbone.body.encoder"), part_of("model.backbone.level_embed"), part_of("class_embed.0")
    ('backbone', 'neck', 'heads')

    ```
    """
    starts = (start for start in PARTS if f"{name}.".startswith(f"{start}."))
    return PARTS.get(max(starts, key=len, default=""), OTHER)


def count_parameters(model: nn.Module) -> Counter[str]:
    """Return the number of parameters by part; shared ones count once."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return counts


def deformable_attention_flops(value: Shape, *inputs: Any, **_: Any) -> int:
    """Return the FLOPs of the compiled operators, whose last input has a weight for each sampling point.

    Args:
        value (`Shape`): `(batch_size, sequence_length, num_heads, head_dim)`.
        inputs: Spatial shapes, and shapes of the other tensors.
    """
    return FLOPS_PER_SAMPLE * value[3] * math.prod(inputs[-1])


def grid_sample_flops(feature_maps: Shape, grids: Shape, *_: Any, **__: Any) -> int:
    """Return the FLOPs of the reference implementation, which weights after `grid_sample` by uncounted operators.

    Args:
        feature_maps (`Shape`): `(batch_size * num_heads, head_dim, height, width)`.
        grids (`Shape`): `(batch_size * num_heads, num_queries, num_points, 2)`.
    """
    return FLOPS_PER_SAMPLE * feature_maps[1] * math.prod(grids[:-1])


def _cpu_attention_flops(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def flop_formulas(device: torch.device) -> dict[Any, Any]:
    """Return formulas for operators that PyTorch does not count, after loading ours for a device, which adds them."""
    kernels.operators(device)
    aten, ours = torch.ops.aten, getattr(torch.ops, NAMESPACE)
    names = [name for name in ("deformable_attention", "fused_deformable_attention") if hasattr(ours, name)]
    return {
        aten.grid_sampler_2d: grid_sample_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
        **{getattr(ours, name): deformable_attention_flops for name in names},
    }


@torch.no_grad()
def count_flops(model: nn.Module, *inputs: torch.Tensor) -> Counter[str]:
    """Run a forward pass and return its FLOPs by part.

    Matrix products, convolutions and attention are counted, with two FLOPs for a multiplication and an addition;
    elementwise operations, norms and softmax are not. Deformable attention counts alike in all implementations.

    Args:
        model (`nn.Module`): The model.
        inputs (`torch.Tensor`): Arguments of its forward.

    Returns:
        `Counter[str]`: FLOPs by part; their total is that of the whole pass.
    """
    formulas = flop_formulas(inputs[0].device)
    with _frozen(model), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        model(*inputs)
    root = type(model).__name__
    of_modules = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items() if name != "Global"}
    counts: Counter[str] = Counter()
    for name, flops in of_modules.items():
        counts[part_of(name.removeprefix(f"{root}."))] += flops
        if name != root:  # a module counts what it calls, too
            counts[part_of(_caller(name, of_modules).removeprefix(f"{root}."))] -= flops
    return counts


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter require a gradient: PyTorch's counter fails at views of one that does."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _caller(name: str, modules: dict[str, int]) -> str:
    """Return the closest module around another one that has a forward of its own."""
    outer = name.rpartition(".")[0]
    return outer if outer in modules else _caller(outer, modules)


@torch.no_grad()
def measure_forward(model: nn.Module, pixel_values: torch.Tensor) -> tuple[float, int | None]:
    """Return the seconds of a forward pass and its peak memory in bytes, beyond that of the weights and the image.

    Peak memory is that of PyTorch's allocator on a CUDA device, and that of the process on a CPU with Linux. It is
    `None` on other systems.
    """
    device = pixel_values.device
    before = start_memory(device)
    start = time.perf_counter()
    model(pixel_values)
    _synchronize(device)
    seconds = time.perf_counter() - start
    return seconds, None if before is None else peak_memory(device) - before


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def start_memory(device: torch.device) -> int | None:
    """Reset the peak and return the bytes in use, of PyTorch's allocator on a CUDA device, else of this process.

    They are `None` if they cannot be measured: on a CPU without Linux, and on other devices.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return _memory(device, peak=False)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed before would be used without being counted
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except (OSError, AttributeError):
        return None
    return _memory(device, peak=False) if device.type == "cpu" else None


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that were in use since [`start_memory`], where that returned a number."""
    return _memory(device, peak=True)


def _memory(device: torch.device, *, peak: bool) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:" if peak else "VmRSS:") + 1]) * 1024


def read_origin(model: str) -> str | None:
    """Return what the model card states about where a model came from, without Markdown.

    Args:
        model (`str`): Directory or Hub id of the model.

    Returns:
        `str` or `None`: `None` if there is no card, or one that was not written by hf_dino.
    """
    text = ""
    with suppress(OSError, ValueError):  # not found, offline, or not a Hub id
        card = Path(model, "README.md") if Path(model).is_dir() else Path(hf_hub_download(model, "README.md"))
        text = card.read_text(encoding="utf-8")
    origin = next(
        (each for each in text.split("\n\n") if re.match(r"(Converted|Trained) (from|with|on)\b", each)), None
    )
    return origin and re.sub(r"\[([^]]+)\]\([^)]+\)|`", r"\1", " ".join(origin.split())).removesuffix(
        ", with this command:"
    )


def describe_model(
    name: str, model: PreTrainedModel, processor: BaseImageProcessor, image_size: tuple[int, int]
) -> dict[str, Any]:
    """Run two forward passes of a random image and return what is to be known of a model.

    Args:
        name (`str`): Directory or Hub id of the model.
        model (`PreTrainedModel`): The model, in evaluation mode, on any device.
        processor (`BaseImageProcessor`): Its image processor.
        image_size (`tuple[int, int]`): Height and width of the image, in pixels.

    Returns:
        `dict[str, Any]`: Facts by name; `"parts"` has the parameters and FLOPs of each part and, last, of the whole
        model.

    Raises:
        InputError: If the image is too small for the model.
    """
    pixel_values = torch.rand(1, 3, *image_size, device=model.device, dtype=model.dtype)
    try:
        flops = count_flops(model, pixel_values)
    except ValueError as error:
        raise InputError(f"--image_size {image_size[0]}x{image_size[1]}: is too small ({error})") from error
    parameters = count_parameters(model)
    parts = [part for part in dict.fromkeys([*PARTS.values(), OTHER]) if parameters[part] or flops[part]]
    config = model.config
    names = [label for label in config.id2label.values() if label != UNUSED_LABEL]
    operators = kernels.operators(model.device)
    return {
        "model": name,
        "backbone": backbone_name(config),
        "num_feature_levels": config.num_feature_levels,
        "num_queries": config.num_queries,
        "origin": read_origin(name),
        "labels": names,
        "num_unused_labels": config.num_labels - len(names),
        "image_size": dict(processor.size),
        "saved_by_transformers": config.transformers_version,
        "versions": {
            "hf_dino": hf_dino.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "kernel": str(Path(str(operators.__file__)).parent) if operators else None,
        "forward": _measure(model, pixel_values),
        "parts": {part: {"parameters": parameters[part], "flops": flops[part]} for part in parts}
        | {"total": {"parameters": parameters.total(), "flops": flops.total()}},
    }


def _measure(model: nn.Module, pixel_values: torch.Tensor) -> dict[str, Any]:
    seconds, peak = measure_forward(model, pixel_values)
    return {
        "height": pixel_values.shape[2],
        "width": pixel_values.shape[3],
        "device": str(pixel_values.device),
        "dtype": str(pixel_values.dtype),
        "seconds": seconds,
        "peak_memory": peak,
        "weights": sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers())),
    }


def describe_facts(facts: dict[str, Any]) -> dict[str, str]:
    """Return the facts of [`describe_model`], but not its parts, in words."""
    unused = f" and {facts['num_unused_labels']} unused" if facts["num_unused_labels"] else ""
    versions = facts["versions"]
    return {
        "model": "{backbone}, {num_feature_levels} feature levels, {num_queries} queries".format(**facts),
        "origin": facts["origin"] or "unknown: no model card by hf_dino",
        "labels": f"{len(facts['labels'])}{unused}: {summarize_list(facts['labels'])}",
        "images": ", ".join(f"{key} {pixels}" for key, pixels in facts["image_size"].items()),
        "saved by": f"transformers {facts['saved_by_transformers'] or 'of an unknown version'}",
        "here": "hf_dino {hf_dino}, PyTorch {torch}, transformers {transformers}".format(**versions),
        "kernel": facts["kernel"] or "none: the reference implementation in PyTorch",
        "forward": _describe_forward(**facts["forward"]),
    }


def _describe_forward(
    height: int, width: int, device: str, dtype: str, seconds: float, peak_memory: int | None, weights: int
) -> str:
    unknown = "peak memory not measured on this system"
    memory = unknown if peak_memory is None else f"peak memory {peak_memory / 1e6:,.0f} MB"
    return (
        f"{height}x{width} on {device} in {dtype}: {seconds:.3g} s, {memory} beyond the {weights / 1e6:,.0f} MB of "
        "the weights"
    )
