"""Forty optimizer steps of the official implementation (IDEA-Research/DINO, commit faa8520), in float64, replayed.

The recorded run starts from given weights and sees real images without noise; its denoising queries have no loss,
since the gradient of their L1 distance, which is 0, is ambiguous.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hf_dino import DinoDetrConfig, DinoDetrForObjectDetection


WIDTH, HEIGHT = 256, 192
BATCH_SIZE = 8
# Names when the weights were recorded, and today
RENAMED = {
    "class_loss_coefficient": "cls_loss_coefficient",
    "freeze_batch_norm": "freeze_backbone_batch_norms",
    "position_embedding_offset": "positional_encoding_offset",
    "position_embedding_temperature": "positional_encoding_temperature",
}


@pytest.fixture
def recording(shared):
    folder = shared / "official" / "training"
    if not folder.is_dir() or not (shared / "data" / "bccd").is_dir():
        pytest.skip("needs ../shared/official/training and ../shared/data/bccd")
    return folder


def recorded_model(folder) -> DinoDetrForObjectDetection:
    fields = json.loads((folder / "config.json").read_text())
    config = DinoDetrConfig(**{RENAMED.get(name, name): value for name, value in fields.items()})
    config._attn_implementation = "eager"
    model = DinoDetrForObjectDetection(config)
    weights = load_file(folder / "weights.safetensors")
    model.load_state_dict({key.replace(".projections.", ".input_proj."): each for key, each in weights.items()})
    return model.double().train()


def read_dataset(folder) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """Return path and labels of all images, train then val; boxes and pixels are rounded to float32, as recorded."""
    examples = []
    for split in ("train", "val"):
        coco = json.loads((folder / f"{split}.json").read_text())
        for image in coco["images"]:
            objects = [each for each in coco["annotations"] if each["image_id"] == image["id"]]
            boxes = torch.tensor([each["bbox"] for each in objects], dtype=torch.float64).reshape(-1, 4)
            classes = torch.tensor([each["category_id"] for each in objects], dtype=torch.int64)
            kept = (boxes[:, 2:] > 0).all(dim=1)
            centered = torch.cat([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], dim=1)
            size = torch.tensor([image["width"], image["height"]] * 2)
            labels = {"class_labels": classes[kept], "boxes": (centered / size)[kept].float().double()}
            examples.append((folder / "images" / image["file_name"], labels))
    return examples


def read_image(path) -> torch.Tensor:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    return ((torch.from_numpy(pixels.copy()).float() / 255 - mean) / std).permute(2, 0, 1).double()


def matching_loss(outputs, config) -> torch.Tensor:
    weights = {
        "loss_ce": config.cls_loss_coefficient,
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
    }
    terms = {name: term for name, term in outputs.loss_dict.items() if "denoising" not in name}
    return sum(weights["_".join(name.split("_")[:2])] * term for name, term in terms.items())


def replay(folder, data, steps: int) -> list[tuple[float, float]]:
    """Train as recorded; return the loss of each step, and the norm of its gradient before clipping."""
    model, examples = recorded_model(folder), read_dataset(data)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=6e-4, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-4, total_steps=1800, pct_start=0.2)
    replayed = []
    for step in range(steps):
        batch = [examples[(BATCH_SIZE * step + index) % len(examples)] for index in range(BATCH_SIZE)]
        outputs = model(torch.stack([read_image(path) for path, _ in batch]), labels=[labels for _, labels in batch])
        loss = matching_loss(outputs, model.config)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        replayed.append((loss.item(), norm.item()))
    return replayed


@pytest.mark.parametrize("steps", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_training_is_the_official_one_step_by_step(recording, shared, steps):
    recorded = json.loads((recording / "losses.json").read_text())[:steps]
    replayed = replay(recording, shared / "data" / "bccd", steps)
    losses, norms = zip(*replayed)
    first = slice(0, 10)
    totals = [step["total"] for step in recorded]
    assert list(losses[first]) == pytest.approx(totals[first], rel=1e-9)
    assert list(losses) == pytest.approx(totals, rel=1e-6)
    assert list(norms) == pytest.approx([step["grad_norm"] for step in recorded], rel=1e-6)
