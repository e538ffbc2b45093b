"""Turn images into feature levels: backbone, multi-scale projection, masks, position embeddings and valid ratios.

Papers: Deformable DETR, https://arxiv.org/abs/2010.04159, appendix A.2; DINO, https://arxiv.org/abs/2203.03605, A.1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoBackbone, PreTrainedConfig

from .configuration_dino_detr import DinoDetrConfig
from .initialization_dino_detr import init_as, level_embedding, xavier_zero_bias
from .position_embeddings_dino_detr import sine_position_embedding


class DinoDetrFeatureLevels(NamedTuple):
    r"""
    Feature maps of a batch of images, as sequences of tokens, one per cell. Each level is flattened row by row and the
    levels are concatenated from fine to coarse, so `sequence_length == sum(height * width)`.

    Args:
        features (`torch.Tensor` of shape `(batch_size, sequence_length, d_model)`): Projected feature maps.
        position_embeddings (`torch.Tensor` of shape `(batch_size, sequence_length, d_model)`):
            Position of each cell in its image, plus the embedding of its level.
        mask (`torch.Tensor` of shape `(batch_size, sequence_length)` and dtype bool): `True` is image.
        valid_ratios (`torch.Tensor` of shape `(batch_size, num_feature_levels, 2)`):
            Unpadded fraction of each map, (width, height).
        spatial_shapes (`torch.Tensor` of shape `(num_feature_levels, 2)` and dtype int64): (height, width) in cells.
        level_start_index (`torch.Tensor` of shape `(num_feature_levels,)` and dtype int64):
            Index of the first token of each level.
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


