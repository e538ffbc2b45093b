"""Watch the losses of a run: stop when one is not a number, average them for the history."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch


# With a GradScaler, which halves its scale each time: more in a row than this are no matter of the scale.
_TOLERATED = 10
_IN_HISTORY = ("loss", "loss_ce", "loss_bbox", "loss_giou")


class LossMonitor:
    """Collects the losses of this process since the last row of the history.

    Args:
        with_scaler (`bool`, *optional*, defaults to `False`): Whether a `GradScaler` leaves out steps whose loss is
            infinite or not a number, so that a few of them in a row do no harm.
    """

    def __init__(self, with_scaler: bool = False) -> None:
        self.tolerated = _TOLERATED if with_scaler else 0
        self._wrong_steps = 0  # in a row, up to now
        self._names: list[str] = []
        self._unread: list[torch.Tensor] = []  # per batch of this step
        self._labels: list[Sequence[Mapping[str, torch.Tensor]]] = []
        self._rows: list[dict[str, float]] = []

    def add(
        self,
        loss: torch.Tensor,
        loss_dict: Mapping[str, torch.Tensor],
        labels: Sequence[Mapping[str, torch.Tensor]],
    ) -> None:
        """Take in a batch's losses without reading them, which would wait for the device.

        Args:
            loss (`torch.Tensor` of shape `()`): The model's.
            loss_dict (`Mapping[str, torch.Tensor]`): Its terms.
            labels (`Sequence[Mapping]`): The batch's labels, for the ids of its pictures.
        """
        self._names = ["loss", *loss_dict]
        self._unread.append(torch.stack([loss.detach(), *(term.detach() for term in loss_dict.values())]))
        self._labels.append(labels)

    def check(self, step: int) -> float:
        """Read the losses of a step's batches, before the optimizer takes it, and return their mean.

        Args:
            step (`int`): The optimizer step.

        Raises:
            FloatingPointError: If a loss is infinite or not a number, in more steps in a row than are tolerated:
                nothing that follows would be worth keeping.
        """
        rows = [dict(zip(self._names, values)) for values in torch.stack(self._unread).tolist()]
        labels, self._unread, self._labels = self._labels, [], []
        wrong = [index for index, row in enumerate(rows) if not math.isfinite(row["loss"])]
        self._wrong_steps = self._wrong_steps + 1 if wrong else 0
        if self._wrong_steps > self.tolerated:
            raise FloatingPointError(_explain(rows[wrong[0]], labels[wrong[0]], step))
        if not wrong:
            self._rows += rows
        return fmean(row["loss"] for row in rows)

    def averages(self) -> dict[str, Any]:
        """Average what was checked since the last call: `loss` and the last decoder layer's terms; {} if nothing."""
        rows, self._rows = self._rows, []
        return {name: fmean(row[name] for row in rows) for name in _IN_HISTORY} if rows else {}


def _explain(row: Mapping[str, float], labels: Sequence[Mapping[str, torch.Tensor]], step: int) -> str:
    wrong = {name: value for name, value in row.items() if name != "loss" and not math.isfinite(value)}
    pictures = [int(label["image_id"]) for label in labels]
    return (
        f"the loss is {row['loss']} at step {step} with the pictures of image_id {pictures} (terms that are not "
        f"finite: {wrong}); look at these pictures and their boxes, or lower the learning rate"
    )
