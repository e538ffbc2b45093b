"""Time and memory of one training step, with compiled operators and without.

    python benchmarks/training_step.py [--height 480] [--width 640] [--pictures 2] [--objects 7] [--rounds 5]

DINO-4scale ResNet-50 with random weights, fp32: forward, loss, backward, clipping and a step of AdamW.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch

from hf_dino import DinoDetrConfig, DinoDetrForObjectDetection
from machine import write_result
from turns import take_turns


def make_step(height: int, width: int, pictures: int, objects: int) -> Callable[[], None]:
    torch.manual_seed(0)
    model = DinoDetrForObjectDetection(DinoDetrConfig(num_labels=91)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    pixel_values = torch.randn(pictures, 3, height, width)
    sides = torch.tensor([0.5, 0.5, 0.3, 0.3])
    labels = [
        {"class_labels": torch.randint(91, (objects,)), "boxes": sides + 0.2 * (torch.rand(objects, 4) - 0.5)}
        for _ in range(pictures)
    ]

    def step() -> None:
        optimizer.zero_grad()
        model(pixel_values, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--objects", type=int, default=7, help="per picture")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    build = partial(make_step, args.height, args.width, args.pictures, args.objects)
    contenders = {
        "hf_dino": (build, {"HF_DINO_KERNELS": "require"}),
        "hf_dino_definition": (build, {"HF_DINO_KERNELS": "off"}),
    }
    options = " ".join(f"--{name} {value}" for name, value in vars(args).items())
    write_result("training_step", f"python benchmarks/training_step.py {options}", take_turns(contenders, args.rounds))


if __name__ == "__main__":
    main()
