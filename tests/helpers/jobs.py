"""Jobs of several processes, killed as a machine that is taken away kills them."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil


def kill_once_there(job: subprocess.Popen, path: Path) -> None:
    """Wait until `path` exists, then kill a job, started with `start_new_session=True`, and all that it began."""
    while not path.exists():
        assert job.poll() is None
        time.sleep(0.01)
    for process in psutil.Process(job.pid).children(recursive=True):  # a launcher's are in sessions of their own
        process.kill()
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()


class Killed(BaseException):
    """Ends a run in this process where a signal would have killed it; no handler of errors catches it."""
