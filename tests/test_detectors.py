"""Detection models of transformers through the tools of hf_dino: opened, trained, evaluated, saved and run."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, pipeline

from helpers.command_line import exit_status, hf_dino
from helpers.detectors import SMALL, small_detector
from hf_dino.data.shapes import generate_shapes
from hf_dino.detectors import CONVENTIONS, adopt_processor, check_patches, convention_of, detect, own_processor
from hf_dino.family import FAMILY, member_of, tiny_fields
from hf_dino.hub import (
    load_detector,
    load_model_and_processor,
    load_pretrained_for_categories,
    save_detector,
    warn_if_batch_norms_frozen,
)
from hf_dino.image_processing_dino_detr import DinoDetrImageProcessor
from hf_dino.training import FineTuner, FineTuningArguments
from hf_dino.training.optim import freezable_stages, freeze, set_training_mode
from hf_dino.training_arguments import reproduction_argv
from hf_dino.utils.errors import InputError


NAMES = {0: "circle", 1: "lamp", 2: "star"}  # two of them are classes of the `shapes` dataset
FOREIGN = [each for each in CONVENTIONS if each in SMALL]


def size_of(model_type):
    edge = 112 if model_type == "rf_detr" else 128
    return {"height": edge, "width": edge}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return generate_shapes(tmp_path_factory.mktemp("data"), num_train=8, num_val=3, num_test=2, image_size=96)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a function that saves a model of a type, once, as transformers does."""
    folders = {}

    def save(model_type):
        if model_type not in folders:
            torch.manual_seed(0)
            folders[model_type] = tmp_path_factory.mktemp(model_type)
            model = small_detector(model_type, id2label=NAMES)
            model.save_pretrained(folders[model_type])
            own_processor(model.config, DinoDetrImageProcessor(size=size_of(model_type))).save_pretrained(
                folders[model_type]
            )
        return folders[model_type]

    return save


def options(shapes, folder, size, **more):
    return FineTuningArguments(
        dataset=str(shapes),
        output_dir=folder,
        image_size=[f"{size['height']}x{size['width']}"],
        augmentation="flip",
        global_batch_size=4,
        dataloader_num_workers=0,
        num_train_epochs=1,
        **more,
    )


def train(arguments):
    tuner = FineTuner(arguments)
    scores = tuner.train()
    rows = [json.loads(line) for line in (arguments.output_dir / "history.jsonl").read_text().splitlines()]
    assert {"loss", "loss_bbox", "loss_giou"} <= rows[0].keys() and rows[0]["loss"] > 0
    return scores


def check_saved(folder, shapes, scores, tmp_path):
    """A saved model is evaluated to the same AP, works without hf_dino's tools, has a card, and detects."""
    loaded, processor = load_detector(str(folder))
    metrics = tmp_path / "metrics.json"
    assert hf_dino(["evaluate", "--model_name_or_path", folder, "--data", shapes, "--metrics_json", metrics]) == 0
    assert json.loads(metrics.read_text())["ap"] == pytest.approx(scores["validation"].metrics["ap"], abs=1e-6)
    found = tmp_path / "found"
    images = shapes / "test"
    assert (
        hf_dino(["predict", images, "--model", folder, "--output", found, "--threshold", "0", "--save", "json"]) == 0
    )
    own = AutoImageProcessor.from_pretrained(folder)
    assert type(own).__name__.removesuffix("Pil") == convention_of(loaded.config).image_processor
    image = Image.open(next((shapes / "test").iterdir()))
    boxes = pipeline("object-detection", model=str(folder), image_processor=own, threshold=0.0)(image)
    assert boxes and {each["label"] for each in boxes} <= {"circle", "square", "triangle", "star", "cross"}
    card = (folder / "README.md").read_text()
    assert "trained on" in card and "hf_dino train" in card
    return loaded, processor


