"""From images to feature levels: backbone, neck, masks, position embeddings and valid ratios.

Paper: Deformable DETR, https://arxiv.org/abs/2010.04159, appendix A.2; DINO, https://arxiv.org/abs/2203.03605, A.1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoBackbone, PreTrainedConfig
from transformers.utils import ModelOutput

from .boxes_dino_detr import sine_wavelengths
from .configuration_dino_detr import DinoDetrConfig
from .initialization_dino_detr import init_as


@dataclass
class DinoDetrFeatureLevels(ModelOutput):
    r"""
    Everything the transformer knows about a batch of images. Each level is flattened row by row and the levels are
    joined from fine to coarse, so `sequence_length == sum(height * width)`.

    Args:
        features (`torch.Tensor` of shape `(batch_size, sequence_length, d_model)`): Projected feature maps.
        position_embeddings (`torch.Tensor` of shape `(batch_size, sequence_length, d_model)`):
            Where in its image and on which level a position lies.
        mask (`torch.Tensor` of shape `(batch_size, sequence_length)` and dtype bool): `True` is image.
        valid_ratios (`torch.Tensor` of shape `(batch_size, num_feature_levels, 2)`):
            Unpadded fraction of each map, (width, height).
        spatial_shapes (`torch.Tensor` of shape `(num_feature_levels, 2)` and dtype int64): (height, width) in cells.
        level_start_index (`torch.Tensor` of shape `(num_feature_levels,)` and dtype int64): First row of each level.
        spatial_shapes_list (`list[tuple[int, int]]`): `spatial_shapes` for those who must not wait for the device.
    """

    features: torch.Tensor = None
    position_embeddings: torch.Tensor = None
    mask: torch.Tensor = None
    valid_ratios: torch.Tensor = None
    spatial_shapes: torch.Tensor = None
    level_start_index: torch.Tensor = None
    spatial_shapes_list: list[tuple[int, int]] = None


class DinoDetrBackbone(nn.Module):
    """A transformers backbone, and the neck that brings its maps to one width and adds coarser ones."""

    _gradient_checkpointing_func: Callable  # set together with `gradient_checkpointing`

    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # switched by `gradient_checkpointing_enable`
        body_config: Any = config.backbone_config
        body_config._attn_implementation = backbone_attn_implementation(body_config, body_config._attn_implementation)
        self.body = AutoBackbone.from_config(body_config)
        self.channels_last = _gives_channels_last(self.body)
        _freeze_unused_norm(self.body)

        channels = list(self.body.channels)
        extra_levels = config.num_feature_levels - len(channels)
        # The first extra level reads the backbone's last map itself, not its projection; each next one the one before.
        extra_channels = [channels[-1], *[config.d_model] * (extra_levels - 1)][:extra_levels]
        self.projections = nn.ModuleList(
            [_project(nn.Conv2d(width, config.d_model, kernel_size=1)) for width in channels]
            + [_project(nn.Conv2d(width, config.d_model, 3, stride=2, padding=1)) for width in extra_channels]
        )
        self.level_embed = nn.Parameter(torch.empty(config.num_feature_levels, config.d_model))
        init_as("level_embedding", self)

        if config.freeze_backbone_batch_norms:
            for norm in self.batch_norms():
                norm.eval().requires_grad_(False)

    def batch_norms(self) -> list[nn.Module]:
        return [module for module in self.body.modules() if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))]

    def train(self, mode: bool = True) -> "DinoDetrBackbone":
        """As `nn.Module.train`, but frozen batch norms stay in evaluation mode."""
        super().train(mode)
        for norm in self.batch_norms():
            if self.config.freeze_backbone_batch_norms or not norm.weight.requires_grad:
                norm.eval()
        return self

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> DinoDetrFeatureLevels:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Normalized, padded images.
            pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`): 1 is image, 0 is padding.
        """
        maps = self.project(self.read_body(pixel_values))
        masks = [_resize_mask(pixel_mask, level.shape[-2:]) for level in maps]
        positions = [self.sine_position_embedding(mask) + embed for mask, embed in zip(masks, self.level_embed)]

        spatial_shapes_list = [(level.shape[-2], level.shape[-1]) for level in maps]
        spatial_shapes = torch.tensor(spatial_shapes_list).to(pixel_values.device, non_blocking=True)
        level_lengths = spatial_shapes.prod(dim=1)
        features = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)
        return DinoDetrFeatureLevels(
            features=features,
            position_embeddings=torch.cat([level.flatten(1, 2) for level in positions], dim=1).to(features.dtype),
            mask=torch.cat([mask.flatten(1) for mask in masks], dim=1),
            valid_ratios=torch.stack([_valid_ratio(mask) for mask in masks], dim=1),
            spatial_shapes=spatial_shapes,
            level_start_index=level_lengths.cumsum(0) - level_lengths,
            spatial_shapes_list=spatial_shapes_list,
        )

    def read_body(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The backbone's own maps, each `(batch_size, channels, height, width)`, from fine to coarse."""
        if self.gradient_checkpointing and self.training and not self.body.supports_gradient_checkpointing:
            if not pixel_values.requires_grad:
                # Reentrant checkpointing trains only what depends on an input that asks for a gradient.
                pixel_values = pixel_values.detach().requires_grad_()
            return self._gradient_checkpointing_func(self._read_body, pixel_values)
        return self._read_body(pixel_values)

    def _read_body(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        maps = self.body(pixel_values).feature_maps
        return tuple(level.permute(0, 3, 1, 2) for level in maps) if self.channels_last else tuple(maps)

    def project(self, maps: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """All levels at width d_model: the backbone's, then each further one from the map before it."""
        levels = [projection(level) for projection, level in zip(self.projections, maps)]
        source = maps[-1]
        for projection in self.projections[len(maps) :]:
            source = projection(source)
            levels.append(source)
        return levels

    def sine_position_embedding(self, mask: torch.Tensor) -> torch.Tensor:
        """Sines and cosines of where a cell lies between the first and the last unpadded cell of its column and row.

        Args:
            mask (`torch.Tensor` of shape `(batch_size, height, width)` and dtype bool): `True` is image.

        Returns:
            `torch.Tensor` of shape `(batch_size, height, width, d_model)`, float32; y in the first half, then x.
        """
        config = self.config
        width = config.d_model // 2
        wavelengths = sine_wavelengths(width, config.positional_encoding_temperature, mask.device)
        halves = []
        for axis in (1, 2):
            index = mask.cumsum(axis, dtype=torch.float32)  # 1, 2, 3, ... In 16 bits it would stop counting at 2048.
            last = index.narrow(axis, index.shape[axis] - 1, 1)
            fraction = (index + config.positional_encoding_offset) / (last + 1e-6)
            angle = 2 * math.pi * fraction[..., None] / wavelengths
            halves.append(torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2))
        return torch.cat(halves, dim=-1)


def backbone_attn_implementation(config: PreTrainedConfig, requested: str | None) -> str | None:
    """The attention that a backbone is to use when the model is told to use `requested`.

    Backbones without attention, such as ResNet, refuse `"sdpa"`; they need not hear of it.
    """
    has_attention = MODEL_FOR_BACKBONE_MAPPING[type(config)]._supports_sdpa
    return "eager" if requested == "sdpa" and not has_attention else requested


def cell_centers(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Centers of the cells of a map, row by row: `(height * width, 2)`, (x, y) in cells.

    Example:

    ```python
    >>> cell_centers(1, 2, torch.device("cpu")).tolist()
    [[0.5, 0.5], [1.5, 0.5]]

    ```
    """
    y = torch.arange(height, device=device, dtype=torch.float32) + 0.5
    x = torch.arange(width, device=device, dtype=torch.float32) + 0.5
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1)


def _project(convolution: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(init_as("xavier_zero_bias", convolution), nn.GroupNorm(32, convolution.out_channels))


def _resize_mask(pixel_mask: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """The mask of a feature map, `(batch_size, height, width)`: each cell asks one pixel, as in the original."""
    return nn.functional.interpolate(pixel_mask[:, None].float(), size=size)[:, 0].bool()


def _valid_ratio(mask: torch.Tensor) -> torch.Tensor:
    """Unpadded (width, height) of a map as fractions, `(batch_size, 2)`; images lie in the upper left corner."""
    return torch.stack([mask[:, 0, :].float().mean(dim=1), mask[:, :, 0].float().mean(dim=1)], dim=-1)


def _gives_channels_last(body: nn.Module) -> bool:
    """Timm's Swin and a few others give (batch, height, width, channels), and transformers hands that on."""
    return str(getattr(getattr(body, "_backbone", None), "output_fmt", "NCHW")).endswith("NHWC")


def _freeze_unused_norm(body: Any) -> None:
    """Transformers' Swin backbone computes a final norm and drops the result: DDP would miss its gradient."""
    if hasattr(body, "swin"):
        body.swin.layernorm.requires_grad_(False)
