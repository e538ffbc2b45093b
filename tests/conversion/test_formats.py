"""The formats of the official code, detrex and mmdetection: told apart, converted completely, and refused by name."""

import contextlib
import importlib
import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from helpers.command_line import hf_dino
from helpers.conversion_sources import BACKBONES, checkpoint, history_buffers, narrow_config, numbered_weights, save
from hf_dino import DinoDetrForObjectDetection
from hf_dino.backbone_weights import match_key
from hf_dino.conversion import convert, convert_checkpoint
from hf_dino.conversion.checkpoint import load_checkpoint, read_source
from hf_dino.conversion.convert import build_model, config_and_processor, convert_state_dict
from hf_dino.conversion.key_tables import (
    FORMATS,
    blocks_to_unfold,
    fills_for,
    relative_position_index,
    rules_for,
    unfold_to_blocks,
)
from hf_dino.conversion.known import KNOWN_CHECKPOINTS
from hf_dino.conversion.settings import flatten, read_python, read_settings_file
from hf_dino.utils.errors import InputError


SUPPORTED = [
    *((name, backbone) for name in FORMATS for backbone in ("ResNet-50", "Swin-T")),
    *(("detrex", "ResNet-101"), ("detrex", "ConvNeXt-T"), ("mmdet", "ConvNeXt-T")),
]


def converted(content: dict, **options):
    """Return the configuration and our tensors of a checkpoint."""
    source = read_source(content, **options)
    config, _ = config_and_processor(source)
    return config, convert_state_dict(source.tensors, config, source.format)


# Tables


@pytest.mark.parametrize(("name", "backbone"), SUPPORTED)
def test_every_tensor_arrives_where_it_came_from(name, backbone):
    config = narrow_config(name, backbone)
    weights = numbered_weights(config)
    found, tensors = converted(checkpoint(name, config))
    assert tensors.keys() == weights.keys()
    assert all(torch.equal(tensors[key], weights[key]) for key in weights)
    for field in ("d_model", "num_queries", "encoder_n_points", "decoder_layers", "num_labels", "num_feature_levels"):
        assert getattr(found, field) == getattr(config, field), field
    assert list(found.backbone_config.depths) == BACKBONES[backbone]["depths"]
    assert list(found.backbone_config.out_indices) == [2, 3, 4]


@pytest.mark.parametrize("name", ["detrex", "mmdet"])
def test_levels_and_strategies_are_read_from_the_tensors(name):
    backbone = {**BACKBONES["ResNet-50"], "out_indices": [1, 2, 3, 4]}
    config = narrow_config(name, backbone_config=backbone, num_feature_levels=5, query_selection="pure")
    found, _ = converted(checkpoint(name, config))
    assert list(found.backbone_config.out_indices) == [1, 2, 3, 4]
    assert (found.num_feature_levels, found.query_selection, found.num_queries) == (5, "pure", 12)


def test_number_of_queries_without_contents_is_assumed_and_said(caplog):
    content = checkpoint("detrex", narrow_config("detrex", query_selection="pure"))
    del content["config"]["model"]["num_queries"]
    assert converted(content)[0].num_queries == 900
    assert "number of queries: 900 are assumed" in caplog.text


@pytest.mark.parametrize(("name", "backbone"), SUPPORTED)
def test_no_key_matches_two_rules_and_every_odd_one_has_a_reason(name, backbone):
    config = narrow_config(name, backbone)
    rules = rules_for(config, name)
    content = checkpoint(name, config)
    for key in content.get("model", content.get("state_dict")):
        assert sum(match_key(rule.source, key) is not None for rule in rules) == 1, key
    for rule in rules:
        assert rule.reason or (len(rule.targets) == 1 and not (rule.first_rows or rule.reorder or rule.equals)), rule
    assert all(fill.reason for fill in fills_for(config, name))


@pytest.mark.parametrize("name", ["detrex", "mmdet"])
def test_missing_and_unknown_tensors_are_listed(name):
    content = checkpoint(name)
    tensors = content.get("model", content.get("state_dict"))
    lost = next(key for key in tensors if "norms.1.bias" in key)
    del tensors[lost]
    tensors["neck.more.weight"] = torch.zeros(1)
    with pytest.raises(InputError, match=r"without a place in the model: neck\.more\.weight.*does not fill: model\."):
        converted(content)


