"""Initial weights. transformers skips containers of models outside its package, so all could be wrong silently."""

import math

import pytest
import torch
from torch import nn

from helpers.models import tiny_config
from hf_dino import DinoDetrForObjectDetection
from hf_dino.initialization_dino_detr import CLASS_PRIOR, initial_sampling_offsets


WIDE = {"d_model": 128, "num_queries": 80, "share_decoder_heads": False, "num_denoising": 100}
MANY_LABELS = {label: f"class {label}" for label in range(60)}


def constructed(config) -> DinoDetrForObjectDetection:
    return DinoDetrForObjectDetection(config)


def loaded_from_nothing(config) -> DinoDetrForObjectDetection:
    """Do what `from_pretrained` does: build on the meta device, load, then initialize what was not loaded."""
    return DinoDetrForObjectDetection.from_pretrained(None, config=config, state_dict={})


def built_elsewhere(config) -> DinoDetrForObjectDetection:
    """Build as code from the Hub does: the class belongs to a dynamic module."""
    elsewhere = {"__module__": "transformers_modules.someone.dino"}
    return type("DinoDetrForObjectDetection", (DinoDetrForObjectDetection,), elsewhere)(config)


@pytest.fixture(
    scope="module", params=[constructed, loaded_from_nothing, built_elsewhere], ids=lambda way: way.__name__
)
def model(request) -> DinoDetrForObjectDetection:
    torch.manual_seed(0)
    return request.param(tiny_config(**WIDE, id2label=MANY_LABELS))


def layers(model: nn.Module, *names: str) -> list[nn.Module]:
    """Return all layers with one of these last names; there must be some."""
    found = [module for name, module in model.named_modules() if name.rpartition(".")[-1] in names]
    assert found
    return found


def check_uniform(weight: torch.Tensor, bound: float) -> None:
    """Check that a weight is within the bound and nearly reaches it, with the standard deviation of a uniform one."""
    assert 0.9 * bound < weight.abs().max() <= bound * (1 + 1e-6)
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)


def check_normal(weight: torch.Tensor) -> None:
    assert abs(weight.mean().item()) < 4 / math.sqrt(weight.numel())
    assert weight.std().item() == pytest.approx(1, rel=0.1)


def xavier_bound(weight: torch.Tensor) -> float:
    rows, columns = weight.shape[:2]
    return math.sqrt(6 / ((rows + columns) * weight[0, 0].numel()))


def test_every_weight_is_materialized_and_finite(model):
    for name, tensor in model.state_dict().items():
        assert not tensor.is_meta, name
        assert tensor.isfinite().all(), name


def test_class_heads_start_with_low_probabilities(model):
    heads = [*model.class_embed, model.model.query_selection.class_embed]
    assert len(heads) == 4
    for head in heads:
        torch.testing.assert_close(head.bias, torch.full((60,), -math.log((1 - CLASS_PRIOR) / CLASS_PRIOR)))
        check_uniform(head.weight, 1 / math.sqrt(128))


def test_box_heads_start_without_effect(model):
    heads = [*model.model.decoder.bbox_embed, model.model.query_selection.bbox_embed]
    assert len(heads) == 4
    for head in heads:
        assert not head.layers[-1].weight.any()
        assert not head.layers[-1].bias.any()
        check_uniform(head.layers[0].weight, 1 / math.sqrt(128))


def test_deformable_attention_starts_with_fixed_offsets_and_equal_weights(model):
    for offsets in layers(model, "sampling_offsets"):
        assert not offsets.weight.any()
        torch.testing.assert_close(
            offsets.bias, initial_sampling_offsets(num_heads=4, num_levels=3, num_points=2).flatten()
        )
    for attention_weights in layers(model, "attention_weights"):
        assert not attention_weights.weight.any()
        assert not attention_weights.bias.any()
    for projection in layers(model, "value_proj", "output_proj"):
        check_uniform(projection.weight, xavier_bound(projection.weight))
        assert not projection.bias.any()


def test_self_attention_starts_as_one_matrix_of_three(model):
    for projection in layers(model, "q_proj", "k_proj", "v_proj"):
        check_uniform(projection.weight, math.sqrt(6 / (4 * 128)))
        assert not projection.bias.any()
    for projection in layers(model, "o_proj"):
        check_uniform(projection.weight, xavier_bound(projection.weight))
        assert not projection.bias.any()


def test_feed_forward_blocks_and_small_heads_are_xavier(model):
    points, output = model.model.decoder.ref_point_head.layers, model.model.query_selection.enc_output
    for linear in (*layers(model, "fc1", "fc2"), *points, output):
        check_uniform(linear.weight, xavier_bound(linear.weight))
        assert 0 < linear.bias.abs().max() <= 1 / math.sqrt(linear.in_features)


def test_neck_is_xavier_without_bias(model):
    for convolution, norm in model.model.backbone.input_proj:
        check_uniform(convolution.weight, xavier_bound(convolution.weight))
        assert not convolution.bias.any()
        assert (norm.weight == 1).all()


def test_embeddings(model):
    check_normal(model.model.backbone.level_embed)
    check_normal(model.model.denoising.label_embed.weight)
    contents = model.model.query_selection.content_queries.weight
    check_uniform(contents, xavier_bound(contents[..., None]))


def test_static_anchors_are_normal():
    check_normal(
        constructed(tiny_config(query_selection="static", num_queries=300)).model.query_selection.anchors.weight
    )


def test_norms_start_as_the_identity(model):
    norms = [module for module in model.modules() if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d))]
    assert len(norms) > 20
    for norm in norms:
        assert (norm.weight == 1).all()
        assert not norm.bias.any()


def test_loaded_weights_are_kept():
    """Only weights that are missing in a checkpoint are initialized: here the class head."""
    source = constructed(tiny_config())
    weights = {name: tensor + 1 for name, tensor in source.state_dict().items() if not name.startswith("class_embed")}
    model = DinoDetrForObjectDetection.from_pretrained(None, config=tiny_config(), state_dict=dict(weights))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights.get(name, tensor)), name
    assert (model.class_embed[0].bias < -4).all()
