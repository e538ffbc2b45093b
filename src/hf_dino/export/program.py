"""Turn a model into a program of `torch.export`, of which all formats are made, and describe it."""

import copy
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import BaseImageProcessor, PreTrainedConfig

import hf_dino

from ..deformable_attention_dino_detr import (
    DinoDetrMultiscaleDeformableAttention,
    MultiScaleDeformableAttention,
    multi_scale_deformable_attention,
)
from ..exported import INPUTS, QuerySelectionMode
from ..kernels import operators
from ..registration import DinoDetrForObjectDetection
from ..utils.errors import InputError


def gather_deformable_attention(
    value: torch.Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    """Compute [`multi_scale_deformable_attention`] by gathering the four cells around each point, without GridSample.

    TensorRT is reported to compute GridSample wrongly (NVIDIA/TensorRT#4813).
    """
    batch_size, _, num_heads, head_dim = value.shape
    num_queries, num_points = sampling_locations.shape[1], sampling_locations.shape[4]
    cells = value.transpose(1, 2).flatten(0, 1)  # (batch * heads, sequence, head_dim)
    locations = sampling_locations.nan_to_num(nan=-3, posinf=-3, neginf=-3).transpose(1, 2).flatten(0, 1)
    weights = attention_weights.transpose(1, 2).flatten(0, 1)  # (batch * heads, queries, levels, points)
    output = cells.new_zeros(batch_size * num_heads, num_queries, head_dim)
    lengths = [height * width for height, width in spatial_shapes]
    for level, ((height, width), level_cells) in enumerate(zip(spatial_shapes, cells.split(lengths, dim=1))):
        x = locations[:, :, level, :, 0] * width - 0.5  # in cells, (batch * heads, queries, points)
        y = locations[:, :, level, :, 1] * height - 0.5
        left, top = x.floor(), y.floor()
        for column, row in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            overlap = (1 - (x - column).abs()) * (1 - (y - row).abs()) * inside * weights[:, :, level]
            index = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long()
            gathered = level_cells.gather(1, index.flatten(1)[..., None].expand(-1, -1, head_dim))
            sampled = gathered.unflatten(1, (num_queries, num_points))
            output = output + (sampled * overlap[..., None]).sum(dim=2)
    return output.unflatten(0, (batch_size, num_heads)).transpose(1, 2).flatten(2)


def compiled_deformable_attention(
    value: torch.Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> torch.Tensor:
    """Compute [`multi_scale_deformable_attention`] by the compiled operator.

    Raises:
        InputError: If it is not available.
    """
    compiled = operators(value.device)
    if compiled is None:
        raise InputError("--attention compiled: there is no compiled kernel, see hf-dino kernels; use grid_sample")
    return compiled.deformable_attention(value, spatial_shapes, sampling_locations, attention_weights)


ATTENTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "grid_sample": multi_scale_deformable_attention,
    "gather": gather_deformable_attention,
    "compiled": compiled_deformable_attention,
}
"""Forms of the operator. Other runtimes have the operators that the first two consist of, and not the third."""


class DeployableAttention(MultiScaleDeformableAttention):
    """The operator in one of the forms in [`ATTENTIONS`], with the arguments of a kernel of the Hub."""

    def __init__(self, attend: Callable[..., torch.Tensor]):
        super().__init__()
        self.attend = attend

    def forward(
        self,
        value: torch.Tensor,
        value_spatial_shapes: torch.Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: torch.Tensor,
        sampling_locations: torch.Tensor,
        attention_weights: torch.Tensor,
        im2col_step: int,
    ) -> torch.Tensor:
        return self.attend(value, value_spatial_shapes_list, sampling_locations, attention_weights)


class Deployable(nn.Module):
    """A copy of a model with its operator replaced, whose inputs and outputs are tensors.

    Args:
        model (`DinoDetrForObjectDetection`): The model.
        attention (`MultiScaleDeformableAttention`): Replaces the compiled operator.
        with_selection (`bool`, *optional*, defaults to `False`): Also return the selected encoder tokens, by rank.
    """

    def __init__(
        self, model: DinoDetrForObjectDetection, attention: MultiScaleDeformableAttention, with_selection: bool = False
    ):
        super().__init__()
        self.with_selection = with_selection
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        for module in self.model.modules():
            if isinstance(module, DinoDetrMultiscaleDeformableAttention):
                module.attn = attention

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for mask_axis, axis in ((0, 0), (1, 2), (2, 3)):
            torch._check(pixel_mask.shape[mask_axis] == pixel_values.shape[axis])
        with QuerySelectionMode() as mode:
            outputs = self.model(pixel_values, pixel_mask)
        return (outputs.logits, outputs.pred_boxes, *(mode.selected if self.with_selection else ()))


def make_program(
    model: DinoDetrForObjectDetection, attention: str = "grid_sample", with_selection: bool = False
) -> torch.export.ExportedProgram:
    """Export a model with dynamic batch, height and width; without the places in source code that it came from.

    Args:
        model (`DinoDetrForObjectDetection`): On the CPU, in float32.
        attention (`str`, *optional*, defaults to `"grid_sample"`): A key of [`ATTENTIONS`].
        with_selection (`bool`, *optional*, defaults to `False`): Also return the selected encoder tokens, by rank.
    """
    height, width = _traced_size(model)
    inputs = torch.zeros(2, 3, height, width), torch.ones(2, height, width, dtype=torch.int64)
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {0: dynamic, 2: dynamic, 3: dynamic}, {0: dynamic, 1: dynamic, 2: dynamic}
    deployable = Deployable(model, DeployableAttention(ATTENTIONS[attention]), with_selection)
    with torch.no_grad():
        program = torch.export.export(deployable, inputs, dynamic_shapes=dict(zip(INPUTS, shapes, strict=True)))
    program.graph.eliminate_dead_code()  # torch.export.load cannot read the outputs of earlier layers, an empty list
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _traced_size(model: DinoDetrForObjectDetection) -> tuple[int, int]:
    """Return a height and width with enough encoder tokens for the queries."""
    height, width = 160, 192
    while _num_tokens(model, height, width) < model.config.num_queries:
        height, width = 2 * height, 2 * width
    return height, width


@torch.no_grad()
def _num_tokens(model: DinoDetrForObjectDetection, height: int, width: int) -> int:
    levels = model.model.backbone(torch.zeros(1, 3, height, width), torch.ones(1, height, width))
    return levels.mask.shape[1]


def least_sizes(program: torch.export.ExportedProgram, num_queries: int) -> dict[str, int]:
    """Return the least edge that a program takes, and the edge of the smallest square with a token for each query."""
    nodes = program.graph.nodes
    pixel_values = next(node for node in nodes if node.op == "placeholder" and node.name == INPUTS[0])
    edges = [size.node.expr for size in pixel_values.meta["val"].shape[2:]]
    least_edge = max(int(program.range_constraints[edge].lower) for edge in edges)
    selections = [node.args[0].meta["val"].shape[1] for node in nodes if node.target is torch.ops.aten.topk.default]

    def has_enough_tokens(side: int) -> bool:
        sizes = dict.fromkeys(edges, side)
        return all(int(tokens.node.expr.subs(sizes)) >= num_queries for tokens in selections)

    return {"least_edge": least_edge, "least_size": next(filter(has_enough_tokens, itertools.count(least_edge)))}


def describe(
    model: DinoDetrForObjectDetection,
    processor: BaseImageProcessor,
    program: torch.export.ExportedProgram,
    origin: str | None,
    attention: str = "grid_sample",
) -> dict[str, Any]:
    """Return what an exported file states about its model."""
    return {
        "id2label": model.config.id2label,
        "num_select": model.config.num_select,
        **least_sizes(program, model.config.num_queries),
        "origin": origin,
        "attention": attention,
        "precision": "float32",
        "model_sha256": model_digest(model),
        "written_by": f"hf_dino {hf_dino.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        "processor": json.loads(processor.to_json_string()),
        "config": _without_paths(model.config),
    }


def digest(contents: Iterable[bytes]) -> str:
    """Return a SHA-256 of arrays, whatever their order."""
    return hashlib.sha256("".join(sorted(hashlib.sha256(each).hexdigest() for each in contents)).encode()).hexdigest()


def model_digest(model: nn.Module) -> str:
    """Return the digest of all weights of a model, in float32 on the CPU."""
    weights = [each for each in model.state_dict().values() if each.is_floating_point()]
    return digest(each.contiguous().numpy().tobytes() for each in weights)


def _without_paths(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a configuration, without the path that it was loaded from."""
    fields = json.loads(config.to_json_string(use_diff=False))
    fields["backbone_config"] = json.loads(config.backbone_config.to_json_string(use_diff=False))
    for part in (fields, fields["backbone_config"]):
        for name in ("_name_or_path", "auto_map"):
            part.pop(name, None)
    return fields
