"""Time the operator, and compare it with the reference in plain PyTorch and with moving every byte once.

Each case has several sets of inputs, together larger than the GPU's cache, and each call takes the next set. Calls
that take less than two milliseconds are replayed in a CUDA graph, since launching them one by one would take longer.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from deformable_attention_accuracy import fewest_bytes, rounded, run_form, size
from deformable_attention_baselines import fused_reference
from deformable_attention_inputs import Case, Inputs
from gpu_stages.rows import Row, Stage
from hf_dino import kernels


Calls = list[Callable[[], Any]]  # one for each set of inputs

SHAPES = ("encoder-4scale", "decoder-900", "encoder-5scale", "decoder-900-5scale")
DTYPES = ("float32", "bfloat16", "float16")
MIN_SETS, MAX_SETS = 2, 16
REPETITIONS, SECONDS = 15, 0.15  # limits of one measurement
GRAPHS_BELOW = 2e-3  # seconds of a call


def make_cases(image_size: tuple[int, int], batch_sizes: tuple[int, ...]) -> dict[str, Case]:
    """Return the cases by name, the most important first."""
    order = itertools.product(batch_sizes, DTYPES, SHAPES)
    return {f"{shape} x{batch} {dtype}": Case(shape, batch, dtype, image_size) for batch, dtype, shape in order}


def measure(row: Row, case: Case, device: str, bandwidth: float, cache_bytes: int) -> None:
    """Time the fused form of the operator, which the model calls."""
    operators: Any = kernels.operators(device)
    sets = make_sets(case, device, cache_bytes)
    row["input_sets"] = len(sets)
    ours = lambda levels, value, *points: operators.fused_deformable_attention(value, levels.shapes, *points)  # noqa: E731
    grad_value = run_form("fused", ours, sets[0], True)[1][0]
    for name, backward in (("forward", False), ("training", True)):
        bound = fewest_bytes(sets[0], grad_value, backward, "fused") / bandwidth
        seconds = median_seconds([partial(run_form, "fused", ours, inputs, backward) for inputs in sets], device)
        row[f"{name}_ms"] = rounded(1000 * seconds, 3)
        row[f"{name}_of_bound"] = rounded(bound / seconds, 2)
        try:
            calls: Calls = [partial(run_form, "fused", fused_reference, inputs, backward) for inputs in sets]
            row[f"{name}_speedup"] = rounded(median_seconds(calls, device) / seconds, 3)
        except torch.cuda.OutOfMemoryError:
            row[f"{name}_speedup"] = "reference: out of memory"


def make_sets(case: Case, device: str, cache_bytes: int) -> list[Inputs]:
    """Make sets of inputs, together more than twice as large as the cache."""
    first = Inputs(case, device)
    wanted = -(-2 * cache_bytes // size(*first.tensors["fused"]))
    count = min(max(wanted, MIN_SETS), MAX_SETS)
    return [first, *(Inputs(case, device, seed) for seed in range(1, count))]


def median_seconds(calls: Calls, device: str) -> float:
    """Return the median seconds of a call."""
    if device == "cpu":
        return statistics.median(seconds_on_cpu(call) for call in calls)
    calls[0]()  # loads the kernels
    if between_events(calls[0]) < GRAPHS_BELOW:
        try:
            return statistics.median(replay(calls))
        except RuntimeError as error:
            print(f"calls are launched one by one, since they cannot be captured in a graph: {error}", flush=True)
    return statistics.median(repeat(calls, REPETITIONS))


def seconds_on_cpu(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def repeat(calls: Calls, repetitions: int) -> list[float]:
    """Return the seconds of calls that are launched one by one."""
    spent: list[float] = []
    for _, call in zip(range(repetitions), itertools.cycle(calls)):
        spent.append(between_events(call))
        if sum(spent) > SECONDS:
            break
    return spent


def replay(calls: Calls) -> list[float]:
    """Return the seconds of a call, measured by replaying a CUDA graph of all calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the first call may initialize what cannot be captured
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return [seconds / len(calls) for seconds in repeat([graph.replay], REPETITIONS)]


def between_events(call: Callable[[], Any]) -> float:
    """Return the seconds of a call on the GPU."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def copy_bandwidth(device: str, mebibytes: int) -> float:
    """Return the bytes read and written per second when a large tensor is copied."""
    source = torch.ones(mebibytes * 2**18, device=device)
    target = torch.empty_like(source)
    call = partial(target.copy_, source)
    seconds = repeat([call], 9)[2:] if device == "cuda" else [seconds_on_cpu(call) for _ in range(5)]
    return 2 * size(source) / statistics.median(seconds)


def main(stage: Stage) -> None:
    on_gpu = stage.device == "cuda"
    bandwidth = copy_bandwidth(stage.device, 4 if stage.dry_run else 1024)
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size if on_gpu else 2**16
    if list(stage.todo(["copy"])):
        stage.rows.add("copy", ok=True, gb_per_s=rounded(bandwidth / 1e9, 4), l2_mib=cache_bytes // 2**20)
    cases = make_cases((64, 96), (1,)) if stage.dry_run else make_cases((800, 1333), (1, 2, 8))
    for name in stage.todo(cases):
        with stage.rows.case(name) as row:
            measure(row, cases[name], stage.device, bandwidth, cache_bytes)
