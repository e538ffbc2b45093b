"""Optimizer settings of the official implementation and of its peers: frozen stages, parameter groups, learning rate.

DINO (https://github.com/IDEA-Research/DINO) `main.py` and `util/get_param_dicts.py`: AdamW, the backbone at a tenth of
the learning rate, weight decay on every parameter including norms and biases, and one decay step near the end.

The learning rate is a pure function of the step. There is no scheduler with a state that could be wrong after a run is
resumed, or that counts the steps of several processes.
"""

import math
import re
from collections.abc import Callable, Collection, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration_dino_detr import DinoDetrConfig
from ..detectors import convention_of
from ..utils.errors import InputError, summarize_list


# Stages of a backbone in transformers and timm: `stages.0.`, `layers_0.`, `layer1.`, `blocks.0.`
_STAGE = re.compile(r"\b(?:stages|layers|layer|blocks)[._]?(\d+)\.")

# `lr_linear_proj_names` of the official implementation: these layers predict sampling points, and Deformable DETR
# trains them at a tenth of the learning rate. Nothing here is called `reference_points`, as in DINO itself, which
# takes them from the encoder.
_SAMPLING = r"\.(sampling_offsets|reference_points)\."


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute the layers' activations in the backward pass instead of storing them: less memory, more time.

    Raises:
        InputError: If the model cannot do this.
    """
    newer, older = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # since transformers 5.23
    try:
        getattr(model, newer if hasattr(model, newer) else older)()
    except ValueError as error:
        raise InputError(f"--gradient_checkpointing: {error}") from None


def compile_layers(model: PreTrainedModel) -> None:
    """Compile the encoder and decoder layers, which take most of the time, with `torch.compile`.

    All layers of a kind share one graph, for images of any size and with any number of objects, so the first step
    takes about a minute and no later one compiles. Names of weights do not change. Compiling the whole model takes
    many times as long, and is repeated for every image size.

    Args:
        model (`PreTrainedModel`): A `DinoDetrForObjectDetection`, before `accelerator.prepare`.

    Raises:
        InputError: If it is another model.
    """
    if not isinstance(model.config, DinoDetrConfig):
        raise InputError(f"a model of type {model.config.model_type!r} cannot be compiled; leave out this option")
    for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
        layer.compile(dynamic=True)


def freezable_stages(model: PreTrainedModel) -> dict[str, list[str]]:
    """Return the stages that [`freeze`] accepts.

    Args:
        model (`PreTrainedModel`): A detection model.

    Returns:
        `dict[str, list[str]]`: Names of parameters by stage: `stem`, which is everything up to and including the
        backbone's first stage, `backbone`, `backbone.stage1` and so on, `encoder` and `decoder`.
    """
    names = [name for name, _ in model.named_parameters()]
    body = [name for name in names if name.startswith(_backbone_of(model))]
    by_number: dict[int, list[str]] = {}
    for name in body:
        if found := _STAGE.search(name):
            by_number.setdefault(int(found[1]), []).append(name)
    stages = [by_number[number] for number in sorted(by_number)]
    before_stages = list(takewhile(lambda name: not _STAGE.search(name), body))
    parts = {
        "stem": sum(stages[:1], before_stages),
        "backbone": body,
        **{f"backbone.stage{number}": stage for number, stage in enumerate(stages, start=1)},
        **{part: [name for name in names if name.startswith(f"model.{part}.")] for part in ("encoder", "decoder")},
    }
    return {name: part for name, part in parts.items() if part}  # RF-DETR has no encoder but its backbone


def _backbone_of(model: Any) -> str:
    """Return what the names of the pretrained weights begin with.

    This is the "backbone" of the official implementation: without the input projections, which are never pretrained.
    """
    return convention_of(model.config).backbone + "."


def freeze(model: PreTrainedModel, stages: Collection[str] | None = None) -> None:
    """Freeze stages of a model: their parameters and the statistics of their batch norms do not change.

    Args:
        model (`PreTrainedModel`): A detection model.
        stages (`Collection[str]`, *optional*): Keys of [`freezable_stages`]. By default what the official
            implementation freezes: the stem of a pretrained ResNet, and nothing of other backbones or of one that is
            trained from scratch, which has `freeze_backbone_batch_norms=False`. Models of transformers decide
            themselves.

    Raises:
        InputError: If the model does not have a stage.
    """
    if stages is None:
        config: Any = model.config
        is_frozen = getattr(config, "freeze_backbone_batch_norms", False)
        is_pretrained_resnet = is_frozen and config.backbone_config.model_type == "resnet"
        stages = ["stem"] if is_pretrained_resnet else []
    names_of_stage = freezable_stages(model)
    if unknown := [stage for stage in stages if stage not in names_of_stage]:
        raise InputError(
            f"this model has no stage {summarize_list(unknown)} to freeze; it has {', '.join(names_of_stage)}"
        )
    frozen = {name for stage in stages for name in names_of_stage[stage]}
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    set_training_mode(model, model.training)


def set_training_mode(model: nn.Module, mode: bool = True) -> None:
    """Set training mode as `nn.Module.train` does, but leave frozen batch norms in evaluation mode."""
    model.train(mode)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d) and not layer.weight.requires_grad:
            layer.eval()


def get_param_groups(
    model: nn.Module, learning_rate: float, backbone_lr_multiplier: float, sampling_lr_multiplier: float = 1.0
) -> list[dict[str, Any]]:
    """Group the trained parameters by learning rate.

    Args:
        model (`nn.Module`): A detection model.
        learning_rate (`float`): Learning rate of all other parameters.
        backbone_lr_multiplier (`float`): Multiplier on `learning_rate` for the backbone.
        sampling_lr_multiplier (`float`, *optional*, defaults to 1.0): Multiplier on `learning_rate` for the layers
            that predict the sampling offsets of deformable attention. Deformable DETR uses 0.1; in DINO's published
            runs its 0.1 had no effect.

    Returns:
        `list[dict]`: Groups for a torch optimizer, each with `params`, `lr`, and `initial_lr`, which the schedule
        multiplies. Every trained parameter is in exactly one of them.

    Raises:
        InputError: If all parameters are frozen.
    """
    # the first pattern that is found in a name decides
    multipliers = {re.escape(_backbone_of(model)): backbone_lr_multiplier, _SAMPLING: sampling_lr_multiplier, "": 1.0}
    groups: dict[float, list[nn.Parameter]] = {multiplier: [] for multiplier in reversed(multipliers.values())}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[next(each for pattern, each in multipliers.items() if re.search(pattern, name))].append(parameter)
    if not any(groups.values()):
        raise InputError("nothing to train: every parameter of the model is frozen")
    return [
        {"params": parameters, "lr": learning_rate * multiplier, "initial_lr": learning_rate * multiplier}
        for multiplier, parameters in groups.items()
        if parameters
    ]


def _multi_step(step: int, total_steps: int, milestones: Sequence[int]) -> float:
    """Decay to a tenth at each milestone, as the official implementation."""
    return 0.1 ** sum(step >= milestone for milestone in milestones)


def _cosine(step: int, total_steps: int, milestones: Sequence[int]) -> float:
    """Decay from 1 to 0 along half a cosine."""
    return _interpolate(1.0, 0.0, step / total_steps)


def _one_cycle(step: int, total_steps: int, milestones: Sequence[int]) -> float:
    """Rise from a 25th in the first fifth of the run and decay to almost 0, as the official `OneCycleLR`."""
    lowest, peak = 1 / 25, 0.2 * total_steps - 1
    if step < peak:
        return _interpolate(lowest, 1.0, step / peak)
    return _interpolate(1.0, lowest / 10_000, (step - peak) / (total_steps - 1 - peak))


def _interpolate(first: float, last: float, fraction: float) -> float:
    """Interpolate between two values along half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * min(fraction, 1.0))) / 2


