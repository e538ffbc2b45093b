"""`hf-dino` in processes of its own that start quickly and can be killed.

They are forks of a process that has imported everything and has no threads. A fork of the test's own process would
inherit locks that its threads hold, and could wait for them forever.
"""

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from hf_dino.cli import main, predict  # noqa: F401, imported before the fork
from hf_dino.cli.options import log_to_terminal  # noqa: F401
from hf_dino.inference import ResultsDirectory


def start(
    arguments: Sequence[object],
    log: Path = Path(os.devnull),
    *,
    environment: Mapping[str, str] = {},
    file_size: int | None = None,
    before: Callable[[], None] | None = None,
) -> BaseProcess:
    """Start the command in the current directory.

    Args:
        arguments (`Sequence`): Of the command.
        log (`Path`, *optional*): Where its output goes.
        environment (`Mapping[str, str]`, *optional*): Variables to add.
        file_size (`int`, *optional*): Bytes beyond which no file can grow, as on a full disk.
        before (`Callable`, *optional*): A function of a module, called in the process before the command.
    """
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        context.set_forkserver_preload([__name__])
        forkserver.ensure_running()
    words = [str(argument) for argument in arguments]
    process = context.Process(target=_run, args=(words, log, Path.cwd(), dict(environment), file_size, before))
    process.start()
    return process


def status_of(process: BaseProcess, timeout: float = 120) -> int:
    """Wait for a process; return its exit status, negative if a signal ended it."""
    process.join(timeout)
    assert process.exitcode is not None, "the process does not end"
    return process.exitcode


def die_after_frame_3() -> None:
    """Let the process die when the results of the fourth frame of a video are written."""
    append = ResultsDirectory.append

    def killed(self: ResultsDirectory, record: dict) -> None:
        append(self, record)
        if record["frame"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    ResultsDirectory.append = killed  # type: ignore[method-assign]


def _run(
    words: list[str],
    log: Path,
    folder: Path,
    environment: dict[str, str],
    file_size: int | None,
    before: Callable[[], None] | None,
) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if before:
        before()
    main(words)
