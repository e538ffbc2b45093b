"""Converted models against what other code bases compute from the same weights in float64."""

import importlib
import json
import re

import numpy as np
import pytest
import torch

from hf_dino import DinoDetrForObjectDetection, DinoDetrImageProcessor
from hf_dino.conversion.checkpoint import read_source
from hf_dino.conversion.convert import build_model, config_and_processor, convert_state_dict


TOLERANCE = 1e-5
LEAST_AGREEING = 0.995  # two tokens with nearly equal scores may swap places among the queries
POSITIONAL_ENCODING = {"detrex_dino_r50_4scale": (10000, -0.5), "mmdet_dino_4scale_r50": None}
ANCESTORS = ("dab_deformable_detr_r50", "dn_deformable_detr_r50")

pytestmark = pytest.mark.slow


@pytest.fixture
def formats(shared, monkeypatch):
    if not (shared / "formats").is_dir():
        pytest.skip("needs the folder ../shared/formats with references of other code")
    monkeypatch.syspath_prepend(shared / "formats")
    return importlib.import_module("synthesize_formats")


def convert(formats, name: str, without_noise: bool = False) -> DinoDetrForObjectDetection:
    source = read_source(formats.checkpoint(name))
    config, _ = config_and_processor(source, POSITIONAL_ENCODING.get(name))
    config._attn_implementation = "eager"
    if without_noise:
        config.box_noise_scale = config.label_noise_ratio = 0.0
    model = build_model(config, convert_state_dict(source.tensors, config, source.format))
    return model.double()


