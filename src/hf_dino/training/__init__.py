"""Around the training loop: settings, checkpoints that a run can go on from, progress, and what it leaves."""

from .checkpoint import (
    TrainingState,
    check_disk_space,
    checkpoint_path,
    data_fingerprint,
    file_fingerprint,
    find_start,
    latest_checkpoint,
    load_checkpoint,
    prepare_checkpoints,
    read_state,
    remove_checkpoints,
    rescue_state,
    save_checkpoint,
)
from .effective_batch import effective_batch, with_effective_batch
from .ema import WeightAverage
from .export import export_run, whole_model
from .freezing import freezable_stages, freeze
from .history import RunHistory
from .inputs import TrainingInputs, make_inputs, read_checked
from .lock import run_folder
from .monitor import LossMonitor
from .optimization import (
    SCHEDULES,
    checkpoint_activations,
    compile_layers,
    drop_steps,
    make_schedule,
    parameter_groups,
    set_learning_rate,
    stopped_improving,
)
from .picture_sizes import check_picture_sizes
from .processes import PATIENCE
from .progress import TrainingProgress
from .recipe import apply_recipe
from .signals import StopSignals
from .tracking import tracked


__all__ = [
    "PATIENCE",
    "SCHEDULES",
    "LossMonitor",
    "RunHistory",
    "StopSignals",
    "TrainingInputs",
    "TrainingProgress",
    "TrainingState",
    "WeightAverage",
    "apply_recipe",
    "check_disk_space",
    "check_picture_sizes",
    "checkpoint_activations",
    "checkpoint_path",
    "compile_layers",
    "data_fingerprint",
    "drop_steps",
    "effective_batch",
    "export_run",
    "file_fingerprint",
    "find_start",
    "freezable_stages",
    "freeze",
    "latest_checkpoint",
    "load_checkpoint",
    "make_inputs",
    "make_schedule",
    "parameter_groups",
    "prepare_checkpoints",
    "read_checked",
    "read_state",
    "remove_checkpoints",
    "rescue_state",
    "run_folder",
    "save_checkpoint",
    "set_learning_rate",
    "stopped_improving",
    "tracked",
    "whole_model",
    "with_effective_batch",
]
