"""The original's optimiser settings: parameter groups and the learning rate at every step.

DINO (https://github.com/IDEA-Research/DINO) `main.py` and `util/get_param_dicts.py`: AdamW, the backbone at a tenth of
the learning rate, weight decay on every parameter, norms and biases included, and one drop to a tenth near the end.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


# "backbone" in the original's sense: not the projections of its levels, which are new in every detector
_BACKBONE = ".backbone.body."


# What the original never trains of a pre-trained ResNet: the layers that find edges and colours anywhere.
_STEM = (".backbone.body.embedder.", ".backbone.body.encoder.stages.0.")


def freeze_stem(model: PreTrainedModel) -> None:
    """Leave the first layers of a ResNet as they were pre-trained, as the original does; train all of other backbones.

    A backbone that is trained from scratch, which `freeze_batch_norm=False` tells, trains as a whole.

    Args:
        model (`PreTrainedModel`): A `DinoDetrForObjectDetection`.
    """
    if model.config.freeze_batch_norm and model.config.backbone_config.model_type == "resnet":
        for name, parameter in model.named_parameters():
            if any(part in f".{name}" for part in _STEM):
                parameter.requires_grad_(False)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Compute the layers' activations again in the backward pass instead of keeping them: less memory, more time."""
    newer, older = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # since transformers 5.23
    getattr(model, newer if hasattr(model, newer) else older)()


def parameter_groups(model: nn.Module, learning_rate: float, backbone_lr_factor: float) -> list[dict[str, Any]]:
    """Share out the parameters that train: the backbone's, and all others.

    Args:
        model (`nn.Module`): A `DinoDetrForObjectDetection`.
        learning_rate (`float`): Of everything but the backbone.
        backbone_lr_factor (`float`): The backbone's learning rate is this many times `learning_rate`.

    Returns:
        `list[dict]`: Groups for a torch optimizer, each with `params`, `lr`, and `initial_lr`, which the schedule
        multiplies.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    backbone = [parameter for name, parameter in trained.items() if _BACKBONE in f".{name}"]
    others = [parameter for name, parameter in trained.items() if _BACKBONE not in f".{name}"]
    rates = ((others, learning_rate), (backbone, learning_rate * backbone_lr_factor))
    return [{"params": params, "lr": rate, "initial_lr": rate} for params, rate in rates if params]


def learning_rate_factor(step: int, *, drop_steps: Sequence[int], warmup_steps: int = 0) -> float:
    """Say what the learning rate is multiplied with at a step: a rise from 0 to 1, then a tenth after each drop.

    Args:
        step (`int`): Optimizer steps done before this one.
        drop_steps (`Sequence[int]`): From each of these steps on it is a tenth of what it was.
        warmup_steps (`int`, *optional*, defaults to 0): The original has none.

    Example:

    ```python
    >>> [learning_rate_factor(step, drop_steps=[4], warmup_steps=2) for step in range(6)]
    [0.5, 1.0, 1.0, 1.0, 0.1, 0.1]

    ```
    """
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    return warmup * 0.1 ** sum(step >= drop_step for drop_step in drop_steps)


def drop_steps(drops: Sequence[float], *, total_steps: int, steps_per_epoch: int) -> list[int]:
    """Turn "when" into steps: below 1 a fraction of the whole run, from 1 on a number of epochs.

    Example:

    ```python
    >>> drop_steps([0.5, 11], total_steps=120, steps_per_epoch=10)
    [60, 110]

    ```
    """
    return [round(drop * (total_steps if drop < 1 else steps_per_epoch)) for drop in drops]


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every parameter group `factor` times its initial learning rate.

    A function of the step and nothing else: there is no scheduler whose state could go wrong when a run is resumed, or
    that counts the steps of several processes.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
