"""What is measured of a model at each evaluation of its training, beside its AP, from one pass over the images.

The measures are those that the papers argue with. Matching instability: DN-DETR, https://arxiv.org/abs/2203.01305,
section 3.2; the recall of query selection: DINO, https://arxiv.org/abs/2203.03605, section 3.4.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import DataLoader
from torchvision.ops import box_convert, box_iou

from ..configuration_dino_detr import DinoDetrConfig
from ..data.dataset import label_of_category
from ..data.loaders import TrainingCollator, evaluation_loader
from ..denoising_dino_detr import DinoDetrDenoising
from ..detectors import detect
from ..evaluation import CocoScores
from ..evaluation.predictions import eval_mode
from ..loss_dino_detr import hungarian_match
from ..training import FineTuner
from ..utils.distributed import summon_full_params
from ..utils.io import atomic_write


logger = logging.getLogger(__name__)

MEASURES_FILE = "measures.jsonl"
ASSIGNMENTS = "assignments"  # directory of the matching of the last evaluation
MIN_IOU = 0.5  # of a box that finds an object

COUNTS = {
    "recall_boxes": "objects",
    "recall_points": "objects",
    "denoising_before": "denoising_queries",
    "denoising_after": "denoising_queries",
}
"""Shares that are measured: how many there are, of how many. A share that a model has not is null."""


class Reading(NamedTuple):
    """How a type of model is read from outside.

    Attributes:
        module (`str`): Name of the module whose output is read.
        references (`Callable`): Returns where the queries of each image start in the decoder, as fractions of the
            image, given that output and the number of queries: points or boxes `(batch_size, num_queries, 2 or 4)`, or
            a tensor `(..., 0)` of a model that has no such place.
        denoised (`Callable`, *optional*): Returns logits and boxes that the last layer predicts for the denoising
            queries, which come first, given the model and that output.
    """

    module: str
    references: Callable[[Any, int], torch.Tensor]
    denoised: Callable[[Any, Any], tuple[torch.Tensor, torch.Tensor]] | None = None


def _denoised_by_dino(model: Any, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    states = output.denoising.intermediate_hidden_states
    layer = range(states.shape[1])[-1:]
    return model.predict_classes(states, layer)[:, 0], output.denoising.intermediate_boxes[:, -1]


def _denoised_by_dn_detr(model: Any, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    logits, boxes = model.predict(output.intermediate_hidden_states[-1:], output.reference_points[-1:])
    return logits[:, 0], boxes[:, 0]


def _initial_points(output: Any, num_queries: int) -> torch.Tensor:
    return output.init_reference_points


def _points_of_first_layer(output: Any, num_queries: int) -> torch.Tensor:
    return output.reference_points[0, :, -num_queries:]  # denoising queries come before


READINGS = {
    "detr": Reading("model", lambda output, _: output.last_hidden_state[..., :0]),
    "conditional_detr": Reading("model", lambda output, _: output.reference_points.transpose(0, 1)),
    "dab-detr": Reading("model.decoder", _points_of_first_layer),
    "dn_detr": Reading("model.decoder", _points_of_first_layer, _denoised_by_dn_detr),
    "deformable_detr": Reading("model", _initial_points),
    "dino_detr": Reading("model", _initial_points, _denoised_by_dino),
}
"""By `config.model_type`."""


class MeasuringFineTuner(FineTuner):
    """Train as [`FineTuner`] does, to the same weights, and write a row of measures at each evaluation.

    `measures.jsonl` in the output directory has one row per evaluation, by ascending step. A resumed run ends with
    the same file, byte for byte, as an uninterrupted one.
    """

    def evaluate(self, name: str) -> CocoScores:
        """Compute the COCO metrics on a split and, if the training is to be evaluated, measure the model."""
        scores = super().evaluate(name)
        if name == "validation" and not self.state.is_evaluated:
            self.add_measures(scores)
        return scores

    def add_measures(self, scores: CocoScores) -> None:
        """Measure the model and write the row of this step, replacing those of this step and later ones."""
        step, folder = self.state.step, self.arguments.output_dir
        with self.eval_weights():
            totals, assignments = self.measure()
        if not self.accelerator.is_main_process:
            return
        earlier = [row for row in read_measures(folder) if row["step"] < step]
        previous = earlier[-1]["step"] if earlier else None
        instability = matching_changes(_read_assignments(folder, previous, assignments.shape), assignments)
        row = {"step": step, "epoch": self.epoch, **scores.metrics, **shares(totals), "instability": instability}
        row["instability_share"] = instability and instability * len(assignments) / (2 * totals["objects"])
        write_assignments(folder, step, assignments, kept=previous)
        with atomic_write(folder / MEASURES_FILE) as path:
            path.write_text("".join(json.dumps(each) + "\n" for each in (*earlier, row)), encoding="utf-8")

    @torch.no_grad()
    def measure(self) -> tuple[dict[str, int], np.ndarray]:
        """Run the model once over the validation images, without touching the state of the training.

        Returns:
            Counts by name, and for each image, by ascending id, and each query the index of the matched object or -1.
        """
        accelerator, network = self.accelerator, self.accelerator.unwrap_model(self.model)
        own: list[tuple[int, list[int], dict[str, int]]] = []
        with (
            torch.random.fork_rng(devices=[accelerator.device] if accelerator.device.type == "cuda" else []),
            eval_mode(network),
            summon_full_params(network),
            Probe(network) as probe,
        ):
            for batch in self.measuring_loader():
                inputs = send_to_device(batch, accelerator.device, non_blocking=True)
                own += probe.run(inputs)
        images = sorted(gather_object(own), key=lambda image: image[0])
        names = dict.fromkeys(name for *_, counts in images for name in counts)
        totals = {name: sum(counts[name] for *_, counts in images) for name in names}
        return totals, np.array([matched for _, matched, _ in images], np.int32)

    def measuring_loader(self) -> DataLoader:
        """Load this process's share of the validation images with their labels, in batches without padding."""
        split, accelerator, config = self.eval_splits["validation"], self.accelerator, self.config
        labels = label_of_category(split, config.id2label)
        return evaluation_loader(
            split,
            self.processor,
            batch_size=self.arguments.per_device_eval_batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_workers=self.arguments.dataloader_num_workers,
            collate=TrainingCollator(self.processor, labels, config.num_labels, do_resize=True),
        )

    def exit_if_stopped(self) -> None:
        """End the process if a signal to stop was received."""
        if self.signals.should_stop():
            step = f"{self.arguments.output_dir}: stopped after step {self.state.step} of {self.total_steps}"
            self.signals.exit(f"{step}; start the same command again to continue")


