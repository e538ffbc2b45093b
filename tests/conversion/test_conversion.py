"""Official checkpoints are converted completely, or not at all and with a reason."""

import argparse
import contextlib
import gzip
import importlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForObjectDetection, ConvNextConfig

from helpers.command_line import hf_dino
from helpers.http_server import serving
from helpers.paths import FIXTURES
from hf_dino import DinoDetrConfig, conversion
from hf_dino.backbone_weights import match_key
from hf_dino.conversion import convert_checkpoint, key_tables
from hf_dino.conversion.checkpoint import load_checkpoint, official_settings, read_source
from hf_dino.conversion.convert import config_and_processor, convert_state_dict, write_folder
from hf_dino.conversion.settings import DEFAULT_OF_SETTING, REQUIRED_SETTINGS, config_from_args, evaluation_size
from hf_dino.utils.errors import InputError
from hf_dino.utils.io import sha256


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "conversion" / "convert_original.py"
VARIANTS = ("r50_4scale", "r50_5scale", "swinl_4scale", "swinl_5scale")


def manifest(variant: str) -> dict:
    """Read the settings, and shape and dtype by key, of an official model."""
    return json.loads(gzip.decompress((FIXTURES / f"official_{variant}.json.gz").read_bytes()))


def hollow(manifest: dict) -> dict[str, torch.Tensor]:
    """Return the tensors of a manifest, all zero and without memory."""
    return {
        key: torch.zeros((), dtype=getattr(torch, dtype)).expand(shape)
        for key, (shape, dtype) in manifest["state_dict"].items()
    }


SMALL_SIZES = {256: 32, 2048: 48, 768: 96, 512: 64, 900: 12, 128: 16}
SMALL_SETTINGS = {
    "hidden_dim": 32,
    "dim_feedforward": 48,
    "nheads": 4,
    "enc_n_points": 1,
    "dec_n_points": 1,
    "enc_layers": 1,
    "dec_layers": 2,
    "num_queries": 12,
}


def small_checkpoint(num_classes: int = 5, **settings) -> dict:
    """Return what the official code would save for a ResNet-50 with a narrow transformer of one and two layers."""
    full = manifest("r50_4scale")
    generator = torch.Generator().manual_seed(0)
    values: dict[str, torch.Tensor] = {}
    model = {}
    for key, (shape, _) in full["state_dict"].items():
        if re.search(r"encoder\.layers\.[1-9]|decoder\.layers\.[2-9]|(class|bbox)_embed\.[2-9]\.", key):
            continue
        if not key.startswith("backbone"):
            if "input_proj" in key:
                shape = [32, *shape[1:]]
            elif "class_embed" in key or "label_enc" in key:
                shape = [num_classes + (shape[0] - 91), *(SMALL_SIZES[size] for size in shape[1:])]
            else:
                shape = [SMALL_SIZES.get(size, size) for size in shape]
        tied = re.sub(r"^(transformer\.decoder\.)?(class|bbox)_embed\.\d+", r"\2_embed.0", key)
        if tied not in values:
            values[tied] = 0.1 * torch.randn(shape, generator=generator)
        model[key] = values[tied]
    args = full["args"] | SMALL_SETTINGS | {"num_classes": num_classes, "dn_labelbook_size": num_classes} | settings
    return {"model": model, "optimizer": {}, "lr_scheduler": {}, "epoch": 11, "args": argparse.Namespace(**args)}


@pytest.fixture
def small() -> dict:
    return small_checkpoint()


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("official") / "checkpoint0011.pth"
    torch.save(small_checkpoint(), path)
    return path


def converted(checkpoint: dict) -> dict[str, torch.Tensor]:
    config = config_from_args(official_settings(checkpoint))
    return convert_state_dict(read_source(checkpoint).tensors, config)


# Keys


