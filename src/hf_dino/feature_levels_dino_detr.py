"""Feature levels: the hand-over from the backbone to the transformer, and where each of its cells lies in the image.

Paper: Deformable DETR, https://arxiv.org/abs/2010.04159, appendix A.2.
"""

from typing import NamedTuple

import torch


class DinoDetrFeatureLevels(NamedTuple):
    r"""
    Feature maps of a batch of images. Each level is flattened row by row and the levels are joined from fine to
    coarse, so `sequence_length == sum(height * width)`.

    Args:
        features (`torch.Tensor` of shape `(batch_size, sequence_length, d_model)`): Projected feature maps.
        position_embeddings (`torch.Tensor` of shape `(batch_size, sequence_length, d_model)`):
            Position of each cell in its image, plus the embedding of its level.
        mask (`torch.Tensor` of shape `(batch_size, sequence_length)` and dtype bool): `True` is image.
        valid_ratios (`torch.Tensor` of shape `(batch_size, num_feature_levels, 2)`):
            Unpadded fraction of each map, (width, height).
        spatial_shapes (`torch.Tensor` of shape `(num_feature_levels, 2)` and dtype int64): (height, width) in cells.
        level_start_index (`torch.Tensor` of shape `(num_feature_levels,)` and dtype int64): First row of each level.
        spatial_shapes_list (`list[tuple[int, int]]`):
            `spatial_shapes` as Python integers, which can be read without waiting for the device.
    """

    features: torch.Tensor
    position_embeddings: torch.Tensor
    mask: torch.Tensor
    valid_ratios: torch.Tensor
    spatial_shapes: torch.Tensor
    level_start_index: torch.Tensor
    spatial_shapes_list: list[tuple[int, int]]

    def valid_sizes(self) -> torch.Tensor:
        """Return the unpadded (width, height) of each map in cells, `(batch_size, num_feature_levels, 2)`.

        The sizes are whole numbers up to the rounding error of `valid_ratios`.
        """
        return self.valid_ratios * self.spatial_shapes.flip(-1)

    def normalized_cell_centers(self, valid_sizes: torch.Tensor) -> torch.Tensor:
        """Return the center (x, y) of each cell as fractions of the unpadded image.

        Args:
            valid_sizes (`torch.Tensor` of shape `(batch_size, num_feature_levels, 2)`):
                `self.valid_sizes()`, exact or rounded.

        Returns:
            `torch.Tensor` of shape `(batch_size, sequence_length, 2)`; above 1 in the padding.
        """
        centers = [
            cell_centers(height, width, valid_sizes.device) / valid_size[:, None]
            for (height, width), valid_size in zip(self.spatial_shapes_list, valid_sizes.unbind(dim=1))
        ]
        return torch.cat(centers, dim=1)


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


def get_reference_points(levels: DinoDetrFeatureLevels) -> torch.Tensor:
    """Return the encoder's reference points: where the center of each cell lies on each level.

    Returns:
        `torch.Tensor` of shape `(batch_size, sequence_length, num_feature_levels, 2)`: (x, y) as fractions of the
        padded map of that level.
    """
    centers = levels.normalized_cell_centers(levels.valid_sizes())
    return centers[:, :, None] * levels.valid_ratios[:, None]
