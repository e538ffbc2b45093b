"""One training step of DINO-4scale ResNet-50: time and memory compared with others', its parts, and its wait for data.

    python benchmarks/training_step.py [--height 480] [--width 640] [--images 2] [--objects 7]
        [--rounds 5] [--warm-up 3]
    python benchmarks/training_step.py --device cuda --precision bf16 --compile

Random weights: forward, losses, backward, clipping and a step of AdamW. As in the official recipe, the stem and the
first stage of the ResNet are frozen. Compared are ours, ours without compiled operators, and transformers' Deformable
DETR of the same size, which has no denoising queries: it does less. As it comes, it freezes the whole ResNet, because
it looks for timm's names; `transformers_frozen` is that, while `transformers` trains the same stages as ours. The
parts are those of ours with compiled operators, the losses' own backward pass included. The wait is for a loader with
two workers that augments images as for training; on a small machine its workers and the step share the processors.
`--loader-steps 0` leaves the wait out.
"""

import argparse
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch.overrides import TorchFunctionMode

from common.interleave import interleave
from common.machine import write_result
from common.precision import use_precision
from forward import (
    MakeModel,
    add_device_options,
    command_of,
    make_candidates,
    make_model,
    make_ours,
    make_transformers,
    result_name,
    set_environment,
)
from hf_dino import DinoDetrImageProcessor, loss_dino_detr
from hf_dino.data import (
    AnnotatedImage,
    DetectionDataset,
    DetectionSplit,
    TrainingBatchSampler,
    TrainingCollator,
    make_augmentation,
    training_loader,
)


Batch = dict[str, Any]
NUM_LABELS = 91


class Stopwatch:
    """A timer that adds up seconds by name. Nested intervals count only for the innermost name.

    Args:
        synchronize (`Callable`): Waits until the accelerator has finished.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self.synchronize = synchronize
        self.seconds: dict[str, float] = {}
        self.running: list[str] = []
        self.last = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._pass_on()
        self.running.append(name)
        yield
        self._pass_on()
        self.running.pop()

    def _pass_on(self) -> None:
        """Add the time since the last change to the name that was running."""
        self.synchronize()
        now = time.perf_counter()
        if self.running:
            self.seconds[self.running[-1]] = self.seconds.get(self.running[-1], 0.0) + now - self.last
        self.last = now


class HostSyncs(TorchFunctionMode):
    """A list of the calls that copy a tensor's values to the host, which waits for the accelerator to finish."""

    READS = ("cpu", "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "unique")

    def __init__(self, watch: Stopwatch):
        super().__init__()
        self.watch = watch
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.READS:
            self.calls.append(f"{self.watch.running[-1]}: {func.__name__}")
        return func(*args, **(kwargs or {}))


class SeparateLoss:
    """A model's loss on copies of its inputs, so that its backward pass is separate from the model's."""

    def __init__(self, loss: Callable[..., Any]):
        self.loss = loss
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, **inputs: Any) -> Any:
        trained = {name: value for name, value in inputs.items() if getattr(value, "requires_grad", False)}
        copies = {name: value.detach().requires_grad_() for name, value in trained.items()}
        self.pairs = [(trained[name], copies[name]) for name in trained]
        return self.loss(**{**inputs, **copies})

    def backward(self) -> None:
        """Backpropagate the gradients of the copies through the model."""
        values, gradients = zip(*[(value, copy.grad) for value, copy in self.pairs if copy.grad is not None])
        torch.autograd.backward(values, gradients)


