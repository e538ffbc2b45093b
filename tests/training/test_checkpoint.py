"""Checkpoints: they restore everything, are complete or absent, and leave other files alone."""

import json
import os
import random
import shutil
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from threading import Timer

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from hf_dino.data import InputError
from hf_dino.data.shapes import generate_shapes
from hf_dino.training import checkpoint as checkpoint_module
from hf_dino.training import get_last_checkpoint
from hf_dino.training.checkpoint import (
    TrainingState,
    check_disk_space,
    checkpoint_path,
    data_fingerprint,
    file_fingerprint,
    load_checkpoint,
    load_training_state,
    lock_output_dir,
    remove_checkpoints,
    resolve_resume_checkpoint,
    save_checkpoint,
    save_emergency_checkpoint,
)
from hf_dino.training.ema import ExponentialMovingAverage
from hf_dino.utils.io import atomic_update_directory, write_json


def make_run(with_scaler=False):
    """Return an accelerator with a trained model that has batch norm statistics, its optimizer and EMA weights."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    if with_scaler:  # which accelerate makes for GPUs only
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    average = ExponentialMovingAverage(accelerator.unwrap_model(model), 0.9)
    accelerator.register_for_checkpointing(average)
    train(accelerator, model, optimizer, average)
    return accelerator, model, optimizer, average


def train(accelerator, model, optimizer, average, steps=2):
    scaler = accelerator.scaler
    for _ in range(steps):
        loss = model(torch.randn(4, 2)).square().sum()
        (loss if scaler is None else scaler.scale(loss)).backward()
        optimizer.step()  # of accelerate, which calls the scaler
        optimizer.zero_grad()
        average.update()


def draws():
    """Return the next number of every generator."""
    return random.random(), float(np.random.random()), torch.rand(1).item()  # noqa: NPY002


def everything(accelerator, model, optimizer, average):
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average.state_dict(),
        "scaler": accelerator.scaler.state_dict(),
    }
    return json.dumps(state, default=lambda tensor: tensor.tolist())


def test_everything_that_the_next_step_depends_on_comes_back(tmp_path):
    accelerator, model, optimizer, average = make_run(with_scaler=True)
    state = TrainingState({"seed": 1}, step=7, validation_ap=[1 / 3], best_step=7, best_ap=1 / 3)
    save_checkpoint(accelerator, tmp_path, state)
    before = everything(accelerator, model, optimizer, average)
    numbers = draws()
    train(accelerator, model, optimizer, average)
    after = model.state_dict()
    expected = everything(accelerator, model, optimizer, average)

    optimizer.param_groups[0]["lr"] = 5.0
    accelerator.scaler.update(2.0)
    train(accelerator, model, optimizer, average, steps=3)
    assert everything(accelerator, model, optimizer, average) not in (before, expected)
    assert draws() != numbers
    torch.manual_seed(99)
    load_checkpoint(accelerator, tmp_path / "step_00000007")
    assert everything(accelerator, model, optimizer, average) == before
    assert draws() == numbers
    train(accelerator, model, optimizer, average)
    assert everything(accelerator, model, optimizer, average) == expected
    assert all(value.isfinite().all() for value in after.values())
    assert load_training_state(tmp_path / "step_00000007", {"seed": 1}) == state


def test_checkpoints_keep_the_latest_and_the_best(tmp_path):
    accelerator, *_ = make_run()
    state = TrainingState({"seed": 1})
    for step, best in ((1, 1), (2, 1), (3, 3), (4, 3)):
        state.step, state.best_step = step, best
        save_checkpoint(accelerator, tmp_path, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]
    state.best_step, state.best_ap = 4, 0.5  # evaluated after the checkpoint was written
    save_checkpoint(accelerator, tmp_path, state)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]
    assert get_last_checkpoint(tmp_path) == checkpoint_path(tmp_path, 4)
    assert load_training_state(checkpoint_path(tmp_path, 4), {"seed": 1}) == state


def test_a_step_is_evaluated_once():
    state = TrainingState({}, step=4, validation_ap=[0.1], evaluated_step=2, best_step=2, best_ap=0.1)
    assert not state.is_evaluated
    state.add_evaluation(0.1)
    assert state.is_evaluated
    assert (state.validation_ap, state.best_step) == ([0.1, 0.1], 2), "the first of the best"
    assert not TrainingState({}).is_evaluated


def test_nothing_but_checkpoints_is_deleted(tmp_path):
    (tmp_path / "step_00000007").mkdir()
    (tmp_path / ".step_00000008.part").mkdir()
    for name in ("notes", "step_by_step", "step_00000001 the good one"):
        (tmp_path / name).mkdir()
    (tmp_path / "log.txt").touch()
    accelerator, *_ = make_run()
    save_checkpoint(accelerator, tmp_path, TrainingState({}, step=9))
    assert get_last_checkpoint(tmp_path) == checkpoint_path(tmp_path, 9)
    others = {"log.txt", "notes", "step_by_step", "step_00000001 the good one"}
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000009", *others}
    remove_checkpoints(tmp_path)
    remove_checkpoints(tmp_path / "gone")
    assert {path.name for path in tmp_path.iterdir()} == others


def test_old_checkpoints_are_there_until_the_new_one_is_on_the_disk(tmp_path, monkeypatch):
    """Check the order that survives a power cut: sync each file and the folder, rename it, sync the new name."""
    accelerator, *_ = make_run()
    state, steps = TrainingState({}, step=1), []
    save_checkpoint(accelerator, tmp_path, state)
    fsync, rename, rmtree = os.fsync, Path.rename, shutil.rmtree

    def note(word, path):
        steps.append((word, Path(path).name))

    monkeypatch.setattr(
        os, "fsync", lambda file: (note("sync", Path(f"/proc/self/fd/{file}").readlink()), fsync(file))
    )
    monkeypatch.setattr(Path, "rename", lambda path, new: (note("rename", path), rename(path, new)))
    monkeypatch.setattr(shutil, "rmtree", lambda path, **more: (note("remove", path), rmtree(path, **more)))
    state.step = 2
    save_checkpoint(accelerator, tmp_path, state)
    new, part = {path.name for path in (tmp_path / "step_00000002").iterdir()}, ".step_00000002.part"
    renamed = steps.index(("rename", part))
    assert {("sync", name) for name in {*new, part}} <= set(steps[:renamed])
    assert steps[renamed + 1 :] == [("sync", tmp_path.name), ("remove", "step_00000001")]
    steps.clear()
    state.best_step = 2
    save_checkpoint(accelerator, tmp_path, state)
    assert steps == [("sync", ".training_state.part.json"), ("sync", "step_00000002")]


def test_a_process_that_dies_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    accelerator, *_ = make_run()
    state = TrainingState({}, step=1)
    save_checkpoint(accelerator, tmp_path, state)
    monkeypatch.setattr(checkpoint_module, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    state.step = 2
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(accelerator, tmp_path, state)
    monkeypatch.undo()
    assert get_last_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1)
    save_checkpoint(accelerator, tmp_path, state)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def test_an_error_that_has_nothing_to_do_with_the_disk_is_raised_as_it_is(tmp_path, monkeypatch):
    accelerator, *_ = make_run()
    monkeypatch.setattr(accelerator, "save_state", lambda *_: (_ for _ in ()).throw(RuntimeError("a device is lost")))
    with pytest.raises(RuntimeError, match="a device is lost"):
        save_checkpoint(accelerator, tmp_path, TrainingState({}))


def test_a_run_is_resumed_with_its_own_settings_only(tmp_path):
    accelerator, *_ = make_run()
    save_checkpoint(accelerator, tmp_path, TrainingState({"seed": 1, "size": (3, 4)}))
    (path,) = tmp_path.iterdir()
    assert load_training_state(path, {"seed": 1, "size": (3, 4)}).step == 0
    with pytest.raises(InputError, match=r"settings it was started with \(seed: 1 before, 2 now\)"):
        load_training_state(path, {"seed": 2, "size": (3, 4)})
    assert get_last_checkpoint(tmp_path / "gone") is None


def test_a_checkpoint_of_another_version_is_read(tmp_path):
    accelerator, *_ = make_run()
    save_checkpoint(accelerator, tmp_path, TrainingState({"seed": 1, "option of old": 2}, step=3))
    (path,) = tmp_path.iterdir()
    file = path / "training_state.json"
    content = json.loads(file.read_text())
    del content["total_steps"]
    file.write_text(json.dumps(content))
    state = load_training_state(path, {"seed": 1, "option of today": 3})
    assert (state.step, state.total_steps) == (3, None)


def test_a_file_is_known_wherever_it_is(tmp_path):
    for name, text in {"one": "a", "moved": "a", "changed": "b"}.items():
        (tmp_path / name).write_text(text)
    one, moved, changed = (file_fingerprint(tmp_path / name) for name in ("one", "moved", "changed"))
    assert one == moved != changed
    assert file_fingerprint(None) not in (one, changed)


def test_unreadable_random_states_are_reported(tmp_path, caplog):
    """Accelerate would continue with other random numbers silently."""
    accelerator, *_ = make_run()
    save_checkpoint(accelerator, tmp_path, TrainingState({}, step=1))
    checkpoint = tmp_path / "step_00000001"
    file = checkpoint / "random_states_0.pkl"
    shutil.copy(file, checkpoint / "random_states_1.pkl")
    load_checkpoint(accelerator, checkpoint)
    assert "written by 2 processes" in caplog.text
    assert "the run resumes with different random numbers" in caplog.text
    (checkpoint / "random_states_1.pkl").unlink()
    caplog.clear()
    load_checkpoint(accelerator, checkpoint)
    assert not caplog.text
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="step_00000001: is damaged or incomplete"):
        load_checkpoint(accelerator, checkpoint)
    file.unlink()
    with pytest.raises(InputError, match=r"damaged or incomplete \(no random_states_0\.pkl\)"):
        load_checkpoint(accelerator, checkpoint)


Usage = namedtuple("Usage", "free")


def test_too_small_a_disk_is_reported_before_the_first_step(tmp_path, monkeypatch, caplog):
    _, model, optimizer, _ = make_run()
    numbers = sum(parameter.numel() for parameter in model.parameters())
    statistics = 4 * (2 + 2) + 8  # mean and variance in float32, and a counter in int64
    size = 4 * 3 * numbers + statistics
    checks = {2 * size - 1: (InputError, False), 2 * size: (None, True), 3 * size: (None, False)}
    for free, (error, warns) in checks.items():
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: Usage(free))
        caplog.clear()
        if error:
            with pytest.raises(InputError, match=r"2 are needed at the same time, and .* free; free disk space or"):
                check_disk_space(tmp_path, model, optimizer)
        else:
            check_disk_space(tmp_path / "new" / "run", model, optimizer)
        assert ("up to 3 are needed" in caplog.text) == warns
    (tmp_path / "step_00000001").mkdir()  # which the resumed run replaces
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(size))
    check_disk_space(tmp_path, model, optimizer)
    with pytest.raises(InputError, match="2 are needed"):
        check_disk_space(tmp_path, model, optimizer, model.parameters())


@pytest.mark.parametrize("nonfinite", ["nothing", "a weight", "a statistic", "the optimizer"])
def test_a_nonfinite_state_does_not_replace_a_finite_one(tmp_path, nonfinite):
    accelerator, model, optimizer, _ = make_run()
    state = TrainingState({}, step=1)
    save_checkpoint(accelerator, tmp_path, state)
    state.step = 2
    targets = {
        "nothing": torch.zeros(1),
        "a weight": model[0].weight.data,
        "a statistic": model[1].running_var,
        "the optimizer": optimizer.state[model[2].weight]["exp_avg"],
    }
    targets[nonfinite].view(-1)[0] = torch.inf
    told = save_emergency_checkpoint(accelerator, model, optimizer, tmp_path, state)
    if nonfinite == "nothing":
        assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]
        assert told == f"The state before this step is saved in {tmp_path / 'step_00000002'}"
    else:
        assert get_last_checkpoint(tmp_path).name == "step_00000001"
        assert get_last_checkpoint(tmp_path / "failed").name == "step_00000002"
        assert "--resume_from_checkpoint resumes from step_00000001" in told


def test_where_a_run_starts(tmp_path, caplog):
    output, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    with pytest.raises(InputError, match="has no checkpoint to resume from"):
        resolve_resume_checkpoint(output, checkpoints, resume=True, overwrite=False)
    checkpoints.mkdir(parents=True)  # killed before the first checkpoint
    assert resolve_resume_checkpoint(output, checkpoints, resume=True, overwrite=False) is None
    assert "is restarted" in caplog.text
    with pytest.raises(InputError, match="is not empty"):
        resolve_resume_checkpoint(output, checkpoints, resume=False, overwrite=False)
    (output / "config.json").touch()  # a model that the user may want to keep
    with pytest.raises(InputError, match="has no checkpoint to resume from"):
        resolve_resume_checkpoint(output, checkpoints, resume=True, overwrite=False)


def test_a_folder_that_another_run_has_used_in_the_meantime_is_left_alone(tmp_path):
    accelerator, *_ = make_run()
    with lock_output_dir(accelerator, tmp_path, None, overwrite=False):
        save_checkpoint(accelerator, tmp_path, TrainingState({}, step=1))
        save_checkpoint(accelerator, tmp_path / "failed", TrainingState({}, step=1))
        (tmp_path / ".step_00000002.part").mkdir()
    first, second = (checkpoint_path(tmp_path, step) for step in (1, 2))
    for start in (None, second):
        with (
            pytest.raises(InputError, match=r"another run has just written .*step_00000001"),
            lock_output_dir(accelerator, tmp_path, start, overwrite=False),
        ):
            pass
    assert first.is_dir()
    with lock_output_dir(accelerator, tmp_path, first, overwrite=False):
        assert {path.name for path in tmp_path.iterdir()} == {"step_00000001", "failed", ".lock"}
    with lock_output_dir(accelerator, tmp_path, None, overwrite=True):
        assert not get_last_checkpoint(tmp_path)
        assert not get_last_checkpoint(tmp_path / "failed")


def test_a_dataset_is_known_wherever_it_is(tmp_path):
    from hf_dino.data import read_coco

    def fingerprint(folder, **options):
        generate_shapes(folder, image_size=32, num_train=3, num_val=2, num_test=1, **options)
        return data_fingerprint(read_coco(folder / "train", folder / "train.json"))

    first = fingerprint(tmp_path / "first")
    assert fingerprint(tmp_path / "moved") == first
    file = tmp_path / "moved" / "train.json"
    content = json.loads(file.read_text())
    content["annotations"] = content["annotations"][1:]
    file.write_text(json.dumps(content))
    moved = tmp_path / "moved" / "train"
    assert data_fingerprint(read_coco(moved, file)) == first, "corrected annotations"
    content["images"] = content["images"][:2]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 3]
    file.write_text(json.dumps(content))
    (moved / sorted(path.name for path in moved.iterdir())[2]).unlink()
    assert data_fingerprint(read_coco(moved, file)) != first


def test_write_json_keeps_the_old_file_when_it_fails(tmp_path):
    file = tmp_path / "folder" / "a.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [path.name for path in file.parent.iterdir()] == ["a.json"]


def test_files_arrive_together_and_others_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "config.json").write_text("old")
    with pytest.raises(TypeError), atomic_update_directory(tmp_path, last="config.json") as folder:
        write_json(folder / "config.json", object())
    assert (tmp_path / "config.json").read_text() == "old"
    with atomic_update_directory(tmp_path, last="config.json") as folder:
        (folder / "config.json").write_text("new")
        (folder / "weights").write_text("w")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "notes.txt": "mine",
        "config.json": "new",
        "weights": "w",
    }


@pytest.mark.parametrize("content", ["{}", '{"model_type": "bert"}', "[]", "no JSON"])
def test_overwrite_leaves_somebody_elses_folder_alone(tmp_path, content):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="contains no run or model that --overwrite_output_dir could replace"):
        resolve_resume_checkpoint(tmp_path, tmp_path / "checkpoints", resume=False, overwrite=True)
    (tmp_path / "config.json").write_text('{"model_type": "dino_detr"}')
    assert resolve_resume_checkpoint(tmp_path, tmp_path / "checkpoints", resume=False, overwrite=True) is None


def test_where_all_write_together_the_one_that_cannot_does_not_wait_for_the_others(tmp_path, monkeypatch):
    """The others already wait for it inside save_state, so it has to end for the launcher to end them."""
    accelerator, *_ = make_run()
    monkeypatch.setattr(accelerator.state, "distributed_type", DistributedType.FSDP)
    monkeypatch.setattr(accelerator, "save_state", lambda path: os.truncate(tmp_path / "gone", 0))
    monkeypatch.setattr(checkpoint_module, "all_gather_unique", lambda text: pytest.fail("waits indefinitely"))
    with pytest.raises(InputError, match=r"could not be written \(.*gone.*then start again"):
        save_checkpoint(accelerator, tmp_path, TrainingState({}, step=3))


def test_a_folder_that_a_network_disk_shows_late_is_waited_for(tmp_path, monkeypatch):
    accelerator, *_ = make_run()
    monkeypatch.setattr(checkpoint_module, "lock_directory", lambda folder: nullcontext())
    monkeypatch.setattr(checkpoint_module, "_NETWORK_DISK_DELAY", 0.2)
    with (
        pytest.raises(InputError, match=r"not found on .*; use an --output_dir on a shared disk"),
        lock_output_dir(accelerator, tmp_path, None, overwrite=False),
    ):
        pass
    monkeypatch.setattr(checkpoint_module, "_NETWORK_DISK_DELAY", 60)
    Timer(0.3, (tmp_path / checkpoint_module._LOCK_FILE).touch).start()
    with lock_output_dir(accelerator, tmp_path, None, overwrite=False):
        pass
