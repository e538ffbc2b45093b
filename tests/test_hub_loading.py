"""Models load completely, with the classes of the dataset, or fail with one error that names the reason."""

import json
import shutil

import pytest
import torch
from transformers import DetrImageProcessor

from helpers.models import tiny_config, tiny_model
from hf_dino import DinoDetrImageProcessor
from hf_dino.configuration_dino_detr import UNUSED_LABEL
from hf_dino.data import InputError
from hf_dino.hub import (
    build_model_and_processor,
    load_model_and_processor,
    load_pretrained_for_categories,
    warn_if_batch_norms_frozen,
)
from hf_dino.modeling_dino_detr import DinoDetrModel


CATEGORIES = {7: "class 0", 3: "class 1", 5: "class 2", 8: "class 3", 2: "class 4"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "saved"
    tiny_model().save_pretrained(folder)
    DinoDetrImageProcessor().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(file):
    file.write_bytes(file.read_bytes()[:1000])


DAMAGES = {
    "config of a wrong type": (
        lambda folder: edit(folder / "config.json", d_model="x"),
        r"has no usable config\.json \(Field 'd_model' expected int, got str",
    ),
    "illegal config": (
        lambda folder: edit(folder / "config.json", num_queries=0),
        r"has no usable config\.json \(num_queries must be between 1",
    ),
    "truncated config": (lambda folder: truncate(folder / "config.json"), r"has no usable config\.json"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r".*it has no config\.json"),
    "another model": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "yolos"}'),
        "(contains a model of type 'yolos', not 'dino_detr'|models of type 'yolos' cannot be used)",
    ),
    "truncated weights": (lambda folder: truncate(folder / "model.safetensors"), "has no usable weights"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no usable weights .*no file named"),
    "weights of another size": (
        lambda folder: edit(folder / "config.json", d_model=64),
        "its weights are not those of a complete detector; .* are missing or do not have the shape",
    ),
    "no heads": (
        lambda folder: DinoDetrModel(tiny_config()).save_pretrained(folder),
        r"its weights are not those of a complete detector; 2 are missing .* such as class_embed\.0\.bias",
    ),
    "no processor": (lambda folder: (folder / "preprocessor_config.json").unlink(), "has no usable image processor"),
    "truncated processor": (
        lambda folder: (folder / "preprocessor_config.json").write_text("{"),
        "has no usable image processor",
    ),
    "processor of another model": (
        lambda folder: DetrImageProcessor().save_pretrained(folder),
        "has no usable image processor.*it is a DetrImageProcessor, not a DinoDetrImageProcessor",
    ),
    "impossible size": (
        lambda folder: edit(folder / "preprocessor_config.json", size={"shortest_edge": -5, "longest_edge": 0}),
        "has no usable image processor.*size must be a positive shortest_edge and longest_edge",
    ),
    "backbone that is none": (
        lambda folder: edit(folder / "config.json", backbone_config={"model_type": "bert"}),
        "has no usable config.json .*backbone_config has the model_type 'bert', which is not a backbone",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "load", [load_model_and_processor, lambda model: load_pretrained_for_categories(model, {1: "thing"})]
)
def test_a_damaged_model_is_one_error(copied, damage, load):
    change, message = DAMAGES[damage]
    change(copied)
    with pytest.raises(InputError, match=rf"model: {message}") as error:
        load(str(copied))
    assert len(str(error.value).splitlines()) == 1


def test_a_model_with_these_classes_is_loaded_unchanged(saved):
    before, processor = load_model_and_processor(str(saved))
    assert not before.training
    assert processor.size["shortest_edge"] == 800
    after, processor = load_pretrained_for_categories(str(saved), CATEGORIES, {"height": 32, "width": 64})
    assert dict(processor.size) == {"height": 32, "width": 64}
    assert after.config.id2label == before.config.id2label
    assert all(torch.equal(after.state_dict()[name], value) for name, value in before.state_dict().items())


@pytest.mark.parametrize("names", [CATEGORIES, {1: "another"}], ids=["the same classes", "others"])
def test_a_model_saved_in_half_precision_is_trained_in_float32(saved, tmp_path, names):
    model, processor = load_model_and_processor(str(saved))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert {each.dtype for each in load_model_and_processor(str(tmp_path))[0].parameters()} == {torch.bfloat16}
    assert {each.dtype for each in load_pretrained_for_categories(str(tmp_path), names)[0].parameters()} == {
        torch.float32
    }


@pytest.mark.parametrize("num_queries", [30, 7])
@pytest.mark.parametrize("names", [CATEGORIES, {1: "another"}], ids=["the same classes", "others"])
def test_a_pretrained_model_gets_more_or_fewer_queries(saved, names, num_queries, caplog):
    before, _ = load_pretrained_for_categories(str(saved), names)
    caplog.clear()
    after, _ = load_pretrained_for_categories(str(saved), names, None, {"num_queries": num_queries})
    assert f"the model has {num_queries} queries instead of 12" in caplog.text
    weights = dict(before.state_dict())
    name = "model.query_selection.content_queries.weight"
    weights[name] = weights[name][torch.arange(num_queries) % 12]
    random = CLASS_TENSORS if names != CATEGORIES else set()
    assert all(torch.equal(after.state_dict()[key], value) for key, value in weights.items() if key not in random)
    with torch.no_grad():
        assert after(torch.rand(1, 3, 128, 128)).logits.shape[1] == num_queries
    with pytest.raises(InputError, match=r"--config_overrides: .*num_queries must be between 1 and inf, got 0"):
        load_pretrained_for_categories(str(saved), names, None, {"num_queries": 0})


CLASS_TENSORS = {
    "class_embed.0.weight",
    "class_embed.0.bias",
    "model.query_selection.class_embed.weight",
    "model.query_selection.class_embed.bias",
    "model.denoising.label_embed.weight",
}


@pytest.mark.parametrize("count", [1, 5], ids=["fewer classes", "as many other classes"])
def test_other_classes_are_reinitialized_and_all_else_is_kept(saved, count):
    before = load_model_and_processor(str(saved))[0].state_dict()
    names = {label: f"thing {label}" for label in range(count)}
    model, _ = load_pretrained_for_categories(str(saved), names)
    assert model.config.id2label == names
    assert model.config.label2id == {name: label for label, name in names.items()}
    after = model.state_dict()
    assert {name for name, value in after.items() if not torch.equal(value, before[name])} == CLASS_TENSORS
    assert all(len(after[name]) == count for name in CLASS_TENSORS)
    assert after["class_embed.0.bias"].sigmoid().allclose(torch.tensor(0.01)), "as if fresh"


def saved_with(folder, names, **overrides):
    tiny_model(id2label=dict(enumerate(names)), **overrides).save_pretrained(folder)
    DinoDetrImageProcessor().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("overrides", [{}, {"share_decoder_heads": False}, {"denoising": "none"}])
@pytest.mark.parametrize("order", [["helmet", "Traffic Light", "person"], ["a", "person", "b", "c", "traffic-light"]])
def test_rows_of_classes_of_the_same_name_are_copied(tmp_path, caplog, overrides, order):
    names = [UNUSED_LABEL, "person", "car", UNUSED_LABEL, "traffic_light"]
    folder = saved_with(tmp_path, names, **overrides)
    before, _ = load_model_and_processor(folder)
    after, _ = load_pretrained_for_categories(folder, dict(enumerate(order, start=10)))
    assert after.config.id2label == dict(enumerate(order))
    where = {"person": 1, "traffic light": 4}
    plain = [name.lower().replace("-", " ") for name in order]
    rows = {label: where[name] for label, name in enumerate(plain) if name in where}
    heads = 3 if "share_decoder_heads" in overrides else 1
    assert len(after.class_specific_layers()) == heads + 1 + (overrides.get("denoising") != "none")
    learned, fresh = before.state_dict(), after.state_dict()
    per_class = {name for name in learned if "class_embed" in name or "label_embed" in name}
    for name, value in fresh.items():
        if name not in per_class:
            assert torch.equal(value, learned[name])
            continue
        assert len(value) == len(order)
        for label in range(len(order)):
            kept = [row for row in range(5) if torch.equal(value[label], learned[name][row])]
            assert kept == ([rows[label]] if label in rows else []), name
    new = [name for label, name in enumerate(order) if label not in rows]
    copied = [order[label] for label in rows]
    assert f"classes copied: {', '.join(copied)}; new: {', '.join(new)}" in caplog.text


def test_an_exact_name_is_preferred_to_a_similar_one(tmp_path, caplog):
    folder = saved_with(tmp_path, ["Cup", "cup", "CUP"])
    before, _ = load_model_and_processor(folder)
    after, _ = load_pretrained_for_categories(folder, {1: "cup"})
    assert torch.equal(after.class_embed[0].weight[0], before.class_embed[0].weight[1])
    assert "classes copied: cup; new: none" in caplog.text


def test_rows_without_a_name_are_never_copied(tmp_path, caplog):
    folder = saved_with(tmp_path, [UNUSED_LABEL, "cup"])
    before, _ = load_model_and_processor(folder)
    after, _ = load_pretrained_for_categories(folder, {1: "n/a", 2: UNUSED_LABEL})
    weights, learned = after.class_embed[0].weight, before.class_embed[0].weight
    assert not any(torch.equal(row, other) for row in weights for other in learned)
    assert "classes copied: none; new: n/a, N/A" in caplog.text


def test_a_new_model_has_the_classes_of_the_dataset(tmp_path, caplog):
    fields = tiny_config().to_diff_dict()
    file = tmp_path / "config.json"
    file.write_text(json.dumps({name: fields[name] for name in ("backbone_config", "d_model", "num_queries")}))
    model, processor = build_model_and_processor(file, CATEGORIES)
    assert model.config.id2label == dict(enumerate(["class 4", "class 1", "class 2", "class 0", "class 3"]))
    assert model.config.d_model == 32
    assert dict(processor.size) == {"shortest_edge": 800, "longest_edge": 1333}
    warn_if_batch_norms_frozen(model)
    assert "training from scratch with frozen batch norms" in caplog.text


def test_overrides_take_precedence(saved, tmp_path):
    model, _ = load_pretrained_for_categories(str(saved), CATEGORIES, overrides={"box_noise_scale": 0.25})
    assert model.config.box_noise_scale == 0.25
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**tiny_config().to_diff_dict(), "box_noise_scale": 0.5, "num_queries": 7}))
    model, _ = build_model_and_processor(file, CATEGORIES, overrides={"box_noise_scale": 0.25})
    assert (model.config.box_noise_scale, model.config.num_queries) == (0.25, 7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must contain an object with fields of DinoDetrConfig, got list"),
        ('{"num_querys": 5}', "DinoDetrConfig has no field 'num_querys'; did you mean num_queries"),
        ('{"num_feature_levels": 9}', "is not a configuration of a DINO model .*num_feature_levels"),
        ('{"d_model": "x"}', "is not a configuration of a DINO model .*Field 'd_model' expected int, got str"),
    ],
)
def test_wrong_config_files(tmp_path, content, message):
    file = tmp_path / "wrong.json"
    file.write_text(content)
    with pytest.raises(InputError, match=rf"wrong\.json: {message}"):
        build_model_and_processor(file, CATEGORIES)
    with pytest.raises(InputError, match=r"gone\.json: file not found"):
        build_model_and_processor(tmp_path / "gone.json", CATEGORIES)
