"""Files of DAB-Deformable-DETR and DN-Deformable-DETR: converted completely, written back, and refused by setting."""

import argparse
import contextlib
import importlib
import json

import pytest
import torch

from helpers.command_line import hf_dino
from helpers.conversion_sources import SIZE, checkpoint, narrow_config, numbered_weights, save
from hf_dino import DinoDetrConfig, DinoDetrForObjectDetection
from hf_dino.backbone_weights import match_key
from hf_dino.conversion import convert_checkpoint
from hf_dino.conversion.checkpoint import read_source
from hf_dino.conversion.convert import UNUSED_WEIGHTS, config_and_processor, convert_state_dict
from hf_dino.conversion.export import checkpoint_content
from hf_dino.conversion.key_tables import ANCESTORS, rules_for
from hf_dino.conversion.settings import DEFAULT_OF_SETTING, SETTINGS_OF_ANCESTORS, make_id2label
from hf_dino.family import FAMILY
from hf_dino.utils.errors import InputError


PAPER = {
    "query_selection": "static",
    "box_refinement": "look_forward_once",
    "positional_query": "conditional",
    "decoder_norm": False,
}
ENDING_WITH_AN_INDICATOR = ("model.query_selection.content_queries.weight", "model.denoising.label_embed.weight")


def converted(content: dict):
    source = read_source(content)
    config, _ = config_and_processor(source)
    return config, convert_state_dict(source.tensors, config, source.format)


@pytest.mark.parametrize("name", ANCESTORS)
def test_every_tensor_arrives_where_it_came_from(name):
    config = narrow_config(name)
    weights = numbered_weights(config)
    content = checkpoint(name, config)
    assert read_source(content).format == name
    found, tensors = converted(content)
    assert {field: getattr(found, field) for field in PAPER} == PAPER
    assert found.denoising == {"dab_deformable": "none", "dn_deformable": "plain"}[name]
    assert (found.positional_encoding_temperature, found.positional_encoding_offset) == (10000, -0.5)
    assert tensors.keys() == weights.keys()
    replaced = ENDING_WITH_AN_INDICATOR if name == "dn_deformable" else ()
    for key, tensor in weights.items():
        kept = [each[:, :-1] if key in replaced else each for each in (tensors[key], tensor)]
        assert torch.equal(*kept), key
    DinoDetrForObjectDetection(found).load_state_dict(tensors)


def test_indicators_are_what_the_model_reads():
    _, tensors = converted(checkpoint("dn_deformable"))
    contents, labels = (tensors[key] for key in ENDING_WITH_AN_INDICATOR)
    assert (contents[:, -1] == 0).all() and (labels[:, -1] == 1).all()


@pytest.mark.parametrize("name", ANCESTORS)
def test_no_key_matches_two_rules_and_every_odd_one_has_a_reason(name):
    config = narrow_config(name)
    rules = rules_for(config, name)
    for key in checkpoint(name, config)["model"]:
        assert sum(match_key(rule.source, key) is not None for rule in rules) == 1, key
    for rule in rules:
        assert rule.reason or (len(rule.targets) == 1 and not (rule.first_rows or rule.reorder or rule.equals)), rule


@pytest.mark.parametrize("name", ANCESTORS)
def test_directory_returns_every_tensor_bit_for_bit(tmp_path, name):
    content = checkpoint(name)
    for key in {"label_enc.weight"} & content["model"].keys():  # also the row that no class reads
        content["model"][key] = torch.rand(content["model"][key].shape)
    hf_dino(["convert", save(content, tmp_path / "a.pth"), "--output_dir", tmp_path / "model"])
    assert hf_dino(["convert", tmp_path / "model", "--to", name, "--output", tmp_path / "b.pth"]) == 0
    back = torch.load(tmp_path / "b.pth", weights_only=False)
    assert back["model"].keys() == content["model"].keys()
    assert all(torch.equal(back["model"][key], tensor) for key, tensor in content["model"].items())
    assert vars(back["args"]) == vars(content["args"])
    assert (tmp_path / "model" / UNUSED_WEIGHTS).exists() is (name == "dn_deformable")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    title = {"dab_deformable": "# DAB-Deformable-DETR, ResNet-50", "dn_deformable": "# DN-Deformable-DETR, ResNet-50"}
    assert title[name] in card and "offset -0.5, fixed in the code that wrote the file" in card


@pytest.mark.parametrize("name", ANCESTORS)
def test_settings_return(name):
    overrides = {"num_denoising_groups": 7, "box_noise_scale": 0.3, "label_noise_ratio": 0.1}
    overrides = {"class_cost": 3.0, "dropout": 0.1} | (overrides if name == "dn_deformable" else {})
    found, _ = converted(checkpoint(name, narrow_config(name, id2label=make_id2label(3), **overrides)))
    assert {field: getattr(found, field) for field in overrides} == overrides
    assert found.id2label == make_id2label(3)


