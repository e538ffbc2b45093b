"""A saved folder, read back: by the Auto classes, the pipeline, a process without the package, in parts, offloaded."""

import json
import logging
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForObjectDetection, pipeline

import hf_dino
from helpers.models import TINY_RESNET, TINY_SWIN, tiny_config, tiny_model
from hf_dino import (
    DinoDetrConfig,
    DinoDetrForObjectDetection,
    DinoDetrImageProcessor,
    DinoDetrImageProcessorPil,
    DinoDetrModel,
    kernels,
)


CORE = {path.name: path.read_bytes() for path in Path(hf_dino.__file__).parent.glob("*_dino_detr.py")}
BACKBONES = {"resnet": TINY_RESNET, "swin": TINY_SWIN}
SIZE = {"shortest_edge": 96, "longest_edge": 160}


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save what a user finds on the Hub: model, code and processor."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder)
    DinoDetrImageProcessor(size=SIZE).save_pretrained(folder)
    return folder


@torch.no_grad()
def predict(model, pixel_values=None):
    """Predict logits and boxes, or hidden states and boxes of a model without heads, for the same image each time."""
    if pixel_values is None:
        pixel_values = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    outputs = model.eval()(pixel_values=pixel_values)
    names = ("logits", "pred_boxes") if "logits" in outputs else ("last_hidden_state", "intermediate_boxes")
    return {name: outputs[name] for name in names}


def assert_same(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **(tolerance or {"rtol": 0, "atol": 0}))


def settings(config):
    """Return a config without the dtype, which loading sets for the backbone too."""
    return json.loads(
        config.to_json_string(),
        object_hook=lambda fields: {name: value for name, value in fields.items() if name != "dtype"},
    )


# Auto classes and pipeline


@pytest.mark.parametrize(
    ("auto_class", "expected_class"),
    [
        (AutoConfig, DinoDetrConfig),
        (AutoModel, DinoDetrModel),
        (AutoModelForObjectDetection, DinoDetrForObjectDetection),
        (AutoImageProcessor, DinoDetrImageProcessor),
    ],
)
@pytest.mark.parametrize("trust_remote_code", [None, True], ids=["", "trust_remote_code"])
def test_auto_classes_know_a_dino(folder, auto_class, expected_class, trust_remote_code):
    """With the package imported its own classes are used, also for a folder that carries code."""
    assert type(auto_class.from_pretrained(folder, trust_remote_code=trust_remote_code)) is expected_class


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_reloaded_model_gives_the_same_outputs(backbone, tmp_path):
    model = tiny_model(backbone_config=BACKBONES[backbone])
    model.save_pretrained(tmp_path)
    reloaded, report = AutoModelForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert settings(reloaded.config) == settings(model.config)
    assert_same(predict(reloaded), predict(model))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_file_has_the_names_of_the_model(backbone, tmp_path):
    """A plain `load_state_dict` reads it, as `Trainer` does when it resumes."""
    model = tiny_model(backbone_config=BACKBONES[backbone])
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    other = tiny_model(seed=1, backbone_config=BACKBONES[backbone])
    other.load_state_dict(weights)
    assert_same(predict(other), predict(model))


def test_pipeline(folder, image, caplog):
    with caplog.at_level(logging.ERROR):
        detector = pipeline("object-detection", model=str(folder), device="cpu")
        detections = detector(image, threshold=0.0)
        pair = detector([image, image], threshold=0.0)
    assert not caplog.records
    assert pair == [detections, detections]
    scores = [detection["score"] for detection in detections]
    assert len(detections) == 12 * 5
    assert scores == sorted(scores, reverse=True)
    assert {detection["label"] for detection in detections} <= set(tiny_config().id2label.values())
    assert all(detection["box"].keys() == {"xmin", "ymin", "xmax", "ymax"} for detection in detections)

    middle = (scores[3] + scores[4]) / 2
    assert detector(image, threshold=middle) == detections[:4]


def test_pipeline_batches_images_of_different_sizes_on_a_canvas(folder):
    shapes = [(90, 120), (120, 90), (100, 100)]
    images = [Image.fromarray(np.random.default_rng(0).integers(0, 256, (*s, 3), dtype=np.uint8)) for s in shapes]
    processor = AutoImageProcessor.from_pretrained(folder, pad_size={"height": 160, "width": 160})
    options = {"model": str(folder), "image_processor": processor, "device": "cpu"}
    together = pipeline("object-detection", **options, batch_size=2)(images, threshold=0.0)
    alone = [pipeline("object-detection", **options)(image, threshold=0.0) for image in images]
    for batched, single in zip(together, alone, strict=True):
        assert len(batched) == 12 * 5
        assert [each["score"] for each in batched] == pytest.approx([each["score"] for each in single], abs=1e-5)
        assert [each["label"] for each in batched] == [each["label"] for each in single]


