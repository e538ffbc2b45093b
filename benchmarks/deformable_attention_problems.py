"""What a benchmark asks of multi-scale deformable attention: DINO's shapes, filled with random numbers."""

from typing import NamedTuple

import torch

from hf_dino.deformable_attention_dino_detr import sampling_locations
from hf_dino.initialization_dino_detr import initial_sampling_offsets


HEADS, HEAD_DIM, POINTS = 8, 32, 4
STRIDES = {"encoder-4scale": (8, 16, 32, 64), "encoder-5scale": (4, 8, 16, 32, 64)}  # the decoder's: 4scale
QUERIES = {"decoder-900": 900, "decoder-1100": 1100}


class Levels:
    """Feature levels in the three forms that implementations ask for."""

    def __init__(self, shapes: list[tuple[int, int]], device: str):
        self.shapes = shapes
        self.tensor = torch.tensor(shapes, device=device)
        self.starts = (self.tensor.prod(1).cumsum(0) - self.tensor.prod(1)).contiguous()


class Case(NamedTuple):
    """What is asked, of how many images at once, in which dtype."""

    shape: str
    batch_size: int
    dtype: str
    image: tuple[int, int]  # height, width in pixels


class Problem:
    """Random inputs in both forms, and the gradient that arrives at the output. The same for the same case."""

    def __init__(self, case: Case, device: str):
        torch.manual_seed(0)
        dtype = getattr(torch, case.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        strides = STRIDES.get(case.shape, STRIDES["encoder-4scale"])
        self.levels = Levels([(-(-case.image[0] // s), -(-case.image[1] // s)) for s in strides], device)
        value = torch.randn(case.batch_size, int(self.levels.tensor.prod(1).sum()), HEADS, HEAD_DIM)
        references = cell_centers(self.levels.shapes) if case.shape in STRIDES else random_boxes(QUERIES[case.shape])
        references = references[:, None].repeat(case.batch_size, 1, len(strides), 1).to(device, wide)

        points = (case.batch_size, references.shape[1], HEADS, len(strides), POINTS)
        offsets = (initial_sampling_offsets(*points[2:]) + 1.5 * torch.randn(*points, 2)).to(device, dtype)
        logits, value = torch.randn(points).to(device, dtype), value.to(device, dtype)
        locations = sampling_locations(offsets, references, self.levels.tensor)
        weights = logits.to(wide).flatten(-2).softmax(dim=-1).view(points)
        for variable in (value, locations, weights, offsets, logits):
            variable.requires_grad_()
        self.inputs = {"plain": (value, locations, weights), "fused": (value, references, offsets, logits)}
        self.grad_output = torch.randn(*points[:2], HEADS * HEAD_DIM).to(device, dtype)
        # As a point crosses a line between cells, the gradient by its place jumps: nothing to compare there.
        cells = locations.detach().double() * self.levels.tensor.flip(1)[:, None] - 0.5
        self.off_lines = (cells - cells.round()).abs() > 1e-3


def cell_centers(shapes: list[tuple[int, int]]) -> torch.Tensor:
    """Reference points of the encoder, `(cells of all levels, 2)`: (x, y) as fractions."""
    rows_first = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in shapes]
    return torch.cat(rows_first).flip(-1)


def random_boxes(count: int) -> torch.Tensor:
    """Reference boxes of the decoder, `(count, 4)`: center x, center y, width, height as fractions."""
    return torch.cat([torch.rand(count, 2), 0.05 + 0.45 * torch.rand(count, 2)], dim=-1)
