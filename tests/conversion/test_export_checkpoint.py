"""Models are written as checkpoints of the other code bases, which converted again give the same models."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import official_weights
from helpers.command_line import hf_dino
from helpers.conversion_sources import BACKBONES, SIZE, checkpoint, narrow_config, numbered_weights, save
from helpers.large_files import measure_conversion, write_file
from helpers.models import make_labels, tiny_model
from helpers.paths import FIXTURES
from hf_dino import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrImageProcessor
from hf_dino.conversion import convert_checkpoint, export_checkpoint
from hf_dino.conversion.checkpoint import read_source
from hf_dino.conversion.convert import (
    UNUSED_WEIGHTS,
    build_model,
    config_and_processor,
    convert_state_dict,
    select_classes,
)
from hf_dino.conversion.export import checkpoint_content
from hf_dino.conversion.key_tables import FORMATS
from hf_dino.conversion.settings import FIXED_FIELDS, config_from_args, make_id2label, read_python
from hf_dino.hub import load_pretrained_for_categories
from hf_dino.utils.errors import InputError


def weights_of(content: dict) -> dict[str, torch.Tensor]:
    return content.get("model", content.get("state_dict"))


@pytest.mark.parametrize("name", FORMATS)
def test_directory_returns_every_tensor_bit_for_bit(tmp_path, name):
    content = checkpoint(name)
    label_rows = next(key for key in weights_of(content) if "label_e" in key)
    weights_of(content)[label_rows] = torch.rand(weights_of(content)[label_rows].shape)  # also those that none reads
    convert_checkpoint(save(content, tmp_path / "a.pth"), tmp_path / "model")
    assert hf_dino(["convert", tmp_path / "model", "--to", name, "--output", tmp_path / "b.pth"]) == 0
    back = torch.load(tmp_path / "b.pth", weights_only=name != "official")
    assert weights_of(back).keys() == weights_of(content).keys()
    for key, tensor in weights_of(content).items():
        assert torch.equal(weights_of(back)[key], tensor), key
        assert weights_of(back)[key].dtype == tensor.dtype
    assert (tmp_path / "model" / UNUSED_WEIGHTS).exists() is (name == "official")
    if name == "official":
        assert vars(back["args"]) == vars(content["args"])
    else:
        assert back["meta" if name == "mmdet" else "config"] == content["meta" if name == "mmdet" else "config"]


@pytest.mark.parametrize("variant", ["r50_4scale", "swinl_4scale"])
def test_official_models_return_with_all_their_keys(variant):
    official = official_weights.read_json(FIXTURES / f"official_{variant}.json.gz")
    source = {
        key: torch.zeros((), dtype=getattr(torch, dtype)).expand(shape)
        for key, (shape, dtype) in official["state_dict"].items()
    }
    config = config_from_args(official["args"])
    back = checkpoint_content(convert_state_dict(source, config), config, "official", SIZE, {})
    assert {key: [list(tensor.shape), str(tensor.dtype)[6:]] for key, tensor in back["model"].items()} == {
        key: list(entry) for key, entry in official["state_dict"].items()
    }
    stored = vars(back["args"])
    assert {name: official["args"][name] for name in stored if name != "data_aug_scales"} == {
        name: value for name, value in stored.items() if name != "data_aug_scales"
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r50_4scale", "detrex_dino_r50_4scale", "mmdet_dino_4scale_r50"])
def test_whole_file_returns_bit_for_bit(shared, tmp_path, name):
    file = tmp_path / "a.pth"
    write_file(shared, name, file)
    embedding = (10000, -0.5) if "detrex" in name else None
    convert_checkpoint(file, tmp_path / "model", positional_encoding=embedding)
    to = {"d": "detrex", "m": "mmdet"}.get(name[0], "official")
    export_checkpoint(str(tmp_path / "model"), tmp_path / "b.pth", to)
    whole, back = (weights_of(torch.load(path, weights_only=False)) for path in (file, tmp_path / "b.pth"))
    assert back.keys() == whole.keys()
    assert all(torch.equal(back[key], tensor) and back[key].dtype == tensor.dtype for key, tensor in whole.items())


@pytest.mark.parametrize("name", FORMATS)
def test_exported_model_is_converted_to_the_same_model(name):
    overrides = {"num_denoising": 7, "box_noise_scale": 0.3, "class_cost": 3.0, "num_select": 50, "dropout": 0.1}
    names = {0: "cat", 1: "dog", 2: "a long name"}
    config = narrow_config(name, id2label=names, **overrides)
    source = read_source(checkpoint(name, config))
    found, processor = config_and_processor(source)
    assert {field: getattr(found, field) for field in overrides} == overrides
    assert found.id2label == (names if name != "official" else make_id2label(3))
    assert dict(processor.size) == SIZE


def test_settings_for_mmdetection_are_a_whole_model():
    """The text has the modules and sizes of `configs/dino/dino-5scale_swin-l_8xb2-12e_coco.py` of mmdet 3.3.0."""
    backbone = {"model_type": "swin", "image_size": 384, "embed_dim": 192, "depths": [2, 2, 18, 2]}
    backbone |= {"num_heads": [6, 12, 24, 48], "window_size": 12, "drop_path_rate": 0.2, "out_indices": [1, 2, 3, 4]}
    config = DinoDetrConfig(
        backbone_config=backbone,
        num_feature_levels=5,
        id2label={i: str(i) for i in range(80)},
        **FIXED_FIELDS["mmdet"],
    )
    content = checkpoint_content(numbered_weights(config), config, "mmdet", SIZE, {})
    model = read_python(content["meta"]["cfg"])["model"]
    assert model["backbone"] == {
        "type": "SwinTransformer",
        "pretrain_img_size": 384,
        "embed_dims": 192,
        "depths": [2, 2, 18, 2],
        "num_heads": [6, 12, 24, 48],
        "window_size": 12,
        "drop_path_rate": 0.2,
        "out_indices": [0, 1, 2, 3],
    }
    assert (model["neck"]["in_channels"], model["neck"]["num_outs"]) == ([192, 384, 768, 1536], 5)
    assert model["encoder"]["layer_cfg"]["self_attn_cfg"]["num_levels"] == 5
    assert model["bbox_head"]["loss_iou"] == {"type": "GIoULoss", "loss_weight": 2.0}
    assert [cost["type"] for cost in model["train_cfg"]["assigner"]["match_costs"]] == [
        "FocalLossCost", "BBoxL1Cost", "IoUCost"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["detrex", "mmdet"])
def test_shared_heads_are_written_for_every_layer(name, caplog):
    config = narrow_config(name, share_decoder_heads=True)
    source = read_source(checkpoint(name, config))
    assert "does not store share_decoder_heads=True, which only matters for further training" in caplog.text
    tensors = convert_state_dict(source.tensors, config_and_processor(source)[0], name)
    shared = numbered_weights(config)
    for layer in range(config.decoder_layers):
        assert torch.equal(tensors[f"class_embed.{layer}.weight"], shared["class_embed.0.weight"])


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("official", {"positional_encoding_offset": -0.5}, r"positional_encoding_offset=-0.5 \(only 0.0\)"),
        ("official", {"box_prediction_epsilon": 1e-5}, "box_prediction_epsilon=1e-05"),
        ("official", {"denoising": "plain"}, "denoising='plain'"),
        ("official", {"decoder_ffn_dim": 64}, "ffn_dim"),
        ("official", {"activation_function": "silu"}, "transformer_activation='silu'"),
        ("official", {"num_ranking_labels": 2}, "num_ranking_labels=2"),
        ("official", {"backbone_config": {**BACKBONES["ConvNeXt-T"], "out_indices": [2, 3, 4]}}, "convnext backbone"),
        ("detrex", {"box_refinement": "look_forward_once"}, "box_refinement='look_forward_once'"),
        ("detrex", {"query_selection": "static"}, "query_selection 'mixed' or 'pure'"),
        ("detrex", {"denoising": "none"}, "denoising='none'"),
        ("detrex", {"activation_function": "gelu"}, "activation_function='gelu'"),
        ("mmdet", {"box_prediction_epsilon": 1e-3}, "box_prediction_epsilon=0.001"),
        ("mmdet", {"box_refinement": "look_forward_once"}, "box_refinement='look_forward_once'"),
        ("mmdet", {"backbone_config": {"model_type": "resnet", "depths": [3, 8, 36, 3]}}, "a resnet with"),
    ],
)
def test_model_that_a_format_cannot_express_is_refused(name, overrides, message):
    with pytest.raises(InputError, match=message) as error:
        checkpoint(name, narrow_config(name, **overrides))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", FORMATS)
def test_refused_model_leaves_no_file(tmp_path, name):
    tiny_model().save_pretrained(tmp_path / "model")
    DinoDetrImageProcessor().save_pretrained(tmp_path / "model")
    with pytest.raises(InputError):
        export_checkpoint(str(tmp_path / "model"), tmp_path / "a.pth", name)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("size", [{"shortest_edge": 480, "longest_edge": 640}, {"height": 320, "width": 400}])
@pytest.mark.parametrize("name", FORMATS)
def test_image_size_is_stored_or_said_not_to_be(name, size, caplog):
    config = narrow_config(name)
    content = checkpoint_content(numbered_weights(config), config, name, size, {})
    _, processor = config_and_processor(read_source(content))
    assert (dict(processor.size) == size) is not (f"does not store the image size {size}" in caplog.text)


def test_other_normalization_of_images_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    DinoDetrImageProcessor(image_mean=[0.5, 0.5, 0.5]).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"image_mean=\[0\.5, 0\.5, 0\.5\], only"):
        export_checkpoint(str(tmp_path / "model"), tmp_path / "a.pth", "official")


def test_neck_with_bias_has_no_place_in_mmdetection():
    config = narrow_config("mmdet")
    weights = numbered_weights(config)
    weights["model.backbone.input_proj.0.0.bias"] = torch.ones(32)
    with pytest.raises(InputError, match=r"input_proj\.0\.0\.bias, which is not 0: mmdetection's convolution"):
        checkpoint_content(weights, config, "mmdet", SIZE, {})


def test_settings_that_a_format_does_not_store_are_said(caplog):
    checkpoint("official", narrow_config("official", focal_gamma=1.5, freeze_backbone_batch_norms=False))
    assert "does not store freeze_backbone_batch_norms=False, focal_gamma=1.5" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "yolo", "--output", "b.pth"], "--to yolo: must be official, detrex, mmdet"),
        (["--to", "mmdet"], "--to and --output"),
        (["--output", "b.pth"], "--to and --output"),
        ([], "give --output_dir"),
        (
            ["--to", "mmdet", "--output", "b.pth", "--coco80", "--settings", "x"],
            "--settings, --coco80: not read with --to",
        ),
        (["--to", "mmdet", "--output", "b.pth", "--output_dir", "c"], "--to and --output"),
        (["--output_dir", "c", "--coco80", "--num_labels", "3"], "--coco80 and --num_labels exclude each other"),
        (["--output_dir", "c", "--num_labels", "0"], "at least 1, got 0"),
    ],
)
def test_options_that_contradict_each_other(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        hf_dino(["convert", "a.pth", *options])
    assert not list(tmp_path.iterdir())


def test_file_that_exists_is_not_replaced(tmp_path):
    (tmp_path / "a.pth").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        export_checkpoint("no model", tmp_path / "a.pth", "mmdet")
    assert (tmp_path / "a.pth").read_text() == "mine"


# Classes


@pytest.fixture
def coco_model() -> DinoDetrForObjectDetection:
    """A model of COCO's 91 category ids in which unused ones often have the largest logit of an encoder token."""
    model = tiny_model(id2label=make_id2label(91))
    with torch.no_grad():
        model.model.query_selection.class_embed.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


