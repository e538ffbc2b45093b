"""Peak memory of one training step of DINO, by backbone, image size, checkpointing and precision.

    OMP_NUM_THREADS=1 python benchmarks/training_memory.py [--rows resnet50 swin-l-checkpointing ...] [--limit 14]

Random weights, 7 objects per image, on the CPU of a Linux machine, as `examples/finetune_coco.py` trains: forward,
losses, backward, clipping and AdamW, a ResNet's stem frozen. The optimizer has its moments before the step that is
measured, as in every step of a run but the first. Of each row the result has

    state  parameters and buffers, gradients and the two moments of AdamW, counted
    peak   parameters and moments, counted, and on top of them what the process grew by in the step, measured

Most activations are gone before the last gradient is there: the peak is less than the state plus all activations.
Python and its libraries count for neither. On a GPU, expect more, because its allocator rounds up and its libraries
need work space. PyTorch then reports it as `torch.cuda.max_memory_allocated()`.

Each row runs in a separate process, one after another, which is stopped if it exceeds the limit. The result is written
after each row; rows that were not chosen keep their previous measurements.
"""

import argparse
import json
import multiprocessing
import os
import re
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common import machine
from forward import SHAPE
from hf_dino import DinoDetrConfig, DinoDetrForObjectDetection
from hf_dino.conversion.settings import BACKBONES
from hf_dino.training import enable_gradient_checkpointing, freeze
from training_step import random_batch


GIB = 2**30
OBJECTS = 7  # per image
SMALL = 256  # height and width of the image of the first step, which is not measured
SWIN_L: dict[str, Any] = {"backbone_config": {**BACKBONES["swin_L_384_22k"], "out_indices": [2, 3, 4]}}


class Row(NamedTuple):
    """A configuration to train."""

    height: int
    width: int
    images: int = 1
    checkpointing: bool = False
    bf16: bool = False
    config: dict[str, Any] = {}


ROWS = {
    "resnet50": Row(800, 1333),
    "resnet50-batch-2": Row(800, 1333, images=2),
    "resnet50-checkpointing": Row(800, 1333, checkpointing=True),
    "resnet50-checkpointing-bf16": Row(800, 1333, checkpointing=True, bf16=True),
    "resnet50-large-checkpointing": Row(1200, 2000, checkpointing=True),
    "resnet50-large-checkpointing-bf16": Row(1200, 2000, checkpointing=True, bf16=True),
    "swin-l-checkpointing": Row(800, 1333, checkpointing=True, config=SWIN_L),
    "swin-l-large-checkpointing-bf16": Row(1200, 2000, checkpointing=True, bf16=True, config=SWIN_L),
}


class Training:
    """A model and its optimizer."""

    def __init__(self, row: Row):
        torch.manual_seed(0)
        self.bf16 = row.bf16
        self.model = DinoDetrForObjectDetection(DinoDetrConfig(**SHAPE | row.config)).train()
        if row.checkpointing:
            enable_gradient_checkpointing(self.model)
        freeze(self.model)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step(self, height: int, width: int, images: int) -> None:
        batch = random_batch(height, width, images, OBJECTS)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()

    def kept(self) -> int:
        """Return the bytes of parameters, buffers and moments, which stay allocated between steps."""
        moments = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        return size([*self.model.parameters(), *self.model.buffers(), *moments])

    def gradients(self) -> int:
        return size(parameter.grad for parameter in self.model.parameters() if parameter.grad is not None)


def size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def memory(field: str, process: str = "self") -> int:
    """Return bytes as Linux counts them, `VmRSS` now or `VmHWM` at the peak. A process that has ended has none."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) * 1024 if found else 0


def measure(row: Row, connection: Connection) -> None:
    """Send the bytes of the state and of everything else in the process, then those of the peak."""
    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, the kernel stops this process first
    training = Training(row)
    training.step(SMALL, SMALL, images=1)
    state = training.kept() + training.gradients()
    training.optimizer.zero_grad()
    others = memory("VmRSS") - training.kept()
    connection.send((state, others))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    training.step(row.height, row.width, row.images)
    connection.send(memory("VmHWM") - others)


def measure_apart(row: Row, limit_gib: float) -> dict[str, Any]:
    """Measure in a new process, and stop it if it exceeds the limit."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(
        2**16
    )  # glibc then returns freed memory to the system, so it does not hide a peak
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=measure, args=(row, theirs), daemon=True)
    process.start()
    theirs.close()
    content: dict[str, Any] = {key: value for key, value in row._asdict().items() if key != "config"}
    try:
        state, others = ours.recv()
        content["state_gib"] = gib(state)
        content["peak_gib"] = f"more than {limit_gib:g}"
        while memory("VmRSS", str(process.pid)) - others <= limit_gib * GIB:
            if ours.poll(0.1):
                content["peak_gib"] = gib(ours.recv())
                break
    except EOFError:
        content["peak_gib"] = "unknown: its process failed"
    process.kill()
    process.join()
    return content


def gib(count: int) -> float:
    return round(count / GIB, 2)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--limit", type=float, default=14, help="GiB of a step beyond which it is stopped")
    args = parser.parse_args(arguments)

    os.environ.setdefault("HF_DINO_KERNELS", "require")
    written = machine.RESULTS / "training_memory.json"
    rows = json.loads(written.read_text())["rows"] if written.exists() else {}
    for name in args.rows:
        rows[name] = measure_apart(ROWS[name], args.limit)
        in_order = {name: rows[name] for name in ROWS if name in rows}
        machine.write_result(
            "training_memory", f"python benchmarks/training_memory.py --limit {args.limit:g}", {"rows": in_order}
        )


if __name__ == "__main__":
    main()
