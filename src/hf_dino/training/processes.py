"""What the processes of a run tell each other beside gradients. Where there is one process, nothing of it costs."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object


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