def selected(model, names, coco80=False) -> DinoDetrForObjectDetection:
    state_dict = dict(model.state_dict())
    config = select_classes(state_dict, model.config, names, coco80)
    return build_model(config, state_dict)


def coco_names() -> list[str]:
    return [name for name in make_id2label(91).values() if name != "N/A"]


@pytest.mark.parametrize("names", [coco_names(), ["toothbrush", "person", "Cell-Phone"]])
def test_detections_of_kept_classes_do_not_change(coco_model, pixel_values, names):
    kept = selected(coco_model, names, coco80=len(names) == 80)
    labels = [coco_model.config.label2id[name.lower().replace("-", " ")] for name in names]
    with torch.no_grad():
        before, after = coco_model(pixel_values), kept(pixel_values)
    torch.testing.assert_close(after.logits, before.logits[..., labels])
    torch.testing.assert_close(after.pred_boxes, before.pred_boxes)
    assert after.enc_outputs_class.shape[-1] == len(names) == kept.config.num_labels
    assert kept.config.num_ranking_labels == 91 - len(names)
    # without the rows that only rank, other tokens would be chosen
    head = kept.model.query_selection.class_embed
    with torch.no_grad():
        head.bias[len(names) :] = -100
        assert not torch.allclose(kept(pixel_values).pred_boxes, before.pred_boxes)


