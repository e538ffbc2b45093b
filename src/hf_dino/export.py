"""Export a model to one portable file, and verify that the file computes what the model computes."""

import copy
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import BaseImageProcessor, PreTrainedConfig

import hf_dino

from .deformable_attention_dino_detr import (
    DinoDetrMultiscaleDeformableAttention,
    MultiScaleDeformableAttention,
    multi_scale_deformable_attention,
)
from .exported import INPUTS, METADATA_KEY, OPENVINO_FILE, OUTPUTS, READERS, QuerySelectionMode
from .registration import DinoDetrForObjectDetection
from .utils.errors import BrokenInputError, InputError, import_extra
from .utils.io import atomic_directory, atomic_write, ensure_new_directory, ensure_new_files


OPSET = 18
"""Of ONNX. The exporter cannot write a lower one; higher ones run GridSample on the CPU in ONNX Runtime's CUDA."""

MAX_BOX_DIFFERENCE, MAX_LOGIT_DIFFERENCE = 1e-5, 2e-4
MAX_TIE_DIFFERENCE = 1e-4
"""Scores of encoder tokens that are closer than this may change their ranks."""

SHAPES = ((1, 320, 352), (3, 320, 352), (2, 224, 416), (1, 480, 333), (2, 400, 256))
"""Batches that a file is verified on: number of images, height, width in pixels."""


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


ATTENTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "grid_sample": multi_scale_deformable_attention,
    "gather": gather_deformable_attention,
}
"""Forms of the operator that consist of operators of other runtimes."""


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
    """

    def __init__(self, model: DinoDetrForObjectDetection, attention: MultiScaleDeformableAttention):
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        for module in self.model.modules():
            if isinstance(module, DinoDetrMultiscaleDeformableAttention):
                module.attn = attention

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for mask_axis, axis in ((0, 0), (1, 2), (2, 3)):
            torch._check(pixel_mask.shape[mask_axis] == pixel_values.shape[axis])
        outputs = self.model(pixel_values, pixel_mask)
        return outputs.logits, outputs.pred_boxes


def make_program(model: DinoDetrForObjectDetection, attention: str = "grid_sample") -> torch.export.ExportedProgram:
    """Export a model with dynamic batch, height and width; without the places in source code that it came from.

    Args:
        model (`DinoDetrForObjectDetection`): On the CPU, in float32.
        attention (`str`, *optional*, defaults to `"grid_sample"`): A key of [`ATTENTIONS`].
    """
    height, width = _traced_size(model)
    inputs = torch.zeros(2, 3, height, width), torch.ones(2, height, width, dtype=torch.int64)
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {0: dynamic, 2: dynamic, 3: dynamic}, {0: dynamic, 1: dynamic, 2: dynamic}
    deployable = Deployable(model, DeployableAttention(ATTENTIONS[attention]))
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
) -> dict[str, Any]:
    """Return what an exported file states about its model."""
    return {
        "id2label": model.config.id2label,
        "num_select": model.config.num_select,
        **least_sizes(program, model.config.num_queries),
        "origin": origin,
        "written_by": f"hf_dino {hf_dino.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        "processor": json.loads(processor.to_json_string()),
        "config": _without_paths(model.config),
    }


def _without_paths(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a configuration, without the path that it was loaded from."""
    fields = json.loads(config.to_json_string(use_diff=False))
    fields["backbone_config"] = json.loads(config.backbone_config.to_json_string(use_diff=False))
    for part in (fields, fields["backbone_config"]):
        for name in ("_name_or_path", "auto_map"):
            part.pop(name, None)
    return fields


