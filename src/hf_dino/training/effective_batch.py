"""What makes a step of several batches, in several processes, the same as one of a single big batch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator

from ..loss_dino_detr import DinoDetrEffectiveBatch


def effective_batch(
    labels_of_batches: Sequence[Sequence[Mapping[str, torch.Tensor]]], accelerator: Accelerator
) -> DinoDetrEffectiveBatch:
    """Count the objects of a step, with one message of two numbers among the processes.

    With the answer the losses of the step's batches are such that their *mean* is the loss of one big batch. The mean
    is what is taken anyway: `accelerator.backward` divides by the accumulated batches, and data-parallel training by
    the processes. So nothing else is to be scaled.

    Args:
        labels_of_batches (`Sequence[Sequence[Mapping]]`): The labels of this process's batches of the step, of which
            every process has as many.
        accelerator (`Accelerator`): Knows the other processes, which must all call this.
    """
    counts = [len(label["boxes"]) for labels in labels_of_batches for label in labels]
    of_all = torch.tensor([sum(counts), max(counts, default=0)])
    if accelerator.num_processes > 1:  # where there is nobody to tell, the device need not be waited for
        of_all = accelerator.gather(of_all.to(accelerator.device))
    objects, max_num_objects = zip(*of_all.view(-1, 2).tolist())
    num_batches = len(labels_of_batches) * accelerator.num_processes
    return DinoDetrEffectiveBatch(num_boxes=max(1, sum(objects)) / num_batches, max_num_objects=max(max_num_objects))


def with_effective_batch(batches: Iterable[dict[str, Any]], accelerator: Accelerator) -> Iterator[dict[str, Any]]:
    """Add to each batch what the model must know of the whole step, as the argument `effective_batch`.

    Args:
        batches (`Iterable[dict]`): With `labels`; `accelerator.gradient_accumulation_steps` of them make a step.
        accelerator (`Accelerator`): Knows the other processes, which must read as many batches.
    """
    batches = iter(batches)
    while step := list(islice(batches, accelerator.gradient_accumulation_steps)):
        whole = effective_batch([batch["labels"] for batch in step], accelerator)
        yield from ({**batch, "effective_batch": whole} for batch in step)
