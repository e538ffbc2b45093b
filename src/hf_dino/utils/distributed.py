"""Models whose weights, or what belongs to them, several processes share out among them (PyTorch's FSDP2)."""

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


SHARDED_DISTRIBUTED_TYPES = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
"""Ways in which no process may have the whole model: its layers are run, and its checkpoints written, together."""


@contextmanager
def summon_full_params(model: nn.Module) -> Iterator[None]:
    """Let every process have all weights while the context lasts, to run the model without the other processes.

    A sharded model gathers its weights at each call, in all processes at once: those that evaluate more images than
    the others would wait for ever. Any other model is whole already.

    Args:
        model (`nn.Module`): Prepared by `accelerator` or not. All processes enter and leave the context together.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    # torch has a public way to set whether a unit keeps its weights after a forward, and none to ask; a unit whose
    # weights are all those of units within it has no group
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
    """This process's part of a tensor that processes share out, in the same memory; else the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor on the CPU if processes share it out, who all call this; else the tensor itself."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def distribute_like(whole: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that all have, if `other` is shared out; else the tensor itself."""
    if not isinstance(other, DTensor):
        return whole
    options: dict[str, Any] = {"src_data_rank": None}  # nobody sends what everybody has
    return distribute_tensor(whole.to(other.device), other.device_mesh, other.placements, **options)


PROCESS_GROUP_TIMEOUT = InitProcessGroupKwargs(timeout=timedelta(hours=6))
"""For `Accelerator`: the others wait while the main process downloads a dataset or looks at it; NCCL's 10 minutes
would end them."""


def all_reduce_max(accelerator: Accelerator, number: int) -> int:
    """Give every process the highest of the numbers that they come with; all have to call it."""
    if accelerator.num_processes == 1:
        return number
    highest = torch.tensor(number, device=accelerator.device)
    torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
    return int(highest)


def all_reduce_mean(accelerator: Accelerator, numbers: Mapping[str, float]) -> dict[str, float]:
    """Average over the processes numbers that each has under the same names; all have to call it."""
    if accelerator.num_processes == 1:
        return dict(numbers)
    values = torch.tensor(list(numbers.values()), device=accelerator.device)
    torch.distributed.all_reduce(values)
    return dict(zip(numbers, (values / accelerator.num_processes).tolist(), strict=True))


def all_gather_unique(text: str) -> list[str]:
    """Give every process the different texts that they come with, but the empty ones; all have to call it."""
    texts: list[Any] = gather_object([text])
    return [each for each in dict.fromkeys(texts) if each]
