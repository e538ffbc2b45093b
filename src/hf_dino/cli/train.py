"""`hf-dino train`: fine-tune DINO or another DETR, with the fields of `FineTuningArguments` as options."""

import inspect
import logging
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from ..training_arguments import OPTIONS, FineTuningArguments, parse_option, read_recipe
from ..utils.errors import InputError, import_extra
from .options import Facts, JsonOption, log_to_terminal


FIRST_OF_GROUP = {
    "model_name_or_path": "Model",
    "dataset": "Data",
    "output_dir": "Run",
    "global_batch_size": "Training step",
    "learning_rate": "Learning rate",
    "per_device_eval_batch_size": "Evaluation and logging",
}
"""Headings in the help, by the option that they stand above."""

SECOND_SPELLINGS = {"dataset": ("--data",), "model_name_or_path": ("--model",)}
"""What users of other tools type."""


def train(recipe: Path | None = None, json: bool = False, **options: Any) -> Facts | None:
    """Fine-tune DINO, or another DETR of transformers, on a dataset, or train it from scratch.

    The dataset is a directory in the format of COCO, Pascal VOC, YOLO or Hugging Face datasets, or on the Hub, with a
    train and a validation split. The defaults are the official recipe for COCO. `accelerate launch -m hf_dino train`
    runs it on several GPUs. Ctrl-C, SIGTERM and SIGUSR1 stop it after the current step, with a checkpoint.
    """
    return run(make_arguments(recipe, options))


def run(arguments: FineTuningArguments) -> Facts | None:
    """Train, with warnings and errors on the terminal.

    Args:
        arguments (`FineTuningArguments`): The options of the run.

    Returns:
        `Facts` or `None`: The metrics of the best model by split; `None` in a process that is not the main one.
    """
    import_extra("accelerate", "train", "training")
    import transformers

    from ..training import FineTuner, make_accelerator

    accelerator = make_accelerator(arguments)
    log_to_terminal(logging.WARNING if accelerator.is_main_process else logging.ERROR)
    transformers.utils.logging.disable_progress_bar()  # FineTuner has its own
    tuner = FineTuner(arguments, accelerator)
    scores = tuner.train()
    if not accelerator.is_main_process:
        return None
    return Facts(
        {
            "output_dir": arguments.output_dir,
            "steps": tuner.state.step,
            "best_step": tuner.state.export_step,
            "metrics": {split: each.to_dict() for split, each in scores.items()},
        }
    )


def make_arguments(recipe: Path | None, options: dict[str, Any]) -> FineTuningArguments:
    """Combine a recipe with the options of the command line, which take precedence.

    Args:
        recipe (`Path`, *optional*): The recipe.
        options (`dict[str, Any]`): Text by the name of the option; `None` or an empty list if it was not given.
    """
    given = {name: parse_option(name, value) for name, value in options.items() if value not in (None, [])}
    values = read_recipe(recipe) if recipe else {}
    overrides = values.get("config_overrides", {}) | given.get("config_overrides", {})
    combined = values | given | {"config_overrides": overrides}
    if missing := [f"--{name}" for name, field in OPTIONS.items() if _is_required(field) and name not in combined]:
        raise InputError(f"give {' and '.join(missing)}, here or in --recipe")
    return FineTuningArguments(**combined)


def _is_required(field: Field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


METAVARS: dict[Any, str] = {
    int: "INTEGER", int | None: "INTEGER", float: "NUMBER", float | None: "NUMBER", Path: "PATH", Path | None: "PATH",
    str: "TEXT", str | None: "TEXT",
}  # fmt: skip
"""What help shows for a value, which the command line passes on as text."""


def _heading(name: str) -> str:
    """Return the heading above an option: that of its group, which begins at or before it."""
    names = list(OPTIONS)
    return [FIRST_OF_GROUP[each] for each in names[: names.index(name) + 1] if each in FIRST_OF_GROUP][-1]


def _takes_several(kind: Any) -> bool:
    """Return whether a type is a list or a mapping, or is optional and one of them."""
    return bool({get_origin(each) for each in (kind, *get_args(kind))} & {list, dict})


def _describe_default(field: Field) -> str:
    if _is_required(field):
        return " Required, here or in --recipe."
    return "" if field.type is bool or field.default in (None, MISSING) else f" Default: {field.default}."


def _parameter(field: Field) -> inspect.Parameter:
    """Make the typer option of a field of `FineTuningArguments`."""
    is_flag = field.type is bool
    option = typer.Option(
        f"--{field.name}/--no_{field.name}" if is_flag else f"--{field.name}",
        *SECOND_SPELLINGS.get(field.name, ()),
        help=field.metadata["help"] + _describe_default(field),
        metavar=field.metadata["metavar"] or METAVARS.get(field.type),
        rich_help_panel=_heading(field.name),
    )
    kind: Any = bool if is_flag else list[str] if _takes_several(field.type) else str
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


_RECIPE = inspect.Parameter(
    "recipe",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="YAML file with any of these options; those of the command line take precedence."
        ),
    ],
)
_JSON = inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=JsonOption)
_PARAMETERS = [_RECIPE, _JSON, *map(_parameter, OPTIONS.values())]
train.__signature__ = inspect.Signature(_PARAMETERS)  # type: ignore[attr-defined]
train.__annotations__ = {each.name: each.annotation for each in _PARAMETERS}
