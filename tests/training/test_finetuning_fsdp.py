"""Fine-tuning with weights, gradients and optimizer state sharded over two processes (PyTorch's FSDP2)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.jobs import kill_once_there
from helpers.models import tiny_config
from hf_dino.data.shapes import generate_shapes


ROOT = Path(__file__).parents[2]
EXAMPLE = str(ROOT / "examples" / "finetune_coco.py")
ON_CPUS = str(ROOT / "tests" / "helpers" / "fsdp_on_cpus.py")


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Gives the command of two processes for a script and an output folder."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "tiny.json").write_text(
        json.dumps(tiny_config(num_denoising=6, freeze_backbone_batch_norms=False).to_diff_dict())
    )
    shapes = generate_shapes(folder / "shapes", image_size=64, num_train=16, num_val=3, num_test=2)
    options = [
        f"--config_name={folder / 'tiny.json'}",
        f"--dataset={shapes}",
        "--image_size=96",
        "--global_batch_size=8",
    ]
    options += [
        "--num_train_epochs=2",
        "--ema_decay=0.9",
        "--dataloader_num_workers=0",
        "--logging_steps=1",
        "--checkpointing_steps=1",
        "--per_device_eval_batch_size=1",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return lambda output, *script: [*torchrun, *script, *options, f"--output_dir={output}"]


@pytest.fixture(scope="module")
def in_processes():
    search_path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path}
    return {"env": environment, "stdout": subprocess.DEVNULL}


@pytest.fixture(scope="module")
def shared_out(launch, in_processes, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "shared_out"
    subprocess.run(launch(run, ON_CPUS, EXAMPLE), check=True, **in_processes)
    return run


def results(run):
    rows = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return rows, load_file(run / "model.safetensors")


def test_it_learns_what_processes_with_whole_copies_learn(launch, in_processes, shared_out, tmp_path):
    subprocess.run(launch(tmp_path / "copies", EXAMPLE), check=True, **in_processes)
    (ours, weights), (theirs, expected) = results(shared_out), results(tmp_path / "copies")
    assert [sorted(row) for row in ours] == [sorted(row) for row in theirs]
    for row, other in zip(ours, theirs):
        assert row == pytest.approx(other, rel=1e-4)
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_killed_it_goes_on_as_if_nothing_had_been(launch, in_processes, shared_out, tmp_path):
    command = launch(tmp_path / "run", ON_CPUS, EXAMPLE)
    job = subprocess.Popen(command, start_new_session=True, **in_processes)
    kill_once_there(job, tmp_path / "run" / "checkpoints" / "step_00000002")
    subprocess.run([*command, "--resume_from_checkpoint"], check=True, **in_processes)
    (ours, weights), (theirs, expected) = results(tmp_path / "run"), results(shared_out)
    assert ours == theirs
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)