def random_batch(height: int, width: int, num_images: int, objects: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    sides = torch.tensor([0.5, 0.5, 0.3, 0.3])
    labels = [
        {
            "class_labels": torch.randint(NUM_LABELS, (objects,), generator=generator),
            "boxes": sides + 0.2 * (torch.rand(objects, 4, generator=generator) - 0.5),
        }
        for _ in range(num_images)
    ]
    return {"pixel_values": torch.randn(num_images, 3, height, width, generator=generator), "labels": labels}


def train_stages(model: torch.nn.Module, trained: str = "123") -> None:
    """Train stages of a ResNet, counted from 0, without their batch norms, and neither its stem nor other stages."""
    for name, weight in model.named_parameters():
        if re.search(r"\bbackbone\.\w+\.(embedder|encoder)\.", name):
            weight.requires_grad_(re.search(rf"\bstages\.[{trained or '-'}]\.(?!.*normalization)", name) is not None)


def make_step(
    make: MakeModel, device: str = "cpu", precision: str = "fp32", compiled: bool = False, trained: str = "123"
) -> Callable[[Batch], None]:
    """Build a model, and return a function that trains it for one step on a batch, on any device."""
    model = make_model(make, device, compiled).train()
    train_stages(model, trained)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], 1e-4, fused=True)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        with use_precision(precision, device):
            loss = model(**send_to_device(batch, device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    return step


def make_same_step(make: MakeModel, batch: Batch, device: str = "cpu", **options: Any) -> Callable[[], None]:
    return partial(make_step(make, device, **options), send_to_device(batch, device))


def profile(batch: Batch, rounds: int, device: str = "cpu", precision: str = "fp32") -> dict[str, Any]:
    """Return the median seconds and percentage of each part of a step, and the tensors that the host reads in it."""
    model, batch = make_model(make_ours, device).train(), send_to_device(batch, device)
    train_stages(model)
    watch = Stopwatch(torch.cuda.synchronize if device == "cuda" else lambda: None)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], 1e-4, fused=True)
    separate = model.loss_function = SeparateLoss(timed(watch, "losses", model.loss_function))
    for name, part in model.model.named_children():
        part.forward = timed(watch, f"forward, {name}", part.forward)

    rows = []
    matcher = loss_dino_detr.hungarian_match
    loss_dino_detr.hungarian_match = timed(watch, "matcher", matcher)
    with watch("forward, the rest"), HostSyncs(watch) as syncs, use_precision(precision, device):
        model(**batch)
    for _ in range(rounds + 1):
        watch.seconds = {}
        optimizer.zero_grad()
        with watch("forward, the rest"), use_precision(precision, device):
            loss = model(**batch).loss
        with watch("losses, backward"):
            loss.backward()
        with watch("backward"):
            separate.backward()
        with watch("clipping"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        with watch("optimizer"):
            optimizer.step()
        rows.append(watch.seconds)
    loss_dino_detr.hungarian_match = matcher

    seconds = {
        name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]
    }  # the first round is a warm-up
    percent = {name: 100 * value / sum(seconds.values()) for name, value in seconds.items()}
    matcher_and_losses = sum(percent[name] for name in ("matcher", "losses", "losses, backward"))
    return {
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "percent": {name: round(value, 2) for name, value in percent.items()},
        "matcher_and_losses_percent": round(matcher_and_losses, 2),
        "host_syncs": syncs.calls,
    }


