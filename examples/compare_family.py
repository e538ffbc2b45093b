"""Train every model from DETR to DINO alike, and watch each idea of the line pay.

    python examples/compare_family.py --output_dir runs/family

1. Generate the `shapes` dataset, which needs no download.
2. Train each row of the family with three seeds: the same images in the same order, the same schedule, comparable
   sizes. At each evaluation, measure what the papers argue with: how stable the matching is, how many objects the
   first boxes of the decoder find, and how well noisy boxes are restored.
3. Measure parameters, FLOPs, speed and memory, and write one report: curves, tables, and where the measured order is
   not that of the papers.

It takes hours. Started again after an interruption, it continues; started in several terminals, the processes share
the rows. `hf-dino compare` is the same with options.
"""

from pathlib import Path
from typing import Annotated

import typer

from hf_dino.compare import ComparisonSettings, compare, measure_comparison, plan_runs, report_comparison
from hf_dino.family import FAMILY
from hf_dino.utils.errors import run_cli


OUTPUT = Path("runs/family")
SEEDS = 3
SETTINGS = ComparisonSettings()  # those of the comparison in the docs


def main(output_dir: Annotated[Path, typer.Option("--output_dir", help="Directory to write to.")] = OUTPUT) -> None:
    """Train every model from DETR to DINO alike, and report them side by side."""
    command = f"python examples/compare_family.py --output_dir {output_dir}"
    runs = plan_runs(output_dir, list(FAMILY), SEEDS)

    print(f"1. The shapes dataset and 2. {len(runs)} trainings, in {output_dir}")
    failures = compare(output_dir, runs, SETTINGS, on_finished=lambda: report_comparison(output_dir, command))

    print("3. Speed, memory and the report")
    measure_comparison(output_dir)
    report = report_comparison(output_dir, command)
    for pair in report["order"]:
        print(f"{pair['higher']} - {pair['lower']}: AP {pair['difference']:+.3f}, {pair['verdict']}")
    print(f"report: {output_dir / 'report.html'}")
    if failures:
        raise SystemExit(
            f"error: {len(failures)} of {len(runs)} trainings failed, the first: {next(iter(failures.values()))}"
        )


if __name__ == "__main__":
    run_cli(lambda: typer.run(main))
