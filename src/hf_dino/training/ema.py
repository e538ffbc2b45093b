"""A running average of the weights, which is usually a better and always a steadier model than the last step's.

Polyak and Juditsky, https://doi.org/10.1137/0330046; the ramp of the decay is that of TensorFlow's
`ExponentialMovingAverage(num_updates=...)`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..utils.distributed import distribute_like, to_full_tensor, to_local


def get_decay(updates: int, decay: float) -> float:
    """Say how much of the average stays at an update: little at first, so that it soon forgets the first weights.

    Up to `decay` the average looks back over about the last tenth of the run so far.

    Args:
        updates (`int`): Updates done before this one.
        decay (`float`): Where the ramp ends, in [0, 1).

    Example:

    ```python
    >>> [round(get_decay(updates, decay=0.99), 2) for updates in (0, 8, 80, 890, 9000)]
    [0.1, 0.5, 0.9, 0.99, 0.99]

    ```
    """
    return min(decay, (1 + updates) / (10 + updates))


class ExponentialMovingAverage:
    """An exponential moving average of a model's weights, in float32 beside the model.

    What is averaged are the parameters that train and the buffers of real numbers, such as the statistics of batch
    norms; frozen parameters are the model's own and cost nothing. `accelerator.register_for_checkpointing` takes it.

    Args:
        model (`nn.Module`): The bare model, `accelerator.unwrap_model(model)` of a prepared one, already frozen where
            it is to be. Of a model that FSDP2 shares out, each process averages its part.
        decay (`float`): Part of the average that an update leaves, once its ramp is over, in [0, 1).

    Raises:
        ValueError: If `decay` is not in [0, 1).

    Example:

    ```python
    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> average = ExponentialMovingAverage(model, decay=0.9)
    >>> _ = nn.init.ones_(model.weight)  # as a step of the optimizer would
    >>> average.update()
    >>> with average.applied():
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
        self.averages = {name: tensor.to(torch.float32, copy=True) for name, tensor in self._trained().items()}

    def _trained(self) -> dict[str, torch.Tensor]:
        """What an average is made of; asked for each time, since `model.to(...)` replaces buffers."""
        parameters = {name: each.detach() for name, each in self.model.named_parameters() if each.requires_grad}
        return parameters | {name: each for name, each in self.model.named_buffers() if each.is_floating_point()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights in, after a step of the optimizer."""
        trained = self._trained()
        averages = [to_local(self.averages[name]) for name in trained]
        now = [to_local(tensor).to(average) for tensor, average in zip(trained.values(), averages)]
        torch._foreach_lerp_(averages, now, 1 - get_decay(self.updates, self.decay))
        self.updates += 1

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights while the context lasts, to evaluate or save it, but not to train it.

        The trained weights come back bit for bit.
        """
        set_aside = {name: tensor.clone() for name, tensor in self._trained().items()}
        try:
            self._fill_in(self.averages)
            yield
        finally:
            self._fill_in(set_aside)

    def _fill_in(self, values: dict[str, torch.Tensor]) -> None:
        for name, tensor in self._trained().items():
            tensor.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """The averages by the names of the weights, and how many updates they are of; called by every process."""
        return {
            "updates": self.updates,
            "averages": {name: to_full_tensor(each) for name, each in self.averages.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: If it is the average of another model, or of one with other frozen parameters.
        """
        expected, given = _shapes(self.averages), _shapes(state["averages"])
        if different := {name for name, _ in expected.items() ^ given.items()}:
            raise ValueError(f"the averaged weights are of another model, which differs in {min(different)}")
        for name, average in self.averages.items():
            average.copy_(distribute_like(state["averages"][name], average))
        self.updates = state["updates"]


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
