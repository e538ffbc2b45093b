import math

import pytest
import torch
from torch import nn

from helpers.models import TINY_RESNET, TINY_SWIN, tiny_config
from hf_dino.backbone_dino_detr import DinoDetrBackbone


SWIN = TINY_SWIN | {"out_features": ["stage2", "stage3", "stage4"]}
TINY_CONVNEXT = {
    "model_type": "convnext",
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 8, 16, 16],
    "out_features": ["stage3", "stage4"],
}
TINY_TIMM_SWIN = {  # returns (batch, height, width, channels)
    "model_type": "timm_backbone",
    "backbone": "swin_tiny_patch4_window7_224",
    "out_indices": [-3, -2, -1],
}


def make_backbone(**overrides) -> DinoDetrBackbone:
    torch.manual_seed(0)
    backbone = DinoDetrBackbone(tiny_config(**overrides))
    nn.init.normal_(backbone.level_embed)
    return backbone


def padded_batch(*sizes: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of these (height, width), padded to the largest."""
    height, width = (max(side) for side in zip(*sizes))
    pixel_mask = torch.zeros(len(sizes), height, width, dtype=torch.int64)
    for mask, (rows, columns) in zip(pixel_mask, sizes):
        mask[:rows, :columns] = 1
    return torch.randn(len(sizes), 3, height, width) * pixel_mask[:, None], pixel_mask


@pytest.mark.parametrize(
    ("backbone_config", "num_feature_levels", "strides"),
    [
        (TINY_RESNET, 3, [16, 32, 64]),
        (SWIN, 4, [8, 16, 32, 64]),
        (TINY_CONVNEXT, 3, [16, 32, 64]),
        ("resnet18", 4, [8, 16, 32, 64]),
        ("convnext_atto", 3, [8, 16, 32]),
        (TINY_TIMM_SWIN, 4, [8, 16, 32, 64]),
    ],
    ids=["resnet", "swin", "convnext", "timm resnet", "timm convnext", "timm swin"],
)
def test_every_kind_of_backbone_gives_levels(backbone_config, num_feature_levels, strides):
    if isinstance(backbone_config, str) or backbone_config["model_type"] == "timm_backbone":
        pytest.importorskip("timm")
    backbone = make_backbone(backbone_config=backbone_config, num_feature_levels=num_feature_levels)
    with torch.no_grad():
        levels = backbone(*padded_batch((224, 224), (160, 224)))
    shapes = [(math.ceil(224 / stride), math.ceil(224 / stride)) for stride in strides]
    length = sum(height * width for height, width in shapes)
    assert levels.spatial_shapes_list == shapes
    assert levels.features.shape == levels.position_embeddings.shape == (2, length, 32)
    assert levels.mask.shape == (2, length)
    assert levels.valid_ratios.shape == (2, len(shapes), 2)
    assert levels.features.isfinite().all()


@pytest.mark.parametrize("num_feature_levels", [1, 2, 3, 4, 5])
def test_levels_beyond_the_backbones_are_halves(num_feature_levels):
    last_stage = TINY_RESNET | {"out_features": ["stage4"]}
    levels = make_backbone(backbone_config=last_stage, num_feature_levels=num_feature_levels)(
        *padded_batch((260, 520))
    )
    shapes = [(9, 17), (5, 9), (3, 5), (2, 3), (1, 2)][:num_feature_levels]
    assert levels.spatial_shapes_list == shapes
    assert levels.spatial_shapes.tolist() == [list(shape) for shape in shapes]
    assert levels.level_start_index.tolist() == [0, 153, 198, 213, 219][:num_feature_levels]


@pytest.mark.parametrize("num_feature_levels", [1, 2, 3, 4, 5])
def test_the_default_resnet_is_read_at_its_last_stages(num_feature_levels):
    stages = {1: 1, 2: 2, 3: 3, 4: 3, 5: 4}[num_feature_levels]
    with torch.device("meta"):
        backbone = make_backbone(backbone_config=None, num_feature_levels=num_feature_levels)
    assert list(backbone.body.channels) == [256, 512, 1024, 2048][-stages:]
    assert len(backbone.input_proj) == num_feature_levels


def statistics(backbone: DinoDetrBackbone) -> list[torch.Tensor]:
    return [norm.running_mean.clone() for norm in backbone.batch_norms()]


@pytest.mark.parametrize("frozen", [True, False])
def test_freeze_batch_norm(frozen):
    backbone = make_backbone(freeze_backbone_batch_norms=frozen).train()
    before = statistics(backbone)
    backbone(*padded_batch((64, 64), (64, 48))).features.sum().backward()
    assert len(before) > 10
    unchanged = [torch.equal(old, new) for old, new in zip(before, statistics(backbone))]
    has_gradient = [norm.weight.grad is not None for norm in backbone.batch_norms()]
    assert unchanged == [frozen] * len(before)
    assert has_gradient == [not frozen] * len(before)
    assert all(norm.training != frozen for norm in backbone.batch_norms())
    assert not any(norm.training for norm in backbone.eval().batch_norms())


def test_masks_and_valid_ratios_of_padded_images():
    levels = make_backbone()(*padded_batch((128, 64), (64, 256)))
    assert levels.spatial_shapes_list == [(8, 16), (4, 8), (2, 4)]
    expected = torch.tensor([[0.25, 1.0], [1.0, 0.5]])  # (width, height)
    torch.testing.assert_close(levels.valid_ratios, expected[:, None].expand(2, 3, 2))
    tall, wide = levels.mask[:, :128].view(2, 8, 16)
    assert torch.equal(tall, (torch.arange(16) < 4).expand(8, 16))
    assert torch.equal(wide, (torch.arange(8) < 4)[:, None].expand(8, 16))


def test_level_embedding_is_added_to_its_level():
    backbone = make_backbone()
    batch = padded_batch((128, 128))
    before = backbone(*batch).position_embeddings
    with torch.no_grad():
        backbone.level_embed[1] += 1
    change = (backbone(*batch).position_embeddings - before)[0].mean(dim=-1)
    torch.testing.assert_close(change, torch.cat([torch.zeros(64), torch.ones(16), torch.zeros(4)]))


def test_an_image_that_is_all_padding_gives_numbers():
    pixel_values, pixel_mask = padded_batch((64, 64), (64, 64))
    pixel_mask[1] = 0
    levels = make_backbone()(pixel_values, pixel_mask)
    assert levels.features.isfinite().all()
    assert levels.position_embeddings.isfinite().all()
    assert (levels.valid_ratios[1] == 0).all()


def test_swin_leaves_no_parameter_without_a_gradient():
    """Swin in transformers computes a norm and drops it; DistributedDataParallel would wait for its gradient."""
    backbone = make_backbone(backbone_config=SWIN, num_feature_levels=4).train()
    levels = backbone(*padded_batch((128, 128)))
    (levels.features.sum() + levels.position_embeddings.sum()).backward()
    without = [name for name, weight in backbone.named_parameters() if weight.requires_grad and weight.grad is None]
    assert without == []
