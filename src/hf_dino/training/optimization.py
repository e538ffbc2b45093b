"""The original's optimizer settings and its peers': parameter groups, the learning rate at every step, when to stop.

DINO (https://github.com/IDEA-Research/DINO) `main.py` and `util/get_param_dicts.py`: AdamW, the backbone at a tenth of
the learning rate, weight decay on every parameter, norms and biases included, and one drop to a tenth near the end.

Learning rate and end are functions of the step and of the history, and nothing else: there is no scheduler whose state
could go wrong when a run is resumed, or that counts the steps of several processes.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..utils.errors import InputError
from .freezing import BACKBONE


# `lr_linear_proj_names` of the original: what says where to look, which Deformable DETR trains at a tenth of the rate.
# Nothing here is called `reference_points`, as in DINO itself, where they come from the encoder.
_SAMPLING = r"\.(sampling_offsets|reference_points)\."


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Compute the layers' activations again in the backward pass instead of keeping them: less memory, more time."""
    newer, older = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # since transformers 5.23
    getattr(model, newer if hasattr(model, newer) else older)()


def compile_layers(model: PreTrainedModel) -> None:
    """Let `torch.compile` translate the layers of encoder and decoder, where most of the time goes.

    All layers of a kind share one translation, which serves images and objects of any size and number: it costs a
    minute at the first step and never again. Names of weights stay as they are. The whole model, in one piece, takes
    many times as long to translate, and a new translation for every size of image.

    Args:
        model (`PreTrainedModel`): A `DinoDetrForObjectDetection`, before `accelerator.prepare`.
    """
    for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
        layer.compile(dynamic=True)


def get_param_groups(
    model: nn.Module, learning_rate: float, backbone_lr_factor: float, sampling_lr_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Share out the parameters that train, by their learning rate.

    Args:
        model (`nn.Module`): A `DinoDetrForObjectDetection`.
        learning_rate (`float`): Of everything but what follows.
        backbone_lr_factor (`float`): The backbone's learning rate is this many times `learning_rate`.
        sampling_lr_factor (`float`, *optional*, defaults to 1.0): And that of the layers which predict the sampling
            offsets of deformable attention. Deformable DETR has 0.1; in DINO's published runs its 0.1 had no effect.

    Returns:
        `list[dict]`: Groups for a torch optimizer, each with `params`, `lr`, and `initial_lr`, which the schedule
        multiplies. Every parameter that trains is in exactly one of them.

    Raises:
        InputError: If all parameters are frozen.
    """
    # the first pattern that is found in a name decides
    factors = {re.escape(BACKBONE): backbone_lr_factor, _SAMPLING: sampling_lr_factor, "": 1.0}
    groups: dict[float, list[nn.Parameter]] = {factor: [] for factor in reversed(factors.values())}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[next(factor for pattern, factor in factors.items() if re.search(pattern, name))].append(parameter)
    if not any(groups.values()):
        raise InputError("nothing is left to train: every parameter of the model is frozen")
    return [
        {"params": parameters, "lr": learning_rate * factor, "initial_lr": learning_rate * factor}
        for factor, parameters in groups.items()
        if parameters
    ]


def _drops(step: int, total_steps: int, get_milestones: Sequence[int]) -> float:
    """The original's: a tenth after each drop."""
    return 0.1 ** sum(step >= drop_step for drop_step in get_milestones)


def _cosine(step: int, total_steps: int, get_milestones: Sequence[int]) -> float:
    """From 1 to 0 along half a cosine."""
    return _between(1.0, 0.0, step / total_steps)


def _one_cycle(step: int, total_steps: int, get_milestones: Sequence[int]) -> float:
    """Up from a 25th in the first fifth of the run, and down to nearly nothing; as `OneCycleLR` of the original."""
    lowest, peak = 1 / 25, 0.2 * total_steps - 1
    if step < peak:
        return _between(lowest, 1.0, step / peak)
    return _between(1.0, lowest / 10_000, (step - peak) / (total_steps - 1 - peak))


def _between(first: float, last: float, part: float) -> float:
    """What lies between two numbers, when `part` of the way is gone: slow, fast, slow."""
    return last + (first - last) * (1 + math.cos(math.pi * min(part, 1.0))) / 2


SCHEDULES: dict[str, Callable[[int, int, Sequence[int]], float]] = {
    "step": _drops,
    "cosine": _cosine,
    "one-cycle": _one_cycle,
}
"""Shapes of the learning rate over a run, without its warm-up."""


def get_lr_multiplier(
    name: str, *, total_steps: int, get_milestones: Sequence[int] = (), warmup_steps: int = 0
) -> Callable[[int], float]:
    """Choose what the learning rate is multiplied with at each step.

    Args:
        name (`str`): A key of `SCHEDULES`: `"step"`, `"cosine"` or `"one-cycle"`.
        total_steps (`int`): Optimizer steps of the whole run.
        get_milestones (`Sequence[int]`, *optional*): For `"step"`: from each of these on it is a tenth of what it was.
        warmup_steps (`int`, *optional*, defaults to 0): Steps over which it rises from 0 to what the schedule says.
            The original has none.

    Returns:
        `Callable[[int], float]`: Takes the number of optimizer steps done, for the factor of the next one.

    Example:

    ```python
    >>> factor = get_lr_multiplier("step", total_steps=6, get_milestones=[4], warmup_steps=2)
    >>> [factor(step) for step in range(6)]
    [0.5, 1.0, 1.0, 1.0, 0.1, 0.1]
    >>> factor = get_lr_multiplier("cosine", total_steps=4)
    >>> [round(factor(step), 2) for step in range(4)]
    [1.0, 0.85, 0.5, 0.15]

    ```
    """
    shape = SCHEDULES[name]

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / max(1, warmup_steps))
        return warmup * shape(step, total_steps, get_milestones)

    return factor


def get_milestones(drops: Sequence[float], *, total_steps: int, steps_per_epoch: int) -> list[int]:
    """Turn "when" into steps: below 1 a fraction of the whole run, from 1 on a number of epochs.

    Example:

    ```python
    >>> get_milestones([0.5, 11], total_steps=120, steps_per_epoch=10)
    [60, 110]

    ```
    """
    return [round(drop * (total_steps if drop < 1 else steps_per_epoch)) for drop in drops]


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every parameter group `factor` times its initial learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def should_stop_early(history: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Say whether the last `patience` evaluations were all no better than the best one before them.

    Args:
        history (`Sequence[Mapping]`): Rows of which those of an evaluation have an `ap`, in their order.
        patience (`int`, *optional*): Evaluations to wait for a better one, at least 1; None to wait for ever.

    Example:

    ```python
    >>> history = [{"ap": 0.2}, {"loss": 1.0}, {"ap": 0.4}, {"ap": 0.3}, {"ap": 0.4}]
    >>> should_stop_early(history, patience=2), should_stop_early(history, patience=3)
    (True, False)

    ```
    """
    scores = [row["ap"] for row in history if "ap" in row]
    return patience is not None and len(scores) > patience and max(scores[:-patience]) >= max(scores[-patience:])