@pytest.mark.parametrize("variant", ["r50_4scale", "swinl_4scale"])
def test_official_models_convert_completely(variant):
    official = manifest(variant)
    assert convert_state_dict(hollow(official), config_from_args(official["args"]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_official_variants_convert_completely(shared, variant):
    official = json.loads((shared / "official" / "manifests" / f"{variant}.json").read_text())
    assert convert_state_dict(hollow(official), config_from_args(official["args"]))


@pytest.mark.parametrize("num_classes", [2, 91, 366])
def test_any_number_of_classes_converts(num_classes):
    state_dict = converted(small_checkpoint(num_classes))
    assert state_dict["class_embed.0.weight"].shape == (num_classes, 32)
    assert state_dict["model.denoising.label_embed.weight"].shape == (num_classes, 32)


def test_tensors_arrive_where_they_are_used(small):
    source, state_dict = small["model"], converted(small)
    layer, ours = "transformer.decoder.layers.1", "model.decoder.layers.1"
    for index, part in enumerate("qkv"):
        rows = slice(32 * index, 32 * index + 32)
        for kind in ("weight", "bias"):
            expected = source[f"{layer}.self_attn.in_proj_{kind}"][rows]
            assert torch.equal(state_dict[f"{ours}.self_attn.{part}_proj.{kind}"], expected)
    assert torch.equal(state_dict[f"{ours}.self_attn_layer_norm.weight"], source[f"{layer}.norm2.weight"])
    assert torch.equal(state_dict[f"{ours}.encoder_attn_layer_norm.weight"], source[f"{layer}.norm1.weight"])
    assert torch.equal(state_dict["model.denoising.label_embed.weight"], source["label_enc.weight"][:5])
    assert torch.equal(
        state_dict["model.backbone.body.encoder.stages.2.layers.3.layer.1.normalization.running_var"],
        source["backbone.0.body.layer3.3.bn2.running_var"],
    )


def test_no_official_key_matches_two_rules():
    for variant in ("r50_4scale", "swinl_4scale"):
        official = manifest(variant)
        rules = key_tables.rules_for(config_from_args(official["args"]))
        for key in official["state_dict"]:
            assert sum(match_key(rule.source, key) is not None for rule in rules) == 1, key


def test_every_odd_rule_has_a_reason():
    for variant in ("r50_4scale", "swinl_4scale"):
        config = config_from_args(manifest(variant)["args"])
        for rule in key_tables.rules_for(config):
            assert rule.reason or (len(rule.targets) == 1 and not rule.first_rows), rule
        assert all(fill.reason for fill in key_tables.fills_for(config))


def test_prefix_of_distributed_training_is_stripped(small):
    small["model"] = {f"module.{key}": value for key, value in small["model"].items()}
    assert converted(small)


def test_key_with_and_without_prefix_is_an_error(small):
    small["model"]["module.label_enc.weight"] = small["model"]["label_enc.weight"]
    with pytest.raises(InputError, match=r"label_enc\.weight is duplicated"):
        converted(small)


def test_missing_tensor_is_listed(small):
    del small["model"]["transformer.level_embed"], small["model"]["transformer.enc_output.bias"]
    with pytest.raises(InputError, match=r"does not fill.*level_embed, model\.query_selection\.enc_output\.bias"):
        converted(small)


def test_unknown_tensor_is_listed(small):
    small["model"]["transformer.extra.weight"] = torch.zeros(1)
    with pytest.raises(InputError, match=r"without a place in the model: transformer\.extra\.weight"):
        converted(small)


def test_layer_beyond_the_settings_is_listed(small):
    small["args"].dec_layers = 1
    with pytest.raises(InputError, match=r"without a place in the model: model\.decoder\.layers\.1\."):
        converted(small)


def test_wrong_shape_is_listed(small):
    small["args"].num_queries = 13
    with pytest.raises(InputError, match=r"content_queries\.weight \(12, 32\), not \(13, 32\)"):
        converted(small)


def test_copy_that_differs_is_listed(small):
    for key in ("class_embed.1.bias", "transformer.decoder.class_embed.1.bias"):
        small["model"][key] = small["model"]["class_embed.0.bias"] + 1
    with pytest.raises(InputError, match=r"another one: class_embed\.1\.bias \(= class_embed\.0\.bias\)"):
        converted(small)


# Settings


def test_settings_are_read_from_the_file():
    config = config_from_args(manifest("swinl_4scale")["args"] | {"dn_box_noise_scale": 1.0, "num_classes": 20})
    assert (config.box_noise_scale, config.num_labels, config.id2label[19]) == (1.0, 20, "class_19")
    assert (config.denoising, config.query_selection) == ("contrastive", "mixed")
    backbone = config.backbone_config
    assert (backbone.embed_dim, backbone.window_size, backbone.drop_path_rate) == (192, 12, 0.2)
    assert list(backbone.num_heads) == [6, 12, 24, 48]
    assert list(backbone.out_indices) == [2, 3, 4]


def test_coco_labels_are_raw_category_ids():
    config = config_from_args(manifest("r50_4scale")["args"])
    unused = [label for label, name in config.id2label.items() if name == "N/A"]
    assert unused == [0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
    assert len(config.label2id) == 80
    assert all(config.id2label[label] == name for name, label in config.label2id.items())


def test_coco_names_are_those_of_the_data(shared):
    [path, *_] = sorted((shared / "data" / "tiny_coco").rglob("*.json"))
    categories = json.loads(path.read_text())["categories"]
    assert {category["id"]: category["name"] for category in categories} == key_tables.COCO_NAMES


def without(checkpoint: dict, pattern: str) -> None:
    for key in [key for key in checkpoint["model"] if re.match(pattern, key)]:
        del checkpoint["model"][key]


def test_pure_query_selection_has_no_content_queries():
    checkpoint = small_checkpoint(embed_init_tgt=False)
    without(checkpoint, r"transformer\.tgt_embed")
    assert "model.query_selection.content_queries.weight" not in converted(checkpoint)


STRATEGIES = [
    {"denoising": denoising, "query_selection": selection, "box_refinement": refinement, "share_decoder_heads": shared}
    for denoising in ("contrastive", "plain", "none")
    for selection in ("mixed", "pure", "static")
    for refinement in ("look_forward_twice", "look_forward_once")
    for shared in (True, False)
]


@pytest.mark.parametrize("strategies", STRATEGIES, ids=lambda strategies: " ".join(map(str, strategies.values())))
def test_every_combination_of_strategies_converts(strategies):
    checkpoint = small_checkpoint()
    if strategies["query_selection"] == "static":
        without(checkpoint, r"transformer\.enc_out")
        checkpoint["model"]["transformer.refpoint_embed.weight"] = torch.rand(12, 4)
    if strategies["query_selection"] == "pure":
        without(checkpoint, r"transformer\.tgt_embed")
    config = config_from_args(official_settings(checkpoint))
    for name, value in strategies.items():
        setattr(config, name, value)
    state_dict = convert_state_dict(read_source(checkpoint).tensors, config)
    assert ("model.denoising.label_embed.weight" in state_dict) is (strategies["denoising"] != "none")
    assert ("class_embed.1.weight" in state_dict) is not strategies["share_decoder_heads"]


def test_a_configuration_with_another_backbone_is_one_error(small):
    config = config_from_args(official_settings(small))
    config.backbone_config = ConvNextConfig(out_indices=[2, 3, 4])
    with pytest.raises(InputError, match="one of the backbones resnet, swin, not convnext"):
        convert_state_dict(read_source(small).tensors, config)


@pytest.mark.parametrize("value", [None, "plain", [], -1, 0])
def test_any_value_of_any_setting_is_converted_or_one_error(small, value):
    for name in (*REQUIRED_SETTINGS, "data_aug_scales", "data_aug_max_size", "data_aug_scale_overlap"):
        with contextlib.suppress(InputError):
            source = read_source(small, settings=official_settings(small) | {name: value})
            config, _ = config_and_processor(source)
            convert_state_dict(source.tensors, config)


def test_single_stage_model_has_learned_anchors():
    checkpoint = small_checkpoint(two_stage_type="no")
    without(checkpoint, r"transformer\.enc_out")
    anchors = checkpoint["model"]["transformer.refpoint_embed.weight"] = torch.rand(12, 4)
    assert torch.equal(converted(checkpoint)["model.query_selection.anchors.weight"], anchors)


def test_model_without_denoising_has_no_label_embedding():
    assert not [key for key in converted(small_checkpoint(use_dn=False)) if "denoising" in key]


def test_larger_label_book_is_cut():
    checkpoint = small_checkpoint(5, dn_labelbook_size=9)
    book = checkpoint["model"]["label_enc.weight"] = torch.rand(10, 32)
    assert torch.equal(converted(checkpoint)["model.denoising.label_embed.weight"], book[:5])


def test_separate_heads_stay_separate():
    checkpoint = small_checkpoint(dec_pred_class_embed_share=False, dec_pred_bbox_embed_share=False)
    bias = checkpoint["model"]["class_embed.1.bias"] + 1
    for key in ("class_embed.1.bias", "transformer.decoder.class_embed.1.bias"):
        checkpoint["model"][key] = bias
    assert torch.equal(converted(checkpoint)["class_embed.1.bias"], bias)


def test_settings_that_old_files_lack_have_the_official_default(small):
    for name in DEFAULT_OF_SETTING["official"]:
        delattr(small["args"], name)
    assert converted(small)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_patterns", 3),
        ("two_stage_learn_wh", True),
        ("use_deformable_box_attn", True),
        ("pre_norm", True),
        ("decoder_sa_type", "ca_label"),
        ("backbone", "convnext_xlarge_22k"),
        ("pe_temperatureW", 10000),
        ("dec_pred_bbox_embed_share", False),
        ("interm_loss_coef", 0.5),
        ("return_interm_indices", [2, 3]),
    ],
)
def test_setting_that_the_model_cannot_express_is_named(name, value):
    with pytest.raises(InputError, match=rf"{name}={re.escape(repr(value))}"):
        config_from_args(manifest("r50_4scale")["args"] | {name: value})


def test_missing_setting_is_named():
    args = manifest("r50_4scale")["args"]
    del args["hidden_dim"]
    with pytest.raises(InputError, match="lack 'hidden_dim'"):
        config_from_args(args)


def test_image_size_follows_the_settings():
    args = manifest("r50_4scale")["args"]
    assert evaluation_size(args) == {"shortest_edge": 800, "longest_edge": 1333}
    enlarged = evaluation_size(args | {"data_aug_scale_overlap": 1.5})
    assert enlarged == {"shortest_edge": 1200, "longest_edge": 1999}


# Files that are something else

FORMATS = {
    "deformable_detr": "a Deformable DETR checkpoint",
    "deformable_detr_refine": "a Deformable DETR checkpoint",
    "deformable_detr_two_stage": "a Deformable DETR checkpoint",
}


@pytest.mark.parametrize("name", FORMATS)
def test_files_of_other_code_are_recognized(shared, name, monkeypatch, tmp_path):
    if not (shared / "formats").is_dir():
        pytest.skip("needs the folder ../shared/formats with the file formats of other code")
    monkeypatch.syspath_prepend(shared / "formats")
    formats = importlib.import_module("synthesize_formats")
    monkeypatch.setattr(formats, "state_dict", lambda name, num_classes: hollow(formats.manifest_of(name)))
    content = formats.checkpoint(name)
    torch.save(content, tmp_path / "other.pth", _use_new_zipfile_serialization="state_dict" not in content)
    with pytest.raises(InputError, match=f"shows that this is {FORMATS[name]}; use ") as error:
        convert_checkpoint(tmp_path / "other.pth", tmp_path / "model")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"model": {"neck.convs.0.conv.weight": 0}}, "detrex"),
        ({"state_dict": {"bbox_head.cls_branches.0.weight": 0}, "meta": {}}, "MMDetection 3"),
        ({"state_dict": {"neck.convs.0.conv.weight": 0, "bbox_head.reg_branches.0.0.bias": 0}}, "MMDetection 3"),
        ({"state_dict": {"bbox_head.transformer.level_embeds": 0}}, "MMDetection 2"),
        ({"model": {"query_embed.weight": 0, "input_proj.weight": 0}}, "a DETR"),
        ({"model": {"query_embed.weight": 0, "transformer.reference_points.weight": 0}}, "Deformable DETR"),
        ({"model": {"refpoint_embed.weight": 0, "tgt_embed.weight": 0}}, "a DAB-DETR or DN-DETR checkpoint"),
        ({"student": {}, "teacher": {}}, "self-supervised"),
        ({"model.encoder.layers.0.fc1.weight": 0}, "transformers"),
        ({"weights": {}}, "should contain 'model' and 'args'"),
    ],
)
def test_other_models_are_recognized(content, name):
    with pytest.raises(InputError, match=name):
        read_source(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"args": "resnet50"}, "settings .* are a str, not a Namespace or a dict"),
        ({"model": {"bbox_embed.0": 5}}, "'model' contains a int as 'bbox_embed.0', not a tensor"),
        ({"args": small_checkpoint(nheads=5)["args"]}, "settings .* not describe a DINO .*d_model must be a multiple"),
        (
            {"args": small_checkpoint(hidden_dim=None)["args"]},
            "settings .* not describe a DINO .*'d_model' expected int",
        ),
        ({"args": small_checkpoint(dn_number=None)["args"]}, "settings .* not describe a DINO model"),
        ({"args": small_checkpoint(data_aug_scales=800)["args"]}, "settings .* not describe a DINO model"),
    ],
)
def test_content_of_another_kind_is_an_error(tmp_path, change, message):
    torch.save(small_checkpoint() | change, tmp_path / "odd.pth")
    with pytest.raises(InputError, match=message):
        convert_checkpoint(tmp_path / "odd.pth", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_checkpoint_without_settings_is_an_error(small):
    del small["args"]
    with pytest.raises(InputError, match="no settings"):
        converted(small)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_file_is_an_error(tmp_path, share, zipped):
    path = tmp_path / "cut.pth"
    torch.save({"model": {"weight": torch.rand(2000)}}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(InputError, match=r"cut\.pth is damaged or incomplete"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>quota exceeded</html>"])
def test_file_that_is_no_checkpoint_is_an_error(tmp_path, content):
    path = tmp_path / "page.pth"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a PyTorch checkpoint"):
        load_checkpoint(path)


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(InputError, match="is not a file"):
        load_checkpoint(tmp_path / "none.pth")


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_runs_only_when_trusted(tmp_path, caplog, zipped):
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    content = {"model": {}, "args": argparse.Namespace(harmless=Evil(trace))}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"pickled together with (_?io)\.open.*--trust_pickle"):
        load_checkpoint(path)
    assert not trace.exists()
    load_checkpoint(path, trust_pickle=True)
    assert trace.exists()
    assert "may run code" in caplog.text


def test_trusted_pickle_of_missing_code_is_an_error(tmp_path):
    path = tmp_path / "old.pth"
    path.write_bytes(pickle.dumps(0).replace(b"K\x00", b"cnot_a_module\nThing\n"))
    with pytest.raises(InputError, match=r"cannot be imported here.*not_a_module"):
        load_checkpoint(path, trust_pickle=True)


# Folders


@pytest.fixture(scope="module")
def folder(small_file, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "deep" / "model"
    convert_checkpoint(small_file, output)
    return output


def test_folder_loads_with_the_weights_of_the_file(folder, small_file):
    model = AutoModelForObjectDetection.from_pretrained(folder)
    source = torch.load(small_file, weights_only=False)["model"]
    assert torch.equal(model.model.query_selection.content_queries.weight, source["transformer.tgt_embed.weight"])
    assert AutoImageProcessor.from_pretrained(folder).size["longest_edge"] == 1333


def test_folder_has_card_code_and_nothing_beside_it(folder, small_file):
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert sha256(small_file) in card
    assert small_file.name in card
    assert (folder / "modeling_dino_detr.py").is_file()
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
    assert {file.stat().st_mode for file in folder.iterdir()} == {(folder / "README.md").stat().st_mode}


@pytest.mark.parametrize("options", [("--output_dir", "--use_ema"), ("--output-dir", "--use-ema")])
def test_options_have_dashes_or_underscores(tmp_path, options, monkeypatch):
    given = {}
    monkeypatch.setattr(conversion, "convert_checkpoint", lambda *paths, **flags: given.update(flags, paths=paths))
    output, use_ema = options
    (tmp_path / "some-file.pth").touch()
    monkeypatch.chdir(tmp_path)
    assert hf_dino(["convert", "some-file.pth", output, tmp_path / "a-model", use_ema]) == 0
    assert given.pop("paths") == (Path("some-file.pth"), tmp_path / "a-model")
    assert given.pop("use_ema")
    assert not any(given.values())


def test_script_prints_one_line_for_an_error(tmp_path):
    command = [sys.executable, SCRIPT, tmp_path / "none.pth", "--output_dir", tmp_path / "model"]
    ended = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}
    )
    assert ended.returncode == 2
    assert ended.stderr == (
        f"error: {tmp_path / 'none.pth'}: is not a file nor the name of a known checkpoint; "
        f"`hf-dino checkpoints` lists those\n"
    )


def test_folder_that_is_not_empty_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        hf_dino(["convert", "no such file", "--output_dir", tmp_path])
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


class Quick:
    """Writes a small stand-in for a model or an image processor."""

    config = DinoDetrConfig()

    def save_pretrained(self, path: Path) -> None:
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text("new")


def write(output: Path) -> None:
    write_folder(Quick(), Quick(), "card", output)


def test_overwrite_replaces_what_a_conversion_wrote(tmp_path):
    output = tmp_path / "model"
    output.mkdir()
    (output / "config.json").write_text("old")
    write(output)
    assert (output / "config.json").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_overwrite_keeps_what_no_conversion_writes(tmp_path, caplog):
    output = tmp_path / "model"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    write(output)
    assert (tmp_path / "model.replaced-1" / "thesis.tex").read_text() == "years of work"
    assert "thesis.tex" in caplog.text
    assert (output / "config.json").read_text() == "new"


def test_failure_leaves_what_was_there(tmp_path, monkeypatch):
    output = tmp_path / "model"
    output.mkdir()
    (output / "config.json").write_text("old")
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(output)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert (output / "config.json").read_text() == "old"


class Killed:
    """Dies half-way through writing, as if out of memory."""

    def save_pretrained(self, path: Path):
        path.mkdir(exist_ok=True)
        (path / "half").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that can be killed")
def test_killed_process_leaves_no_folder(tmp_path):
    child = os.fork()
    if child == 0:
        write_folder(Killed(), Killed(), "card", tmp_path / "model")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not (tmp_path / "model").exists()


def test_ema_weights_are_converted_on_request(small):
    small["ema_model"] = {f"module.{key}": value + 1 for key, value in small["model"].items()}
    source = read_source(small, use_ema=True).tensors
    assert torch.equal(source["transformer.level_embed"], small["model"]["transformer.level_embed"] + 1)


def test_file_without_ema_weights_is_an_error(small_file, tmp_path):
    with pytest.raises(InputError, match="no 'ema_model'"):
        hf_dino(["convert", small_file, "--output_dir", tmp_path / "model", "--use_ema"])
    assert not (tmp_path / "model").exists()


def test_card_of_an_own_file_claims_nothing(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "official checkpoint" not in card
    assert "license:" not in card
    assert "12 epochs" in card


def test_checkpoint_from_a_url_is_converted_like_the_file(folder, small_file, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HF_DINO_CACHE", str(tmp_path / "cache"))
    with serving(small_file.read_bytes(), [{"cut": 9999}], name=small_file.name) as server:
        assert hf_dino(["convert", server.url, "--output_dir", tmp_path / "model"]) == 0
    assert "only its length was verified" in caplog.text
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "model" / name).read_bytes() == (folder / name).read_bytes()
