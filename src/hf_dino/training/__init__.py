"""Fine-tuning: the loop, its checkpoints, optimizer settings, averaged weights and logs."""

from ..training_arguments import FineTuningArguments
from ..utils.distributed import PROCESS_GROUP_TIMEOUT
from .batch import TrainingPipeline, build_training_pipeline, effective_batch, read_and_check, with_effective_batch
from .checkpoint import get_last_checkpoint
from .ema import ExponentialMovingAverage
from .finetuning import FineTuner, make_accelerator
from .loss_monitor import LossMonitor
from .optim import (
    compile_layers,
    enable_gradient_checkpointing,
    freeze,
    get_lr_multiplier,
    get_milestones,
    get_param_groups,
    scale_lr,
)
from .signals import StopSignals


__all__ = [
    "PROCESS_GROUP_TIMEOUT",
    "ExponentialMovingAverage",
    "FineTuner",
    "FineTuningArguments",
    "LossMonitor",
    "StopSignals",
    "TrainingPipeline",
    "build_training_pipeline",
    "compile_layers",
    "effective_batch",
    "enable_gradient_checkpointing",
    "freeze",
    "get_last_checkpoint",
    "get_lr_multiplier",
    "get_milestones",
    "get_param_groups",
    "make_accelerator",
    "read_and_check",
    "scale_lr",
    "with_effective_batch",
]