def test_second_reference_of_detrex_must_be_equal():
    content = checkpoint("detrex")
    content["model"]["transformer.decoder.class_embed.1.bias"] = torch.zeros(5)
    with pytest.raises(InputError, match=r"transformer\.decoder\.class_embed\.1\.bias \(= class_embed\.1\.bias\)"):
        converted(content)


def test_patch_merging_of_mmdetection_is_reordered():
    """Mmdetection unfolds 2 x 2 patches; reordered, the same weights give the official merging the same result."""
    torch.manual_seed(0)
    features, channels = torch.rand(2, 6, 8, 5), 5
    norm, weight = nn.LayerNorm(4 * channels), torch.rand(2 * channels, 4 * channels)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    unfolded = nn.Unfold(2, stride=2)(features.permute(0, 3, 1, 2)).transpose(1, 2)
    theirs = norm(unfolded) @ weight.T
    blocks = [features[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
    ours = nn.LayerNorm(4 * channels)
    ours.load_state_dict({name: unfold_to_blocks(value) for name, value in norm.state_dict().items()})
    merged = ours(torch.cat(blocks, dim=-1).flatten(1, 2)) @ unfold_to_blocks(weight).T
    torch.testing.assert_close(merged, theirs)
    assert torch.equal(blocks_to_unfold(unfold_to_blocks(weight)), weight)


def test_convnext_runs():
    config, tensors = converted(checkpoint("detrex", narrow_config("detrex", "ConvNeXt-T")))
    model = build_model(config, {key: 0.01 * torch.rand(value.shape) for key, value in tensors.items()})
    with torch.no_grad():
        assert model(torch.rand(1, 3, 128, 128)).logits.isfinite().all()


def test_neck_without_bias_is_filled_with_zeros():
    content = checkpoint("mmdet")
    assert not [key for key in content["state_dict"] if "neck" in key and key.endswith("conv.bias")]
    _, tensors = converted(content)
    assert tensors["model.backbone.input_proj.0.0.bias"].eq(0).all()


# The formats as they are, without their weights


@pytest.fixture
def formats(shared, monkeypatch):
    if not (shared / "formats").is_dir():
        pytest.skip("needs the folder ../shared/formats with the file formats of other code")
    monkeypatch.syspath_prepend(shared / "formats")
    module = importlib.import_module("synthesize_formats")
    monkeypatch.setattr(module, "_values", lambda key, shape: np.broadcast_to(np.float32(0), shape))
    monkeypatch.setattr(module, "_integers", lambda key, shape: _integers(shape))
    monkeypatch.setattr(module.np, "ascontiguousarray", lambda values, dtype: values)
    return module


def _integers(shape):
    table = torch.zeros((2 * round((shape or [1])[0] ** 0.5) - 1) ** 2, 1)
    return relative_position_index(table) if shape else torch.zeros(shape, dtype=torch.int64)


WHOLE = {
    "detrex_dino_r50_4scale": ("resnet", [2, 3, 4]),
    "detrex_dino_swin_large_384_4scale": ("swin", [2, 3, 4]),
    "mmdet_dino_4scale_r50": ("resnet", [2, 3, 4]),
    "mmdet_dino_5scale_swin_l": ("swin", [1, 2, 3, 4]),
}


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_convert_and_return(formats, name, num_classes):
    from hf_dino.conversion.export import checkpoint_content

    content = formats.checkpoint(name, num_classes)
    source = read_source(content)
    embedding = (10000, -0.5) if source.format == "detrex" else None
    config, processor = config_and_processor(source, embedding)
    assert (config.backbone_config.model_type, list(config.backbone_config.out_indices)) == WHOLE[name]
    assert (config.num_labels, config.share_decoder_heads) == (num_classes or 80, False)
    epsilon = {"detrex": 1e-3, "mmdet": 1e-5}[source.format]
    assert (config.box_prediction_epsilon, config.num_queries, config.box_noise_scale) == (epsilon, 900, 1.0)
    tensors = convert_state_dict(source.tensors, config, source.format)
    back = checkpoint_content(tensors, config, source.format, processor.size, {})
    weights = back.get("model", back.get("state_dict"))
    assert {key: (value.shape, value.dtype) for key, value in weights.items()} == {
        key: (value.shape, value.dtype) for key, value in source.tensors.items()
    }


# Settings


def test_detrex_file_must_be_told_its_position_embedding(tmp_path):
    content = checkpoint("detrex")
    del content["config"]
    file = save(content, tmp_path / "model_final.pth")
    with pytest.raises(InputError, match=r"give --positional_encoding 10000,-0\.5 .*20,0") as error:
        hf_dino(["convert", file, "--output_dir", tmp_path / "model"])
    assert len(str(error.value).splitlines()) == 1
    output = tmp_path / "model"
    assert hf_dino(["convert", file, "--output_dir", output, "--positional_encoding", "10000,-0.5"]) == 0
    config = json.loads((output / "config.json").read_text())
    assert (config["positional_encoding_temperature"], config["positional_encoding_offset"]) == (10000, -0.5)
    assert "temperature 10000, offset -0.5, given with" in (output / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["20", "20,a", "20,0,1", "nan,0", " "])
def test_position_embedding_that_is_none_is_an_error(tmp_path, text):
    with pytest.raises(InputError, match=r"expected TEMPERATURE,OFFSET"):
        hf_dino(["convert", tmp_path / "none.pth", "--output_dir", tmp_path / "m", "--positional_encoding", text])


def test_known_file_needs_no_position_embedding(tmp_path):
    content = checkpoint("detrex")
    del content["config"]
    file = save(content, tmp_path / "dino_r50_4scale_24ep.pth")
    known = replace(KNOWN_CHECKPOINTS["detrex/dino_r50_4scale_24ep"], url="https://x.y/z", license="MIT")
    assert (known.positional_encoding, known.box_ap) == ((20, 0), 0.506)
    convert_checkpoint(file, tmp_path / "model", known=known)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["positional_encoding_temperature"], config["positional_encoding_offset"]) == (20, 0)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    for words in ("license: mit", "https://x.y/z", "0.506", "padding", "clips boxes", "known for this published file"):
        assert words in card


def test_namesake_of_a_published_file_has_its_position_embedding_but_not_its_result(tmp_path, caplog):
    content = checkpoint("detrex")
    del content["config"]
    convert_checkpoint(save(content, tmp_path / "dino_r50_4scale_24ep.pth"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["positional_encoding_temperature"], config["positional_encoding_offset"]) == (20, 0)
    assert "has the name of a published file but not its content" in caplog.text
    assert "0.506" not in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")


def test_position_embedding_that_contradicts_the_file_is_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(convert, "write_folder", lambda *_: None)
    file = save(checkpoint("mmdet"), tmp_path / "epoch_12.pth")
    convert_checkpoint(file, tmp_path / "model", positional_encoding=(10000, -0.5))
    assert "--positional_encoding 10000,-0.5: replaces 20,0 of the settings" in caplog.text


MMDET_CONFIG = """
levels = 4
model = dict(
    type='DINO', as_two_stage=True, with_box_refine=True,
    positional_encoding=dict(num_feats=16, normalize=True, offset=-0.5, temperature=10000),
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], bgr_to_rgb=True),
    dn_cfg=dict(box_noise_scale=0.7, group_cfg=dict(num_dn_queries=300)),
    train_cfg=dict(assigner=dict(match_costs=[dict(type='FocalLossCost', weight=3.0), dict(type='IoUCost', weight=1)]
    )))
test_pipeline = [dict(type='Load'), dict(type='Resize', scale=(1000, 600), keep_ratio=True)]
"""


def test_settings_of_mmdetection_are_read_from_its_text():
    content = checkpoint("mmdet")
    content["meta"]["cfg"] = MMDET_CONFIG
    config, processor = config_and_processor(read_source(content))
    assert (config.positional_encoding_temperature, config.positional_encoding_offset) == (10000, -0.5)
    assert (config.box_noise_scale, config.num_denoising, config.class_cost, config.giou_cost) == (0.7, 300, 3.0, 1)
    assert dict(processor.size) == {"shortest_edge": 600, "longest_edge": 1000}


@pytest.mark.parametrize(
    ("resize", "size"),
    [
        ("dict(type='Resize', scale=(640, 480))", {"height": 480, "width": 640}),
        ("dict(type='Resize', scale=(640, 480), keep_ratio=False)", {"height": 480, "width": 640}),
        ("dict(type='Other')", {"shortest_edge": 800, "longest_edge": 1333}),
        ("dict(type='Resize', scale=[(1, 2), (3, 4)])", {"shortest_edge": 800, "longest_edge": 1333}),
    ],
)
def test_image_size_of_mmdetection(resize, size, caplog):
    content = checkpoint("mmdet")
    content["meta"]["cfg"] = MMDET_CONFIG.replace("dict(type='Resize', scale=(1000, 600), keep_ratio=True)", resize)
    assert dict(config_and_processor(read_source(content))[1].size) == size
    assert ("image size of the file's test_pipeline is not known" in caplog.text) is ("longest_edge" in size)


def test_types_of_mmdetection_may_have_their_module(caplog):
    content = checkpoint("mmdet")
    losses = "bbox_head=dict(type='DINOHead', loss_cls=dict(type='mmdet.models.QualityFocalLoss')), "
    text = MMDET_CONFIG.replace("'DINO'", "mmdet.models.detectors.dino.DINO").replace("as_two", losses + "as_two")
    content["meta"]["cfg"] = text.replace("'FocalLossCost'", "'mmdet.FocalLossCost'")
    assert converted(content)[0].class_cost == 3
    assert "loss_cls.type=QualityFocalLoss; further training uses FocalLoss" in caplog.text


@pytest.mark.parametrize("spelling", ["classes", "CLASSES"])
def test_class_names_of_mmdetection_in_either_spelling(spelling):
    content = checkpoint("mmdet")
    content["meta"]["dataset_meta"] = {spelling: ("cat", "dog", "cow", "ant", "bee")}
    assert converted(content)[0].id2label == {0: "cat", 1: "dog", 2: "cow", 3: "ant", 4: "bee"}


def test_wrong_number_of_class_names_is_said(caplog):
    content = checkpoint("mmdet")
    content["meta"]["dataset_meta"] = {"classes": ("cat", "dog")}
    assert converted(content)[0].id2label[4] == "class_4"
    assert "names 2 classes but has 5" in caplog.text


def test_eighty_classes_without_names_are_those_of_coco():
    config = narrow_config("detrex", id2label={label: f"class_{label}" for label in range(80)})
    content = checkpoint("detrex", config)
    del content["metadata"]
    found, _ = converted(content)
    assert (found.id2label[0], found.id2label[79], found.num_labels) == ("person", "toothbrush", 80)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("type='DINO'", "type='DeformableDETR'", "model.type='DeformableDETR'"),
        ("normalize=True", "normalize=False", "normalize=False"),
        (", bgr_to_rgb=True", "", "bgr_to_rgb=False"),
        ("mean=[123.675, 116.28", "mean=[0, 0", r"mean=\[0, 0, 103.53\]"),
        ("levels = 4", "levels = (", "not Python"),
        ("levels = 4", "levels = '\0'", "not Python"),
        ("levels = 4", "levels = " + 5000 * "(", "not Python"),
        ("temperature=10000", "temperature=half()", "half()"),
    ],
)
def test_setting_of_mmdetection_that_cannot_be_expressed_is_named(old, new, message):
    content = checkpoint("mmdet")
    content["meta"]["cfg"] = MMDET_CONFIG.replace(old, new)
    with pytest.raises(InputError, match=message) as error:
        converted(content)
    assert len(str(error.value).splitlines()) == 1


