"""The model against numbers recorded from the official implementation (IDEA-Research/DINO, commit faa8520) in float64.

Weights, images and objects are made by `official_weights`. `fixtures/official_<case>.npz` holds the outputs for all
queries, of the logits every seventh class; `official_<case>.loss.json.gz` the loss terms and the gradient norm of each
parameter that the official implementation trains, in training mode with noise scales of 0.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import official_weights
from helpers.models import CPU_CAPABILITIES
from helpers.paths import FIXTURES
from hf_dino import DinoDetrForObjectDetection, DinoDetrImageProcessor
from hf_dino.conversion.convert import config_from_args, convert_state_dict


# The official implementation computes position embeddings in float32 even here, which limits the agreement.
TOLERANCE = 1e-5
# Two tokens with nearly equal scores may swap places among the queries.
LEAST_AGREEING = 0.995
OBJECT_COUNTS = {"r50_4scale": [3, 7], "r50_4scale_empty": [0, 4]}


def convert(manifest, num_classes=None) -> DinoDetrForObjectDetection:
    settings = manifest["args"] | {"dn_box_noise_scale": 0, "dn_label_noise_ratio": 0}
    if num_classes is not None:
        settings["num_classes"] = settings["dn_labelbook_size"] = num_classes
    config = config_from_args(settings)
    config._attn_implementation = "eager"
    model = DinoDetrForObjectDetection(config)
    model.load_state_dict(convert_state_dict(official_weights.state_dict(manifest, num_classes), config))
    return model.double().eval()


def read_case(path: Path) -> tuple[dict[str, np.ndarray], torch.Tensor, torch.Tensor]:
    """Return the recorded arrays, pixel values and the mask."""
    recorded = dict(np.load(path))
    return recorded, *official_weights.images(int(recorded["seed"]), recorded["sizes"].tolist())


def agreement(ours: torch.Tensor, theirs: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """Return the fraction of queries whose values all agree."""
    close = (ours - torch.from_numpy(theirs)).abs() <= tolerance
    return close.flatten(2).all(dim=-1).double().mean().item()


def check_outputs(model, recorded, pixel_values, pixel_mask):
    no_objects = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    with torch.no_grad():  # labels, although none, ask for the auxiliary outputs
        outputs = model(pixel_values, pixel_mask, labels=[no_objects] * len(pixel_values))
    classes = slice(None, None, 1 if recorded["pred_logits"].shape[-1] == model.config.num_labels else 7)
    for name, ours in {
        "pred_logits": outputs.logits[..., classes],
        "pred_boxes": outputs.pred_boxes,
        "aux_boxes0": outputs.auxiliary_outputs[0]["pred_boxes"],
        "enc_logits": outputs.enc_outputs_class[..., classes],
        "enc_boxes": outputs.enc_outputs_coord_logits.sigmoid(),
    }.items():
        assert agreement(ours, recorded[name]) >= LEAST_AGREEING, name

    detections = DinoDetrImageProcessor().post_process_object_detection(
        outputs, threshold=0.0, target_sizes=recorded["sizes"].tolist(), top_k=300
    )
    stacked = {name: torch.stack([each[name] for each in detections]) for name in ("scores", "labels", "boxes")}
    assert agreement(stacked["scores"][..., None], recorded["scores"][..., None]) >= LEAST_AGREEING
    assert agreement(stacked["labels"][..., None], recorded["labels"][..., None].astype(np.int64)) >= LEAST_AGREEING
    in_pixels = TOLERANCE * recorded["sizes"].max()
    assert agreement(stacked["boxes"], recorded["boxes"], in_pixels) >= LEAST_AGREEING


@pytest.fixture(scope="module")
def manifest():
    return official_weights.read_json(FIXTURES / "official_r50_4scale.json.gz")


@pytest.fixture(scope="module")
def model(manifest):
    return convert(manifest)


@pytest.mark.parametrize("case", OBJECT_COUNTS)
def test_outputs(backend, model, case):
    check_outputs(model.eval(), *read_case(FIXTURES / f"official_{case}.npz"))


# test_kernels.py compares the gradients of all forms; an image without objects matters to the loss alone
OFTEN = (("reference", "r50_4scale"), ("avx512", "r50_4scale"), ("reference", "r50_4scale_empty"))
LOSSES = [
    pytest.param(name, case, marks=[] if (name, case) in OFTEN else pytest.mark.slow)
    for name in ("reference", *CPU_CAPABILITIES)
    for case in OBJECT_COUNTS
]


@pytest.mark.parametrize(("backend", "case"), LOSSES, indirect=["backend"])
def test_loss_and_gradients(backend, model, manifest, case):
    arrays, pixel_values, pixel_mask = read_case(FIXTURES / f"official_{case}.npz")
    recorded = official_weights.read_json(FIXTURES / f"official_{case}.loss.json.gz")
    labels = official_weights.objects(int(arrays["seed"]) + 1, OBJECT_COUNTS[case], model.config.num_labels)
    model.train().zero_grad()
    outputs = model(pixel_values, pixel_mask, labels)
    outputs.loss.backward()

    assert outputs.loss.item() == pytest.approx(recorded["total"], rel=1e-5)
    theirs = {
        name.replace("_interm", "_encoder").replace("_dn", "_denoising"): term
        for name, term in recorded["losses"].items()
    }
    ours = {name: term.item() for name, term in outputs.loss_dict.items()}
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-12)

    squares = dict.fromkeys(recorded["grad_norms"], 0.0)  # one of theirs can be several of ours, such as q, k and v
    source_of = sources(manifest, model.config)
    for name, parameter in model.named_parameters():
        if source_of[name] in squares:  # the official implementation does not train the stem and the first stage
            squares[source_of[name]] += parameter.grad.square().sum().item()
    assert len(squares) == 315
    norms = {key: square**0.5 for key, square in squares.items()}
    assert norms == pytest.approx(recorded["grad_norms"], rel=1e-3)


def sources(manifest, config) -> dict[str, str]:
    """Return the official parameter that each of ours comes from: number the official ones and convert the numbers."""
    numbers = {official_weights.first_copy(key): float(i) for i, key in enumerate(manifest["state_dict"])}
    numbered = {
        key: torch.tensor(numbers[official_weights.first_copy(key)]).expand(shape)
        for key, (shape, _) in manifest["state_dict"].items()
    }
    key_of = {number: trained_name(key) for key, number in numbers.items()}
    ours = convert_state_dict(numbered, config)
    return {name: key_of[tensor.flatten()[0].item()] for name, tensor in ours.items() if "num_batches" not in name}


def trained_name(key: str) -> str:
    """Return the name of a shared parameter in `named_parameters`: its first, which is the decoder's for the heads."""
    return f"transformer.decoder.{key}" if key.startswith(("class_embed", "bbox_embed")) else key


def test_other_class_count(manifest):
    """A checkpoint of a model that was fine-tuned for other objects converts and runs."""
    model = convert(manifest, num_classes=7).float()
    with torch.no_grad():
        outputs = model(torch.zeros(1, 3, 256, 256))
    assert outputs.logits.shape == (1, 900, 7)
    assert outputs.logits.isfinite().all()


def test_swin_outputs(shared):
    model = convert(official_weights.read_json(FIXTURES / "official_swinl_4scale.json.gz"))
    check_outputs(model, *read_case(shared / "official" / "reference" / "swinl_4scale.npz"))