SCHEDULES: dict[str, Callable[[int, int, Sequence[int]], float]] = {
    "multi_step": _multi_step,
    "cosine": _cosine,
    "one_cycle": _one_cycle,
}
"""Learning-rate schedules without warm-up."""


def get_lr_multiplier(
    name: str, *, total_steps: int, milestones: Sequence[int] = (), warmup_steps: int = 0
) -> Callable[[int], float]:
    """Return the multiplier on the learning rate as a function of the step.

    Args:
        name (`str`): A key of `SCHEDULES`: `"multi_step"`, `"cosine"` or `"one_cycle"`.
        total_steps (`int`): Optimizer steps of the whole run.
        milestones (`Sequence[int]`, *optional*): Steps at which `"multi_step"` decays the learning rate to a tenth.
        warmup_steps (`int`, *optional*, defaults to 0): Steps over which the learning rate rises linearly from 0 to
            the schedule's. The official implementation has no warm-up.

    Returns:
        `Callable[[int], float]`: Takes the number of optimizer steps done and returns the multiplier of the next one.

    Example:

    ```python
    >>> multiplier = get_lr_multiplier("multi_step", total_steps=6, milestones=[4], warmup_steps=2)
    >>> [multiplier(step) for step in range(6)]
    [0.5, 1.0, 1.0, 1.0, 0.1, 0.1]
    >>> multiplier = get_lr_multiplier("cosine", total_steps=4)
    >>> [round(multiplier(step), 2) for step in range(4)]
    [1.0, 0.85, 0.5, 0.15]

    ```
    """
    schedule = SCHEDULES[name]

    def multiplier(step: int) -> float:
        warmup = min(1.0, (step + 1) / max(1, warmup_steps))
        return warmup * schedule(step, total_steps, milestones)

    return multiplier


def get_milestones(milestones: Sequence[float], *, total_steps: int, steps_per_epoch: int) -> list[int]:
    """Convert milestones to steps: below 1 they are fractions of the whole run, from 1 on epochs.

    Example:

    ```python
    >>> get_milestones([0.5, 11], total_steps=120, steps_per_epoch=10)
    [60, 110]

    ```
    """
    return [round(milestone * (total_steps if milestone < 1 else steps_per_epoch)) for milestone in milestones]


def scale_lr(optimizer: torch.optim.Optimizer, multiplier: float) -> None:
    """Set the learning rate of each parameter group to its initial one times `multiplier`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier


def should_stop_early(scores: Sequence[float], patience: int | None) -> bool:
    """Return whether none of the last `patience` evaluations was better than the best one before them.

    Args:
        scores (`Sequence[float]`): Average precision of each evaluation so far, in order.
        patience (`int`, *optional*): Number of evaluations to wait for a better one, at least 1; `None` never stops.

    Example:

    ```python
    >>> scores = [0.2, 0.4, 0.3, 0.4]
    >>> should_stop_early(scores, patience=2), should_stop_early(scores, patience=3)
    (True, False)

    ```
    """
    return patience is not None and len(scores) > patience and max(scores[:-patience]) >= max(scores[-patience:])
