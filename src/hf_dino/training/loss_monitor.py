"""Monitor the losses of a run: average them for the history, and stop with a cause when one is NaN or infinite."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply, send_to_device
from torch import nn
from torch.distributed.tensor import DTensor

from ..detectors import model_inputs, training_loss
from ..utils.distributed import SHARDED_DISTRIBUTED_TYPES, all_gather_unique, all_reduce_max, all_reduce_mean
from ..utils.errors import summarize_list


# A GradScaler halves its scale after each non-finite gradient; more in a row than this are not due to the scale.
MAX_CONSECUTIVE_NONFINITE = 10
# of those that a model has; RT-DETR and its descendants have other losses of the class
_IN_HISTORY = ("loss", "loss_ce", "loss_vfl", "loss_mal", "loss_bbox", "loss_giou")


@dataclass(frozen=True)
class RandomState:
    """State of the random generators of torch, on the CPU and on this process's GPU.

    Attributes:
        cpu (`torch.Tensor`): State of the CPU's generator.
        cuda (`torch.Tensor` or `None`): State of the GPU's, if there is one.
    """

    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def capture(cls) -> "RandomState":
        """Return the current state, without waiting for the device."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None)

    def restore(self) -> None:
        """Make this the current state."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


_Batch = tuple[Mapping[str, Any], RandomState]


class LossMonitor:
    """Collect the losses since the last row of the history, averaged over the processes.

    For each micro-batch, call [`LossMonitor.begin`], the model and [`LossMonitor.add`]; before each step of the
    optimizer, [`LossMonitor.check`]. While all values are finite, it reads the device once per step.
    `accelerator.register_for_checkpointing` accepts it, so that the averages of a resumed run are those of an
    uninterrupted one.

    Args:
        accelerator (`Accelerator`): The accelerator, whose processes stop together. If it has a `GradScaler`, which
            skips steps with a non-finite gradient, a few of them in a row are accepted.
        model (`nn.Module`): The model that the accelerator prepared.
        on_failure (`Callable[[], str]`): Saves the state before the failed step and returns where; called by every
            process, with the random state that the step began with.
        files (`Mapping[int, Any]`, *optional*): Names of the images in error messages, such as their paths, by
            `image_id`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        on_failure: Callable[[], str],
        files: Mapping[int, Any] | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.on_failure = on_failure
        self.files = files or {}
        self.max_nonfinite = 0 if accelerator.scaler is None else MAX_CONSECUTIVE_NONFINITE
        self._num_nonfinite = 0  # consecutive steps up to now
        self._batches: list[_Batch] = []  # of this step
        self._losses: list[tuple[list[str], torch.Tensor]] = []  # names and values of this step, on the device
        self._rows: list[dict[str, float]] = []

    def begin(self, batch: Mapping[str, Any]) -> None:
        """Store a micro-batch and the random state before the model is called.

        Args:
            batch (`Mapping`): Arguments of the model, preferably as loaded: they are kept until the end of the step
                and need not occupy the device's memory.
        """
        self._batches.append((batch, RandomState.capture()))

    def add(self, loss: torch.Tensor, loss_dict: Mapping[str, torch.Tensor]) -> None:
        """Store the losses of a micro-batch without reading them, which would wait for the device.

        Args:
            loss (`torch.Tensor` of shape `()`): The loss.
            loss_dict (`Mapping[str, torch.Tensor]`): Its terms.
        """
        values = torch.stack([loss.detach(), *(term.detach() for term in loss_dict.values())])
        self._losses.append((["loss", *loss_dict], values))

    def check(self, step: int, gradient_norm: torch.Tensor | float | None = None) -> dict[str, float]:
        """Read the losses of a step before the optimizer takes it; called by every process.

        DeepSpeed has already taken it, in `accelerator.backward`, so the state that is saved may be non-finite too.

        Args:
            step (`int`): Optimizer steps done before this one.
            gradient_norm (`torch.Tensor` of shape `()`, *optional*): Norm of the gradient of all weights over all
                processes, from `accelerator.clip_grad_norm_`.

        Returns:
            `dict[str, float]`: Means over the step of `loss` and the last decoder layer's terms.

        Raises:
            FloatingPointError: If a loss or the gradient is NaN or infinite in more consecutive steps than accepted.
        """
        norm, rows = self._read(gradient_norm)
        batches, self._batches = self._batches, []
        is_finite = all(map(math.isfinite, (norm, *(row["loss"] for row in rows))))
        is_nonfinite = all_reduce_max(self.accelerator, not is_finite)
        self._num_nonfinite = self._num_nonfinite + 1 if is_nonfinite else 0
        if self._num_nonfinite > self.max_nonfinite:
            self._stop(step, norm, rows, batches)
        means = all_reduce_mean(self.accelerator, _means(rows))
        if not is_nonfinite:
            self._rows.append(means)
        return means

    def averages(self) -> dict[str, float]:
        """Return the means over the steps since the last call, {} if there were none."""
        rows, self._rows = self._rows, []
        return _means(rows)

    def state_dict(self) -> dict[str, Any]:
        """Return the losses since the last row of the history and the number of consecutive non-finite steps."""
        return {"rows": self._rows, "num_nonfinite": self._num_nonfinite}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self._rows, self._num_nonfinite = list(state["rows"]), state["num_nonfinite"]

    def _read(self, gradient_norm: torch.Tensor | float | None) -> tuple[float, list[dict[str, float]]]:
        """Read the norm and the losses of each micro-batch, in one transfer."""
        names, losses = zip(*self._losses)
        self._losses = []
        full = gradient_norm.full_tensor() if isinstance(gradient_norm, DTensor) else gradient_norm
        norm = torch.as_tensor(0.0 if full is None else full).to(losses[0]).reshape(1)
        first, *values = torch.cat([norm, *losses]).tolist()
        remaining = iter(values)
        return first, [{name: next(remaining) for name in each} for each in names]

    def _stop(self, step: int, norm: float, rows: list[dict[str, float]], batches: list[_Batch]) -> NoReturn:
        """Save the state, find the cause, and raise one error with the findings of all processes."""
        _, random_state = batches[0]
        random_state.restore()
        saved = self.on_failure()
        self.model.zero_grad(set_to_none=True)  # frees memory to repeat the step
        reports = [self._report(row, *batch) for row, batch in zip(rows, batches, strict=True)]
        findings = "; ".join(all_gather_unique("; ".join(filter(None, reports))))
        raise FloatingPointError(
            f"step {step} (counted from 0): {findings or f'the norm of the gradient is {norm}'}.\n{saved}.\n"
            "Check these images and their boxes, or restart with a lower --learning_rate, a smaller --max_grad_norm, "
            "or without fp16"
        )

    def _report(self, row: Mapping[str, float], batch: Mapping[str, Any], random_state: RandomState) -> str:
        """Describe what is non-finite in a micro-batch; empty if nothing is."""
        cause = self._find_cause(batch, random_state)
        losses = {name: value for name, value in row.items() if not math.isfinite(value)}
        if not losses and cause is None:
            return ""
        values = [f"{name} is {value}" for name, value in losses.items()] or ["the loss is finite"]
        ids = [int(label["image_id"]) for label in batch["labels"]]
        images = ", ".join(f"{i} ({self.files[i]})" if i in self.files else str(i) for i in ids)
        first = f"; the first non-finite tensor is {cause}" if cause else ""
        return f"{summarize_list(values, 3)} for the images with image_id {images}{first}"

    def _find_cause(self, batch: Mapping[str, Any], random_state: RandomState) -> str | None:
        if self.accelerator.distributed_type in SHARDED_DISTRIBUTED_TYPES:
            return None
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
        try:
            return find_first_nonfinite(model, batch, random_state, scale)
        except torch.OutOfMemoryError:
            return None


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: fmean(row[name] for row in rows) for name in _IN_HISTORY if rows and name in rows[0]}


