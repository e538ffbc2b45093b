import json

import pytest

from helpers.models import TINY_RESNET, make_labels, tiny_config, tiny_model
from hf_dino import DinoDetrConfig
from hf_dino.configuration_dino_detr import (
    BOX_REFINEMENT_NAMES,
    DENOISING_NAMES,
    POSITIONAL_QUERY_NAMES,
    QUERY_SELECTION_NAMES,
)
from hf_dino.denoising_dino_detr import DENOISING_STRATEGIES
from hf_dino.modeling_dino_detr import BOX_REFINEMENTS
from hf_dino.position_embeddings_dino_detr import POSITIONAL_QUERIES
from hf_dino.query_selection_dino_detr import QUERY_SELECTIONS


def test_defaults_are_the_published_ones_of_dino_4scale_resnet50():
    config = DinoDetrConfig()
    assert config.backbone_config.model_type == "resnet"
    assert config.backbone_config.out_features == ["stage2", "stage3", "stage4"]
    assert list(config.backbone_config.depths) == [3, 4, 6, 3]
    published = {
        "num_queries": 900,
        "d_model": 256,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_ffn_dim": 2048,
        "positional_encoding_temperature": 20,
        "num_select": 300,
        "num_denoising": 100,
        "box_noise_scale": 0.4,
        "label_noise_ratio": 0.5,
        "dropout": 0.0,
        "freeze_backbone_batch_norms": True,
        "share_decoder_heads": True,
    }
    assert {field: getattr(config, field) for field in published} == published
    assert (config.class_cost, config.bbox_cost, config.giou_cost) == (2, 5, 2)
    assert (config.cls_loss_coefficient, config.bbox_loss_coefficient, config.giou_loss_coefficient) == (1, 5, 2)


def test_every_named_strategy_has_an_implementation():
    assert tuple(DENOISING_STRATEGIES) == DENOISING_NAMES
    assert tuple(QUERY_SELECTIONS) == QUERY_SELECTION_NAMES
    assert tuple(BOX_REFINEMENTS) == BOX_REFINEMENT_NAMES
    assert tuple(POSITIONAL_QUERIES) == POSITIONAL_QUERY_NAMES


def test_json_round_trip(tmp_path):
    config = tiny_config(dropout=0, denoising="plain", box_noise_scale=1)
    config.save_pretrained(tmp_path)
    assert DinoDetrConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "dino_detr"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"denoising": "dn"}, "denoising must be one of 'contrastive', 'plain', 'none', got 'dn'"),
        ({"query_selection": "two_stage"}, "query_selection must be one of 'mixed', 'pure', 'static'"),
        ({"box_refinement": "none"}, "box_refinement must be one of 'look_forward_twice', 'look_forward_once'"),
        (
            {"positional_query": "modulated"},
            "positional_query must be one of 'anchor', 'conditional', got 'modulated'",
        ),
        (
            {"positional_query": "conditional", "decoder_layers": 1},
            "decoder_layers must be at least 2 with positional_query='conditional'",
        ),
        ({"num_denoising_groups": 0}, "num_denoising_groups must be between 1 and inf, got 0"),
        ({"num_denoising": 0}, "num_denoising must be at least 1 with denoising='contrastive', got 0"),
        ({"d_model": 40}, "d_model must be a multiple of 32"),
        ({"encoder_attention_heads": 5}, "which 5 does not divide"),
        ({"num_feature_levels": 6}, "num_feature_levels must be between 1 and 5, got 6"),
        ({"num_feature_levels": 1}, "fewer than the 2 feature maps of backbone_config"),
        ({"label_noise_ratio": 1.5}, "label_noise_ratio must be between 0 and 1, got 1.5"),
        ({"dropout": -0.1}, "dropout must be between 0 and 1"),
        ({"class_cost": 0, "bbox_cost": 0, "giou_cost": 0}, "at least one must be positive"),
        (
            {"auxiliary_loss": False, "share_decoder_heads": False},
            "auxiliary_loss=False with share_decoder_heads=False",
        ),
        ({"id2label": {1: "a", 2: "b"}}, r"id2label must have the keys 0 to 1, got \[1, 2\]"),
        ({"backbone_config": {"model_type": "resnet51"}}, "backbone_config must have a 'model_type'"),
    ],
)
def test_a_wrong_field_is_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**overrides)


def test_a_wrong_type_is_refused():
    with pytest.raises(Exception, match="num_queries"):
        tiny_config(num_queries="many")


def test_fields_overridden_one_by_one_are_checked_when_the_model_is_built(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, num_denoising=17, box_noise_scale=1.0, label_noise_ratio=0.2)
    assert (loaded.model.denoising.num_denoising, loaded.model.denoising.box_noise_scale) == (17, 1.0)
    with pytest.raises(ValueError, match="denoising must be one of"):
        type(model).from_pretrained(tmp_path, denoising="all")


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_default_backbone_gives_as_many_maps_as_the_paper_reads(levels):
    stages = {1: 1, 2: 2, 3: 3, 4: 3, 5: 4}[levels]
    assert DinoDetrConfig(num_feature_levels=levels).num_backbone_levels == stages


def test_names_and_labels_go_both_ways():
    config = tiny_config(id2label={"0": "cat", "1": "dog"})
    assert (config.id2label, config.label2id, config.num_labels) == ({0: "cat", 1: "dog"}, {"cat": 0, "dog": 1}, 2)


# How to change each field so that a loss in training must change with it.
READ_IN_TRAINING = {
    "positional_encoding_temperature": 10000,
    "positional_encoding_offset": -0.5,
    "activation_function": "gelu",
    "dropout": 0.5,
    "share_decoder_heads": False,
    "denoising": "plain",
    "query_selection": "pure",
    "positional_query": "conditional",
    "decoder_norm": False,
    "box_prediction_epsilon": 0.2,
    "num_ranking_labels": 40,
    "num_denoising": 3,
    "num_denoising_groups": 2,
    "label_noise_ratio": 1.0,
    "box_noise_scale": 1.0,
    "auxiliary_loss": False,
    "class_cost": 0.0,
    "bbox_cost": 50.0,
    "giou_cost": 50.0,
    "cls_loss_coefficient": 3.0,
    "bbox_loss_coefficient": 3.0,
    "giou_loss_coefficient": 3.0,
    "focal_alpha": 0.9,
    "focal_gamma": 0.0,
    "freeze_backbone_batch_norms": False,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_n_points": 1,
    "decoder_n_points": 1,
    "d_model": 64,
    "num_queries": 5,
    "num_feature_levels": 2,
    "backbone_config": TINY_RESNET | {"hidden_sizes": [8, 8, 8, 8]},
}
# Fields that only some strategies read, with one of these.
READ_BY = {"num_denoising_groups": {"denoising": "plain"}}
READ_ELSEWHERE = {
    "box_refinement": "changes gradients only: test_modeling",
    "num_select": "read by the examples: test_examples",
}


def test_every_field_is_in_one_of_the_lists():
    own = set(DinoDetrConfig.__annotations__) - {"model_type"}
    assert own == set(READ_IN_TRAINING) | set(READ_ELSEWHERE)


@pytest.mark.parametrize("field", READ_IN_TRAINING)
def test_every_field_is_read(field, pixel_values):
    import torch

    def loss(**overrides) -> float:
        model = tiny_model(**overrides).train()
        torch.manual_seed(1)
        return model(pixel_values, labels=make_labels(3, 4)).loss.item()

    strategy = READ_BY.get(field, {})
    assert loss(**strategy, **{field: READ_IN_TRAINING[field]}) != loss(**strategy)
