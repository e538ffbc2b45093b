"""Measure a model and its exported files on this machine, interleaved in one run."""

import platform
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import BaseImageProcessor

from ..exported import load_exported
from ..hub import load_model_and_processor
from ..inference import prepare_for_inference
from ..kernels import operators
from ..utils.errors import InputError
from .precision import average_precision, read_precision_data


@dataclass
class Candidate:
    """A model, exported or not, and what was measured.

    Attributes:
        name (`str`): Directory, file or Hub id.
        runtime (`str`): The program that runs it.
        megabytes (`float`): Size of its weights or its file.
        load_seconds (`float`): Time to load it, once.
        model (`Any`): Called like the model.
        processor (`BaseImageProcessor`): Its image processor.
        milliseconds (`dict[str, list[float]]`): Of each round, by image size.
        ap (`float`, *optional*): Average precision.
    """

    name: str
    runtime: str
    megabytes: float
    load_seconds: float
    model: Any
    processor: BaseImageProcessor
    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    ap: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what was measured, for JSON."""
        times = {
            size: {"median": statistics.median(values), "p90": percentile_90(values)}
            for size, values in self.milliseconds.items()
        }
        return {
            "name": self.name,
            "runtime": self.runtime,
            "megabytes": round(self.megabytes, 1),
            "load_seconds": round(self.load_seconds, 2),
            "milliseconds": times,
            "ap": self.ap,
        }


def percentile_90(values: Sequence[float]) -> float:
    """Return the smallest value that 90 % of the values do not exceed.

    Example:

    ```python
    >>> percentile_90([3, 1, 2, 5, 4, 6, 7, 8, 9, 10])
    9

    ```
    """
    return sorted(values)[-(-9 * len(values) // 10) - 1]


def measure(
    model: str,
    files: Sequence[Path],
    sizes: Sequence[tuple[int, int]],
    rounds: int = 10,
    threads: int = 1,
    data: str | None = None,
) -> dict[str, Any]:
    """Measure a model in PyTorch, prepared for inference, and exported files on the CPU.

    Args:
        model (`str`): Directory or Hub id of the model.
        files (`Sequence[Path]`): Exported models.
        sizes (`Sequence[tuple[int, int]]`): Heights and widths of images, in pixels.
        rounds (`int`, *optional*, defaults to 10): Number of rounds of each size.
        threads (`int`, *optional*, defaults to 1): Threads of each candidate.
        data (`str`, *optional*): Dataset to measure AP on.

    Returns:
        `dict[str, Any]`: `machine`, `threads`, `rounds` and a list of `candidates`.

    Raises:
        InputError: If a file or the dataset cannot be used, or a size is too small.
    """
    split = None if data is None else read_precision_data(data, "float32").judging
    torch.set_num_threads(threads)
    candidates = [_load_model(model), *(_load_file(Path(file), threads) for file in files)]
    for size in sizes:
        take_turns(candidates, size, rounds)
    for candidate in candidates if split else ():
        assert split is not None
        candidate.ap = average_precision(candidate.model, candidate.processor, split)
    machine = f"{processor_name()}, {platform.system()}, Python {platform.python_version()}"
    rows = [each.to_dict() for each in candidates]
    return {"machine": machine, "threads": threads, "rounds": rounds, "candidates": rows}


def processor_name() -> str:
    """Return the name of the processor, which Python knows on few systems."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _load_model(name: str) -> Candidate:
    start = time.perf_counter()
    model, processor = load_model_and_processor(name)
    detector = prepare_for_inference(model)  # as `hf-dino predict` does
    seconds = time.perf_counter() - start
    kernel = "compiled" if operators("cpu") else "reference"
    size = sum(each.numel() * each.element_size() for each in model.state_dict().values()) / 1e6
    runtime = f"PyTorch {torch.__version__.partition('+')[0]}, {kernel} operator"
    return Candidate(name, runtime, size, seconds, detector, processor)


def _load_file(path: Path, threads: int) -> Candidate:
    start = time.perf_counter()
    detector, processor = load_exported(path, threads=threads)
    seconds = time.perf_counter() - start
    size = sum(each.stat().st_size for each in (path, *path.rglob("*")) if each.is_file()) / 1e6
    runtime = f"{detector.session.runtime}, {detector.session.facts['precision']}"
    return Candidate(str(path), runtime, size, seconds, detector, processor)


@torch.inference_mode()
def take_turns(candidates: Sequence[Candidate], size: tuple[int, int], rounds: int) -> None:
    """Time candidates on one image: each runs once per round, after a round to warm up.

    In turns, what else the machine does slows all of them alike.

    Raises:
        InputError: If the image is too small.
    """
    name = "{}x{}".format(*size)
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, *size, dtype=torch.int64)
    try:
        for candidate in candidates:
            candidate.model(image, mask)
    except ValueError as error:  # the smallest feature level has too few cells
        raise InputError(f"--sizes {name}: is too small ({error})") from error
    for _ in range(rounds):
        for candidate in candidates:
            start = time.perf_counter()
            candidate.model(image, mask)
            elapsed = 1000 * (time.perf_counter() - start)
            candidate.milliseconds.setdefault(name, []).append(elapsed)