@pytest.mark.parametrize("name", ["dab_deformable_detr_r50", "dn_deformable_detr_r50"])
def test_every_key_of_the_published_models_has_a_place(shared, monkeypatch, name):
    if not (shared / "formats").is_dir():
        pytest.skip("needs the folder ../shared/formats with the file formats of other code")
    manifest = json.loads((shared / "formats" / name / "manifest.json").read_text())
    monkeypatch.syspath_prepend(shared / "formats")
    formats = importlib.import_module("synthesize_formats")
    hollow = {key: torch.zeros(()).expand(shape) for key, (shape, _) in manifest["state_dict"].items()}
    monkeypatch.setattr(formats, "state_dict", lambda name, num_classes: hollow)
    content = formats.checkpoint(name)
    config, tensors = converted(content)
    back = checkpoint_content(tensors, config, name.removesuffix("_detr_r50"), SIZE, {})
    assert {key: tensor.shape for key, tensor in back["model"].items()} == {
        key: tensor.shape for key, tensor in hollow.items()
    }
    stored = vars(content["args"])
    assert {key: stored[key] for key in vars(back["args"])} == vars(back["args"])
    assert (config.num_queries, config.num_labels, config.num_select) == (300, 91, 100)
    fields = FAMILY[name.removesuffix("_r50")].config  # the published model is that of the family
    assert {field: getattr(config, field) for field in fields} == fields
    defaults = DinoDetrConfig(id2label=make_id2label(91), **fields).to_dict()
    assert {field for field, value in config.to_dict().items() if value != defaults[field]} <= {"backbone_config"}


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        *((name, "num_patterns", 3) for name in ANCESTORS),
        *((name, "two_stage", True) for name in ANCESTORS),
        *((name, "backbone", "resnet34") for name in ANCESTORS),
        ("dab_deformable", "modelname", "dab_detr"),
        ("dn_deformable", "use_dn", False),
        ("dn_deformable", "use_lft", True),
        ("dn_deformable", "use_mqs", True),
        ("dn_deformable", "contrastive", True),
    ],
)
def test_setting_that_the_model_cannot_express_is_named(name, setting, value):
    content = checkpoint(name)
    setattr(content["args"], setting, value)
    with pytest.raises(InputError, match=f"{setting}={value!r}") as error:
        converted(content)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ANCESTORS)
def test_every_setting_is_required_or_has_a_default(name):
    content = checkpoint(name)
    for setting in SETTINGS_OF_ANCESTORS[name]:
        stored = {key: value for key, value in vars(content["args"]).items() if key != setting}
        lacking = content | {"args": argparse.Namespace(**stored)}
        if setting in DEFAULT_OF_SETTING[name]:
            converted(lacking)
        else:
            with pytest.raises(InputError, match=f"lack '{setting}'"):
                converted(lacking)


@pytest.mark.parametrize("name", ANCESTORS)
@pytest.mark.parametrize("value", [None, "plain", [], -1, 0])
def test_any_value_of_any_setting_is_converted_or_one_error(name, value):
    content = checkpoint(name)
    for setting in SETTINGS_OF_ANCESTORS[name]:
        changed = content | {"args": argparse.Namespace(**vars(content["args"]) | {setting: value})}
        with contextlib.suppress(InputError):
            converted(changed)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("dab_deformable", {"denoising": "plain"}, "denoising='plain'"),
        ("dab_deformable", {"decoder_norm": True}, r"has no place for model\.decoder\.layer_norm|decoder_norm=True"),
        ("dab_deformable", {"positional_query": "anchor"}, r"positional_query='anchor' \(only 'conditional'\)"),
        ("dab_deformable", {"query_selection": "mixed"}, "query_selection 'static', not 'mixed'"),
        ("dab_deformable", {"positional_encoding_temperature": 20}, "positional_encoding_temperature=20"),
        ("dn_deformable", {"denoising": "none"}, "denoising='none'"),
        ("dn_deformable", {"denoising": "contrastive"}, "denoising='contrastive'"),
        ("dn_deformable", {"box_refinement": "look_forward_twice"}, "box_refinement='look_forward_twice'"),
        ("official", {"decoder_norm": False}, r"decoder_norm=False \(only True\)"),
        ("official", {"positional_query": "conditional"}, "no place for .*query_scale"),
        ("detrex", {"decoder_norm": False}, r"decoder_norm=False \(only True\)"),
        ("mmdet", {"positional_query": "conditional"}, "no place for .*query_scale"),
    ],
)
def test_model_that_a_format_cannot_express_is_refused(name, overrides, message):
    with pytest.raises(InputError, match=message) as error:
        checkpoint(name, narrow_config(name, **overrides))
    assert len(str(error.value).splitlines()) == 1


def test_incomplete_file_is_one_error():
    content = checkpoint("dab_deformable")
    del content["model"]["class_embed.0.bias"]
    with pytest.raises(InputError, match=r"no class_embed\.0\.bias"):
        converted(content)


def test_given_position_embedding_is_said_to_replace_the_fixed_one(tmp_path, caplog):
    file = save(checkpoint("dab_deformable"), tmp_path / "a.pth")
    convert_checkpoint(file, tmp_path / "model", positional_encoding=(20, 0))
    assert "--positional_encoding 20,0: replaces 10000,-0.5 of the code that wrote the file" in caplog.text


@pytest.mark.parametrize("name", ANCESTORS)
def test_classes_can_be_kept(tmp_path, name):
    config = narrow_config(name, id2label=make_id2label(91))
    file = save(checkpoint(name, config), tmp_path / "a.pth")
    assert hf_dino(["convert", file, "--output_dir", tmp_path / "model", "--keep_classes", "cat,dog"]) == 0
    model = DinoDetrForObjectDetection.from_pretrained(tmp_path / "model")
    assert (model.config.label2id, model.config.num_ranking_labels) == ({"cat": 0, "dog": 1}, 0)