def write_onnx(program: torch.export.ExportedProgram, path: Path, metadata: str) -> None:
    """Write an ONNX file with all weights and metadata in it."""
    with _quiet("torch.onnx", "onnxscript", "onnx_ir"):
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=INPUTS, output_names=OUTPUTS, verbose=False
        )
    assert exported is not None
    proto = exported.model_proto
    graph = proto.graph
    # they repeat, node by node, the names of modules and of local source files
    for part in (graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    pixel_values = graph.input[0].type.tensor_type.shape.dim
    names = {pixel_values[axis].dim_param: name for axis, name in ((0, "batch"), (2, "height"), (3, "width"))}
    for value in (*graph.value_info, *graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
    proto.ClearField("metadata_props")
    proto.metadata_props.add(key=METADATA_KEY, value=metadata)
    path.write_bytes(proto.SerializeToString())


def write_openvino(program: torch.export.ExportedProgram, path: Path, metadata: str) -> None:
    """Write an OpenVINO model, in float32, into a directory."""
    openvino = import_extra("openvino", "openvino", "writing an OpenVINO model")
    model = openvino.convert_model(program)
    for port, name in zip((*model.inputs, *model.outputs), (*INPUTS, *OUTPUTS), strict=True):
        port.get_tensor().set_names({name})
    model.set_rt_info(metadata, [METADATA_KEY])
    openvino.save_model(model, path / OPENVINO_FILE, compress_to_fp16=False)


def write_program(program: torch.export.ExportedProgram, path: Path, metadata: str) -> None:
    """Write a program of `torch.export`."""
    torch.export.save(program, path, extra_files={METADATA_KEY: metadata})


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Keep loggers from informing of each step."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@dataclass(frozen=True)
class Format:
    """A format of exported models.

    Args:
        suffix (`str`): Of the file; empty for a directory.
        extra (`str`): The extra of this package that installs `packages`.
        packages (`tuple[str, ...]`): Needed to write and to run it.
        write (`Callable`): Writes a program and metadata to a path.
    """

    suffix: str
    extra: str
    packages: tuple[str, ...]
    write: Callable[[torch.export.ExportedProgram, Path, str], None]


FORMATS = {
    "onnx": Format(".onnx", "export", ("onnx", "onnxscript", "onnxruntime"), write_onnx),
    "openvino": Format("", "openvino", ("openvino",), write_openvino),
    "pt2": Format(".pt2", "export", (), write_program),
}


class DifferenceError(BrokenInputError):
    """Raised if a file does not compute what its model computes."""


@dataclass(frozen=True)
class Comparison:
    """Largest differences of a file from its model on one batch.

    Args:
        shape (`tuple[int, int, int]`): Number of images, height, width.
        boxes, logits (`float`): Of the raw outputs of all queries, after the ranks of query selection are aligned.
        ranks (`int`): Number of queries whose encoder token had another rank.
        ties (`float`): Largest difference between the scores of two tokens that changed places.
    """

    shape: tuple[int, int, int]
    boxes: float
    logits: float
    ranks: int
    ties: float

    @property
    def is_equal(self) -> bool:
        """Return whether all differences, which may be NaN, are within their bounds."""
        return (
            self.boxes <= MAX_BOX_DIFFERENCE
            and self.logits <= MAX_LOGIT_DIFFERENCE
            and self.ties <= MAX_TIE_DIFFERENCE
        )

    def __str__(self) -> str:
        """Return the differences in words."""
        return (
            f"boxes by {self.boxes:.1e} (at most {MAX_BOX_DIFFERENCE:.0e}), logits by {self.logits:.1e} (at most "
            f"{MAX_LOGIT_DIFFERENCE:.0e}), scores of tokens in changed places by {self.ties:.1e} (at most "
            f"{MAX_TIE_DIFFERENCE:.0e})"
        )


def verify(path: Path, model: DinoDetrForObjectDetection) -> list[Comparison]:
    """Compare an exported file with its model on several batches of padded images of noise.

    Mixed query selection gives each learned content query to a rank. Where the scores of two encoder tokens tie, a
    right file may swap their ranks, and with them all that follows. So the model is made to select the tokens of the
    file, by which raw outputs agree, and tokens may differ only where their scores tie.

    Args:
        path (`Path`): An exported file or directory.
        model (`DinoDetrForObjectDetection`): The model, on the CPU, in float32 and evaluation mode.

    Raises:
        DifferenceError: If a difference exceeds its bound.
    """
    session = READERS["" if path.is_dir() else path.suffix](path, with_selection=True)
    least = session.facts["least_size"]
    comparisons = []
    for index, (batch_size, height, width) in enumerate(SHAPES):
        shape = batch_size, max(height, least), max(width, least)
        comparison = compare(session.run, model, make_inputs(shape, seed=index))
        if not comparison.is_equal:
            size = " x ".join(map(str, shape))
            raise DifferenceError(f"the exported file differs from the model on {size} images: {comparison}")
        comparisons.append(comparison)
    return comparisons


def make_inputs(shape: tuple[int, int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images of noise and their masks; all but the first image are padded to the right and below."""
    batch_size, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(batch_size, height, width, dtype=torch.int64)
    for index in range(batch_size):
        mask[index, : height - height * index // 5, : width - width * index // 4] = 1
    return torch.randn(batch_size, 3, height, width, generator=generator) * mask[:, None], mask


@torch.no_grad()
def compare(
    run: Callable[..., list[Any]], model: DinoDetrForObjectDetection, inputs: tuple[torch.Tensor, torch.Tensor]
) -> Comparison:
    """Compare an exported model, which also returns the selected tokens, with its model."""
    logits, boxes, *selected = (torch.as_tensor(output) for output in run(*inputs))
    with QuerySelectionMode() as free:
        model(*inputs)
    with QuerySelectionMode(*(tokens.long() for tokens in selected)) as forced:
        expected = model(*inputs)
    ranks, ties = 0, 0.0
    for scores, own, theirs in zip(free.scores, free.selected, forced.selected, strict=True):
        ranks += int((own != theirs).sum())
        ties = max(ties, float((scores.gather(1, own) - scores.gather(1, theirs)).abs().max()))
        if any(len(set(row)) < len(row) for row in theirs.tolist()):
            ties = math.inf  # a token that is selected twice
    return Comparison(
        shape=(inputs[0].shape[0], inputs[0].shape[2], inputs[0].shape[3]),
        boxes=float((boxes - expected.pred_boxes).abs().max()),
        logits=float((logits - expected.logits).abs().max()),
        ranks=ranks,
        ties=ties,
    )


def check_output(output: Path, format: str) -> None:
    """Check all that can be wrong before the export, which takes minutes.

    Raises:
        InputError: If the output exists, cannot be written or has the suffix of another format.
        ImportError: If a package is not installed.
    """
    wanted = FORMATS[format]
    for package in wanted.packages:
        import_extra(package, wanted.extra, f"--format {format}")
    if output.suffix != wanted.suffix:
        ending = f"end in {wanted.suffix}" if wanted.suffix else "be a directory, without a suffix"
        raise InputError(f"--output {output}: with --format {format} it must {ending}")
    (ensure_new_files if wanted.suffix else ensure_new_directory)(output)
    with atomic_write(output.with_name(f"{output.name}.writable")) as temporary:
        temporary.touch()
    output.with_name(f"{output.name}.writable").unlink()


def export_model(
    model: DinoDetrForObjectDetection,
    processor: BaseImageProcessor,
    output: str | Path,
    *,
    format: str = "onnx",
    attention: str = "grid_sample",
    origin: str | None = None,
) -> list[Comparison]:
    """Export a model with dynamic batch, height and width, and verify the file before it gets its name.

    Args:
        model (`DinoDetrForObjectDetection`): The model; it is exported in float32.
        processor (`BaseImageProcessor`): Its image processor, whose settings are stored in the file.
        output (`str` or `Path`): File, or directory for `"openvino"`, to write; it must not exist.
        format (`str`, *optional*, defaults to `"onnx"`): A key of [`FORMATS`].
        attention (`str`, *optional*, defaults to `"grid_sample"`): A key of [`ATTENTIONS`].
        origin (`str`, *optional*): Where the model came from, to be stored in the file.

    Returns:
        `list[Comparison]`: The differences, all within their bounds.

    Raises:
        InputError: If the output exists, cannot be written or has the suffix of another format.
        DifferenceError: If the file does not compute what the model computes; it is deleted.
    """
    output = Path(output)
    check_output(output, format)
    model = copy.deepcopy(model).cpu().float().eval()
    program = make_program(model, attention)
    metadata = json.dumps(describe(model, processor, program, origin))
    with (atomic_write if FORMATS[format].suffix else atomic_directory)(output) as temporary:
        FORMATS[format].write(program, temporary, metadata)
        return verify(temporary, model)