def inputs(formats, recorded) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pixel values and the mask of the padded batch."""
    images = formats.images(int(recorded["seed"]), recorded["sizes"].tolist())
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    pixel_values = torch.zeros(len(images), 3, height, width, dtype=torch.float64)
    pixel_mask = torch.zeros(len(images), height, width, dtype=torch.int64)
    for index, image in enumerate(images):
        pixel_values[index, :, : image.shape[1], : image.shape[2]] = torch.from_numpy(image)
        pixel_mask[index, : image.shape[1], : image.shape[2]] = 1
    return pixel_values, pixel_mask


def agreement(ours: torch.Tensor, theirs: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """Return the fraction of queries whose values all agree."""
    close = (ours - torch.from_numpy(theirs).to(ours.dtype)).abs() <= tolerance
    return close.flatten(2).all(dim=-1).double().mean().item()


def best_detections(outputs, sizes: np.ndarray, top_k: int) -> dict[str, torch.Tensor]:
    detections = DinoDetrImageProcessor().post_process_object_detection(
        outputs, threshold=0.0, target_sizes=sizes.tolist(), top_k=top_k
    )
    return {name: torch.stack([each[name] for each in detections]) for name in ("scores", "labels", "boxes")}


def clipped_detections(outputs, sizes: np.ndarray) -> dict[str, torch.Tensor]:
    """Return the 300 best detections of each image with boxes clipped to the image, as both code bases do."""
    stacked = best_detections(outputs, sizes, 300)
    highest = torch.from_numpy(sizes[:, None, [1, 0, 1, 0]]).to(stacked["boxes"].dtype)
    stacked["boxes"] = stacked["boxes"].clamp(min=torch.zeros_like(highest), max=highest)
    return stacked


def check_detections(found: dict[str, torch.Tensor], recorded) -> None:
    assert agreement(found["scores"][..., None], recorded["scores"][..., None]) >= LEAST_AGREEING
    assert agreement(found["labels"][..., None], recorded["labels"][..., None]) >= LEAST_AGREEING
    in_pixels = TOLERANCE * float(recorded["original_sizes"].max())
    assert agreement(found["boxes"], recorded["boxes"], in_pixels) >= LEAST_AGREEING


def outputs_of_all_layers(model, formats, recorded):
    no_objects = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    with torch.no_grad():  # labels, although none, ask for the auxiliary outputs
        return model(*inputs(formats, recorded), labels=[no_objects] * 2)


@pytest.mark.parametrize("name", POSITIONAL_ENCODING)
def test_outputs(formats, shared, name):
    recorded = dict(np.load(shared / "formats" / name / "reference.npz"))
    outputs = outputs_of_all_layers(convert(formats, name), formats, recorded)
    for key, ours in {
        "pred_logits": outputs.logits,
        "pred_boxes": outputs.pred_boxes,
        "aux_logits0": outputs.auxiliary_outputs[0]["logits"],
        "aux_boxes0": outputs.auxiliary_outputs[0]["pred_boxes"],
        "enc_logits": outputs.enc_outputs_class,
        "enc_boxes": outputs.enc_outputs_coord_logits.sigmoid(),
    }.items():
        assert agreement(ours, recorded[key]) >= LEAST_AGREEING, key
    check_detections(clipped_detections(outputs, recorded["original_sizes"]), recorded)


@pytest.mark.parametrize("name", ANCESTORS)
def test_outputs_of_ancestors(formats, shared, name):
    recorded = dict(np.load(shared / "formats" / name / "reference.npz"))
    model = convert(formats, name)
    outputs = outputs_of_all_layers(model, formats, recorded)
    for key, ours in {
        "pred_logits": outputs.logits,
        "pred_boxes": outputs.pred_boxes,
        "aux_logits0": outputs.auxiliary_outputs[0]["logits"],
        "aux_boxes0": outputs.auxiliary_outputs[0]["pred_boxes"],
        "init_reference": outputs.init_reference_points,
    }.items():
        assert agreement(ours, recorded[key]) >= LEAST_AGREEING, key
    check_detections(best_detections(outputs, recorded["original_sizes"], model.config.num_select), recorded)


def training_outputs(formats, shared, name: str, num_labels: int):
    """Return recorded losses, and model and outputs in training mode without noise, for the recorded objects."""
    recorded = json.loads((shared / "formats" / name / "reference.loss.json").read_text())
    arrays = dict(np.load(shared / "formats" / name / "reference.npz"))
    labels = [
        {"class_labels": torch.from_numpy(each["labels"]), "boxes": torch.from_numpy(each["boxes"]).double()}
        for each in formats.targets(recorded["target_seed"], recorded["counts"], num_labels)
    ]
    model = convert(formats, name, without_noise=True).train()
    return recorded, model, model(*inputs(formats, arrays), labels=labels)


@pytest.mark.parametrize("name", POSITIONAL_ENCODING)
def test_loss(formats, shared, name):
    with torch.no_grad():
        recorded, _, outputs = training_outputs(formats, shared, name, 80)
    assert outputs.loss.item() == pytest.approx(recorded["total"], rel=1e-5)
    if name.startswith("detrex"):
        ours = {key: term.item() for key, term in outputs.loss_dict.items()}
        theirs = {
            key.replace("class", "ce").replace("_enc", "_encoder").replace("_dn", "_denoising"): term
            for key, term in recorded["losses"].items()
        }
        assert len(theirs) == 39
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("name", ANCESTORS)
def test_loss_and_gradients_of_ancestors(formats, shared, name):
    recorded, model, outputs = training_outputs(formats, shared, name, 91)
    weights = recorded["weights"]  # the terms without one are only logged
    theirs = {denoising_name(key): term for key, term in recorded["losses"].items() if key in weights}
    ours = {key: term.item() for key, term in outputs.loss_dict.items()}
    assert len(theirs) == {"dab": 18, "dn_": 36}[name[:3]]
    assert {key: ours[key] for key in theirs} == pytest.approx(theirs, rel=1e-5)
    assert all(ours[key] == 0 for key in ours.keys() - theirs.keys())
    assert outputs.loss.item() == pytest.approx(recorded["total"], rel=1e-5)

    outputs.loss.backward()
    squares = dict.fromkeys(recorded["gradient_norms"], 0.0)  # one of theirs can be several of ours: q, k and v
    source_of = sources(formats, name)
    for key, parameter in model.named_parameters():
        if source_of[key] in squares:  # theirs does not train the stem and the first stage
            squares[source_of[key]] += parameter.grad.square().sum().item()
    norms = {key: square**0.5 for key, square in squares.items()}
    assert norms == pytest.approx(recorded["gradient_norms"], rel=1e-5)


def sources(formats, name: str) -> dict[str, str]:
    """Return their parameter that each of ours comes from: number theirs, and convert the numbers."""
    content = formats.checkpoint(name)
    source = read_source(content)
    first = {key: key.replace("transformer.decoder.bbox_embed", "bbox_embed") for key in source.tensors}
    number = {key: float(index) for index, key in enumerate(dict.fromkeys(first.values()), start=1)}
    numbered = {key: torch.tensor(number[first[key]]).expand(each.shape) for key, each in source.tensors.items()}
    # a shared parameter goes by its first name, which is the decoder's
    key_of = {value: f"transformer.decoder.{key}" if "bbox" in key else key for key, value in number.items()}
    converted = convert_state_dict(numbered, config_and_processor(source)[0], source.format)
    return {key: key_of[each.flatten()[0].item()] for key, each in converted.items() if "num_batches" not in key}


def denoising_name(key: str) -> str:
    """Return our name of a term of DN-DETR: `tgt_loss_ce_0` is `loss_ce_denoising_0`."""
    match = re.fullmatch(r"tgt_(loss_[a-z]+)(_\d+)?", key)
    return f"{match[1]}_denoising{match[2] or ''}" if match else key
