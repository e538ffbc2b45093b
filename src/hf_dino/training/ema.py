"""Exponential moving average of the weights, usually a better model than the last step's.

Polyak and Juditsky, https://doi.org/10.1137/0330046; the warm-up of the decay is that of TensorFlow's
`ExponentialMovingAverage(num_updates=...)`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..utils.distributed import distribute_like, to_full_tensor, to_local


def get_decay(updates: int, decay: float) -> float:
    """Return the decay of an update: low at first, so that the average soon forgets the initial weights.

    During this warm-up, the average covers about the last tenth of the run so far.

    Args:
        updates (`int`): Number of updates before this one.
        decay (`float`): Decay after the warm-up, in [0, 1).

    Example:

    ```python
    >>> [round(get_decay(updates, decay=0.99), 2) for updates in (0, 8, 80, 890, 9000)]
    [0.1, 0.5, 0.9, 0.99, 0.99]

    ```
    """
    return min(decay, (1 + updates) / (10 + updates))


class ExponentialMovingAverage:
    """Exponential moving average of a model's weights, in float32.

    It averages the trained parameters and the floating-point buffers, such as the statistics of batch norms. Frozen
    parameters are not copied. `accelerator.register_for_checkpointing` accepts it.

    Args:
        model (`nn.Module`): The unwrapped model, `accelerator.unwrap_model(model)` of a prepared one, with its frozen
            stages already frozen. Of a model sharded by FSDP2, each process averages its shard.
        decay (`float`): Fraction of the average that an update keeps after the warm-up, in [0, 1).

    Attributes:
        shadow (`dict[str, torch.Tensor]`): Averaged weights by name.
        updates (`int`): Number of updates so far.

    Raises:
        ValueError: If `decay` is not in [0, 1).

    Example:

    ```python
    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> average = ExponentialMovingAverage(model, decay=0.9)
    >>> _ = nn.init.ones_(model.weight)  # as a step of the optimizer would
    >>> average.update()
    >>> with average.average_parameters():
    ...     print(round(model.weight.item(), 2))
    0.9
    >>> model.weight.item()
    1.0

    ```
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and less than 1, got {decay}")
        self.model = model
        self.decay = decay
        self.updates = 0
        self.shadow = {name: tensor.to(torch.float32, copy=True) for name, tensor in self._trained().items()}

    def _trained(self) -> dict[str, torch.Tensor]:
        """Return the averaged tensors of the model; looked up each time, since `model.to(...)` replaces buffers."""
        parameters = {name: each.detach() for name, each in self.model.named_parameters() if each.requires_grad}
        return parameters | {name: each for name, each in self.model.named_buffers() if each.is_floating_point()}

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights to the average, after a step of the optimizer."""
        trained = self._trained()
        shadow = [to_local(self.shadow[name]) for name in trained]
        now = [to_local(tensor).to(average) for tensor, average in zip(trained.values(), shadow)]
        torch._foreach_lerp_(shadow, now, 1 - get_decay(self.updates, self.decay))
        self.updates += 1

    @contextmanager
    @torch.no_grad()
    def average_parameters(self) -> Iterator[None]:
        """Give the model the averaged weights while the context lasts, to evaluate or save it, but not to train it.

        The trained weights are restored bitwise identical.
        """
        stored = {name: tensor.clone() for name, tensor in self._trained().items()}
        try:
            self._copy_to_model(self.shadow)
            yield
        finally:
            self._copy_to_model(stored)

    def _copy_to_model(self, values: dict[str, torch.Tensor]) -> None:
        for name, tensor in self._trained().items():
            tensor.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights and the number of updates; called by every process."""
        return {"updates": self.updates, "shadow": {name: to_full_tensor(each) for name, each in self.shadow.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state.

        Raises:
            ValueError: If it is of another model, or of one with other frozen parameters.
        """
        expected, given = _shapes(self.shadow), _shapes(state["shadow"])
        if different := {name for name, _ in expected.items() ^ given.items()}:
            raise ValueError(f"the averaged weights are of another model, which differs in {min(different)}")
        for name, average in self.shadow.items():
            average.copy_(distribute_like(state["shadow"][name], average))
        self.updates = state["updates"]


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
