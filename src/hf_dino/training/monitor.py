"""Watch the losses of a run: stop when one is not a number and say why, average them for the history."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from ..utils.distributed import SHARDED_DISTRIBUTED_TYPES, all_gather_unique, all_reduce_max, all_reduce_mean
from ..utils.errors import summarize_list
from .diagnosis import RandomState, find_first_nonfinite


# With a GradScaler, which halves its scale each time: more in a row than this are no matter of the scale.
_TOLERATED = 10
_IN_HISTORY = ("loss", "loss_ce", "loss_bbox", "loss_giou")


@dataclass(frozen=True)
class _Begun:
    """What it takes to compute a batch once more."""

    batch: Mapping[str, Any]
    random_state: RandomState


class LossMonitor:
    """Collects the losses of the steps since the last row of the history, averaged over the processes.

    For each batch: [`LossMonitor.begin`], the model, [`LossMonitor.add`]. Before each step of the optimizer:
    [`LossMonitor.check`]. In a run whose numbers are finite it reads the device once a step and keeps nothing.
    `accelerator.register_for_checkpointing` takes it, so that a resumed run averages what the whole one would have.

    Args:
        accelerator (`Accelerator`): Knows the processes, which stop together. If it has a `GradScaler`, which leaves
            out steps whose gradient is not finite, a few of them in a row do no harm.
        model (`nn.Module`): The model that the accelerator prepared.
        rescue (`Callable[[], str]`): Saves the state before a step that has failed, and says where; called by every
            process, with the random numbers that the step began with.
        files (`Mapping[int, Any]`, *optional*): What to call an image, such as its path, by its `image_id`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        rescue: Callable[[], str],
        files: Mapping[int, Any] | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.rescue = rescue
        self.files = files or {}
        self.tolerated = 0 if accelerator.scaler is None else _TOLERATED
        self._wrong_steps = 0  # in a row, up to now
        self._names: list[str] = []
        self._begun: list[_Begun] = []  # per batch of this step, as the next
        self._unread: list[torch.Tensor] = []
        self._rows: list[dict[str, float]] = []

    def begin(self, batch: Mapping[str, Any]) -> None:
        """Take note of a batch, before the model gets it.

        Args:
            batch (`Mapping`): The model's arguments, best as the loader gave them: it is held until the step is done,
                and need not take up the device's memory.
        """
        self._begun.append(_Begun(batch, RandomState.now()))

    def add(self, loss: torch.Tensor, loss_dict: Mapping[str, torch.Tensor]) -> None:
        """Take in a batch's losses without reading them, which would wait for the device.

        Args:
            loss (`torch.Tensor` of shape `()`): The model's.
            loss_dict (`Mapping[str, torch.Tensor]`): Its terms.
        """
        self._names = ["loss", *loss_dict]
        self._unread.append(torch.stack([loss.detach(), *(term.detach() for term in loss_dict.values())]))

    def check(self, step: int, gradient_norm: torch.Tensor | float | None = None) -> dict[str, float]:
        """Read the losses of a step's batches, before the optimizer takes it; called by every process.

        DeepSpeed has taken it by then, in `accelerator.backward`: what is rescued may be spoilt, and is called so.

        Args:
            step (`int`): Optimizer steps done before this one.
            gradient_norm (`torch.Tensor` of shape `()`, *optional*): What `accelerator.clip_grad_norm_` returned: it
                has seen the gradient of every weight, from all processes.

        Returns:
            `dict[str, float]`: The step's means: `loss` and the last decoder layer's terms.

        Raises:
            FloatingPointError: If a loss or the gradient is infinite or not a number, in more steps in a row than are
                tolerated: nothing that follows would be worth keeping.
        """
        norm, rows = self._read(gradient_norm)
        begun, self._begun = self._begun, []
        is_wrong = all_reduce_max(self.accelerator, not all(map(math.isfinite, (norm, *(r["loss"] for r in rows)))))
        self._wrong_steps = self._wrong_steps + 1 if is_wrong else 0
        if self._wrong_steps > self.tolerated:
            self._stop(step, norm, rows, begun)
        means = all_reduce_mean(self.accelerator, _means(rows))
        if not is_wrong:
            self._rows.append(means)
        return means

    def averages(self) -> dict[str, float]:
        """Average what was checked since the last call: `loss` and the last decoder layer's terms; {} if nothing."""
        rows, self._rows = self._rows, []
        return _means(rows)

    def state_dict(self) -> dict[str, Any]:
        """What was checked since the last row of the history, and how many steps in a row were left out."""
        return {"rows": self._rows, "wrong_steps": self._wrong_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._rows, self._wrong_steps = list(state["rows"]), state["wrong_steps"]

    def _read(self, gradient_norm: torch.Tensor | float | None) -> tuple[float, list[dict[str, float]]]:
        """The norm and each batch's losses, in one transfer."""
        unread, self._unread = torch.stack(self._unread), []
        whole = gradient_norm.full_tensor() if isinstance(gradient_norm, DTensor) else gradient_norm
        norm = torch.as_tensor(0.0 if whole is None else whole).to(unread).reshape(1)
        numbers = torch.cat([norm, unread.flatten()]).tolist()
        width = len(self._names)
        return numbers[0], [dict(zip(self._names, numbers[i : i + width])) for i in range(1, len(numbers), width)]

    def _stop(self, step: int, norm: float, rows: list[dict[str, float]], begun: list[_Begun]) -> NoReturn:
        """Keep the state, look for the cause, and raise one error that has both from all processes."""
        begun[0].random_state.restore()
        kept = self.rescue()
        self.model.zero_grad(set_to_none=True)  # makes room for computing the step again
        reports = [self._report(row, each) for row, each in zip(rows, begun, strict=True)]
        what = "; ".join(all_gather_unique("; ".join(report for report in reports if report)))
        raise FloatingPointError(
            f"step {step} (counted from 0): {what or f'the norm of the gradient is {norm}'}.\n{kept}.\n"
            "Look at these images and their boxes, or start again with a lower learning rate, a smaller --clip, or "
            "without fp16"
        )

    def _report(self, row: Mapping[str, float], begun: _Begun) -> str:
        """What is wrong with a batch, or nothing."""
        cause = self._cause(begun)
        wrong = {name: value for name, value in row.items() if not math.isfinite(value)}
        if not wrong and cause is None:
            return ""
        numbers = [f"{name} is {value}" for name, value in wrong.items()] or ["the loss is finite"]
        ids = [int(label["image_id"]) for label in begun.batch["labels"]]
        images = ", ".join(f"{i} ({self.files[i]})" if i in self.files else str(i) for i in ids)
        first = f"; the first tensor that is not finite is {cause}" if cause else ""
        return f"{summarize_list(numbers, 3)} with the images of image_id {images}{first}"

    def _cause(self, begun: _Begun) -> str | None:
        if self.accelerator.distributed_type in SHARDED_DISTRIBUTED_TYPES:
            return None
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
        try:
            return find_first_nonfinite(model, begun.batch, begun.random_state, scale)
        except torch.OutOfMemoryError:
            return None


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: fmean(row[name] for row in rows) for name in _IN_HISTORY} if rows else {}
