"""A training small enough to be killed many times, with everything that a checkpoint has to restore.

Dropout samples random numbers, different ones on each process; there are EMA weights and one "evaluation" per epoch.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from hf_dino.training.checkpoint import (
    TrainingState,
    checkpoint_path,
    load_checkpoint,
    load_training_state,
    lock_output_dir,
    resolve_resume_checkpoint,
    save_checkpoint,
)
from hf_dino.training.ema import ExponentialMovingAverage
from hf_dino.training.logging import RunHistory
from hf_dino.training.signals import StopSignals


STEPS, EPOCH, SAVE_EVERY = 12, 6, 2
SETTINGS = {"seed": 0}


def network():
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 1))


def train(output: Path, *, after_step=lambda step: None) -> Path:
    """Train, or resume if there is something to resume, and return the file of the final weights."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    checkpoints = output / "checkpoints"
    start = resolve_resume_checkpoint(output, checkpoints, resume=checkpoints.exists(), overwrite=False)
    state = load_training_state(start, SETTINGS) if start else TrainingState(SETTINGS)
    set_seed(0)
    model = network()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    average = ExponentialMovingAverage(accelerator.unwrap_model(model), 0.9)
    accelerator.register_for_checkpointing(average)
    set_seed(0, device_specific=True)
    with lock_output_dir(accelerator, checkpoints, start, overwrite=False), StopSignals(accelerator) as signals:
        if start:
            load_checkpoint(accelerator, start)
        history = RunHistory(output, state, enabled=accelerator.is_main_process)
        while state.step < STEPS:
            images = torch.randn(8, 4, generator=torch.Generator().manual_seed(state.step))
            loss = model(images).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            average.update()
            state.step += 1
            history.add({"step": state.step, "loss": loss.item()})
            if state.step % EPOCH == 0:
                history.add({"step": state.step, "ap": 0.1 * state.step})
                state.add_evaluation(0.1 * state.step)
            if state.step % SAVE_EVERY == 0:
                save_checkpoint(accelerator, checkpoints, state)
            after_step(state.step)
            if signals.should_stop():
                save_checkpoint(accelerator, checkpoints, state)
                signals.exit(f"stopped after step {state.step}")
        load_checkpoint(accelerator, checkpoint_path(checkpoints, state.export_step))
    weights = output / f"weights_{accelerator.process_index}.pt"
    torch.save({"model": model.state_dict(), "average": average.state_dict()}, weights)
    accelerator.end_training()
    return weights


if __name__ == "__main__":
    train(Path(sys.argv[1]), after_step=lambda step: print(f"step {step} of process {os.getpid()}", flush=True))
