"""Compare contenders that take turns, each in a process of its own, so that its peak memory is its own."""

import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any


# what builds the work of a contender in its process, and the environment variables of that process
Contender = tuple[Callable[[], Callable[[], Any]], Mapping[str, str]]


def take_turns(contenders: Mapping[str, Contender], rounds: int) -> dict[str, Any]:
    """Run every contender once per round, and compare medians with the first one's.

    Returns:
        `dict`: Seconds (medians), peak memory of one run beyond what stood before it (MiB), and for every other
        contender how many times its figures the first one's are.
    """
    context = multiprocessing.get_context("spawn")
    connections = {}
    for name, (build, environment) in contenders.items():
        connections[name], theirs = context.Pipe()
        context.Process(target=_serve, args=(build, dict(environment), theirs), daemon=True).start()

    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    memory: dict[str, float] = {}
    for round_number in range(rounds + 1):
        for name, connection in connections.items():
            connection.send(True)
            elapsed, memory[name] = connection.recv()
            if round_number:  # the first one warms up
                seconds[name].append(elapsed)
    for connection in connections.values():
        connection.send(False)

    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first, *others = contenders
    return {
        "median_seconds": {name: round(value, 3) for name, value in medians.items()},
        "peak_memory_of_a_run_mib": {name: round(value) for name, value in memory.items()},
        "time_ratio": {f"{first} / {name}": round(medians[first] / medians[name], 3) for name in others},
        "memory_ratio": {f"{first} / {name}": round(memory[first] / memory[name], 3) for name in others},
    }


def _serve(build: Callable[[], Callable[[], Any]], environment: Mapping[str, str], connection: Connection) -> None:
    """Run once for each message; answer with seconds and peak memory in MiB."""
    os.environ.update(environment)
    run = build()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while connection.recv():
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        connection.send((seconds, (peak - before) / 1024))