def test_settings_files_are_read_and_not_run(tmp_path):
    (tmp_path / "base.py").write_text("dn_number = 7\nmodel = dict(a=1, b=dict(c=2))\n")
    (tmp_path / "config.py").write_text(
        f"_base_ = ['base.py']\nopen({str(tmp_path / 'trace')!r}, 'w')\nx = 1e-4\nmodel = dict(b=dict(d=[3, (4,)]))\n"
    )
    assert read_settings_file(tmp_path / "config.py") == {
        "dn_number": 7, "x": 1e-4, "model": {"a": 1, "b": {"c": 2, "d": [3, [4]]}}
    }  # fmt: skip
    assert not (tmp_path / "trace").exists()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"num_queries": 3}}))
    assert flatten(read_settings_file(tmp_path / "config.yaml"))["model.num_queries"] == 3
    (tmp_path / "evil.yaml").write_text("!!python/object/apply:os.system ['exit']")
    with pytest.raises(InputError, match=r"evil\.yaml: cannot be read"):
        read_settings_file(tmp_path / "evil.yaml")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.py", "x = = 1", "cannot be read"),
        ("a.json", "{", "cannot be read"),
        ("a.json", "[1]", "got a list"),
        ("a.txt", "", r"must be a \.py, \.json"),
        ("a.py", "_base_ = 'missing.py'", "missing.py: file not found"),
    ],
)
def test_unusable_settings_file_is_one_error(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_settings_file(tmp_path / name)
    assert len(str(error.value).splitlines()) == 1


def test_python_that_is_no_literal_keeps_its_text():
    assert read_python("a = dict(b=f(1), **c)\nd.e = 1\nf = a['b']")["a"] == {"b": "f(1)"}


def official_settings_text(args) -> str:
    return "".join(f"{name} = {value!r}\n" for name, value in vars(args).items())


@pytest.mark.parametrize("content", ["bare", "none", "no args"])
def test_settings_can_be_given_for_weights_alone(tmp_path, content):
    whole = checkpoint("official")
    alone = {"bare": whole["model"], "none": {**whole, "args": None}, "no args": {"model": whole["model"]}}[content]
    file = save(alone, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"weights, but .*--settings FILE") as error:
        hf_dino(["convert", file, "--output_dir", tmp_path / "model"])
    assert ("are None" in str(error.value)) is (content == "none")
    (tmp_path / "config.py").write_text(official_settings_text(whole["args"]))
    (tmp_path / "config.json").write_text(json.dumps(vars(whole["args"])))
    found = [read_settings_file(tmp_path / name) for name in ("config.py", "config.json")]
    assert found == [vars(whole["args"])] * 2
    assert converted(alone, settings=found[0])[0].num_queries == 12


def test_settings_option(tmp_path):
    whole = checkpoint("official")
    file = save(whole["model"], tmp_path / "weights.pth")
    (tmp_path / "config.py").write_text(official_settings_text(whole["args"]))
    settings = ["--settings", tmp_path / "config.py"]
    assert hf_dino(["convert", file, "--output_dir", tmp_path / "model", *settings]) == 0
    assert DinoDetrForObjectDetection.from_pretrained(tmp_path / "model").config.num_queries == 12


def test_bare_weights_of_detrex_take_the_settings_of_its_yaml(tmp_path):
    whole = checkpoint("detrex")
    file = save(whole["model"], tmp_path / "weights.pth")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(whole["config"]))
    convert_checkpoint(file, tmp_path / "model", settings=tmp_path / "config.yaml")
    assert DinoDetrForObjectDetection.from_pretrained(tmp_path / "model").config.positional_encoding_temperature == 20


