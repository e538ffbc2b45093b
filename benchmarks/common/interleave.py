"""Compare candidates in interleaved runs, each in a separate process so that peak memory is measured separately."""

import ctypes
import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


Build = Callable[[], Callable[[], Any]]  # builds the work of a candidate in its process
Candidate = tuple[Build, Mapping[str, str]]  # and the environment variables of that process

_RUN = "run"


class WorkerError(RuntimeError):
    """Raised if the work of a candidate could not be built or run."""


class Worker:
    """A process that builds work and runs it once for each request.

    Args:
        environment (`Mapping[str, str]`): Environment variables of the process, in addition to the current ones.
        device (`str`): `"cpu"` or `"cuda"`, whose memory is measured. On `"cuda"` a run waits for the GPU to finish.
        start_method (`str`): Of `multiprocessing`. `"fork"` imports nothing again, but does not work with CUDA.
    """

    def __init__(self, environment: Mapping[str, str], device: str = "cpu", start_method: str = "spawn"):
        context: Any = multiprocessing.get_context(start_method)
        self.connection, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(dict(environment), device, theirs), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is noticed here

    def start_building(self, build: Build) -> None:
        """Replace the work of the process; [`Worker.wait`] waits until it is built."""
        with suppress(OSError):  # the process has ended, which `wait` reports
            self.connection.send(build)

    def run(self) -> tuple[float, float]:
        """Run the work once; return its seconds, and its peak memory in MiB beyond what stood before its first run.

        Raises:
            WorkerError: If it fails.
        """
        with suppress(OSError):
            self.connection.send(_RUN)
        return self.wait()

    def wait(self) -> Any:
        """Return the answer to the last request.

        Raises:
            WorkerError: If building or running has failed, or ended the process.
        """
        try:
            succeeded, answer = self.connection.recv()
        except (EOFError, OSError):
            raise WorkerError("its process ended") from None
        if not succeeded:
            raise WorkerError(answer)
        return answer

    def close(self) -> None:
        """Let the process end."""
        self.connection.close()


def interleave(
    candidates: Mapping[str, Candidate], rounds: int, device: str = "cpu", warm_up: int = 1
) -> dict[str, Any]:
    """Run every candidate once per round, and compare medians with the first one's.

    Args:
        candidates (`Mapping[str, Candidate]`): What is compared, by name.
        rounds (`int`): Measured runs of each.
        device (`str`): `"cpu"` or `"cuda"`.
        warm_up (`int`): Runs of each before these, which are not counted.

    Returns:
        `dict`: Seconds (medians), peak memory of one run beyond what stood before it (MiB), and for every other
        candidate how many times its figures the first one's are.

    Raises:
        WorkerError: If a candidate cannot be built or run.
    """
    workers = {name: Worker(environment, device) for name, (_, environment) in candidates.items()}
    for name, (build, _) in candidates.items():
        workers[name].start_building(build)
    for worker in workers.values():
        worker.wait()
    seconds, memory = measure(workers, rounds, warm_up)
    for worker in workers.values():
        worker.close()

    first, *others = candidates
    return {
        "median_seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peak_memory_mib": {name: round(value) for name, value in memory.items()},
        "time_ratio": {f"{first} / {name}": round(seconds[first] / seconds[name], 3) for name in others},
        "memory_ratio": {f"{first} / {name}": round(memory[first] / memory[name], 3) for name in others},
    }


def measure(workers: Mapping[str, Worker], rounds: int, warm_up: int = 1) -> tuple[dict[str, float], dict[str, float]]:
    """Run what the workers have built, once each per round, after some rounds to warm up.

    Returns:
        Median seconds and peak memory in MiB, by name.
    """
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    for _ in range(warm_up + rounds):
        for name, worker in workers.items():
            measured[name].append(worker.run())
    seconds = {name: statistics.median(elapsed for elapsed, _ in rows[warm_up:]) for name, rows in measured.items()}
    return seconds, {name: rows[-1][1] for name, rows in measured.items()}


def _serve(environment: Mapping[str, str], device: str, connection: Connection) -> None:
    """Build and run on request until the connection is closed."""
    os.environ.update(environment)
    meter: Any = {"cpu": ProcessMemory, "cuda": DeviceMemory}[device]()
    run: Any = None
    while (request := _next_request(connection)) is not None:
        try:
            if request == _RUN:
                answer = _timed(run, meter)
            else:
                run = None  # so that its memory does not count for the next work
                run, answer = request(), None
                meter.start()
            connection.send((True, answer))
        except Exception as error:  # the parent process handles the failure
            connection.send((False, f"{type(error).__name__}: {error}"))


def _next_request(connection: Connection) -> Any:
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        return None


def _timed(run: Callable[[], Any], meter: Any) -> tuple[float, float]:
    start = time.perf_counter()
    run()
    meter.synchronize()
    return time.perf_counter() - start, meter.peak_mib()


class ProcessMemory:
    """The memory of this process, as measured by Linux.

    The peak is reset for each work, so that one process can measure several, in any order. What glibc keeps of freed
    memory is first returned to the system, because memory that is there already would not count for the next work.
    """

    def start(self) -> None:
        """Return freed memory to the system and start measuring."""
        gc.collect()
        with suppress(AttributeError):  # of another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):  # some containers do not allow it: the peak is then that of all works so far
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self.before = self._kibibytes("VmRSS")

    def synchronize(self) -> None:
        """Do nothing: work on the CPU has finished when a call returns."""

    def peak_mib(self) -> float:
        """Return the peak in MiB above the memory in use at the start."""
        return (self._kibibytes("VmHWM") - self.before) / 1024

    def _kibibytes(self, field: str) -> int:
        status = Path("/proc/self/status").read_text().split()
        return int(status[status.index(f"{field}:") + 1])


class DeviceMemory:
    """The memory that PyTorch has allocated on the current CUDA device."""

    def start(self) -> None:
        """Free cached memory and start measuring."""
        import torch

        self.cuda = torch.cuda
        gc.collect()
        self.cuda.synchronize()
        self.cuda.empty_cache()
        self.cuda.reset_peak_memory_stats()
        self.before = self.cuda.memory_allocated()

    def synchronize(self) -> None:
        """Wait until the GPU has finished."""
        self.cuda.synchronize()

    def peak_mib(self) -> float:
        """Return the peak in MiB above the memory in use at the start."""
        return (self.cuda.max_memory_allocated() - self.before) / 2**20