def find_first_nonfinite(
    model: Any, batch: Mapping[str, Any], random_state: RandomState, loss_scale: float = 1.0
) -> str | None:
    """Repeat a micro-batch and name its first NaN or infinite tensor, in the order of computation.

    That is: weights, the batch, the outputs of the layers, the loss, the gradients of the layers' outputs, and those
    of the weights. The statistics of batch norms are updated once more. transformers' `DebugUnderflowOverflow` is not
    used, because it also reports boxes that are infinite on purpose (positions in the padding), does not check
    gradients, prints pages, and never removes its hooks.

    Args:
        model (`PreTrainedModel`): A detection model with the weights that the step began with.
        batch (`Mapping`): Arguments of the model, on any device.
        random_state (`RandomState`): State before the model was called.
        loss_scale (`float`, *optional*, defaults to 1.0): Scale of a `GradScaler`.
    """
    found: list[str] = []
    parameters = dict(model.named_parameters())
    for name, weight in parameters.items():
        _check_finite(found, f"the weight {name}", weight)
    for name, value in batch.items():
        recursively_apply(partial(_check_finite, found, f"the input {name}"), value)
    random_state.restore()
    with _check_outputs(model, found):
        batch = send_to_device(batch, next(iter(parameters.values())).device)
        outputs = model(**model_inputs(batch, model.config))
        loss, terms = training_loss(outputs, batch, model.config)
        for name, term in {"loss": loss, **terms}.items():
            _check_finite(found, f"the loss term {name}", term)
        if not found:
            trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
            gradients = torch.autograd.grad(loss * loss_scale, list(trained.values()), materialize_grads=True)
            for name, gradient in zip(trained, gradients):
                _check_finite(found, f"the gradient of {name}", gradient)
    return next(iter(found), None)


def _check_finite(found: list[str], name: str, tensor: torch.Tensor) -> None:
    if not tensor.detach().isfinite().all():
        found.append(name)


@contextmanager
def _check_outputs(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Check the outputs of the layers as they are computed, and the gradients of the outputs."""

    def check(name: str, output: torch.Tensor) -> None:
        _check_finite(found, f"the output of {name}", output)
        if output.requires_grad:
            output.register_hook(partial(_check_finite, found, f"the gradient of the output of {name}"))

    def hook(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        recursively_apply(partial(check, name), output)

    layers = {name: module for name, module in model.named_modules() if not any(module.children())}
    handles = [module.register_forward_hook(partial(hook, name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