def test_file_with_ema_weights_alone_names_the_option(tmp_path):
    whole = checkpoint("official")
    file = save({"ema_model": whole["model"], "args": whole["args"]}, tmp_path / "ema.pth")
    with pytest.raises(InputError, match=r"only EMA weights \('ema_model'\); repeat with --use_ema"):
        convert_checkpoint(file, tmp_path / "model")
    convert_checkpoint(file, tmp_path / "model", use_ema=True)
    assert "its EMA weights, `ema_model`" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")


# Files straight from a training


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_beside_the_weights_are_replaced_and_not_run(tmp_path, zipped):
    with history_buffers() as history_buffer:
        buffers = {"loss": history_buffer(), "method": getattr}
        content = {**checkpoint("mmdet"), "message_hub": buffers, "optimizer": {"lr": np.float64(1e-4)}}
        file = save(content, tmp_path / "epoch_12.pth", zipped)
        loaded = load_checkpoint(file)
        assert not history_buffer.used
    assert converted(loaded)[0].num_labels == 5
    assert type(loaded["message_hub"]["loss"]).__name__ == "HistoryBuffer"


@pytest.mark.parametrize("zipped", [True, False])
def test_other_objects_are_still_refused(tmp_path, zipped):
    content = {**checkpoint("mmdet"), "message_hub": SimpleNamespace(a=1)}
    file = save(content, tmp_path / "epoch_12.pth", zipped)
    with pytest.raises(InputError, match=r"pickled together with types\.SimpleNamespace.*--trust_pickle"):
        load_checkpoint(file)


