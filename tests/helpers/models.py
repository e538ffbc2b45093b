"""A detector small enough to build in every test, and labels to go with it."""

import torch

from hf_dino import DinoDetrConfig, DinoDetrForObjectDetection


CPU_CAPABILITIES = ("avx512", "avx2", "default")

TINY_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage3", "stage4"],
}

TINY_SWIN = {
    "model_type": "swin",
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 4,
    "out_features": ["stage3", "stage4"],
}


def tiny_config(**overrides) -> DinoDetrConfig:
    """Two encoder and three decoder layers, 12 queries, 5 classes; three levels, one of them the neck's own."""
    fields = {
        "backbone_config": dict(TINY_RESNET),
        "num_feature_levels": 3,
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "encoder_n_points": 2,
        "decoder_layers": 3,
        "decoder_ffn_dim": 48,
        "decoder_attention_heads": 4,
        "decoder_n_points": 2,
        "num_queries": 12,
        "num_denoising": 6,
        "id2label": {label: f"class {label}" for label in range(5)},
    }
    return DinoDetrConfig(**fields | overrides)


def tiny_model(seed: int = 0, **overrides) -> DinoDetrForObjectDetection:
    """A fresh model in evaluation mode whose heads already say something, unlike those of a truly fresh one."""
    torch.manual_seed(seed)
    model = DinoDetrForObjectDetection(tiny_config(**overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def make_labels(*counts: int, num_labels: int = 5, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Labels of images with so many objects each, all well inside."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "class_labels": torch.randint(num_labels, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.3 + torch.tensor([0.35, 0.35, 0.1, 0.1]),
        }
        for count in counts
    ]