def test_pipeline_of_damaged_weights_is_an_error(image):
    model = tiny_model()
    torch.nn.init.constant_(model.class_embed[0].bias, math.nan)
    detector = pipeline(
        "object-detection", model=model, image_processor=DinoDetrImageProcessor(size=SIZE), device="cpu"
    )
    with pytest.raises(FloatingPointError, match="scores or boxes are NaN or infinite"):
        detector(image, threshold=0.9)


def test_pipeline_gives_boxes_in_pixels_of_the_image(folder, image):
    model, processor = DinoDetrForObjectDetection.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        outputs = model(**processor(images=image, return_tensors="pt"))
    by_hand = processor.post_process_object_detection(outputs, 0.0, [(image.height, image.width)])[0]
    detections = pipeline("object-detection", model=str(folder), device="cpu")(image, threshold=0.0)
    assert [list(each["box"].values()) for each in detections] == by_hand["boxes"].int().tolist()
    assert [each["label"] for each in detections] == [
        model.config.id2label[label] for label in by_hand["labels"].tolist()
    ]


# The code in the folder


def test_the_folder_carries_the_flat_core(folder):
    saved = {path.name: path.read_bytes() for path in folder.glob("*.py")}
    assert saved == CORE
    assert {path.name for path in folder.iterdir()} - saved.keys() == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert set(json.loads((folder / "config.json").read_text())["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForObjectDetection",
    }


@pytest.mark.parametrize("processor_class", [DinoDetrImageProcessor, DinoDetrImageProcessorPil])
def test_a_processor_alone_carries_its_code(processor_class, tmp_path):
    processor_class().save_pretrained(tmp_path)
    saved = {path.name for path in tmp_path.glob("*.py")}
    backends = json.loads((tmp_path / "preprocessor_config.json").read_text())["auto_map"]["AutoImageProcessor"]
    assert set(backends) == {"torchvision", "pil"}
    assert {f"{reference.split('.')[0]}.py" for reference in backends.values()} <= saved <= set(CORE)


WITHOUT_THE_PACKAGE = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    import numpy as np
    sys.modules["hf_dino"] = None  # importing it is an error, installed or not

    import torch
    from PIL import Image
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForObjectDetection

    torch.set_num_threads(1)
    folder, image, answer, again = sys.argv[1:]
    trust = {"trust_remote_code": True}
    results = {"config": AutoConfig.from_pretrained(folder, **trust).to_dict()}
    for backend in ("torchvision", "pil"):
        processor = AutoImageProcessor.from_pretrained(folder, backend=backend, **trust)
        assert type(processor).__module__.startswith("transformers_modules."), type(processor)
        results[backend] = processor(images=Image.open(image), return_tensors="pt")["pixel_values"]
    for auto_class in (AutoModelForObjectDetection, AutoModel):
        model = auto_class.from_pretrained(folder, **trust).eval()
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        with torch.no_grad():
            outputs = model(pixel_values=results["pil"])
        names = {"logits", "pred_boxes", "last_hidden_state", "intermediate_boxes"} & set(outputs)
        results[auto_class.__name__] = {name: outputs[name] for name in names}
    fresh = AutoModelForObjectDetection.from_config(AutoConfig.from_pretrained(folder, **trust), **trust)
    results["class_bias"] = fresh.class_embed[0].bias.detach()
    torch.save(results, answer)

    AutoModelForObjectDetection.from_pretrained(folder, **trust).save_pretrained(again)
    processor.save_pretrained(again)
    """
)


@pytest.fixture(scope="module")
def without_the_package(folder, image, tmp_path_factory):
    """Read the folder in a process that cannot import hf_dino; return the results and the folder that it saved."""
    work = tmp_path_factory.mktemp("elsewhere")
    image.save(work / "image.png")
    (work / "read.py").write_text(WITHOUT_THE_PACKAGE)
    arguments = [folder, work / "image.png", work / "answer.pt", work / "again"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work), "HF_MODULES_CACHE": str(work / "modules")}
    command = [sys.executable, "-I", str(work / "read.py"), *map(str, arguments)]
    finished = subprocess.run(command, cwd=work, env=os.environ | offline, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return torch.load(work / "answer.pt"), work / "again"


def test_without_the_package_the_folder_gives_the_same_numbers(folder, image, without_the_package, monkeypatch):
    monkeypatch.setitem(kernels._found, "cpu", None)  # a folder contains the reference implementation, not the kernel
    results, _ = without_the_package
    for backend, processor_class in {"torchvision": DinoDetrImageProcessor, "pil": DinoDetrImageProcessorPil}.items():
        assert_same(results[backend], processor_class(size=SIZE)(images=image, return_tensors="pt")["pixel_values"])
    for auto_class in (AutoModelForObjectDetection, AutoModel):
        expected = predict(auto_class.from_pretrained(folder), results["pil"])
        assert_same({name: results[auto_class.__name__][name] for name in expected}, expected)
    assert results["config"]["id2label"] == tiny_config().id2label
    assert_same(results["class_bias"], torch.full((5,), -math.log(99)))


def test_without_the_package_a_folder_is_saved_complete(folder, without_the_package):
    _, again = without_the_package
    assert {path.name for path in again.iterdir()} == {path.name for path in folder.iterdir()}
    assert {path.name: path.read_bytes() for path in again.glob("*.py")} == CORE
    assert_same(load_file(again / "model.safetensors"), load_file(folder / "model.safetensors"))
    for name in ("config.json", "preprocessor_config.json"):
        auto_maps = [json.loads((at / name).read_text())["auto_map"] for at in (folder, again)]
        assert auto_maps[0] == auto_maps[1]


# Parts of a model, and other sizes


def test_another_class_count_replaces_the_heads_and_keeps_the_rest(folder):
    names = {label: f"other {label}" for label in range(7)}
    torch.manual_seed(0)
    model, report = DinoDetrForObjectDetection.from_pretrained(
        folder, id2label=names, ignore_mismatched_sizes=True, output_loading_info=True
    )
    heads = ["class_embed.0", "model.query_selection.class_embed"]
    new = {f"{head}.{part}" for head in heads for part in ("weight", "bias")} | {"model.denoising.label_embed.weight"}
    assert {mismatch[0] for mismatch in report["mismatched_keys"]} == new
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.num_labels == 7
    assert model.config.label2id["other 6"] == 6

    for head in map(model.get_submodule, heads):
        assert_same(head.bias.detach(), torch.full((7,), -math.log(99)))
        assert 0 < head.weight.abs().max() <= 1 / math.sqrt(32)
    label_embed = model.model.denoising.label_embed.weight
    assert label_embed.shape == (7, 32)
    assert 0.8 < label_embed.std() < 1.2
    saved = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in model.state_dict().items() if name not in new}
    assert_same(kept, {name: saved[name] for name in kept})


def test_a_model_without_heads_and_one_with_load_each_other(folder, tmp_path):
    detector = tiny_model()
    detector.model.save_pretrained(tmp_path)
    reloaded, report = DinoDetrForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {"class_embed.0.weight", "class_embed.0.bias"}
    assert not report["unexpected_keys"]
    assert_same(reloaded.class_embed[0].bias.detach(), torch.full((5,), -math.log(99)))
    for base in (reloaded.model, DinoDetrModel.from_pretrained(folder), DinoDetrModel.from_pretrained(tmp_path)):
        assert_same(predict(base), predict(detector.model))


# Precision and place


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_half_precision_detects_nearly_the_same(dtype, backbone, tmp_path):
    # static queries, because half precision can change which tokens are selected
    reference = tiny_model(query_selection="static", backbone_config=BACKBONES[backbone])
    reference.save_pretrained(tmp_path)
    model = DinoDetrForObjectDetection.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    actual, expected = predict(model), predict(reference)
    assert actual["logits"].dtype == dtype
    assert actual["pred_boxes"].dtype == torch.float32
    tolerance = 20 * torch.finfo(dtype).eps
    assert_same(actual["logits"].float(), expected["logits"], rtol=tolerance, atol=tolerance * 3)
    assert_same(actual["pred_boxes"], expected["pred_boxes"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_a_device_map_leaves_nothing_on_meta(device_map, backbone, tmp_path):
    model = tiny_model(backbone_config=BACKBONES[backbone])
    model.save_pretrained(tmp_path)
    loaded = DinoDetrForObjectDetection.from_pretrained(tmp_path, device_map=device_map)
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    loaded = loaded.to("cpu")
    assert_same(predict(loaded), predict(model))


DN_DEFORMABLE = {
    "query_selection": "static",
    "denoising": "plain",
    "box_refinement": "look_forward_once",
    "positional_query": "conditional",
    "decoder_norm": False,
}
STRATEGIES = [*({"query_selection": name} for name in ("mixed", "pure", "static")), DN_DEFORMABLE]


@pytest.mark.parametrize("strategies", STRATEGIES, ids=lambda strategies: " ".join(map(str, strategies.values())))
def test_a_model_can_be_built_on_the_meta_device(strategies):
    with torch.device("meta"):
        model = DinoDetrForObjectDetection(tiny_config(**strategies))
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    filled = tiny_model(**strategies)
    model.load_state_dict(filled.state_dict(), assign=True)
    assert_same(predict(model), predict(filled))


def offload_to_cpu(model, folder):
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def offload_to_disk(model, folder):
    accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("offload", [offload_to_cpu, offload_to_disk])
@pytest.mark.parametrize("strategies", STRATEGIES, ids=lambda strategies: " ".join(map(str, strategies.values())))
def test_weights_can_be_offloaded(offload, strategies, tmp_path):
    model = tiny_model(**strategies)
    expected = predict(model)
    offload(model, tmp_path)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_same(predict(model), expected)
