"""Watch the losses of a run: stop when one is not a number, average them for the history."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch


_MAIN_TERMS = ("loss_ce", "loss_bbox", "loss_giou")


class LossMonitor:
    """Collects the losses of this process since the last row of the history."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._terms: list[torch.Tensor] = []

    def add(
        self,
        loss: torch.Tensor,
        loss_dict: Mapping[str, torch.Tensor],
        labels: Sequence[Mapping[str, torch.Tensor]],
        step: int,
    ) -> float:
        """Take in a batch's losses and return the total.

        Args:
            loss (`torch.Tensor` of shape `()`): The model's.
            loss_dict (`Mapping[str, torch.Tensor]`): Its terms.
            labels (`Sequence[Mapping]`): The batch's labels, for the ids of its pictures.
            step (`int`): The optimizer step that the batch belongs to.

        Raises:
            FloatingPointError: If the loss is infinite or not a number: nothing that follows would be worth keeping.
        """
        value = float(loss.detach())
        if not math.isfinite(value):
            terms = {name: float(term.detach()) for name, term in loss_dict.items()}
            wrong = {name: term for name, term in terms.items() if not math.isfinite(term)}
            pictures = [int(label["image_id"]) for label in labels]
            raise FloatingPointError(
                f"the loss is {value} at step {step} with the pictures of image_id {pictures} (terms that are not "
                f"finite: {wrong}); look at these pictures and their boxes, or lower the learning rate"
            )
        self._losses.append(value)
        self._terms.append(torch.stack([loss_dict[name].detach() for name in _MAIN_TERMS]))
        return value

    def averages(self) -> dict[str, Any]:
        """Average what was added since the last call: `loss` and the last decoder layer's terms."""
        terms = torch.stack(self._terms).mean(dim=0).tolist()
        row = {"loss": sum(self._losses) / len(self._losses), **dict(zip(_MAIN_TERMS, terms, strict=True))}
        self._losses, self._terms = [], []
        return row