def test_model_of_kept_classes_is_saved_trained_and_fine_tuned(coco_model, pixel_values, tmp_path):
    kept = selected(coco_model, ["person", "car"])
    kept.save_pretrained(tmp_path / "model")
    DinoDetrImageProcessor().save_pretrained(tmp_path / "model")
    loaded = DinoDetrForObjectDetection.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(pixel_values).logits, kept(pixel_values).logits)
    loaded.train()(pixel_values, labels=make_labels(2, 1, num_labels=2)).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters() if parameter.requires_grad)
    tuned, _ = load_pretrained_for_categories(str(tmp_path / "model"), {3: "car", 5: "zebra", 6: "yak"})
    assert tuned.config.num_ranking_labels == 0
    assert torch.equal(
        tuned.model.query_selection.class_embed.weight[0], kept.model.query_selection.class_embed.weight[1]
    )


@pytest.mark.parametrize(
    ("names", "coco80", "message"),
    [
        (["person", "bicycel"], False, "no class 'bicycel'; did you mean bicycle"),
        ([""], False, "no class ''"),
        (["car", "car"], False, "given twice"),
        (["person", "N/A"], False, "no class 'N/A'"),
        (["person"], True, "--coco80: the file has 91 labels"),
    ],
)
def test_wrong_classes_are_one_error(coco_model, names, coco80, message):
    with pytest.raises(InputError, match=message) as error:
        selected(coco_model, names, coco80)
    assert len(str(error.value).splitlines()) == 1


