"""`hf-dino compare`: train the models of the family alike and report them side by side."""

import logging
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..training_arguments import DATASET_HELP
from ..utils.errors import import_extra
from .options import Facts, JsonOption, command_line, log_to_terminal


def compare(
    context: typer.Context,
    output_dir: Annotated[
        Path, typer.Option(metavar="DIRECTORY", help="Directory of the comparison, which is continued if it exists.")
    ],
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            "--data",
            metavar="DATASET",
            help=f"{DATASET_HELP} By default, the shapes dataset is generated in --output_dir.",
        ),
    ] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Models to compare: all, or names such as detr dino_4scale.", show_default="all"
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Number of times that each model is trained.")
    ] = 3,
    max_train_steps: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Optimizer steps of each training.")
    ] = 600,
    evaluations: Annotated[
        int,
        typer.Option(
            metavar="INTEGER", min=1, help="Evaluations of each training, evenly spaced, the last one at its end."
        ),
    ] = 8,
    image_size: Annotated[str, typer.Option(metavar="HEIGHTxWIDTH", help="Size of the images in pixels.")] = "160x160",
    global_batch_size: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Images per optimizer step, over all processes.")
    ] = 8,
    learning_rate: Annotated[float, typer.Option(metavar="NUMBER", min=0, help="Peak learning rate.")] = 4e-4,
    size: Annotated[Literal["tiny"], typer.Option(help="Width and depth of the models.")] = "tiny",
    dataloader_num_workers: Annotated[
        int, typer.Option(metavar="INTEGER", min=0, help="Data loading processes per training process.")
    ] = 1,
    report_only: Annotated[
        bool, typer.Option("--report_only", help="Write the report of what there is so far, without training.")
    ] = False,
    speed: Annotated[
        bool,
        typer.Option("--speed", help="Measure speed and memory of all finished models again, without training."),
    ] = False,
    json: JsonOption = False,
) -> Facts | None:
    """Train the models from DETR to DINO on the same data with the same schedule, and report them side by side.

    Each model is trained with several seeds and evaluated at the same steps. At the end, speed and memory are
    measured. The report is rewritten after each training: report.html, report.json and PNG files in --output_dir.

    Started again, the command continues: finished trainings are kept, and one that was killed resumes from its last
    checkpoint. Started several times at once, the processes share the trainings; with `accelerate launch -m hf_dino
    compare`, several processes train each. --rows and --seeds may differ from one start to the next.
    """
    _check_options(context)
    import_extra("accelerate", "train", "training")
    import_extra("jinja2", "train", "the report")
    import_extra("matplotlib", "train", "plotting")
    import transformers

    from ..compare import ComparisonSettings, compare, measure_comparison, plan_runs, report_comparison
    from ..compare.plan import choose_rows
    from ..utils.distributed import create_accelerator

    is_main = create_accelerator(None).is_main_process
    log_to_terminal(logging.WARNING if is_main else logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    settings = ComparisonSettings(size, max_train_steps, evaluations, image_size, global_batch_size, learning_rate)
    runs, write = plan_runs(output_dir, choose_rows(rows or []), seeds), partial(report_comparison, output_dir)
    failures = {}
    if not (report_only or speed):
        failures = compare(
            output_dir,
            runs,
            settings,
            dataset=dataset,
            on_finished=partial(write, command_line(context)),
            dataloader_num_workers=dataloader_num_workers,
        )
    if not is_main:
        return None
    if not report_only:
        measure_comparison(output_dir, dataset, again=speed)
    report = write(None if report_only or speed else command_line(context))
    print(f"report: {output_dir / 'report.html'}")
    return _facts(output_dir, report, failures)


_READ_WITH = {"report_only": ("output_dir", "json"), "speed": ("output_dir", "dataset", "json")}
"""Options that have an effect beside one that trains nothing; what a comparison trained with is in its settings."""


def _check_options(context: typer.Context) -> None:
    """Refuse options that would have no effect."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    for mode in (name for name in _READ_WITH if name in given):
        if unread := [name for name in given if name not in (mode, *_READ_WITH[mode])]:
            context.fail(f"--{unread[0]} has no effect with --{mode}; remove one of them.")


def _facts(output_dir: Path, report: dict[str, Any], failures: dict[Any, str]) -> Facts:
    rows = {
        name: {
            "finished_seeds": row["finished_seeds"],
            "unfinished_seeds": row["unfinished_seeds"],
            "ap": row["final"]["ap"],
            "steps_to_90": row["steps_to_90"],
        }
        for name, row in report["rows"].items()
    }
    failed = [{"row": run.row, "seed": run.seed, "error": error} for run, error in failures.items()]
    facts = {"output_dir": output_dir, "rows": rows, "order": report["order"], "failed": failed}
    return Facts(facts, status=int(bool(failures)))
