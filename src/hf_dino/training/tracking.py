"""A run in TensorBoard, Weights & Biases and what else Accelerate knows: under its own name."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .checkpoint import TrainingState


PROJECT = "hf_dino"


@contextmanager
def init_tracking(
    accelerator: Accelerator, state: TrainingState, output: Path, arguments: Mapping[str, Any]
) -> Iterator[None]:
    """Begin a tracker's run with the hyper-parameters, or go on with the one that a resumed run had.

    TensorBoard, Weights & Biases, SwanLab and Trackio go on with it. MLflow, which gives runs ids of its own, gets a
    second run of the same name, with the steps from the checkpoint on. What other trackers do is left to them.

    However the context is left, the tracker gets to write what it has.

    Args:
        accelerator (`Accelerator`): Has the tracker in `log_with`, or none.
        state (`TrainingState`): Of the run: its `run_id` and the step that it goes on from.
        output (`Path`): The run's folder, whose name people will see.
        arguments (`Mapping[str, Any]`): Names and values of the settings.
    """
    name = output.resolve().name
    # what a run had written after the step that it goes on from is replaced where the tracker can do that
    options = {
        "wandb": {"name": name, "id": state.run_id, "resume": "allow"},
        "swanlab": {"experiment_name": name, "id": state.run_id, "resume": "allow"},
        "trackio": {"name": f"{name}-{state.run_id}", "resume": "allow"},
        "mlflow": {"run_name": f"{name}-{state.run_id}"},
        "tensorboard": {"purge_step": state.step + 1 if state.step else 0},
    }
    plain = (bool, int, float, str)
    config = {key: value if isinstance(value, plain) else str(value) for key, value in arguments.items()}
    accelerator.init_trackers(PROJECT, config=None if state.step else config, init_kwargs=options)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
