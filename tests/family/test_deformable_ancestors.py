"""Deformable DETR of transformers against the code of its authors, and the part of their loss that it lacks.

The references are fundamentalvision/Deformable-DETR 11169a6 in float64, with weights that are a fixed function of
their names; see ../shared/formats/README.md.
"""

import copy
import functools
import importlib
import json
import os
import re
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig
from transformers.loss import loss_for_object_detection

from helpers.models import TINY_RESNET, make_labels
from hf_dino.family.losses import deformable_detr_missing_loss, encoder_loss_terms


VARIANTS = {
    "deformable_detr": {},
    "deformable_detr_refine": {"with_box_refine": True},
    "deformable_detr_two_stage": {"with_box_refine": True, "two_stage": True},
}
AUTHORS = {"auxiliary_loss": True, "class_cost": 2}
WEIGHTS = {"loss_ce": 2, "loss_bbox": 5, "loss_giou": 2}
# Name in the authors' state dict -> name in that of transformers, one after the other
RENAMED = {
    r"^backbone\.0\.body\.": "model.backbone.model.",
    r"^transformer\.|^(?=input_proj)": "model.",
    r"^query_embed\.": "model.query_position_embeddings.",
    r"(encoder\.layers\.\d+)\.norm1\.": r"\1.self_attn_layer_norm.",
    r"(encoder\.layers\.\d+)\.norm2\.": r"\1.final_layer_norm.",
    r"(decoder\.layers\.\d+)\.cross_attn\.": r"\1.encoder_attn.",
    r"(decoder\.layers\.\d+)\.norm1\.": r"\1.encoder_attn_layer_norm.",
    r"(decoder\.layers\.\d+)\.norm2\.": r"\1.self_attn_layer_norm.",
    r"(decoder\.layers\.\d+)\.norm3\.": r"\1.final_layer_norm.",
    r"\.linear(\d)\.": r".mlp.fc\1.",
    r"self_attn\.out_proj": "self_attn.o_proj",
}


def new_names(name: str) -> list[str]:
    """Return the names in transformers of a tensor: three if it has the weights of queries, keys and values."""
    for pattern, replacement in RENAMED.items():
        name = re.sub(pattern, replacement, name)
    return [name.replace("in_proj_", f"{part}_proj.") for part in "qkv"] if "in_proj_" in name else [name]


@functools.cache
def formats():
    return importlib.import_module("synthesize_formats")


def reference_model(name: str) -> DeformableDetrForObjectDetection:
    model = DeformableDetrForObjectDetection(DeformableDetrConfig(num_labels=91, **AUTHORS, **VARIANTS[name]))
    if model.config.with_box_refine:  # one class head per layer, which transformers ties without two_stage
        model.class_embed, model.bbox_embed = (
            nn.ModuleList(copy.deepcopy(head) for head in heads) for heads in (model.class_embed, model.bbox_embed)
        )
        model.model.decoder.bbox_embed = model.bbox_embed
        if model.config.two_stage:
            model.model.decoder.class_embed = model.class_embed
    weights = {}
    for key, tensor in formats().state_dict(name).items():
        names = new_names(key)
        weights |= zip(names, tensor.chunk(len(names)) if tensor.ndim else [tensor])
    model.load_state_dict(weights)
    return model.double().eval()


def read_case(folder, name: str, file: str = "reference.npz"):
    """Return the recorded arrays, pixel values and the mask."""
    recorded = dict(np.load(folder / name / file))
    sizes = recorded["sizes"].tolist()
    pixel_values = torch.zeros(2, 3, *np.max(sizes, axis=0), dtype=torch.float64)
    pixel_mask = torch.zeros_like(pixel_values[:, 0], dtype=torch.int64)
    for index, image in enumerate(formats().images(int(recorded["seed"]), sizes)):
        height, width = image.shape[1:]
        pixel_values[index, :, :height, :width] = torch.from_numpy(image)
        pixel_mask[index, :height, :width] = 1
    return recorded, pixel_values, pixel_mask


def read_loss(folder, name: str):
    """Return the recorded losses, and the labels."""
    recorded = json.loads((folder / name / "reference.loss.json").read_text())
    targets = formats().targets(recorded["target_seed"], recorded["counts"], 91)
    return recorded, [
        {"class_labels": torch.from_numpy(each["labels"]), "boxes": torch.from_numpy(each["boxes"]).double()}
        for each in targets
    ]


def check_outputs(outputs, recorded):
    ours = {
        "pred_logits": outputs.logits,
        "pred_boxes": outputs.pred_boxes,
        "aux_logits0": outputs.auxiliary_outputs[0]["logits"],
        "aux_boxes0": outputs.auxiliary_outputs[0]["pred_boxes"],
        "init_reference": outputs.init_reference_points,
    }
    if outputs.enc_outputs_class is not None:
        ours |= {"enc_logits": outputs.enc_outputs_class, "enc_boxes": outputs.enc_outputs_coord_logits.sigmoid()}
    for name, values in ours.items():
        assert (values - torch.from_numpy(recorded[name])).abs().max() < 1e-5, name


