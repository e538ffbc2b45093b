"""Time and memory of one forward pass: ours, ours without compiled operators, and transformers' Deformable DETR.

    python benchmarks/forward.py [--height 800] [--width 1066] [--rounds 5]

All are two-stage with box refinement: ResNet-50, 4 levels, 6 + 6 layers, 900 queries, 91 classes, fp32, random
weights. Each model lives in a process of its own, so that its peak memory is its own; they take turns, one pass at a
time, and the medians are compared.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

from hf_dino import DinoDetrConfig, DinoDetrForObjectDetection
from machine import write_result
from turns import take_turns


SHAPE: dict[str, Any] = {"num_queries": 900, "num_labels": 91}
BACKBONE = {"out_features": ["stage2", "stage3", "stage4"]}


def make_ours() -> torch.nn.Module:
    return DinoDetrForObjectDetection(DinoDetrConfig(**SHAPE))


def make_transformers() -> torch.nn.Module:
    config = DeformableDetrConfig(
        **SHAPE,
        backbone_config=ResNetConfig(**BACKBONE),
        two_stage=True,
        two_stage_num_proposals=900,
        with_box_refine=True,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        auxiliary_loss=True,
    )
    return DeformableDetrForObjectDetection(config)


def make_pass(make: Callable[[], torch.nn.Module], pixel_values: torch.Tensor) -> Callable[[], None]:
    model = make().eval()

    def run() -> None:
        with torch.no_grad():
            model(pixel_values)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1066)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    pixel_values = torch.randn(1, 3, args.height, args.width, generator=torch.Generator().manual_seed(0))
    contenders = {
        "hf_dino": (partial(make_pass, make_ours, pixel_values), {"HF_DINO_KERNELS": "require"}),
        "hf_dino_definition": (partial(make_pass, make_ours, pixel_values), {"HF_DINO_KERNELS": "off"}),
        "transformers": (partial(make_pass, make_transformers, pixel_values), {}),
    }
    command = f"python benchmarks/forward.py --height {args.height} --width {args.width} --rounds {args.rounds}"
    content = take_turns(contenders, args.rounds)
    write_result("forward", command, content)


if __name__ == "__main__":
    main()
