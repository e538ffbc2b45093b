"""Fine-tuning: the loop, its checkpoints, optimizer settings, averaged weights and logs."""

from ..training_arguments import FineTuningArguments
from ..utils.distributed import PROCESS_GROUP_TIMEOUT
from .batch import (
    TrainingPipeline,
    build_training_pipeline,
    check_min_image_size,
    effective_batch,
    read_and_check,
    with_effective_batch,
)
from .checkpoint import (
    TrainingState,
    check_disk_space,
    checkpoint_path,
    data_fingerprint,
    file_fingerprint,
    get_last_checkpoint,
    load_checkpoint,
    load_training_state,
    lock_output_dir,
    remove_checkpoints,
    resolve_resume_checkpoint,
    save_checkpoint,
    save_emergency_checkpoint,
)
from .ema import ExponentialMovingAverage
from .finetuning import FineTuner, make_accelerator
from .logging import RunHistory, TrainingProgress, init_tracking
from .loss_monitor import LossMonitor
from .optim import (
    SCHEDULES,
    compile_layers,
    enable_gradient_checkpointing,
    freezable_stages,
    freeze,
    get_lr_multiplier,
    get_milestones,
    get_param_groups,
    set_lr,
    should_stop_early,
)
from .signals import StopSignals


__all__ = [
    "PROCESS_GROUP_TIMEOUT",
    "SCHEDULES",
    "ExponentialMovingAverage",
    "FineTuner",
    "FineTuningArguments",
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
    "get_last_checkpoint",
    "get_lr_multiplier",
    "get_milestones",
    "get_param_groups",
    "init_tracking",
    "load_checkpoint",
    "load_training_state",
    "lock_output_dir",
    "make_accelerator",
    "read_and_check",
    "remove_checkpoints",
    "resolve_resume_checkpoint",
    "save_checkpoint",
    "save_emergency_checkpoint",
    "set_lr",
    "should_stop_early",
    "with_effective_batch",
]