class Probe:
    """Look at a model from outside, in a `with` block: its reference points and its denoising queries.

    Denoising queries are otherwise made in training mode only. Here they are made in evaluation mode: no batch norm
    or dropout knows of it, and no matching query attends to them.

    Args:
        model (`nn.Module`): A detection model in evaluation mode.
    """

    def __init__(self, model: Any):
        self.model = model
        self.reading = READINGS[model.config.model_type]
        self.seen: dict[str, Any] = {}
        self.labels: list[dict[str, torch.Tensor]] | None = None
        self._hooks = ExitStack()

    def __enter__(self) -> "Probe":
        keep = self._hooks.enter_context
        core = self.model.get_submodule(self.reading.module)
        keep(core.register_forward_hook(lambda _, args, output: self._see("output", output)))
        for module in self._denoising():
            keep(module.register_forward_pre_hook(lambda _, args: (self.labels, *args[1:])))
            keep(module.register_forward_hook(lambda _, args, output: self._see("queries", output)))
            keep(module.label_embed.register_forward_hook(lambda _, args, output: self._see("classes", args[0])))
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def _denoising(self) -> list[Any]:
        return [module for module in self.model.modules() if isinstance(module, DinoDetrDenoising)]

    def _see(self, name: str, value: Any) -> None:
        self.seen[name] = value

    def run(self, batch: Mapping[str, Any]) -> Iterator[tuple[int, list[int], dict[str, int]]]:
        """Run the model on a batch.

        Args:
            batch (`dict`): From [`TrainingCollator`], on the model's device, without padding.

        Yields:
            For each image its id, the index of each query's object or -1, and counts by name.
        """
        self.labels, self.seen = batch["labels"], {}
        inputs = {name: batch[name] for name in ("pixel_values", "pixel_mask")}
        torch.manual_seed(int(self.labels[0]["image_id"]))  # the same noise at each evaluation, in whichever process
        outputs = detect(self.model, self.model.config, inputs)
        costs = DinoDetrConfig()  # one cost for all rows, so that they are matched alike
        matched = hungarian_match(outputs.logits[:, None], outputs.pred_boxes[:, None], self.labels, costs)[:, 0]
        references = self.reading.references(self.seen["output"], outputs.logits.shape[1])
        denoised = self._denoised(self.labels) if "queries" in self.seen else [{}] * len(self.labels)
        for index, label in enumerate(self.labels):
            found = count_found(references[index], label["boxes"])
            counts = {"objects": len(label["boxes"]), **found, **denoised[index]}
            yield int(label["image_id"]), matched[index].tolist(), counts

    def _denoised(self, labels: list[dict[str, torch.Tensor]]) -> list[dict[str, int]]:
        """Count, for each image, the positive denoising queries that have their object's class and box."""
        queries = self.seen["queries"]
        assert self.reading.denoised is not None
        logits, boxes = self.reading.denoised(self.model, self.seen["output"])
        before = (self.seen["classes"].flatten(1), queries.reference_points)
        after = (logits.argmax(dim=-1), boxes)
        return [
            {
                "denoising_queries": int((objects >= 0).sum()),
                "denoising_before": count_right(before[0][image], before[1][image], objects, label),
                "denoising_after": count_right(after[0][image], after[1][image], objects, label),
            }
            for image, (objects, label) in enumerate(zip(queries.object_index, labels))
        ]


