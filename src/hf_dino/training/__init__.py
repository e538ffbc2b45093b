"""Around the training loop: optimiser settings, checkpoints that a run can go on from, and progress."""

from .checkpoint import TrainingState, checkpoint_path, find_start, latest_checkpoint, read_state, save_checkpoint
from .files import files_into_folder, write_json
from .monitor import LossMonitor
from .optimization import drop_steps, freeze_stem, learning_rate_factor, parameter_groups, set_learning_rate
from .progress import TrainingProgress


__all__ = [
    "LossMonitor",
    "TrainingProgress",
    "TrainingState",
    "checkpoint_path",
    "drop_steps",
    "files_into_folder",
    "find_start",
    "freeze_stem",
    "latest_checkpoint",
    "learning_rate_factor",
    "parameter_groups",
    "read_state",
    "save_checkpoint",
    "set_learning_rate",
    "write_json",
]
