"""Time and memory of one forward pass: ours, and transformers' Deformable DETR of the same shape.

    python benchmarks/forward.py [--height 800] [--width 1066] [--rounds 5]

Both are two-stage with box refinement: ResNet-50, 4 levels, 6 + 6 layers, 900 queries, 91 classes, fp32, random
weights. Each model lives in a process of its own, so that its peak memory is its own; the two take turns, one pass at
a time, and the medians are compared.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

from hf_dino import DinoDetrConfig, DinoDetrForObjectDetection
from machine import write_result


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


def serve(make: Any, pixel_values: torch.Tensor, connection: Connection) -> None:
    """Build a model, then run one forward pass for each message; answer with seconds and peak memory in MiB."""
    model = make().eval()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while connection.recv():
        start = time.perf_counter()
        with torch.no_grad():
            model(pixel_values)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        connection.send((seconds, (peak - before) / 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1066)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    pixel_values = torch.randn(1, 3, args.height, args.width, generator=torch.Generator().manual_seed(0))
    context = multiprocessing.get_context("spawn")
    connections = {}
    for name, make in {"hf_dino": make_ours, "transformers": make_transformers}.items():
        connections[name], theirs = context.Pipe()
        context.Process(target=serve, args=(make, pixel_values, theirs), daemon=True).start()

    seconds: dict[str, list[float]] = {name: [] for name in connections}
    memory: dict[str, float] = {}
    for round_number in range(args.rounds + 1):
        for name, connection in connections.items():
            connection.send(True)
            elapsed, memory[name] = connection.recv()
            if round_number:  # the first one warms up
                seconds[name].append(elapsed)
    for connection in connections.values():
        connection.send(False)

    medians = {name: statistics.median(times) for name, times in seconds.items()}
    command = f"python benchmarks/forward.py --height {args.height} --width {args.width} --rounds {args.rounds}"
    content = {
        "median_seconds": {name: round(value, 3) for name, value in medians.items()},
        "time_ratio": round(medians["hf_dino"] / medians["transformers"], 3),
        "peak_memory_of_a_pass_mib": {name: round(value) for name, value in memory.items()},
        "memory_ratio": round(memory["hf_dino"] / memory["transformers"], 3),
    }
    write_result("forward", command, content)


if __name__ == "__main__":
    main()
