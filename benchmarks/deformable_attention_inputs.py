"""Inputs of multi-scale deformable attention at the shapes DINO has: random numbers, the same for the same case."""

from typing import NamedTuple

import torch

from hf_dino.deformable_attention_dino_detr import compute_sampling_locations
from hf_dino.initialization_dino_detr import initial_sampling_offsets


HEADS, HEAD_DIM, POINTS = 8, 32, 4
FOUR_SCALES, FIVE_SCALES = (8, 16, 32, 64), (4, 8, 16, 32, 64)


class Shape(NamedTuple):
    """Strides of the feature levels, and the number of queries; 0: every cell is one, as in the encoder."""

    strides: tuple[int, ...]
    num_queries: int = 0


SHAPES = {
    "encoder-4scale": Shape(FOUR_SCALES),
    "encoder-5scale": Shape(FIVE_SCALES),
    "decoder-900": Shape(FOUR_SCALES, 900),
    "decoder-1100": Shape(FOUR_SCALES, 1100),
    "decoder-900-5scale": Shape(FIVE_SCALES, 900),
}


class Levels:
    """Feature levels in the three forms that implementations ask for."""

    def __init__(self, shapes: list[tuple[int, int]], device: str):
        self.shapes = shapes
        self.tensor = torch.tensor(shapes, device=device)
        self.starts = (self.tensor.prod(1).cumsum(0) - self.tensor.prod(1)).contiguous()


class Case(NamedTuple):
    """A key of `SHAPES`, the number of images, the dtype of the values, and height and width of an image in pixels."""

    shape: str
    batch_size: int
    dtype: str
    image_size: tuple[int, int]


class Inputs:
    """Random inputs in both forms, and the gradient that arrives at the output.

    Args:
        case (`Case`): Their sizes and dtype.
        device (`str`): Where they are made. CPU and GPU have other random numbers.
        seed (`int`): Of the random numbers.
    """

    def __init__(self, case: Case, device: str, seed: int = 0):
        torch.manual_seed(seed)
        dtype = getattr(torch, case.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        strides, num_queries = SHAPES[case.shape]
        self.levels = Levels([(-(-case.image_size[0] // s), -(-case.image_size[1] // s)) for s in strides], device)
        num_cells = sum(height * width for height, width in self.levels.shapes)
        value = torch.randn(case.batch_size, num_cells, HEADS, HEAD_DIM, device=device)
        references = random_boxes(num_queries) if num_queries else cell_centers(self.levels.shapes)
        references = references[:, None].repeat(case.batch_size, 1, len(strides), 1).to(device, wide)

        points = (case.batch_size, references.shape[1], HEADS, len(strides), POINTS)
        ring = initial_sampling_offsets(*points[2:]).to(device)
        offsets = (ring + 1.5 * torch.randn(*points, 2, device=device)).to(dtype)
        logits, value = torch.randn(points, device=device).to(dtype), value.to(dtype)
        locations = compute_sampling_locations(offsets, references, self.levels.tensor)
        weights = logits.to(wide).flatten(-2).softmax(dim=-1).view(points)
        for variable in (value, locations, weights, offsets, logits):
            variable.requires_grad_()
        self.tensors = {"plain": (value, locations, weights), "fused": (value, references, offsets, logits)}
        self.grad_output = torch.randn(*points[:2], HEADS * HEAD_DIM, device=device).to(dtype)

    @property
    def off_lines(self) -> torch.Tensor:
        """Return which points are off the lines between cells, where the gradient of a sampling location jumps."""
        locations = self.tensors["plain"][1]
        cells = locations.detach().double() * self.levels.tensor.flip(1)[:, None] - 0.5
        return (cells - cells.round()).abs() > 1e-3


def cell_centers(shapes: list[tuple[int, int]]) -> torch.Tensor:
    """Return reference points of the encoder, `(cells of all levels, 2)`: (x, y) as fractions."""
    rows_first = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in shapes]
    return torch.cat(rows_first).flip(-1)


def random_boxes(count: int) -> torch.Tensor:
    """Return reference boxes of the decoder, `(count, 4)`: center x, center y, width, height as fractions."""
    return torch.cat([torch.rand(count, 2), 0.05 + 0.45 * torch.rand(count, 2)], dim=-1)
