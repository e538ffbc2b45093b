r"""Multi-scale deformable attention: time and memory of all available implementations, at the shapes of DINO.

    python benchmarks/deformable_attention.py
    python benchmarks/deformable_attention.py --device cuda --hub --batch-sizes 1 2 8 \
        --shapes encoder-4scale encoder-5scale decoder-900 decoder-1100

The encoder asks from the center of every cell of an image of 800 x 1333, with the offsets that training starts from
and noise of 1.5 cells; the decoder asks from random boxes. With 16-bit values, raw offsets and logits are of their
dtype, and locations and weights of 32 bits, as in the model under autocast; what takes one dtype only gets it.

What gives a wrong output or gradient is not timed, unless with `--time-wrong`. The others are interleaved, each with
one call that is not measured and some that are, and medians are compared with the reference in plain PyTorch. The
bound moves every byte once, as fast as this machine copies: only data that stays in caches is faster. Memory includes
outputs and gradients, unless it says "beyond results".
"""

import argparse
import functools
import itertools
import multiprocessing
import os
import re
import shlex
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from common import machine
from deformable_attention_accuracy import fewest_bytes, find_expected, relative_error, rounded, run, size
from deformable_attention_baselines import IMPLEMENTATIONS, REFERENCES, Tensors, find_implementations
from deformable_attention_inputs import SHAPES, Case, Inputs
from deformable_attention_report import draw, write_table


PASSES = {"forward": False, "forward+backward": True}
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}  # relative, in the Euclidean norm


class Child:
    """A process that runs calls one after another, and is replaced after a call that failed."""

    def __init__(self) -> None:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(
            2**16
        )  # glibc then returns freed memory to the system, so it does not hide a peak
        self.pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def examine(self, *arguments: Any) -> dict[str, Any]:
        try:
            return self.pool.submit(examine, *arguments).result()
        except Exception as failure:  # any failure of other implementations is reported
            self.pool.shutdown()
            self.pool = self._start()
            if isinstance(failure, BrokenProcessPool):
                return {"verdict": "fails: its process crashed"}
            return {"verdict": f"fails: {type(failure).__name__}: {failure}".splitlines()[0]}


