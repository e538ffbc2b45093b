"""Every model of the family is built small, and takes a training step."""

import pytest
import torch
from transformers import ResNetConfig

from helpers.models import TINY_RESNET, make_labels, tiny_config
from hf_dino import DinoDetrConfig
from hf_dino.configuration_dino_detr import (
    BOX_REFINEMENT_NAMES,
    DENOISING_NAMES,
    POSITIONAL_QUERY_NAMES,
    QUERY_SELECTION_NAMES,
)
from hf_dino.family import FAMILY, FamilyMember


OURS = [key for key, member in FAMILY.items() if member.model_class == "DinoDetrForObjectDetection"]
STRATEGIES = {
    "denoising": DENOISING_NAMES,
    "query_selection": QUERY_SELECTION_NAMES,
    "box_refinement": BOX_REFINEMENT_NAMES,
    "positional_query": POSITIONAL_QUERY_NAMES,
}
TINY_ANCESTOR = {
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": 12,
    "num_labels": 5,
}


def tiny_sizes(member: FamilyMember) -> dict:
    """Return sizes of a tiny model; what the member says of them itself is not among them."""
    if member.model_class == "DinoDetrForObjectDetection":
        levels = member.config.get("num_feature_levels", 3)
        stages = ["stage1", "stage2", "stage3", "stage4"][-(levels - 1) :]
        sizes = tiny_config(num_feature_levels=levels, backbone_config=TINY_RESNET | {"out_features": stages})
        names = ("encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim", "num_queries", "id2label")
        names += ("encoder_attention_heads", "decoder_attention_heads", "d_model", "backbone_config")
        return {name: getattr(sizes, name) for name in names} | {"num_feature_levels": levels}
    deformable = "Deformable" in member.model_class
    levels = {"num_feature_levels": 2, "two_stage_num_proposals": 12} if deformable else {}
    width = {"hidden_size" if member.model_class.startswith(("Dab", "Dn")) else "d_model": 32}
    stages = ["stage3", "stage4"] if deformable else ["stage4"]
    backbone = ResNetConfig(**{key: value for key, value in TINY_RESNET.items() if key != "out_features"})
    backbone.out_features = stages
    return TINY_ANCESTOR | levels | width | {"backbone_config": backbone}


@pytest.mark.parametrize("key", FAMILY)
def test_every_member_takes_a_training_step(key, pixel_values):
    torch.manual_seed(0)
    model = FAMILY[key].make_model(**tiny_sizes(FAMILY[key])).train()
    outputs = model(pixel_values, labels=make_labels(2, 1))
    outputs.loss.backward()
    assert outputs.loss.isfinite() and outputs.pred_boxes.shape == (2, 12, 4)
    gradients = [each.grad for each in model.parameters() if each.requires_grad and each.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("key", "sizes"),
    [
        ("deformable_detr", [0.12, 0.12]),
        ("deformable_detr_refine", [0.12, 0.5]),
        ("deformable_detr_two_stage", [0.5] * 3),
    ],
)
def test_box_heads_of_deformable_detr_begin_as_those_of_its_authors(key, sizes):
    model = FAMILY[key].make_model(**tiny_sizes(FAMILY[key]))
    heads = [head.layers[2] for head in model.bbox_embed]
    assert not any(head.weight.any() or head.bias[:2].any() for head in heads)
    first = torch.stack([head.bias[2:].sigmoid() for head in heads[: len(sizes)]])
    torch.testing.assert_close(first, torch.tensor(sizes)[:, None].expand(-1, 2), atol=1e-3, rtol=0)


def test_every_line_of_descent_begins_with_detr():
    for key, member in FAMILY.items():
        ancestors = []
        while member.parent is not None:
            assert member.parent not in (*ancestors, key)
            ancestors.append(member.parent)
            member = FAMILY[member.parent]
        assert (ancestors or [key])[-1] == "detr"


def test_every_strategy_belongs_to_a_member():
    configs = [DinoDetrConfig(**FAMILY[key].config) for key in OURS]
    for field, names in STRATEGIES.items():
        assert {getattr(config, field) for config in configs} == set(names)


@pytest.mark.parametrize("key", OURS)
def test_fields_of_a_member_are_changes(key):
    """None repeats a default, each differs from its parent, and of DINO's own steps in one strategy."""
    member, defaults = FAMILY[key], DinoDetrConfig()
    assert not [field for field, value in member.config.items() if getattr(defaults, field) == value]
    parent = FAMILY[str(member.parent)]
    if parent.model_class == member.model_class:
        ours, theirs = (DinoDetrConfig(**each.config).to_dict() for each in (member, parent))
        changed = {field for field in ours if ours[field] != theirs[field]}
        assert changed
        if parent.paper == member.paper and key != "dino_5scale":
            assert len(changed) == 1 and changed <= STRATEGIES.keys()


def test_a_later_model_is_better_for_the_same_epochs():
    for member in FAMILY.values():
        parent = FAMILY[member.parent].published_ap if member.parent else {}
        assert all(member.published_ap[epochs] > parent[epochs] for epochs in member.published_ap.keys() & parent)
        assert all(0.4 < ap < 0.52 for ap in member.published_ap.values())


@pytest.mark.slow
@pytest.mark.parametrize("key", ["dab_deformable_detr", "dn_deformable_detr"])
def test_ancestors_are_exported_with_dynamic_sizes(key):
    export = pytest.importorskip("hf_dino.export")
    model = FAMILY[key].make_model(**tiny_sizes(FAMILY[key])).eval()
    program = export.make_program(model).module()
    for shape in ((1, 320, 352), (3, 224, 416)):
        pixel_values, mask = export.make_inputs(shape, seed=0)
        with torch.no_grad():
            logits, boxes = program(pixel_values, mask)
            expected = model(pixel_values, mask)
        torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(boxes, expected.pred_boxes, atol=1e-5, rtol=0)