@pytest.mark.parametrize("key", FAMILY)
def test_every_member_of_the_family_is_trained_evaluated_saved_loaded_and_run(key, shapes, tmp_path):
    folder = tmp_path / "run"
    fields = tiny_fields(key) | {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 20}
    arguments = options(shapes, folder, size_of(key), architecture=key, config_overrides=fields)
    scores = train(arguments)
    loaded, _ = check_saved(folder, shapes, scores, tmp_path)
    assert type(loaded).__name__ == FAMILY[key].model_class
    assert member_of(loaded.config) is FAMILY["dino_4scale" if key == "dino_5scale" else key]
    assert "--architecture" in reproduction_argv(arguments)


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(each, marks=[pytest.mark.slow] * (each not in ("rt_detr", "rf_detr", "d_fine")))
        for each in FOREIGN
    ],
)
def test_a_pretrained_model_is_fine_tuned_on_other_classes(model_type, shapes, saved, tmp_path):
    folder = tmp_path / "run"
    arguments = options(shapes, folder, size_of(model_type), model_name_or_path=str(saved(model_type)))
    scores = train(arguments)
    loaded, _ = check_saved(folder, shapes, scores, tmp_path)
    assert loaded.config.model_type == model_type and loaded.config.num_labels == 5


@pytest.mark.parametrize("model_type", FOREIGN)
def test_detections_are_those_of_the_own_image_processor(model_type, saved):
    model, processor = load_detector(str(saved(model_type)))
    own = AutoImageProcessor.from_pretrained(saved(model_type))
    image = torch.randint(256, (3, 90, 120), dtype=torch.uint8)
    theirs, ours = (each(images=image, return_tensors="pt") for each in (own, processor))
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"])
    with torch.no_grad():
        outputs, standard = model(ours["pixel_values"]), detect(model, model.config, ours)
    (expected,) = own.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(90, 120)])
    order = expected["scores"].argsort(descending=True, stable=True)
    (found,) = processor.post_process_object_detection(
        standard, threshold=0.0, target_sizes=[(90, 120)], top_k=len(order)
    )
    torch.testing.assert_close(found["scores"], expected["scores"][order])
    # equal scores may be in another order
    first, second = (
        torch.cat([each["boxes"], each["labels"][:, None]], dim=1).sort(dim=0).values for each in (found, expected)
    )
    torch.testing.assert_close(first, second, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("model_type", FOREIGN)
def test_known_classes_keep_their_rows_and_others_are_new(model_type, saved):
    before, _ = load_detector(str(saved(model_type)))
    after, _ = load_pretrained_for_categories(str(saved(model_type)), {4: "star", 5: "pear", 9: "Circle"})
    assert after.config.id2label == {0: "star", 1: "pear", 2: "Circle"}
    old, new = before.state_dict(), after.state_dict()
    with_classes = [name for name in old if re.search("class|score_head", name) and len(old[name]) in (3, 4)]
    assert with_classes
    for name in with_classes:
        assert new[name][[0, 2]].equal(old[name][[2, 0]]) and new[name][3:].equal(old[name][3:])
    others = [name for name in old if name not in with_classes]
    assert all(new[name].equal(old[name]) for name in others)
    assert any(not new[name][1].equal(old[name][1]) for name in with_classes)


@pytest.mark.parametrize("model_type", ["conditional_detr", "deformable_detr"])
def test_new_classes_begin_with_low_scores(model_type, saved):
    after, _ = load_pretrained_for_categories(str(saved(model_type)), {4: "star", 5: "pear", 9: "Circle"})
    biases = [value for name, value in after.state_dict().items() if re.search(r"class_\w+(\.\d+)?\.bias", name)]
    assert biases and all(bias[1].sigmoid().item() == pytest.approx(0.01) for bias in biases)


def test_fields_that_change_the_weights_of_a_model_are_taken(saved):
    overrides = {"num_denoising": 0, "num_queries": 12}
    changed, _ = load_pretrained_for_categories(str(saved("rt_detr")), {1: "star", 2: "pear"}, overrides=overrides)
    assert (changed.config.num_denoising, changed.config.num_queries) == (0, 12)
    assert not any("denoising" in name for name in changed.state_dict())


def test_all_classes_of_the_same_names_are_loaded_unchanged(saved):
    before, _ = load_detector(str(saved("rt_detr")))
    after, _ = load_pretrained_for_categories(str(saved("rt_detr")), {7: "circle", 8: "star", 9: "lamp"})
    assert after.config.id2label == before.config.id2label
    assert all(value.equal(after.state_dict()[name]) for name, value in before.state_dict().items())


def test_types_with_unknown_conventions_are_refused(tmp_path):
    config = AutoConfig.for_model("yolos", num_hidden_layers=1)
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"models of type 'yolos' cannot be used; .* dino_detr, detr, "):
        load_detector(str(tmp_path))


