"""Distributed training: parameters sharded over processes (PyTorch's FSDP2), and collectives for small values."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from .errors import InputError


SHARDED_DISTRIBUTED_TYPES = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
"""Accelerate's ways to shard a model. All processes must run its layers and write its checkpoints together."""


@contextmanager
def summon_full_params(model: nn.Module) -> Iterator[None]:
    """Gather the full parameters in every process, so that each can run the model on its own within the context.

    A sharded model gathers its parameters at each call, in all processes at once, so a process that evaluates more
    images than the others would wait indefinitely. A model that is not sharded is left as it is.

    Args:
        model (`nn.Module`): Prepared by Accelerate or not. All processes must enter and leave the context together.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    # torch can set, but not return, whether a unit reshards after a forward, hence the private attributes; a unit
    # without parameters of its own has no group
    groups = [group for unit in units if (group := unit._get_fsdp_state()._fsdp_param_group)]
    settings = [group.post_forward_mesh_info for group in groups]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
        for group, setting in zip(groups, settings):
            group.post_forward_mesh_info = setting


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a sharded tensor, without a copy; any other tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a sharded tensor on the CPU, which all processes must do; any other tensor is returned as it is."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def distribute_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Shard a tensor that every process has as `other` is sharded; if it is not sharded, return the tensor."""
    if not isinstance(other, DTensor):
        return tensor
    options: dict[str, Any] = {"src_data_rank": None}  # every process has the full tensor, so there is no broadcast
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, **options)


PROCESS_GROUP_TIMEOUT = InitProcessGroupKwargs(timeout=timedelta(hours=6))
"""Keyword handler for `Accelerator`. The other processes wait while the main process downloads and checks a dataset,
which may take longer than NCCL's default timeout of 10 minutes."""


def create_accelerator(mixed_precision: str | None, **options: Any) -> Accelerator:
    """Make an `Accelerator` that waits long for other processes, on the CPU if there is nothing faster.

    Args:
        mixed_precision (`str`, *optional*): `"no"`, `"fp16"` or `"bf16"`; by default, that of accelerate's
            configuration.
        options: Further arguments of `Accelerator`.

    Raises:
        InputError: If the device does not compute in this precision. On a CPU, accelerate itself takes fp16 and
            computes in float32.
    """
    # given explicitly, several processes on CPUs find each other
    options |= {"cpu": not torch.accelerator.is_available(), "kwargs_handlers": [PROCESS_GROUP_TIMEOUT]}
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision, **options)
    except ValueError as error:
        if "mixed precision" not in str(error):
            raise
        raise InputError(f"--mixed_precision {mixed_precision or 'of accelerate config'}: {error}") from None
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("--mixed_precision fp16 needs a GPU, and this machine has none; use bf16 or no")
    return accelerator


def all_reduce_max(accelerator: Accelerator, number: int) -> int:
    """Return the maximum over all processes, which must all call this. A bool counts as 0 or 1."""
    if accelerator.num_processes == 1:
        return int(number)
    maximum = torch.tensor(int(number), device=accelerator.device)
    torch.distributed.all_reduce(maximum, op=torch.distributed.ReduceOp.MAX)
    return int(maximum)


def all_reduce_mean(accelerator: Accelerator, values: Mapping[str, float]) -> dict[str, float]:
    """Return the mean of each value over all processes, which must all call this with the same keys."""
    if accelerator.num_processes == 1:
        return dict(values)
    sums = torch.tensor(list(values.values()), device=accelerator.device)
    torch.distributed.all_reduce(sums)
    return dict(zip(values, (sums / accelerator.num_processes).tolist(), strict=True))


def all_gather_unique(text: str) -> list[str]:
    """Return the distinct non-empty texts of all processes, which must all call this."""
    texts: list[Any] = gather_object([text])
    return [text for text in dict.fromkeys(texts) if text]
