"""What a finished run leaves: the model, and all that is known about it."""

import platform
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator, DistributedType
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from ..evaluation import CocoScores
from ..hub import save_detector
from ..model_card import finetuned_card
from ..modeling_dino_detr import DinoDetrForObjectDetection
from ..utils.io import atomic_update_directory, write_json
from ..visualization import plot_training_curves
from .checkpoint import TrainingState


def gather_full_model(accelerator: Accelerator, model: nn.Module) -> PreTrainedModel:
    """Return the bare model; where processes share out its weights, a copy on the main process that has them all.

    Args:
        accelerator (`Accelerator`): Knows the processes, which all call this.
        model (`nn.Module`): The `DinoDetrForObjectDetection` that it prepared.
    """
    bare = accelerator.unwrap_model(model)
    if accelerator.distributed_type != DistributedType.FSDP:
        return bare
    weights = accelerator.get_state_dict(model)
    copy = DinoDetrForObjectDetection(bare.config)  # FSDP has changed the class of the other
    if accelerator.is_main_process:
        copy.load_state_dict(weights)
    return copy


def save_run(
    output: Path,
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    state: TrainingState,
    measured: Mapping[str, CocoScores],
    *,
    dataset: str,
    command: str,
    base_model: str | None,
    backbone: str | None,
) -> None:
    """Write model, image processor, card, `metrics.json` and `curves.png`, all at once.

    Args:
        output (`Path`): The folder. Files of these names are replaced, others stay.
        model (`PreTrainedModel`): A `DinoDetrForObjectDetection` with the weights to keep.
        processor (`BaseImageProcessor`): Its image processor.
        state (`TrainingState`): Of the finished run.
        measured (`Mapping[str, CocoScores]`): By the name of the part of the data; the card quotes the last.
        dataset (`str`): Name of the data, for people.
        command (`str`): What does the run again.
        base_model (`str`, *optional*): What training started from; None for random weights.
        backbone (`str`, *optional*): What the backbone alone started from.
    """
    split = list(measured)[-1]
    card = finetuned_card(
        model.config,
        metrics=measured[split].metrics,
        dataset=dataset,
        command=command,
        base_model=base_model,
        backbone=backbone,
        split=split,
        size=dict(processor.size),
    )
    report = {
        "best_step": state.export_step,
        **{name: {**scores.metrics, "ap_per_category": scores.ap_per_category} for name, scores in measured.items()},
        "command": command,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "history": state.history,
    }
    with atomic_update_directory(output, last="config.json") as folder:
        save_detector(folder, model, processor, card)
        write_json(folder / "metrics.json", report)
        plot_training_curves(state.history, folder / "curves.png")