def timed(watch: Stopwatch, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with watch(name):
            return function(*args, **kwargs)

    return run


def draw_images(folder: Path, count: int, height: int, width: int, objects: int) -> DetectionSplit:
    """Write images with the size and detail of photographs, and random boxes."""
    rng, images = np.random.default_rng(0), []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
        path = folder / f"{number}.jpg"
        Image.fromarray((smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)).save(path, quality=90)
        boxes = np.concatenate([rng.uniform(0, 0.5, (objects, 2)), rng.uniform(0.1, 0.5, (objects, 2))], axis=1)
        boxes *= [width, height, width, height]
        kinds, crowd = rng.integers(0, NUM_LABELS, objects), np.zeros(objects, dtype=np.int64)
        images.append(AnnotatedImage(number, path, height, width, boxes, kinds, boxes[:, 2:].prod(axis=1), crowd))
    return DetectionSplit(folder / "none.json", images, {label: f"class {label}" for label in range(NUM_LABELS)})


def measure_waiting(
    step: Callable[[Batch], None], height: int, width: int, batch_size: int, objects: int, steps: int
) -> dict[str, Any]:
    """Train for some steps on image files. Return the seconds they took, and the seconds of waiting for batches."""
    waiting, working = [], []
    processor = DinoDetrImageProcessor(size={"height": height, "width": width})
    collate = TrainingCollator(processor, {label: label for label in range(NUM_LABELS)}, NUM_LABELS, do_resize=False)
    with tempfile.TemporaryDirectory() as folder:
        data = draw_images(Path(folder), steps * batch_size, height, width, objects)
        images = DetectionDataset(data, make_augmentation("dino", dict(processor.size)))
        batches = TrainingBatchSampler(len(images), batch_size, seed=0, epoch=0)
        loaded = iter(training_loader(images, collate, batches, num_workers=2))
        for _ in range(steps):
            start = time.perf_counter()
            batch = next(loaded)
            arrived = time.perf_counter()
            step(batch)
            waiting.append(arrived - start)
            working.append(time.perf_counter() - arrived)
        alone = time.perf_counter()
        num_batches = len(list(training_loader(images, collate, batches, num_workers=2)))
        alone = time.perf_counter() - alone
    return {
        "steps": steps,
        "seconds_until_the_first_batch": round(waiting[0], 3),
        "seconds_waited_for_the_others": round(sum(waiting[1:]), 4),
        "percent_of_the_time_waited": round(100 * sum(waiting[1:]) / sum(waiting[1:] + working[1:]), 3),
        "median_seconds_of_a_step": round(statistics.median(working), 3),
        "seconds_per_batch_of_the_loader_alone": round(alone / num_batches, 3),
    }


def synchronized(step: Callable[[Batch], None]) -> Callable[[Batch], None]:
    """Return a step that waits for the GPU to finish."""

    def run(batch: Batch) -> None:
        step(batch)
        torch.cuda.synchronize()

    return run


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=480, help="of the images, in pixels (default: 480)")
    parser.add_argument("--width", type=int, default=640, help="of the images, in pixels (default: 640)")
    parser.add_argument("--images", type=int, default=2, help="images per step (default: 2)")
    parser.add_argument("--objects", type=int, default=7, help="objects per image (default: 7)")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each model (default: 5)")
    warm_up = "steps of each model before these: on a CPU the first take longer, until memory is reused (default: 3)"
    parser.add_argument("--warm-up", type=int, default=3, help=warm_up)
    steps = "steps that wait for a loader, at least 2, or 0 to leave that out (default: 20)"
    parser.add_argument("--loader-steps", type=int, default=20, help=steps)
    add_device_options(parser)
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.warm_up < 1:
        parser.error(f"--rounds and --warm-up must be at least 1, not {args.rounds} and {args.warm_up}")
    if args.loader_steps < 0 or args.loader_steps == 1:
        parser.error(f"--loader-steps must be 0 or at least 2, not {args.loader_steps}: the first step is not counted")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    set_environment(args)
    batch = random_batch(args.height, args.width, args.images, args.objects)
    where: dict[str, Any] = {"device": args.device, "precision": args.precision, "compiled": args.compile}
    candidates = make_candidates(partial(make_same_step, batch=batch, **where))
    candidates["transformers_frozen"] = (partial(make_same_step, make_transformers, batch, **where, trained=""), {})
    content = interleave(candidates, args.rounds, args.device, args.warm_up)
    seconds = content["median_seconds"]
    content["samples_per_second"] = {name: round(args.images / value, 3) for name, value in seconds.items()}
    os.environ.setdefault("HF_DINO_KERNELS", "require")
    content["parts_of_hf_dino"] = profile(batch, args.rounds, args.device, args.precision)
    if args.loader_steps:
        step = make_step(make_ours, **where)
        step = synchronized(step) if args.device == "cuda" else step
        sizes = (args.height, args.width, args.images, args.objects, args.loader_steps)
        content["waiting_for_two_workers"] = measure_waiting(step, *sizes)
    write_result(result_name("training_step", args), command_of("training_step", args), content)


if __name__ == "__main__":
    main()
