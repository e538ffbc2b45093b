"""The cost of the models of a comparison: parameters, FLOPs, time of a step and of an image, memory."""

import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..data import DetectionDataset, read_data
from ..data.dataset import label_of_category
from ..data.loaders import TrainingCollator
from ..detectors import detect, model_inputs, training_loss
from ..export.benchmark import processor_name
from ..hub import load_detector
from ..model_info import count_flops, count_parameters, peak_memory, start_memory
from ..utils.errors import BrokenInputError, InputError, count_of
from ..utils.io import read_text, write_json
from .plan import dataset_of, find_runs, read_settings


SPEED_FILE = "speed.json"
ROUNDS = 7


def measure_comparison(output_dir: Path, dataset: str | None = None, *, again: bool = False) -> None:
    """Measure all finished rows of a comparison and write `speed.json`.

    Args:
        output_dir (`Path`): Directory of the comparison.
        dataset (`str`, *optional*): Dataset that it trains on; by default the one it began with.
        again (`bool`, *optional*, defaults to `False`): Measure also if training goes on, or all rows were measured.
    """
    runs = find_runs(output_dir)
    folders = {run.row: run.folder for run in reversed(runs) if run.is_finished}  # the first seed of each row
    is_due = (
        all(run.is_finished for run in runs) and not folders.keys() <= read_speed(output_dir).get("rows", {}).keys()
    )
    if not folders or not (is_due or again):
        return
    settings = read_settings(output_dir)
    print(f"measuring the speed of {count_of(len(folders), 'model')}")
    data, threads = dataset_of(output_dir, dataset, settings), torch.get_num_threads()
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:  # alone, and without leftovers
        measuring = pool.submit(measure_speed, folders, data, settings["global_batch_size"], threads)
        try:
            rows = measuring.result()
        except BrokenProcessPool:
            raise BrokenInputError(
                f"{output_dir}: the process that measures speed was killed, perhaps for lack of memory; all models "
                "are kept: measure again with --speed, or write the report without it with --report_only"
            ) from None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()
    facts = {"device": device, "threads": threads, "rounds": ROUNDS}
    write_json(output_dir / SPEED_FILE, {**facts, "rows": rows})


def read_speed(output_dir: Path) -> dict[str, Any]:
    """Read what [`measure_comparison`] measured; empty if nothing was measured yet.

    Raises:
        InputError: If the file is damaged.
    """
    path = output_dir / SPEED_FILE
    try:
        facts = dict(json.loads(read_text(path))) if path.is_file() else {}
        for row in facts.get("rows", {}).values():
            float(row["step_seconds"] * row["inference_seconds"] * row["parameters"] * row["flops"] * row["images"])
            row.setdefault("training_memory", None)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise InputError(f"{path}: is damaged ({error!r}); remove it, and measure again with --speed") from None
    return facts


@dataclass
class Trainee:
    """A trained model that is trained on, on a batch that stays the same.

    Args:
        model (`PreTrainedModel`): The model.
        batch (`dict`): From [`TrainingCollator`].
    """

    model: PreTrainedModel
    batch: dict[str, Any]

    def __post_init__(self) -> None:
        # a learning rate of zero: the model stays as it is, and so does the time of its matching
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)
        self.inputs = model_inputs(self.batch, self.model.config)

    def train(self) -> None:
        """Take an optimizer step."""
        self.model.train()
        loss, _ = training_loss(self.model(**self.inputs), self.batch, self.model.config)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.inference_mode()
    def detect(self) -> None:
        """Detect objects in the images of the batch."""
        self.model.eval()
        detect(self.model, self.model.config, self.batch)


def load_trainee(folder: Path, dataset: str, batch_size: int, device: torch.device) -> Trainee:
    """Load a trained model, with the first images of the training split, or as many of them as there are.

    Args:
        folder (`Path`): Directory of a finished run.
        dataset (`str`): Dataset that it was trained on.
        batch_size (`int`): Number of images.
        device (`torch.device`): Where to measure.
    """
    model, processor = load_detector(str(folder))
    return Trainee(model.to(device), _to_device(make_batch(model, processor, dataset, batch_size), device))


def make_batch(model: PreTrainedModel, processor: BaseImageProcessor, dataset: str, batch_size: int) -> dict[str, Any]:
    """Return a batch of the first images of the training split."""
    split, config = read_data(dataset, splits=["train"])["train"], model.config
    labels = label_of_category(split, config.id2label)
    collate = TrainingCollator(processor, labels, config.num_labels, do_resize=True)
    images = DetectionDataset(split)
    return collate([images[index] for index in range(min(batch_size, len(images)))])


def _to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    labels = [{name: value.to(device) for name, value in label.items()} for label in batch["labels"]]
    return {"labels": labels, **{name: batch[name].to(device) for name in ("pixel_values", "pixel_mask")}}


def measure_speed(
    folders: dict[str, Path], dataset: str, batch_size: int, threads: int, rounds: int = ROUNDS
) -> dict[str, dict[str, Any]]:
    """Measure trained models in turns, so that what else the machine does slows all of them alike.

    Args:
        folders (`dict[str, Path]`): Directory of a finished run by the name of its row.
        dataset (`str`): Dataset that they were trained on.
        batch_size (`int`): Images of a step.
        threads (`int`): Threads of PyTorch, which are set.
        rounds (`int`, *optional*, defaults to 7): Number of times that each model is timed.

    Returns:
        `dict`: For each row `parameters`; `flops` of one image; `step_seconds` and `inference_seconds`, medians, of a
        batch of `batch_size` images; `images`, the size of that batch; `training_memory`, in bytes, of two steps from
        loading the model on; `None` where it cannot be read.
    """
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    load = partial(load_trainee, dataset=dataset, batch_size=batch_size, device=device)
    _use_memory(lambda: load(next(iter(folders.values()))), device)  # no model pays for what is loaded once
    memory = {row: _use_memory(partial(load, folder), device) for row, folder in folders.items()}
    trainees = {row: load(folder) for row, folder in folders.items()}
    steps = take_turns({row: each.train for row, each in trainees.items()}, rounds)
    detections = take_turns({row: each.detect for row, each in trainees.items()}, rounds)
    return {
        row: {
            **_count(trainee),
            "images": len(trainee.batch["labels"]),
            "step_seconds": statistics.median(steps[row]),
            "inference_seconds": statistics.median(detections[row]),
            "training_memory": memory[row],
        }
        for row, trainee in trainees.items()
    }


def _use_memory(load: Callable[[], Trainee], device: torch.device) -> int | None:
    """Return the memory that it takes to load a model and to train it for two steps."""
    before = start_memory(device)
    trainee = load()
    for _ in range(2):  # the second step has the optimizer's state
        trainee.train()
    return None if before is None else peak_memory(device) - before


def _count(trainee: Trainee) -> dict[str, int]:
    model = trainee.model.eval()
    flops = count_flops(model, trainee.batch["pixel_values"][:1])
    return {"parameters": count_parameters(model).total(), "flops": flops.total()}


def take_turns(actions: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each action in each round, after one round to warm up.

    Example:

    ```python
    >>> {name: len(seconds) for name, seconds in take_turns({"one": lambda: None, "two": lambda: None}, 3).items()}
    {'one': 3, 'two': 3}

    ```
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            _synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: each[1:] for name, each in seconds.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