def count_found(references: torch.Tensor, boxes: torch.Tensor) -> dict[str, int]:
    """Count the objects of an image near which a query starts.

    Args:
        references (`torch.Tensor` of shape `(num_queries, 2 or 4)`): Center x, center y and, of a box, width, height.
        boxes (`torch.Tensor` of shape `(num_objects, 4)`): The objects, in the same units.

    Returns:
        `recall_points`, objects with a reference point inside, and of reference boxes `recall_boxes`, those with an
        IoU of at least 0.5.

    Example:

    ```python
    >>> boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]])
    >>> count_found(torch.tensor([[0.5, 0.55, 0.2, 0.2]]), boxes)
    {'recall_points': 1, 'recall_boxes': 1}

    ```
    """
    kinds = {0: {}, 2: {"recall_points": _points_inside}, 4: {"recall_points": _points_inside, "recall_boxes": _iou}}
    counters = kinds[references.shape[-1]]
    return {name: int(hits(references, boxes).any(dim=0).sum()) for name, hits in counters.items()}


def _points_inside(references: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    distances = (references[:, None, :2] - boxes[None, :, :2]).abs()
    return (distances <= boxes[None, :, 2:] / 2).all(dim=-1)


def _iou(references: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    return _pairwise_iou(references, boxes) >= MIN_IOU


def _pairwise_iou(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return box_iou(*(box_convert(each.float(), "cxcywh", "xyxy") for each in (boxes, others)))


def count_right(
    classes: torch.Tensor, boxes: torch.Tensor, object_index: torch.Tensor, label: Mapping[str, torch.Tensor]
) -> int:
    """Count the positive queries that have the class of their object and a box with an IoU of at least 0.5.

    Args:
        classes (`torch.Tensor` of shape `(num_queries,)`): Classes of the queries.
        boxes (`torch.Tensor` of shape `(num_queries, 4)`): Their boxes: center x, center y, width, height.
        object_index (`torch.Tensor` of shape `(num_queries,)`): Index of their objects, negative for none.
        label (`Mapping[str, torch.Tensor]`): `class_labels` and `boxes` of the image.
    """
    queries = (object_index >= 0).nonzero().flatten()
    objects = object_index[queries]
    is_right = classes[queries] == label["class_labels"][objects]
    iou = _pairwise_iou(boxes[queries], label["boxes"])[torch.arange(len(queries)), objects]
    return int((is_right & (iou >= MIN_IOU)).sum())


def shares(totals: Mapping[str, int]) -> dict[str, float | None]:
    """Return the shares of [`COUNTS`]: null where a model has no such thing.

    Example:

    ```python
    >>> shares({"objects": 4, "recall_points": 3})
    {'recall_boxes': None, 'recall_points': 0.75, 'denoising_before': None, 'denoising_after': None}

    ```
    """
    return {name: totals[name] / totals[of] if name in totals and totals[of] else None for name, of in COUNTS.items()}


def matching_changes(before: np.ndarray | None, now: np.ndarray) -> float | None:
    """Return the matching instability: how many queries of an image changed their object, in the mean.

    Args:
        before (`np.ndarray` of shape `(num_images, num_queries)`, *optional*): Index of the object of each query in
            its image, or -1, at the evaluation before; `None` at the first one.
        now (`np.ndarray` of shape `(num_images, num_queries)`): The same at this evaluation.

    Example:

    ```python
    >>> matching_changes(np.array([[0, 1, -1], [-1, -1, 0]]), np.array([[0, -1, 1], [-1, -1, 0]]))
    1.0

    ```
    """
    return None if before is None else float((before != now).sum(axis=1).mean())


def read_measures(folder: Path) -> list[dict[str, Any]]:
    """Read the rows of measures of a run, up to one that is damaged; none if there is no file."""
    rows: list[dict[str, Any]] = []
    with suppress(FileNotFoundError, ValueError, TypeError, LookupError):
        for line in (folder / MEASURES_FILE).read_bytes().splitlines():
            row = dict(json.loads(line))
            sum(float(value) for value in row.values() if value is not None)
            rows.append({**row, "step": int(row["step"]), "ap": float(row["ap"])})
    return rows


def _assignments_path(folder: Path, step: int) -> Path:
    return folder / ASSIGNMENTS / f"step_{step:08d}.npy"


def _read_assignments(folder: Path, step: int | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """Read the matching of an earlier evaluation; `None` if there was none."""
    if step is None:
        return None
    path = _assignments_path(folder, step)
    try:
        return np.load(path).reshape(shape)
    except (OSError, ValueError, EOFError) as error:
        logger.warning("%s: cannot be read (%s); the matching instability after it is unknown", path, error)
        return None


def write_assignments(folder: Path, step: int, assignments: np.ndarray, kept: int | None) -> None:
    """Write the matching of an evaluation, and delete all but it and the one before, which a resumed run may need."""
    path = _assignments_path(folder, step)
    with atomic_write(path) as temporary:
        np.save(temporary, assignments)
    for other in path.parent.glob("step_*.npy"):
        if other not in (path, kept is not None and _assignments_path(folder, kept)):
            other.unlink()
