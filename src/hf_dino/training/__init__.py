"""Around the training loop: settings, checkpoints that a run can go on from, progress, and what it leaves."""

from ..utils.distributed import PROCESS_GROUP_TIMEOUT
from .checkpoint import (
    TrainingState,
    check_disk_space,
    checkpoint_path,
    data_fingerprint,
    file_fingerprint,
    get_last_checkpoint,
    load_checkpoint,
    load_training_state,
    prepare_checkpoints,
    remove_checkpoints,
    resolve_resume_checkpoint,
    save_checkpoint,
    save_emergency_checkpoint,
)
from .effective_batch import effective_batch, with_effective_batch
from .ema import ExponentialMovingAverage
from .export import gather_full_model, save_run
from .freezing import freezable_stages, freeze
from .history import RunHistory
from .image_sizes import check_min_image_size
from .inputs import TrainingPipeline, build_training_pipeline, read_and_check
from .lock import lock_output_dir
from .monitor import LossMonitor
from .optimization import (
    SCHEDULES,
    compile_layers,
    enable_gradient_checkpointing,
    get_lr_multiplier,
    get_milestones,
    get_param_groups,
    set_lr,
    should_stop_early,
)
from .progress import TrainingProgress
from .recipe import parse_args_with_recipe
from .signals import StopSignals
from .tracking import init_tracking


__all__ = [
    "PROCESS_GROUP_TIMEOUT",
    "SCHEDULES",
    "ExponentialMovingAverage",
    "LossMonitor",
    "RunHistory",
    "StopSignals",
    "TrainingPipeline",
    "TrainingProgress",
    "TrainingState",
    "build_training_pipeline",
    "check_disk_space",
    "check_min_image_size",
    "checkpoint_path",
    "compile_layers",
    "data_fingerprint",
    "effective_batch",
    "enable_gradient_checkpointing",
    "file_fingerprint",
    "freezable_stages",
    "freeze",
    "gather_full_model",
    "get_last_checkpoint",
    "get_lr_multiplier",
    "get_milestones",
    "get_param_groups",
    "init_tracking",
    "load_checkpoint",
    "load_training_state",
    "lock_output_dir",
    "parse_args_with_recipe",
    "prepare_checkpoints",
    "read_and_check",
    "remove_checkpoints",
    "resolve_resume_checkpoint",
    "save_checkpoint",
    "save_emergency_checkpoint",
    "save_run",
    "set_lr",
    "should_stop_early",
    "with_effective_batch",
]
