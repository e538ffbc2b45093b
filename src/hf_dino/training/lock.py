"""Keep two runs out of one folder."""

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO

from accelerate import Accelerator

from ..utils.distributed import all_gather_unique
from ..utils.errors import InputError
from .checkpoint import get_last_checkpoint, prepare_checkpoints


fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

_LOCK_FILE = ".lock"
_MEMORY_OF_NETWORK_DISKS = 60.0  # seconds; NFS remembers for 30 to 60 that a name was not there


@contextmanager
def lock_output_dir(accelerator: Accelerator, folder: Path, start: Path | None, *, overwrite: bool) -> Iterator[None]:
    """Have a folder of checkpoints for this run alone, called by every process, and make it ready for the first.

    The system gives the folder free when the process ends, in whatever way.

    Args:
        accelerator (`Accelerator`): Knows the processes.
        folder (`Path`): Where the checkpoints will be; made if it does not exist.
        start (`Path` or `None`): From [`resolve_resume_checkpoint`]; with None, the checkpoints of an older run are deleted.
        overwrite (`bool`): Whether there may be an older run.

    Raises:
        InputError: In every process, if another run uses the folder, or did since `start` was found, or a process does
            not see it, or it cannot be made or written to.
    """
    with ExitStack() as held:
        failure = ""
        if accelerator.is_main_process:
            try:
                held.enter_context(_lock(folder))
                _check_start(folder, start, overwrite=overwrite)
                prepare_checkpoints(folder, resume=start is not None)
            except (InputError, OSError) as error:
                failure = str(error)
        _stop_if(failure)
        is_seen = _appears(folder / _LOCK_FILE)
        host = socket.gethostname()
        _stop_if("" if is_seen else f"{folder}: is not seen by {host}; give an --output that all machines share")
        yield


def _appears(path: Path) -> bool:
    """Whether a file that exists can be seen here, at once or after the time for which network disks remember."""
    deadline = time.monotonic() + _MEMORY_OF_NETWORK_DISKS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _stop_if(failure: str) -> None:
    """Stop every process if one has a reason to."""
    if failures := all_gather_unique(failure):
        raise InputError("; ".join(failures))


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold a lock that ends with this process: unlike `flock`, it does not pass on to processes that read images."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK_FILE).open("a+", encoding="utf-8") as file:
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise InputError(
                    f"{folder}: another run writes there ({_owner(file)}); wait for its end, or give another --output"
                ) from None
            except OSError as error:
                logger.warning("%s: cannot be locked (%s); start no other run with this --output", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _owner(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "a process that has just begun"


def _check_start(folder: Path, start: Path | None, *, overwrite: bool) -> None:
    """See that no other run came and went while this one read its data."""
    latest = get_last_checkpoint(folder)
    if latest != start and not (start is None and overwrite):
        raise InputError(f"{folder}: another run has just written {latest}; start again")
