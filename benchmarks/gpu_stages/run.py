"""Run one or several stages: `benchmarks/gpu.py` starts this process and watches the rows that it writes."""

import argparse
import gc
import importlib
import os
import signal
import sys
from pathlib import Path

from gpu_stages.rows import DRY_RUN_TIME_FACTOR, Rows, Stage
from gpu_stages.stages import STAGES


def release_memory() -> None:
    """Free the GPU memory that a stage has left allocated."""
    gc.collect()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=STAGES, help="the stages")
    parser.add_argument("--rows", type=Path, required=True, help="file of all rows")
    parser.add_argument("--work", type=Path, required=True, help="directory for temporary files")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True, help="where the operator runs")
    parser.add_argument("--deadline", type=float, required=True, help="end of all stages, by the clock of time.time")
    parser.add_argument("--dry-run", action="store_true", help="use tiny sizes")
    args = parser.parse_args()

    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that compilers and other child processes are stopped too
    os.environ.setdefault("HF_DINO_KERNELS", "require")
    for name in args.names:
        rows = Rows(args.rows, name)
        started = rows.start()
        time_factor = DRY_RUN_TIME_FACTOR if args.dry_run else 1
        deadline = min(started + time_factor * STAGES[name].seconds, args.deadline)
        module = importlib.import_module(f"gpu_stages.{STAGES[name].module}")
        module.main(Stage(rows, args.device, args.dry_run, deadline, args.work))
        rows.end()
        release_memory()


if __name__ == "__main__":
    main()
