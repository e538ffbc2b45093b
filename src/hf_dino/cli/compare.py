"""`hf-dino compare`: train the models of the family alike and report them side by side."""

import logging
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..training_arguments import DATASET_HELP
from ..utils.errors import import_extra
from .options import Facts, JsonOption, log_to_terminal


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
    ] = 1200,
    evaluations: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Evaluations of each training, evenly spaced.")
    ] = 12,
    image_size: Annotated[str, typer.Option(metavar="HEIGHTxWIDTH", help="Size of the images in pixels.")] = "160x160",
    global_batch_size: Annotated[
        int, typer.Option(metavar="INTEGER", min=1, help="Images per optimizer step, over all processes.")
    ] = 8,
    learning_rate: Annotated[float, typer.Option(metavar="NUMBER", min=0, help="Peak learning rate.")] = 4e-4,
    size: Annotated[Literal["tiny"], typer.Option(help="Width and depth of the models.")] = "tiny",
    dataloader_num_workers: Annotated[
        int, typer.Option(metavar="INTEGER", min=0, help="Data loading processes per training process.")
    ] = 1,
    json: JsonOption = False,
) -> Facts | None:
    """Train the models from DETR to DINO on the same data with the same schedule, and report them side by side.

    Started again, the command continues: finished trainings are kept, and one that was killed resumes from its last
    checkpoint. Started several times at once, the processes share the trainings.
    """
    import_extra("accelerate", "train", "training")
    import transformers

    from ..compare import ComparisonSettings, compare, plan_runs
    from ..compare.plan import choose_rows
    from ..utils.distributed import create_accelerator

    is_main = create_accelerator(None).is_main_process
    log_to_terminal(logging.WARNING if is_main else logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    settings = ComparisonSettings(size, max_train_steps, evaluations, image_size, global_batch_size, learning_rate)
    runs = plan_runs(output_dir, choose_rows(rows or []), seeds)
    failures = compare(output_dir, runs, settings, dataset=dataset, dataloader_num_workers=dataloader_num_workers)
    if not is_main:
        return None
    return Facts({"output_dir": output_dir, "failed": list(failures.values())}, status=int(bool(failures)))