def test_other_models_are_not_dino(saved):
    with pytest.raises(InputError, match="contains a model of type 'detr', not 'dino_detr'"):
        load_model_and_processor(str(saved("detr")))


def test_pillow_is_refused_for_a_model_that_resizes_without_antialiasing(saved):
    with pytest.raises(InputError, match=r"RfDetrImageProcessor gives .* or other values"):
        load_detector(str(saved("rf_detr")), backend="pil")


def test_a_processor_that_changes_images_otherwise_is_refused():
    own = own_processor(AutoConfig.for_model("detr"), DinoDetrImageProcessor(size={"height": 32, "width": 32}))
    assert adopt_processor(own, CONVENTIONS["detr"]).size == own.size
    own.pad_size = {"height": 64, "width": 64}
    with pytest.raises(ValueError, match=r"DetrImageProcessor gives .* hf_dino"):
        adopt_processor(own, CONVENTIONS["detr"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image_size": ["64"]}, "a model of type 'rt_detr' needs images of one size; give --image_size HEIGHTxWIDTH"),
        ({"image_size": ["80x80"]}, "images become as small as 80 x 80 pixels"),
        ({"config_overrides": {"box_refinement": "look_forward_once"}}, "RTDetrConfig has no field 'box_refinement'"),
        (
            {"config_overrides": {"d_model": 64}},
            "follows from config.json and --config_overrides d_model",
        ),
        (
            {"config_overrides": {"decoder_layers": "x"}},
            "--config_overrides: is not .* rt_detr model .*expected int",
        ),
        ({"config_overrides": {"num_queries": 0}}, "--config_overrides: .*num_queries must be at least 1, got 0"),
        ({"torch_compile": True}, "a model of type 'rt_detr' cannot be compiled"),
        ({"image_size": ["90x70"]}, "a model of type 'rt_detr' does not take images of 90 x 70 pixels"),
        ({"freeze": ["head"]}, "this model has no stage head to freeze; it has stem, backbone, backbone.stage1"),
    ],
)
def test_what_a_model_cannot_do_is_one_error(given, message, shapes, saved, tmp_path):
    arguments = options(shapes, tmp_path / "run", size_of("rt_detr"), model_name_or_path=str(saved("rt_detr")))
    for name, value in given.items():
        setattr(arguments, name, value)
    with pytest.raises(InputError, match=message):
        FineTuner(arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"architecture": "yolo"}, "--architecture: must be one of detr, conditional_detr, .* got 'yolo'"),
        ({"architecture": "detr", "model_name_or_path": "m"}, "--model_name_or_path has its own architecture"),
        ({"architecture": "detr", "config_overrides": {"num_querys": 3}}, "no field 'num_querys'; did you mean"),
    ],
)
def test_wrong_architectures_are_refused_at_once(given, message, tmp_path):
    with pytest.raises(InputError, match=message):
        FineTuningArguments(dataset="d", output_dir=tmp_path / "run", **given)


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_images_of_a_size_that_a_model_does_not_take_are_an_error(command, shapes, tmp_path, capsys):
    model = small_detector("rf_detr", id2label=dict(enumerate(["circle", "square", "triangle", "star", "cross"])))
    size = {"height": 126, "width": 112}
    save_detector(tmp_path / "model", model, DinoDetrImageProcessor(size=size), "")
    given = {"evaluate": ["--data", shapes], "predict": [shapes / "test", "--output", tmp_path / "found"]}
    assert exit_status([command, *given[command], "--model_name_or_path", tmp_path / "model"]) in (1, 2)
    assert "a model of type 'rf_detr' does not take images of 126 x 112 pixels" in capsys.readouterr().err