class DinoDetrBackbone(nn.Module):
    """Extract feature maps with a transformers backbone, project them to `d_model` and add coarser levels."""

    _gradient_checkpointing_func: Callable  # set together with `gradient_checkpointing`

    def __init__(self, config: DinoDetrConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # set by `gradient_checkpointing_enable`
        body_config: Any = config.backbone_config
        body_config._attn_implementation = backbone_attn_implementation(body_config, body_config._attn_implementation)
        self.body = AutoBackbone.from_config(body_config)
        self.channels_last = _is_channels_last(self.body)
        _freeze_unused_norm(self.body)

        channels = list(self.body.channels)
        extra_levels = config.num_feature_levels - len(channels)
        # The first extra level is made from the backbone's last map, not from its projection; each further one from
        # the level before it.
        extra_channels = [channels[-1], *[config.d_model] * (extra_levels - 1)][:extra_levels]
        self.input_proj = nn.ModuleList(
            [_make_projection(nn.Conv2d(dim, config.d_model, kernel_size=1)) for dim in channels]
            + [_make_projection(nn.Conv2d(dim, config.d_model, 3, stride=2, padding=1)) for dim in extra_channels]
        )
        self.level_embed = nn.Parameter(torch.empty(config.num_feature_levels, config.d_model))
        init_as(level_embedding, self)

        if config.freeze_backbone_batch_norms:
            for norm in self.batch_norms():
                norm.eval().requires_grad_(False)

    def batch_norms(self) -> list[nn.Module]:
        return [module for module in self.body.modules() if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))]

    def train(self, mode: bool = True) -> "DinoDetrBackbone":
        """Set training mode as `nn.Module.train` does, but leave frozen batch norms in evaluation mode."""
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
        feature_maps = self.project_features(self.extract_features(pixel_values))
        features = torch.cat([feature_map.flatten(2).transpose(1, 2) for feature_map in feature_maps], dim=1)
        shapes = [(feature_map.shape[-2], feature_map.shape[-1]) for feature_map in feature_maps]
        return self.make_levels(features, shapes, pixel_mask)

    def make_levels(
        self, features: torch.Tensor, shapes: list[tuple[int, int]], pixel_mask: torch.Tensor
    ) -> DinoDetrFeatureLevels:
        """Add positions, mask, valid ratios and shapes to projected feature maps.

        Args:
            features (`torch.Tensor` of shape `(batch_size, sequence_length, d_model)`): As in the levels.
            shapes (`list[tuple[int, int]]`): (height, width) of each level in cells.
            pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`): 1 is image, 0 is padding.
        """
        masks = [_resize_mask(pixel_mask, shape) for shape in shapes]
        config = self.config
        dim, temperature = config.d_model // 2, config.positional_encoding_temperature
        sines = [sine_position_embedding(mask, dim, temperature, config.positional_encoding_offset) for mask in masks]
        positions = [sine + level_embed for sine, level_embed in zip(sines, self.level_embed)]

        spatial_shapes = torch.tensor(shapes).to(features.device, non_blocking=True)
        level_lengths = spatial_shapes.prod(dim=1)
        position_embeddings = torch.cat([position.flatten(1, 2) for position in positions], dim=1)
        return DinoDetrFeatureLevels(
            features=features,
            position_embeddings=position_embeddings.to(features.dtype),
            mask=torch.cat([mask.flatten(1) for mask in masks], dim=1),
            valid_ratios=torch.stack([_valid_ratio(mask) for mask in masks], dim=1),
            spatial_shapes=spatial_shapes,
            level_start_index=level_lengths.cumsum(0) - level_lengths,
            spatial_shapes_list=shapes,
        )

    def extract_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the backbone's feature maps, each `(batch_size, channels, height, width)`, from fine to coarse."""
        if self.gradient_checkpointing and self.training and not self.body.supports_gradient_checkpointing:
            if not pixel_values.requires_grad:
                # Reentrant checkpointing trains only what depends on an input that requires a gradient.
                pixel_values = pixel_values.detach().requires_grad_()
            return self._gradient_checkpointing_func(self._backbone_features, pixel_values)
        return self._backbone_features(pixel_values)

    def _backbone_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        feature_maps = self.body(pixel_values).feature_maps
        if self.channels_last:
            feature_maps = [feature_map.permute(0, 3, 1, 2) for feature_map in feature_maps]
        return tuple(feature_maps)

    def project_features(self, feature_maps: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Project the feature maps to `d_model` channels and append coarser maps.

        The first coarser map is made from the last feature map before its projection, each further one from the one
        before.
        """
        projected = [projection(feature_map) for projection, feature_map in zip(self.input_proj, feature_maps)]
        coarsest = feature_maps[-1]
        for projection in self.input_proj[len(feature_maps) :]:
            coarsest = projection(coarsest)
            projected.append(coarsest)
        return projected


def backbone_attn_implementation(config: PreTrainedConfig, requested: str | None) -> str | None:
    """Return the attention implementation for a backbone whose model was given `requested`.

    Backbones without attention, such as ResNet, raise an error when they are given `"sdpa"`, so they get `"eager"`.
    """
    has_attention = MODEL_FOR_BACKBONE_MAPPING[type(config)]._supports_sdpa
    return "eager" if requested == "sdpa" and not has_attention else requested


def _make_projection(convolution: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(init_as(xavier_zero_bias, convolution), nn.GroupNorm(32, convolution.out_channels))


def _resize_mask(pixel_mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize a mask to a feature map, `(batch_size, height, width)`: nearest pixel, as the official implementation."""
    return nn.functional.interpolate(pixel_mask[:, None].float(), size=size)[:, 0].bool()


def _valid_ratio(mask: torch.Tensor) -> torch.Tensor:
    """Return the unpadded fractions (width, height), `(batch_size, 2)`; images are in the upper left corner."""
    return torch.stack([mask[:, 0, :].float().mean(dim=1), mask[:, :, 0].float().mean(dim=1)], dim=-1)


def _is_channels_last(body: nn.Module) -> bool:
    """Return whether maps are `(batch, height, width, channels)`, as those of timm's Swin and a few others."""
    return str(getattr(getattr(body, "_backbone", None), "output_fmt", "NCHW")).endswith("NHWC")


def _freeze_unused_norm(body: Any) -> None:
    """Freeze the final norm of transformers' Swin, whose result is not used: DDP would wait for its gradient."""
    if hasattr(body, "swin"):
        body.swin.layernorm.requires_grad_(False)
