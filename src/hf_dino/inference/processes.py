"""Divide the images of a run among processes that `accelerate launch` or `torchrun` started.

The processes talk only through the key-value store that their launcher sets up: each takes images from a common queue
whenever it is done with others, and only the main process waits for the others, at the end. So a process that dies
stops no other one, and its images are merely missing from the results.
"""

import json
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from ..utils.errors import BrokenInputError, InputError, summarize_list
from .sources import ImageInput


STALL_SECONDS = 600.0  # without an image, tile or frame anywhere, after which the main process gives the others up
POLL_SECONDS = 0.05

Summary = dict[str, Any]


class InputQueue:
    """The images and videos of a run, for its only process.

    Attributes:
        rank (`int`): Number of this process; 0 is the main process, which checks, merges and reports.
        size (`int`): Number of processes.
    """

    rank, size = 0, 1

    def __init__(self) -> None:
        self.inputs: Sequence[ImageInput] = ()
        self.num_finished = 0

    def put(self, inputs: Sequence[ImageInput], chunk_size: int) -> None:
        """Fill the queue, which the main process does once.

        Args:
            inputs (`Sequence[ImageInput]`): Images, then videos.
            chunk_size (`int`): Number of images that a process takes at a time; it takes one video.
        """
        self.inputs = inputs

    def wait(self) -> None:
        """Wait until the main process has filled the queue."""

    def take(self) -> Iterator[ImageInput]:
        """Yield images and videos, each in one process only."""
        yield from self.inputs

    def finish(self, number: int = 1) -> int:
        """Count finished images and videos, and return the number of all processes together."""
        self.num_finished += number
        return self.num_finished

    def beat(self) -> None:
        """Tell the main process that this one works, though it finishes no image for long."""

    def gather(self, summary: Summary, on_wait: Callable[[int], None]) -> list[Summary]:
        """Return the summaries of all processes, in the main process; it waits for the others.

        Args:
            summary (`dict`): Of this process, as JSON has it.
            on_wait (`Callable[[int], None]`): Called again and again with the number of finished images and videos.
        """
        return [summary]

    def fail(self, reason: str) -> None:
        """Tell the main process that this one ends with an error."""


class SharedInputQueue(InputQueue):
    """The images and videos of a run, for several processes.

    Args:
        store (`torch.distributed.Store`): Of all processes.
        rank (`int`): Number of this process.
        size (`int`): Number of processes.
    """

    def __init__(self, store: Any, rank: int, size: int):
        self.store, self.rank, self.size = store, rank, size

    def put(self, inputs: Sequence[ImageInput], chunk_size: int) -> None:
        images = [item for item in inputs if not item.is_video]
        chunks = [images[start : start + chunk_size] for start in range(0, len(images), chunk_size)]
        chunks += [[item] for item in inputs if item.is_video]
        for number, chunk in enumerate(chunks):
            self._ask("set", f"chunk {number}", pickle.dumps(chunk))
        self._ask("set", "chunks", str(len(chunks)))

    def wait(self) -> None:
        while not self._ask("check", ["chunks"]):  # in small steps, so that signals are heard
            time.sleep(POLL_SECONDS)

    def take(self) -> Iterator[ImageInput]:
        num_chunks = int(self._ask("get", "chunks"))
        while (number := self._ask("add", "taken", 1) - 1) < num_chunks:
            yield from pickle.loads(self._ask("get", f"chunk {number}"))

    def finish(self, number: int = 1) -> int:
        self.beat()
        return self._ask("add", "finished", number)

    def beat(self) -> None:
        self._ask("add", "beats", 1)

    def gather(self, summary: Summary, on_wait: Callable[[int], None]) -> list[Summary]:
        self._ask("set", f"summary {self.rank}", json.dumps(summary))
        if self.rank:
            return []
        beats, since = -1, time.monotonic()
        while missing := [rank for rank in range(self.size) if not self._ask("check", [f"summary {rank}"])]:
            if (beats_now := self._ask("add", "beats", 0)) != beats:
                beats, since = beats_now, time.monotonic()
            if time.monotonic() - since > STALL_SECONDS:
                names = summarize_list(missing)
                raise BrokenInputError(
                    f"no answer from process {names} of {self.size} for {STALL_SECONDS:.0f} s; --resume continues"
                )
            on_wait(self._ask("add", "finished", 0))
            time.sleep(POLL_SECONDS)
        summaries = [json.loads(self._ask("get", f"summary {rank}")) for rank in range(self.size)]
        if failures := [each["failure"] for each in summaries if "failure" in each]:
            raise BrokenInputError(f"{failures[0]}; --resume continues")
        return summaries

    def fail(self, reason: str) -> None:
        failure = f"process {self.rank} of {self.size} failed ({reason})"
        with suppress(InputError):  # this may be the failure
            self._ask("set", f"summary {self.rank}", json.dumps({"failure": failure}))

    def _ask(self, operation: str, *arguments: Any) -> Any:
        try:
            return getattr(self.store, operation)(*arguments)
        except RuntimeError as error:  # torch's errors of connections
            reason = str(error).partition("\n")[0]
            raise BrokenInputError(
                f"the main process cannot be reached any more ({reason}); --resume continues"
            ) from None


def join_processes() -> InputQueue:
    """Return the queue of the processes that were started together with this one, often itself alone.

    Raises:
        InputError: If the environment has only a part of what a launcher sets.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return InputQueue()
    # not imported for a single process: builds of torch for small devices lack it
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(iter(rendezvous("env://")))
    except ValueError as error:
        raise InputError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {error}; unset it") from None
    return SharedInputQueue(PrefixStore("hf_dino.predict", store), rank, size)


def local_device(device: str) -> str:
    """Return the GPU of this process among those of its machine, if `device` is `cuda` without a number."""
    import torch

    if device != "cuda":
        return device
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % max(1, torch.cuda.device_count())}"