def edited_processor(source, target, **settings):
    shutil.copytree(source, target)
    file = target / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return target


def test_images_that_patches_do_not_cover_are_refused(shapes, saved, tmp_path):
    with pytest.raises(InputError, match="patches of 14 x 14 pixels, which do not cover images of 96 x 96"):
        load_detector(str(edited_processor(saved("rf_detr"), tmp_path / "model", size={"height": 96, "width": 96})))
    with pytest.raises(InputError, match="patches of 16 x 16 pixels, which do not cover images of 120 x 128"):
        check_patches(small_detector("lw_detr").config, {"height": 120, "width": 128})
    check_patches(small_detector("lw_detr").config, {"height": 128, "width": 128})


def test_a_processor_that_does_not_resize_is_refused(saved, tmp_path):
    folder = edited_processor(saved("rt_detr"), tmp_path / "model", do_resize=False)
    with pytest.raises(InputError, match="do_resize must be true"):
        load_detector(str(folder))


def test_labels_are_fractions_also_without_normalization(saved, tmp_path):
    _, processor = load_detector(str(edited_processor(saved("rt_detr"), tmp_path / "model", do_normalize=False)))
    for each in (processor, DinoDetrImageProcessor(do_normalize=False)):
        target = {"image_id": 1, "annotations": [{"category_id": 0, "bbox": [8, 8, 16, 16], "area": 256}]}
        batch = each(Image.new("RGB", (32, 32)), target, return_tensors="pt")
        assert batch["labels"][0]["boxes"].tolist() == [[0.5, 0.5, 0.5, 0.5]]


def test_stages_that_can_be_frozen_have_weights():
    stages = freezable_stages(small_detector("rf_detr"))
    assert "decoder" in stages and "encoder" not in stages and all(stages.values())


def test_statistics_of_frozen_batch_norms_do_not_change():
    model = small_detector("rt_detr")
    freeze(model, ["encoder"])
    norms = {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) is nn.BatchNorm2d and "backbone" not in name
    }
    set_training_mode(model)
    assert {name: not name.startswith("model.encoder.") for name in norms} == {
        name: layer.training for name, layer in norms.items()
    }
    assert len({layer.training for layer in norms.values()}) == 2 and model.training


@pytest.mark.parametrize(
    ("model_type", "advice"), [("deformable_detr", "--backbone_weights"), ("rt_detr", "to false")]
)
def test_frozen_batch_norms_from_scratch_are_warned_about(model_type, advice, caplog):
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
    resnet["out_features"] = ["stage2", "stage3", "stage4"]
    fields = {} if model_type == "rt_detr" else {"backbone_config": resnet}
    warn_if_batch_norms_frozen(small_detector(model_type, **fields))
    assert "training from scratch with frozen batch norms" in caplog.text and advice in caplog.text
    caplog.clear()
    warn_if_batch_norms_frozen(small_detector("conditional_detr"))  # a ConvNeXt, which has none
    assert not caplog.text


def test_conventions_name_modules_and_processors_that_exist():
    for model_type in FOREIGN:
        model = small_detector(model_type)
        backbone = convention_of(model.config).backbone
        assert any(name.startswith(f"{backbone}.") for name, _ in model.named_parameters())
        assert type(AutoModelForObjectDetection.from_config(model.config)) is type(model)
