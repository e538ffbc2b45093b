"""Find the first tensor of a step that is not finite, by computing the step once more with the same random numbers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn


@dataclass(frozen=True)
class RandomState:
    """What the numbers that torch draws from here on depend on, on the CPU and on this process's GPU.

    Attributes:
        cpu (`torch.Tensor`): State of the CPU's generator.
        cuda (`torch.Tensor` or `None`): State of the GPU's, if there is one.
    """

    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def now(cls) -> "RandomState":
        """Take the present state, which neither waits for the device nor changes anything."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None)

    def restore(self) -> None:
        """Make this the present state."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


def find_first_nonfinite(
    model: nn.Module, batch: Mapping[str, Any], random_state: RandomState, loss_scale: float = 1.0
) -> str | None:
    """Name the first tensor that is infinite or not a number, in the order in which a step computes them.

    That is: weights, the batch, the outputs of the model's layers, the terms of the loss, the gradients of the layers'
    outputs from the last to the first, and those of the weights. Running statistics of batch norms are updated anew.

    Args:
        model (`nn.Module`): A `DinoDetrForObjectDetection` with the weights that the step began with.
        batch (`Mapping`): The model's arguments, on any device.
        random_state (`RandomState`): From before the step's call of the model.
        loss_scale (`float`, *optional*, defaults to 1.0): What a `GradScaler` multiplies the loss with.

    Returns:
        `str` or `None`: For people; None if all is finite.
    """
    found = [f"the weight {name}" for name, weight in model.named_parameters() if not _is_finite(weight)]
    found += [f"the input {name}" for name, value in batch.items() if not all(map(_is_finite, _tensors(value)))]
    # computed even if something is found: the processes' losses wait for each other
    hooks = [module.register_forward_hook(partial(_look, found, name)) for name, module in model.named_modules()]
    random_state.restore()
    try:
        outputs = model(**send_to_device(batch, next(model.parameters()).device))
        terms = {"loss": outputs.loss, **outputs.loss_dict}
        found += [f"the term {name} of the loss" for name, term in terms.items() if not _is_finite(term)]
        if not found:
            found += _gradients(model, outputs.loss * loss_scale, found)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _look(found: list[str], name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    """A forward hook that looks at what a module gives, and at the gradients when they come back."""
    is_layer = not any(module.children())
    for tensor in _tensors(output):
        # what larger parts give may be infinite on purpose, as are the boxes of positions outside an image
        if not _is_finite(tensor) if is_layer else bool(tensor.isnan().any()):
            found.append(f"the output of {name}")
        elif tensor.requires_grad and is_layer:
            tensor.register_hook(partial(_look_at_gradient, found, name))


def _look_at_gradient(found: list[str], name: str, gradient: torch.Tensor) -> None:
    if not _is_finite(gradient):
        found.append(f"the gradient of the output of {name}")


def _gradients(model: nn.Module, loss: torch.Tensor, found: list[str]) -> list[str]:
    """Go back through the step, which fills `found`, and name the weights whose gradients are not finite."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    wrong = [name for name, each in zip(trained, gradients, strict=True) if each is not None and not _is_finite(each)]
    return [f"the gradient of {name}" for name in wrong]


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors of real numbers in a module's output, however deep."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
        return
    parts: Any = value if isinstance(value, (tuple, list)) else ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif is_dataclass(value):
        parts = vars(value).values()
    for part in parts:
        yield from _tensors(part)