def examine(name: str, case: Case, backward: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Return verdict, error, peak memory beyond the inputs, and beyond the results too.

    Called in a separate process, because wrong code may crash it.
    """
    attend = IMPLEMENTATIONS[name].make(options)
    inputs, expected = prepare(case, options.device)
    results = run(name, attend, inputs, backward)
    error = relative_error(results, expected[IMPLEMENTATIONS[name].form], inputs.off_lines)
    verdict = "right" if error <= TOLERANCE[case.dtype] else "wrong result"
    row = {"verdict": verdict, "relative_error": rounded(error, 2)}
    if options.device == "cpu" and sys.platform != "linux":
        return row

    del results  # or a second run would take its memory from what stands before it
    before = memory(options.device, "now")
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    outputs, gradients = run(name, attend, inputs, backward)
    extra = memory(options.device, "peak") - before
    torch.cuda.empty_cache()  # the process that measures the time needs it
    beyond = max(extra - size(*outputs, *gradients), 0) / size(inputs.tensors["plain"][0])
    return {**row, "peak_memory_mib": round(extra / 2**20, 1), "memory_beyond_results_in_values": round(beyond, 2)}


@functools.lru_cache(maxsize=1)
def prepare(case: Case, device: str) -> tuple[Inputs, dict[str, tuple[Tensors, Tensors]]]:
    inputs = Inputs(case, device)
    return inputs, {form: find_expected(form, inputs) for form in REFERENCES}


def interleave(candidates: dict[str, Any], inputs: Inputs, backward: bool, rounds: int) -> dict[str, float]:
    """Return median seconds of a call, each candidate once per round."""
    clock = seconds_on_gpu if inputs.grad_output.is_cuda else seconds_on_cpu
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, attend in candidates.items():
            call = functools.partial(run, name, attend, inputs, backward)
            call()  # warm-up, after the others have used caches and allocators
            seconds[name].append(clock(call))
    torch.cuda.empty_cache()
    return {name: statistics.median(times) for name, times in seconds.items()}


def seconds_on_cpu(call: Any, turn: float = 0.1) -> float:
    """Return the median of as many calls as a turn of this many seconds has time for, but at least one."""
    times: list[float] = []
    while sum(times) < turn:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def seconds_on_gpu(call: Any, calls: int = 20) -> float:
    """Time one call among several that are queued at once, or the time of launching them would be measured."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / calls


def memory(device: str, which: str) -> int:
    """Return bytes in use `"now"`, or their `"peak"`: of PyTorch's allocator on a GPU, else of this process."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() if which == "peak" else torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:" if which == "peak" else "VmRSS:") + 1]) * 1024


def copy_bandwidth(device: str, mebibytes: int) -> float:
    """Return the bytes read and written per second when a large tensor is copied."""
    source = torch.ones(mebibytes * 2**18, device=device)
    target = torch.empty_like(source)
    clock = seconds_on_gpu if device == "cuda" else seconds_on_cpu
    return 2 * size(source) / statistics.median([clock(lambda: target.copy_(source)) for _ in range(9)])


def bound_bytes(case: Case, backward: bool, device: str) -> int:
    inputs, expected = prepare(case, device)
    return fewest_bytes(inputs, expected["plain"][1][0], backward)


def measure(case: Case, options: argparse.Namespace, bandwidth: float, child: Child) -> list[dict[str, Any]]:
    """Measure both passes of one case with all implementations that can run it."""
    measured = []
    for pass_name, backward in PASSES.items():
        rows = {name: child.examine(name, case, backward, options) for name in options.implementations}
        timed = ("right", "wrong result") if options.time_wrong else ("right",)
        candidates = {name: IMPLEMENTATIONS[name].make(options) for name in rows if rows[name]["verdict"] in timed}
        inputs = Inputs(case, options.device)
        seconds = interleave(candidates, inputs, backward, options.rounds)
        for name, median in seconds.items():
            rows[name]["median_ms"] = rounded(1000 * median, 4)
            if baseline := seconds.get(REFERENCES[IMPLEMENTATIONS[name].form]):
                rows[name]["times_faster"] = rounded(baseline / median, 3)
        fewest = child.pool.submit(bound_bytes, case, backward, options.device).result()
        bound_ms = rounded(1000 * fewest / bandwidth, 3)
        measured.append({**case._asdict(), "pass": pass_name, "bound_ms": bound_ms, "results": rows})
    return measured


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["encoder-4scale", "decoder-900"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1])
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--hub", action="store_true", help="download kernels-community/deformable-detr and compare it")
    parser.add_argument("--time-wrong", action="store_true", help="time what gives wrong results, too; it may crash")
    parser.add_argument("--quick", action="store_true", help="a tiny image and one round, to check that it works")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or min(options.batch_sizes) < 1:
        parser.error("--rounds and --batch-sizes must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device")
    return options


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    found = find_implementations(options)
    options.implementations = [name for name, state in found.items() if state == "takes part"]
    device = torch.cuda.get_device_name() if options.device == "cuda" else machine.processor_name()
    image_size = (64, 96) if options.quick else (800, 1333)
    if options.quick:
        options.rounds = 1
    bandwidth = copy_bandwidth(options.device, 8 if options.quick else 256)
    child = Child()
    measured = [
        one
        for case in itertools.product(options.shapes, options.batch_sizes, options.dtypes, [image_size])
        for one in measure(Case(*case), options, bandwidth, child)
    ]
    child.pool.shutdown()

    content = {
        "device": device,
        "copy_gb_per_s": rounded(bandwidth / 1e9, 3),
        "implementations": found,
        "measured": measured,
    }
    kind = "cpu" if options.device == "cpu" else re.sub(r"\W+", "_", device.lower())
    name = f"deformable_attention_{kind}{'_quick' if options.quick else ''}"
    command = shlex.join(["python", "benchmarks/deformable_attention.py", *arguments])
    machine.write_result(name, command, content)
    write_table(machine.RESULTS / f"{name}.md", {"command": command, **content})
    draw(machine.RESULTS / f"{name}.png", content)
    print((machine.RESULTS / f"{name}.md").read_text())


if __name__ == "__main__":
    main()
