"""Converted detrex and mmdetection models against what these code bases compute from the same weights in float64."""

import importlib
import json

import numpy as np
import pytest
import torch

from hf_dino import DinoDetrForObjectDetection, DinoDetrImageProcessor
from hf_dino.conversion.checkpoint import read_source
from hf_dino.conversion.convert import build_model, config_and_processor, convert_state_dict


TOLERANCE = 1e-5
LEAST_AGREEING = 0.995  # two tokens with nearly equal scores may swap places among the queries
POSITIONAL_ENCODING = {"detrex_dino_r50_4scale": (10000, -0.5), "mmdet_dino_4scale_r50": None}

pytestmark = pytest.mark.slow


@pytest.fixture
def formats(shared, monkeypatch):
    if not (shared / "formats").is_dir():
        pytest.skip("needs the folder ../shared/formats with references of other code")
    monkeypatch.syspath_prepend(shared / "formats")
    return importlib.import_module("synthesize_formats")


def convert(formats, name: str, without_noise: bool = False) -> DinoDetrForObjectDetection:
    source = read_source(formats.checkpoint(name))
    config, _ = config_and_processor(source, POSITIONAL_ENCODING[name])
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


def clipped_detections(outputs, sizes: np.ndarray) -> dict[str, torch.Tensor]:
    """Return the 300 best detections of each image with boxes clipped to the image, as both code bases do."""
    detections = DinoDetrImageProcessor().post_process_object_detection(
        outputs, threshold=0.0, target_sizes=sizes.tolist(), top_k=300
    )
    stacked = {name: torch.stack([each[name] for each in detections]) for name in ("scores", "labels", "boxes")}
    highest = torch.from_numpy(sizes[:, None, [1, 0, 1, 0]]).to(stacked["boxes"].dtype)
    stacked["boxes"] = stacked["boxes"].clamp(min=torch.zeros_like(highest), max=highest)
    return stacked


@pytest.mark.parametrize("name", POSITIONAL_ENCODING)
def test_outputs(formats, shared, name):
    recorded = dict(np.load(shared / "formats" / name / "reference.npz"))
    model = convert(formats, name)
    no_objects = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    with torch.no_grad():  # labels, although none, ask for the auxiliary outputs
        outputs = model(*inputs(formats, recorded), labels=[no_objects] * 2)
    for key, ours in {
        "pred_logits": outputs.logits,
        "pred_boxes": outputs.pred_boxes,
        "aux_logits0": outputs.auxiliary_outputs[0]["logits"],
        "aux_boxes0": outputs.auxiliary_outputs[0]["pred_boxes"],
        "enc_logits": outputs.enc_outputs_class,
        "enc_boxes": outputs.enc_outputs_coord_logits.sigmoid(),
    }.items():
        assert agreement(ours, recorded[key]) >= LEAST_AGREEING, key
    found = clipped_detections(outputs, recorded["original_sizes"])
    assert agreement(found["scores"][..., None], recorded["scores"][..., None]) >= LEAST_AGREEING
    assert agreement(found["labels"][..., None], recorded["labels"][..., None]) >= LEAST_AGREEING
    in_pixels = TOLERANCE * float(recorded["original_sizes"].max())
    assert agreement(found["boxes"], recorded["boxes"], in_pixels) >= LEAST_AGREEING


@pytest.mark.parametrize("name", POSITIONAL_ENCODING)
def test_loss(formats, shared, name):
    recorded = json.loads((shared / "formats" / name / "reference.loss.json").read_text())
    arrays = dict(np.load(shared / "formats" / name / "reference.npz"))
    labels = [
        {"class_labels": torch.from_numpy(each["labels"]), "boxes": torch.from_numpy(each["boxes"]).double()}
        for each in formats.targets(recorded["target_seed"], recorded["counts"], 80)
    ]
    model = convert(formats, name, without_noise=True).train()
    with torch.no_grad():
        outputs = model(*inputs(formats, arrays), labels=labels)
    assert outputs.loss.item() == pytest.approx(recorded["total"], rel=1e-5)
    if name.startswith("detrex"):
        ours = {key: term.item() for key, term in outputs.loss_dict.items()}
        theirs = {
            key.replace("class", "ce").replace("_enc", "_encoder").replace("_dn", "_denoising"): term
            for key, term in recorded["losses"].items()
        }
        assert len(theirs) == 39
        assert ours == pytest.approx(theirs, rel=1e-5)