def test_ema_weights_of_mmdetection_are_swapped_in_its_files():
    content = checkpoint("mmdet")
    raw = {f"module.{key}": value + 1 for key, value in content["state_dict"].items()} | {"steps": torch.tensor(9)}
    content["ema_state_dict"] = raw
    averaged, trained = read_source(content, use_ema=True), read_source(content)
    assert (averaged.weights, trained.weights) == ("state_dict", "ema_state_dict")
    assert torch.equal(trained.tensors["level_embed"], averaged.tensors["level_embed"] + 1)
    assert converted(content)[1]
    assert converted(content, use_ema=True)[1]


def test_ema_weights_of_detrex_have_each_head_once():
    content = checkpoint("detrex")
    heads = ("class_embed", "bbox_embed")
    content["ema_state"] = {k: v for k, v in content["model"].items() if not k.startswith(heads)}
    assert torch.equal(
        converted(content, use_ema=True)[1]["class_embed.1.bias"], converted(content)[1]["class_embed.1.bias"]
    )


# Files that are something else


def test_files_of_other_kinds_are_named(tmp_path):
    (tmp_path / "folder").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    torch.jit.script(nn.Linear(1, 1)).save(tmp_path / "a.pt")
    for name, message in {
        "folder": "is a directory.*give --to",
        "a.safetensors": "a safetensors file, which from_pretrained",
        "a.pt": "a TorchScript program",
    }.items():
        with pytest.raises(InputError, match=message):
            load_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("backbone.layers.0.blocks.0.modulation.f.weight", "FocalNet"),
        ("backbone.net.blocks.0.attn.qkv.weight", "a plain vision transformer"),
        ("backbone.levels.0.blocks.0.dcn.offset.weight", "InternImage"),
        ("backbone.layers.0.blocks.0.attn.logit_scale", "Swin V2"),
        ("backbone.something.weight", r"an unknown backbone \(backbone.something.weight\)"),
    ],
)
def test_other_backbones_are_refused_by_name(key, name):
    content = checkpoint("detrex")
    kept = {k: v for k, v in content["model"].items() if not k.startswith("backbone.")}
    with pytest.raises(InputError, match=f"{name}.*only ResNet-50, .*ConvNeXt-L can be converted"):
        converted({**content, "model": {key: torch.zeros(1), **kept}})


