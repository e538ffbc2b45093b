"""Generate the weights, images and objects from which the official code computed the values in `fixtures`.

Weights are a fixed function of their key, so that results can be compared with the official implementation
(IDEA-Research/DINO, commit faa8520) without a file of weights.
"""

import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch


# Part of the key of a matrix -> scale of its normal distribution.
MATRIX_SCALES = {"relative_position_bias_table": 0.2, "label_enc": 0.5, "tgt_embed": 0.5, "level_embed": 0.5}


def read_json(path: Path) -> dict[str, Any]:
    """Read a gzipped JSON file.

    `official_<variant>.json.gz` contains `args`, and in `state_dict` the shape and dtype of each key.
    """
    return json.loads(gzip.decompress(path.read_bytes()))


def state_dict(manifest: dict[str, Any], num_classes: int | None = None) -> dict[str, torch.Tensor]:
    """Generate a state dict with the keys of an official checkpoint, with another number of classes if it is given."""
    trained_classes = manifest["args"]["num_classes"]
    num_classes = num_classes or trained_classes
    tensors = {}
    for key, (shape, dtype) in manifest["state_dict"].items():
        if dtype != "float32":
            tensors[key] = torch.zeros(shape, dtype=getattr(torch, dtype))  # Swin's index, which the conversion drops
            continue
        if "class_embed" in key:
            shape = [num_classes if length == trained_classes else length for length in shape]
        if "label_enc" in key:
            shape = [num_classes + 1, shape[1]]
        tensors[key] = torch.from_numpy(weight(first_copy(key), tuple(shape)))
    return tensors


def first_copy(key: str) -> str:
    """Return the first key of a tensor: heads are shared by the decoder layers and stored under several keys."""
    return re.sub(r"^(?:transformer\.decoder\.)?(class_embed|bbox_embed)\.\d+", r"\1.0", key)


def weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Sample normal values seeded by the key, scaled and shifted so that all layers affect the result."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
    normal = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)  # as recorded
    name = key.rpartition(".")[-1]
    if name == "running_var":
        return 1 + 0.1 * np.abs(normal)
    if len(shape) > 1:
        scale = next((scale for part, scale in MATRIX_SCALES.items() if part in key), None)
        if scale is not None:
            return scale * normal
        gain = 0.2 if "bbox_embed" in key and "layers.2." in key else 1.0
        return (gain * normal / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    if name == "weight":
        return 1 + 0.1 * normal
    if name == "bias" and "sampling_offsets" in key:
        return 2.0 * normal
    return 0.1 * normal - (3.0 if name == "bias" and "class_embed" in key else 0.0)


def images(seed: int, sizes: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Generate images of waves and noise, padded to a batch.

    Args:
        seed (`int`): Seed of the noise.
        sizes (`list[tuple[int, int]]`): (height, width) of each image.

    Returns:
        Pixels, `(batch_size, 3, height, width)` float64, and mask, `(batch_size, height, width)`, 1 on the image.
    """
    random = np.random.RandomState(seed)  # as recorded
    height, width = (max(side) for side in zip(*sizes))
    pixels = torch.zeros(len(sizes), 3, height, width, dtype=torch.float64)
    mask = torch.zeros(len(sizes), height, width, dtype=torch.int64)
    for index, (rows, columns) in enumerate(sizes):
        y, x = np.meshgrid(np.linspace(0, 1, rows), np.linspace(0, 1, columns), indexing="ij")
        waves = np.stack([np.sin(9 * x + 3 * y), np.cos(7 * y * x), np.sin(5 * x) * np.cos(11 * y)])
        image = (waves + 0.3 * random.standard_normal(waves.shape)).astype(np.float32)
        pixels[index, :, :rows, :columns] = torch.from_numpy(image)
        mask[index, :rows, :columns] = 1
    return pixels, mask


def objects(seed: int, counts: list[int], num_classes: int) -> list[dict[str, torch.Tensor]]:
    """Sample labels for a batch of images, with the given number of objects in each."""
    random = np.random.RandomState(seed)  # as recorded
    labels = []
    for count in counts:
        centers, sides = random.uniform(0.2, 0.8, (count, 2)), random.uniform(0.05, 0.35, (count, 2))
        classes = torch.from_numpy(random.randint(1, num_classes, count))
        boxes = torch.from_numpy(np.concatenate([centers, sides], axis=1).astype(np.float32)).double()
        labels.append({"class_labels": classes.long(), "boxes": boxes})
    return labels
