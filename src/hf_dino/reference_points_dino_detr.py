"""Centers of feature map cells: the encoder's reference points, and the centers of the box proposals.

`backbone_dino_detr` builds the feature levels themselves.

Paper: Deformable DETR, https://arxiv.org/abs/2010.04159, section 4.1 and appendix A.4.
"""

import torch

from .backbone_dino_detr import DinoDetrFeatureLevels


def cell_centers(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Return the centers of a map's cells, row by row: `(height * width, 2)`, (x, y) in cells.

    Example:

    ```python
    >>> cell_centers(1, 2, torch.device("cpu")).tolist()
    [[0.5, 0.5], [1.5, 0.5]]

    ```
    """
    y = torch.arange(height, device=device, dtype=torch.float32) + 0.5
    x = torch.arange(width, device=device, dtype=torch.float32) + 0.5
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1)


def normalized_cell_centers(levels: DinoDetrFeatureLevels, *, round_sizes: bool) -> torch.Tensor:
    """Return the center (x, y) of each cell as fractions of the unpadded image.

    Args:
        levels ([`DinoDetrFeatureLevels`]): Only shapes and valid ratios are read.
        round_sizes (`bool`):
            Round the unpadded size of each map to whole cells, which removes the rounding error of `valid_ratios`.

    Returns:
        `torch.Tensor` of shape `(batch_size, sequence_length, 2)`; above 1 in the padding.
    """
    valid_sizes = levels.valid_ratios * levels.spatial_shapes.flip(-1)  # (batch, levels, 2): width, height in cells
    if round_sizes:
        valid_sizes = valid_sizes.round()
    centers = [
        cell_centers(height, width, valid_sizes.device) / valid_size[:, None]
        for (height, width), valid_size in zip(levels.spatial_shapes_list, valid_sizes.unbind(dim=1))
    ]
    return torch.cat(centers, dim=1)


def get_reference_points(levels: DinoDetrFeatureLevels) -> torch.Tensor:
    """Return the encoder's reference points: the center of each cell, once per level.

    Returns:
        `torch.Tensor` of shape `(batch_size, sequence_length, num_feature_levels, 2)`: (x, y) as fractions of the
        padded map of that level.
    """
    centers = normalized_cell_centers(levels, round_sizes=False)
    return centers[:, :, None] * levels.valid_ratios[:, None]