def test_options_for_classes(tmp_path, caplog):
    config = narrow_config("official", id2label=make_id2label(91))
    file = save(checkpoint("official", config), tmp_path / "a.pth")
    for options, count in ((["--coco80"], 80), (["--keep_classes", "car, person"], 2), (["--num_labels", 3], 3)):
        output = tmp_path / options[0]
        assert hf_dino(["convert", file, "--output_dir", output, *options]) == 0
        found = json.loads((output / "config.json").read_text())
        assert len(found["id2label"]) == count
        assert not (output / UNUSED_WEIGHTS).exists()
        model = DinoDetrForObjectDetection.from_pretrained(output)
        assert model.class_embed[0].weight.shape[0] == count
        assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert "the class heads are new and random" in caplog.text
    assert "random: train the model before use" in (output / "README.md").read_text(encoding="utf-8")
    rows = load_file(tmp_path / "--coco80" / "model.safetensors")["model.query_selection.class_embed.weight"]
    assert len(rows) == 91


# Large files


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swinl_4scale", "detrex_dino_swin_large_384_4scale", "mmdet_dino_5scale_swin_l"])
def test_memory_and_time_of_a_large_file(shared, tmp_path, name):
    """At most 1.5 times the file in memory, and no slower than reading and writing it twice."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to measure memory")
    measured = measure_conversion(shared, name, tmp_path)
    assert measured["memory"] <= 1.5 * measured["size"], measured
    assert measured["seconds"] <= 2 * measured["copy_seconds"], measured
