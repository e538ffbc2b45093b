"""Compare whole models with and without the kernel, and transformers' Deformable DETR: forward and training step.

Each runs in a separate process. The three processes build and compile a variant at the same time, and run it in turn.
"""

import os
from functools import partial
from typing import Any, NamedTuple

from common.interleave import Worker, WorkerError, measure
from deformable_attention_accuracy import rounded
from forward import SMALL, make_candidates, make_pass, random_images
from gpu_stages.rows import Row, Stage
from training_step import make_same_step, random_batch


ROUNDS = 7
OBJECTS = 7  # per image


class Variant(NamedTuple):
    """A forward pass or a training step, its precision, and whether the model is compiled."""

    is_step: bool
    precision: str
    compiled: bool


VARIANTS = [  # the most important first
    Variant(False, "bf16", False),
    Variant(True, "bf16", False),
    Variant(True, "fp32", False),
    Variant(False, "fp32", False),
    Variant(True, "tf32", False),
    Variant(False, "tf32", False),
    Variant(False, "bf16", True),
    Variant(True, "bf16", True),
    Variant(True, "tf32", True),
    Variant(False, "tf32", True),
]
TINY = [Variant(False, "fp32", False), Variant(True, "bf16", True)]


def name_of(variant: Variant) -> str:
    parts = ["training step" if variant.is_step else "forward", variant.precision]
    return " ".join(parts + ["compiled"] * variant.compiled)


class Models:
    """The processes of the compared models. One that fails is restarted for the next variant."""

    def __init__(self, stage: Stage):
        self.device = stage.device
        size = (64, 96) if stage.dry_run else (800, 1333)
        self.overrides = SMALL if stage.dry_run else {}
        self.images, self.batch = random_images(1, *size), random_batch(*size, 2, OBJECTS)
        self.start_method = "fork" if stage.dry_run else "spawn"
        self.rounds = 1 if stage.dry_run else ROUNDS
        self.workers: dict[str, Worker] = {}

    def builds(self, variant: Variant) -> dict[str, Any]:
        """Return the function that builds the work of each process, and its environment variables."""
        where: dict[str, Any] = {"device": self.device, "precision": variant.precision, "compiled": variant.compiled}
        if variant.is_step:
            return make_candidates(partial(make_same_step, batch=self.batch, **where), **self.overrides)
        return make_candidates(partial(make_pass, pixel_values=self.images, **where), **self.overrides)

    def measure(self, row: Row, variant: Variant) -> None:
        """Fill in the milliseconds and peak memory of each model. If one fails, the others still run."""
        built = self.build(row, variant)
        for name in list(built):
            try:
                built[name].run()  # compiles
            except WorkerError as error:
                self.fail(row, name, error)
                del built[name]
        seconds, memory = measure(built, self.rounds)
        for name in built:
            row[f"{name}_ms"] = rounded(1000 * seconds[name], 4)
            row[f"{name}_gib"] = rounded(memory[name] / 1024, 3)
        for name in [name for name in built if name != "hf_dino" and "hf_dino" in built]:
            row[f"faster_than_{name}"] = rounded(seconds[name] / seconds["hf_dino"], 3)

    def build(self, row: Row, variant: Variant) -> dict[str, Worker]:
        builds = self.builds(variant)
        for name, (build, environment) in builds.items():
            if name not in self.workers:
                self.workers[name] = Worker(environment, self.device, self.start_method)
            self.workers[name].start_building(build)
        built = {}
        for name in builds:
            try:
                self.workers[name].wait()
                built[name] = self.workers[name]
            except WorkerError as error:
                self.fail(row, name, error)
        return built

    def fail(self, row: Row, name: str, error: WorkerError) -> None:
        """Record a failure and restart the process for the next case: an error of the GPU stays in the process."""
        row["ok"] = False
        row[f"{name}_error"] = str(error).splitlines()[0][:150]
        self.workers.pop(name).close()


def main(stage: Stage) -> None:
    models = Models(stage)
    if stage.dry_run:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes longer than everything else
    variants = {name_of(variant): variant for variant in (TINY if stage.dry_run else VARIANTS)}
    for name in stage.todo(variants):
        with stage.rows.case(name) as row:
            models.measure(row, variants[name])