@pytest.fixture
def folder(shared, monkeypatch):
    if not (shared / "formats").is_dir():
        pytest.skip("needs the folder ../shared/formats with the file formats of other code")
    monkeypatch.syspath_prepend(shared / "formats")
    return shared / "formats"


def check_loss(outputs, recorded, labels, config) -> torch.Tensor:
    missing, terms = deformable_detr_missing_loss(outputs, labels, config)
    expected = {name: value for name, value in recorded["losses"].items() if name.startswith("loss_")}
    found = {name.replace("encoder", "enc"): term.item() for name, term in terms.items()}
    assert found == pytest.approx(expected, rel=1e-6)
    assert (outputs.loss + missing).item() == pytest.approx(recorded["total"], rel=1e-7)
    return outputs.loss + missing


def test_two_stage_model_and_its_loss_are_the_authors(folder):
    name = "deformable_detr_two_stage"
    model = reference_model(name)
    recorded, labels = read_loss(folder, name)
    arrays, *inputs = read_case(folder, name)
    with torch.no_grad():
        outputs = model(*inputs, labels=labels)
        check_outputs(outputs, arrays)
        check_loss(outputs, recorded, labels, model.config)
        # so few tokens that those without a box of their own are queries too
        arrays, *inputs = read_case(folder, name, "reference_small.npz")
        outputs = model(*inputs, labels=labels)
    assert outputs.enc_outputs_coord_logits.isinf().any()
    check_outputs(outputs, arrays)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_the_authors(folder, name):
    model = reference_model(name)
    recorded, labels = read_loss(folder, name)
    arrays, *inputs = read_case(folder, name)
    outputs = model(*inputs, labels=labels)
    check_outputs(outputs, arrays)
    check_loss(outputs, recorded, labels, model.config).backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters(remove_duplicate=False)}
    found = {
        key: torch.stack([gradients[name].norm() for name in new_names(key)]).norm().item()
        for key in recorded["gradient_norms"]
    }
    assert found == pytest.approx(recorded["gradient_norms"], rel=1e-5)


def tiny_detector(**fields) -> DeformableDetrForObjectDetection:
    backbone = ResNetConfig(**TINY_RESNET | {"out_features": ["stage3", "stage4"]})
    sizes = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_layers": 1, "decoder_layers": 2, "d_model": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_feature_levels": 2, "num_labels": 5}
    queries = {"num_queries": 12, "two_stage_num_proposals": 12}
    torch.manual_seed(0)
    return DeformableDetrForObjectDetection(
        DeformableDetrConfig(backbone_config=backbone, **sizes, **heads, **queries, **AUTHORS, **fields)
    )


def slow_encoder_terms(logits, boxes, labels, config):
    """Compute the losses of the cheapest of all matches, with every object of class 0."""
    losses = torch.zeros(3, dtype=torch.float64)
    for image_logits, image_boxes, label in zip(logits, boxes, labels):
        corners, targets = (box_convert(each, "cxcywh", "xyxy") for each in (image_boxes, label["boxes"]))
        overlaps = generalized_box_iou(corners, targets)
        distances = (image_boxes[:, None] - label["boxes"]).abs().sum(dim=-1)
        is_class_0 = image_logits[:, :1]
        focal = [sigmoid_focal_loss(is_class_0, torch.full_like(is_class_0, value)) for value in (1.0, 0.0)]
        # the matcher's cost of a class leaves out a factor that is 1 up to 1e-8
        cost = config.class_cost * (focal[0] - focal[1]) + config.bbox_cost * distances - config.giou_cost * overlaps
        objects = range(len(label["boxes"]))
        rows = min(
            permutations(range(len(cost)), len(objects)), key=lambda rows: cost[list(rows), list(objects)].sum().item()
        )
        is_object = torch.zeros_like(image_logits)
        is_object[list(rows), 0] = 1
        losses[0] += sigmoid_focal_loss(image_logits, is_object).sum()
        losses[1] += sum(distances[row, index] for index, row in enumerate(rows))
        losses[2] += sum(1 - overlaps[row, index] for index, row in enumerate(rows))
    return losses / max(1, sum(len(label["boxes"]) for label in labels))


def double(labels):
    return [{**label, "boxes": label["boxes"].double()} for label in labels]


@pytest.mark.parametrize("counts", [(2, 1), (0, 2), (3, 0), (0, 0)])
def test_encoder_loss_equals_a_slow_one(counts):
    config = DeformableDetrConfig(num_labels=5, backbone_config=ResNetConfig(), **AUTHORS)
    generator = torch.Generator().manual_seed(sum(counts))
    logits = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    box_logits = torch.randn(2, 7, 4, generator=generator, dtype=torch.float64)
    box_logits[:, :3] = torch.inf
    labels = double(make_labels(*counts))
    outputs = SimpleNamespace(enc_outputs_class=logits, enc_outputs_coord_logits=box_logits)
    terms = encoder_loss_terms(outputs, labels, config)
    assert list(terms) == ["loss_ce_encoder", "loss_bbox_encoder", "loss_giou_encoder"]
    expected = slow_encoder_terms(logits, box_logits.sigmoid(), labels, config)
    torch.testing.assert_close(torch.stack(list(terms.values())), expected)


