"""Checkpoints of all formats with whole backbones and a narrow transformer, whose tensors are numbered."""

import pickle
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hf_dino import DinoDetrConfig, DinoDetrForObjectDetection
from hf_dino.conversion.export import checkpoint_content
from hf_dino.conversion.settings import FIXED_FIELDS


BACKBONES = {
    "ResNet-50": {"model_type": "resnet", "depths": [3, 4, 6, 3]},
    "ResNet-101": {"model_type": "resnet", "depths": [3, 4, 23, 3]},
    "Swin-T": {"model_type": "swin", "embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
    "ConvNeXt-T": {"model_type": "convnext", "depths": [3, 3, 9, 3], "hidden_sizes": [96, 192, 384, 768]},
}
SIZE = {"shortest_edge": 800, "longest_edge": 1333}


def narrow_config(name: str = "official", backbone: str = "ResNet-50", **overrides: Any) -> DinoDetrConfig:
    """Return a configuration that a format can express."""
    fields = {
        "backbone_config": {**BACKBONES[backbone], "out_indices": [2, 3, 4]},
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_n_points": 1,
        "decoder_n_points": 1,
        "num_queries": 12,
        "id2label": {label: f"class_{label}" for label in range(5)},
    }
    return DinoDetrConfig(**fields | FIXED_FIELDS[name] | overrides)


def numbered_weights(config: DinoDetrConfig) -> dict[str, torch.Tensor]:
    """Return the state dict of a model in which each tensor has another number as all its values.

    Biases of the neck are 0 and the numbers of norms that are not used are 1 and 0, as formats take for granted.
    """
    with torch.device("meta"):
        slots = DinoDetrForObjectDetection(config).state_dict()
    weights = {}
    for number, (key, slot) in enumerate(slots.items(), start=1):
        is_zero = "num_batches" in key or ("input_proj" in key and key.endswith(".0.bias"))
        value = {"swin.layernorm.weight": 1, "swin.layernorm.bias": 0}.get(key.partition("body.")[2], number)
        weights[key] = torch.tensor(0 if is_zero else value, dtype=slot.dtype).expand(slot.shape)
    return weights


def checkpoint(name: str, config: DinoDetrConfig | None = None) -> dict[str, Any]:
    """Return the content of a file with numbered weights."""
    config = config or narrow_config(name)
    return checkpoint_content(numbered_weights(config), config, name, SIZE, {})


@contextmanager
def history_buffers() -> Iterator[type]:
    """Provide a type that looks like one of mmengine while a file is written, and that reports its use."""
    module: Any = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        used = False

        def __setstate__(self, state: Any) -> None:
            HistoryBuffer.used = True

        def __getstate__(self) -> dict[str, Any]:
            import numpy as np

            return {"_log_history": np.zeros(3), "_count_history": np.float64(2)}

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    module.HistoryBuffer = HistoryBuffer
    names = ["mmengine", "mmengine.logging", module.__name__]
    sys.modules.update(dict.fromkeys(names[:2], types.ModuleType("mmengine")) | {names[2]: module})
    try:
        yield HistoryBuffer
    finally:
        for each in names:
            del sys.modules[each]


def save(content: dict[str, Any], path: Path, zipped: bool = True) -> Path:
    """Write a checkpoint; unless `zipped`, in the format from before PyTorch 1.6, as mmdetection publishes them."""
    torch.save(content, path, _use_new_zipfile_serialization=zipped, pickle_module=pickle)
    return path