def test_other_sizes_of_a_backbone_are_refused():
    content = checkpoint("detrex")
    fewer = {k: v for k, v in content["model"].items() if not k.startswith("backbone.res4.5.")}
    with pytest.raises(InputError, match=r"a resnet with \(3, 4, 5, 3\) blocks"):
        converted({**content, "model": fewer})


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"state_dict": {"language_model.x": 0, "bbox_head.a": 0}}, "Grounding DINO"),
        ({"state_dict": {"bbox_head.cls_branches.0.weight": 0, "memory_trans_fc.weight": 0}}, "other than DINO"),
        ({"model": {"neck.convs.0.conv.weight": 0, "label_enc.weight": 0}}, "detrex checkpoint of a detector other"),
        ({"state_dict": {"roi_head.bbox_head.fc.weight": 0}}, "MMDetection 3"),
    ],
)
def test_other_detectors_are_recognized(content, name):
    with pytest.raises(InputError, match=name):
        read_source(content)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_file_is_one_error(tmp_path, zipped):
    """Whatever byte of the part that is not weights is changed, the file is read or there is one error."""
    path = save({"state_dict": {"weight": torch.rand(3)}, "meta": {"cfg": "a = 1"}}, tmp_path / "a.pth", zipped)
    whole = bytearray(path.read_bytes())
    random = np.random.RandomState(0)
    for place in random.choice(len(whole), 120, replace=False):
        damaged = bytearray(whole)
        damaged[place] = random.randint(256)
        path.write_bytes(damaged)
        with contextlib.suppress(InputError):
            load_checkpoint(path)


def test_convert_says_what_it_found(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(convert, "write_folder", lambda *_: None)
    caplog.set_level(logging.INFO)
    convert_checkpoint(save(checkpoint("mmdet"), tmp_path / "a.pth", zipped=False), tmp_path / "model")
    assert "a.pth: a checkpoint in the format 'mmdet'" in caplog.text