def test_half_precision_is_upcast():
    config = DeformableDetrConfig(num_labels=5, backbone_config=ResNetConfig(), **AUTHORS)
    half = {
        "enc_outputs_class": torch.randn(2, 7, 5).bfloat16(),
        "enc_outputs_coord_logits": torch.randn(2, 7, 4).half(),
    }
    single = {name: tensor.float() for name, tensor in half.items()}
    labels = make_labels(2, 1)
    terms, expected = (encoder_loss_terms(SimpleNamespace(**each), labels, config) for each in (half, single))
    assert terms == expected


@pytest.mark.parametrize("counts", [(2, 3), (0, 0)])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_a_finite_gradient(name, counts, pixel_values):
    model = tiny_detector(**VARIANTS[name]).train()
    labels = make_labels(*counts)
    outputs = model(pixel_values, labels=labels)
    outputs.loss.backward(retain_graph=True)
    untrained = {key for key, each in model.named_parameters() if each.requires_grad and each.grad is None}
    assert any("enc_output." in key for key in untrained) is model.config.two_stage  # else it would count twice
    model.zero_grad()
    missing, _ = deformable_detr_missing_loss(outputs, labels, model.config)
    (outputs.loss + missing).backward()
    for key, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.isfinite().all(), key


def test_class_0_alone_tells_objects_from_the_background():
    model = tiny_detector(**VARIANTS["deformable_detr_two_stage"])
    labels = make_labels(3, 2)
    others = [{**label, "class_labels": (label["class_labels"] + 1) % 5} for label in labels]
    outputs = model(torch.randn(2, 3, 64, 64), labels=labels)
    terms, same = (encoder_loss_terms(outputs, each, model.config) for each in (labels, others))
    assert terms == same


@pytest.mark.parametrize("name", VARIANTS)
def test_total_does_not_depend_on_the_normalizer_of_transformers(name, monkeypatch):
    model = tiny_detector(**VARIANTS[name])
    model.double().eval()
    pixel_values, labels = torch.randn(2, 3, 64, 64, dtype=torch.float64), double(make_labels(3, 2))

    def losses():
        outputs = model(pixel_values, labels=labels)
        missing, terms = deformable_detr_missing_loss(outputs, labels, model.config)
        return outputs.loss.item(), (outputs.loss + missing).item(), {key: term.item() for key, term in terms.items()}

    alone, total, terms = losses()
    with monkeypatch.context() as patch:  # as a process of two with equal numbers of objects
        two_processes = type("PartialState", (), {"_shared_state": {"started": True}, "num_processes": 2})
        patch.setattr(loss_for_object_detection, "PartialState", two_processes)
        patch.setattr(loss_for_object_detection, "reduce", lambda num_boxes: num_boxes)
        assert losses() == (pytest.approx(2 * alone), pytest.approx(total), pytest.approx(terms))
    outputs = model(pixel_values, labels=labels)
    missing, _ = deformable_detr_missing_loss(outputs, labels, model.config, num_boxes=10.0)  # not 5
    assert (outputs.loss + missing).item() == pytest.approx(total / 2)
    assert total == pytest.approx(sum(WEIGHTS["_".join(name.split("_")[:2])] * term for name, term in terms.items()))


def total_and_gradients(network, config, images):
    """Return the loss of some of two images, and its gradients; DDP fails where a parameter had none before."""
    pixel_values = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[images]
    labels = double(make_labels(3, 1))[images]
    for _ in range(2):
        network.zero_grad()
        outputs = network(pixel_values=pixel_values, labels=labels)
        total = outputs.loss + deformable_detr_missing_loss(outputs, labels, config)[0]
        total.backward()
    named = {name.removeprefix("module."): each.grad for name, each in network.named_parameters()}
    return total.detach(), {name: each for name, each in named.items() if each is not None}


def train_in_process(rank, folder):
    torch.set_num_threads(1)
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", **ranks}  # for accelerate
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    PartialState(cpu=True)
    seen = {}
    for name, fields in VARIANTS.items():
        model = tiny_detector(dropout=0.0, **fields).double().train()
        seen[name] = total_and_gradients(DistributedDataParallel(model), model.config, slice(rank, rank + 1))
    torch.save(seen, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    torch.multiprocessing.spawn(train_in_process, (tmp_path,), nprocs=2)
    processes = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, fields in VARIANTS.items():
        model = tiny_detector(dropout=0.0, **fields).double().train()
        total, gradients = total_and_gradients(model, model.config, slice(None))
        totals, of_processes = zip(*(process[name] for process in processes))
        torch.testing.assert_close(sum(totals) / 2, total, rtol=1e-9, atol=0)
        for each in of_processes:
            torch.testing.assert_close(each, gradients, rtol=1e-6, atol=1e-9)
