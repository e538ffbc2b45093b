"""Around the training loop: settings, checkpoints that a run can go on from, progress, and what it leaves."""

from .arguments import HelpFormatter, at_least, number_between, parse_size
from .checkpoint import (
    TrainingState,
    checkpoint_path,
    find_start,
    latest_checkpoint,
    load_checkpoint,
    prepare_checkpoints,
    read_state,
    remove_checkpoints,
    save_checkpoint,
)
from .export import export_run
from .files import check_new_files, files_into_folder, write_json
from .monitor import LossMonitor
from .optimization import (
    checkpoint_activations,
    drop_steps,
    freeze_stem,
    learning_rate_factor,
    parameter_groups,
    set_learning_rate,
)
from .progress import TrainingProgress


__all__ = [
    "HelpFormatter",
    "LossMonitor",
    "TrainingProgress",
    "TrainingState",
    "at_least",
    "check_new_files",
    "checkpoint_activations",
    "checkpoint_path",
    "drop_steps",
    "export_run",
    "files_into_folder",
    "find_start",
    "freeze_stem",
    "latest_checkpoint",
    "learning_rate_factor",
    "load_checkpoint",
    "number_between",
    "parameter_groups",
    "parse_size",
    "prepare_checkpoints",
    "read_state",
    "remove_checkpoints",
    "save_checkpoint",
    "set_learning_rate",
    "write_json",
]
