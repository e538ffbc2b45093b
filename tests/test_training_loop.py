"""Optimiser settings, checkpoints, and the watch on the loss."""

import json

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from conftest import tiny_model
from hf_dino.data import InputError
from hf_dino.training import (
    LossMonitor,
    TrainingState,
    checkpoint_path,
    drop_steps,
    files_into_folder,
    freeze_stem,
    latest_checkpoint,
    learning_rate_factor,
    parameter_groups,
    parse_size,
    read_state,
    remove_checkpoints,
    save_checkpoint,
    set_learning_rate,
    write_json,
)
from hf_dino.training import checkpoint as checkpoint_module


class Detector(nn.Module):
    """Parameters named as in the model."""

    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "backbone": nn.ModuleDict({"body": nn.Linear(2, 2), "projections": nn.Linear(2, 2)}),
                "head": nn.Linear(2, 1),
            }
        )
        self.model["backbone"]["body"].bias.requires_grad_(False)


def test_only_the_backbone_itself_learns_slower():
    model = Detector()
    others, backbone = parameter_groups(model, 1e-3, 0.1)
    assert (others["lr"], backbone["lr"]) == (1e-3, pytest.approx(1e-4))
    body, projections = model.model["backbone"]["body"], model.model["backbone"]["projections"]
    assert [id(p) for p in backbone["params"]] == [id(body.weight)], "and what is frozen is in no group"
    assert id(projections.weight) in {id(p) for p in others["params"]}
    assert len(others["params"]) == 4


def test_schedule():
    drops = drop_steps([0.5, 11], total_steps=1200, steps_per_epoch=100)
    assert drops == [600, 1100]
    factors = [learning_rate_factor(step, drop_steps=drops, warmup_steps=10) for step in (0, 9, 10, 599, 600, 1100)]
    assert factors == pytest.approx([0.1, 1, 1, 1, 0.1, 0.01])
    optimizer = torch.optim.AdamW(parameter_groups(Detector(), 1e-3, 0.1))
    for _ in range(2):  # from the initial rate, not from the last
        set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-4, 5e-5])


def batch_losses(value):
    terms = {name: torch.tensor(value) for name in ("loss_ce", "loss_bbox", "loss_giou", "loss_ce_0")}
    return torch.tensor(3 * value), terms


def check(monitor, *values, step=0):
    for value in values:
        monitor.add(*batch_losses(value), labels=[{"image_id": torch.tensor([step])}])
    return monitor.check(step)


def test_monitor_averages_and_forgets():
    monitor = LossMonitor()
    assert check(monitor, 1.0, 2.0) == 4.5, "the mean over the batches of a step"
    assert check(monitor, 3.0) == 9
    assert monitor.averages() == {"loss": 6, "loss_ce": 2, "loss_bbox": 2, "loss_giou": 2}
    check(monitor, 4.0)
    assert monitor.averages()["loss"] == 12
    assert monitor.averages() == {}


def test_a_loss_that_is_not_finite_stops_with_step_and_pictures():
    loss, terms = batch_losses(1.0)
    terms["loss_giou"] = torch.tensor(float("nan"))
    labels = [{"image_id": torch.tensor([41])}, {"image_id": torch.tensor([7])}]
    monitor = LossMonitor()
    monitor.add(*batch_losses(1.0), labels=[{"image_id": torch.tensor([3])}])
    monitor.add(loss * float("nan"), terms, labels)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 12 .*image_id \[41, 7\].*'loss_giou': nan"):
        monitor.check(step=12)


def test_where_a_scaler_leaves_steps_out_ten_in_a_row_may_be_wrong():
    monitor, inf = LossMonitor(with_scaler=True), float("inf")
    for step in range(10):
        assert check(monitor, inf, step=step) == inf
    assert monitor.averages() == {}
    check(monitor, 1.0)
    for step in range(10):
        check(monitor, 1.0, inf, step=step)
    assert monitor.averages()["loss"] == 3, "of what was learned from"
    with pytest.raises(FloatingPointError, match=r"the loss is inf at step 10 .*image_id \[10\]"):
        check(monitor, inf, step=10)


def trained(accelerator):
    model = Detector()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(parameter_groups(model, 1e-3, 0.1)))
    model.model["head"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return model


def test_checkpoints_keep_the_latest_and_the_best(tmp_path):
    accelerator = Accelerator()
    model = trained(accelerator)
    state = TrainingState({"seed": 1})
    for step, best in ((1, 1), (2, 1), (3, 3), (4, 3)):
        state.step, state.best_step = step, best
        save_checkpoint(accelerator, tmp_path, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]
    state.best_step, state.best_ap = 4, 0.5  # evaluated after it was written
    save_checkpoint(accelerator, tmp_path, state)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 4)
    assert read_state(checkpoint_path(tmp_path, 4), {"seed": 1}) == state

    before = model.model["head"].weight.detach().clone()
    nn.init.zeros_(model.model["head"].weight)
    accelerator.load_state(str(checkpoint_path(tmp_path, 4)))
    assert torch.equal(model.model["head"].weight, before)


def test_nothing_but_checkpoints_is_deleted(tmp_path):
    (tmp_path / "step_00000007").mkdir()
    (tmp_path / ".step_00000008.part").mkdir()
    for name in ("notes", "step_by_step", "step_00000001 the good one"):
        (tmp_path / name).mkdir()
    (tmp_path / "log.txt").touch()
    accelerator = Accelerator()
    trained(accelerator)
    save_checkpoint(accelerator, tmp_path, TrainingState({}, step=9))
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 9)
    others = {"log.txt", "notes", "step_by_step", "step_00000001 the good one"}
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000009", *others}
    remove_checkpoints(tmp_path)
    remove_checkpoints(tmp_path / "gone")
    assert {path.name for path in tmp_path.iterdir()} == others


def test_a_process_that_dies_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    accelerator = Accelerator()
    trained(accelerator)
    state = TrainingState({}, step=1)
    save_checkpoint(accelerator, tmp_path, state)
    monkeypatch.setattr(checkpoint_module, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    state.step = 2
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(accelerator, tmp_path, state)
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1)
    save_checkpoint(accelerator, tmp_path, state)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def test_a_run_goes_on_with_its_own_settings_only(tmp_path):
    accelerator = Accelerator()
    trained(accelerator)
    save_checkpoint(accelerator, tmp_path, TrainingState({"seed": 1, "size": (3, 4)}))
    (path,) = tmp_path.iterdir()
    assert read_state(path, {"seed": 1, "size": (3, 4)}).step == 0
    with pytest.raises(InputError, match=r"settings that it began with \(seed: 1 before, 2 now\)"):
        read_state(path, {"seed": 2, "size": (3, 4)})
    assert latest_checkpoint(tmp_path / "gone") is None


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
    with pytest.raises(TypeError), files_into_folder(tmp_path, last="config.json") as folder:
        write_json(folder / "config.json", object())
    assert (tmp_path / "config.json").read_text() == "old"
    with files_into_folder(tmp_path, last="config.json") as folder:
        (folder / "config.json").write_text("new")
        (folder / "weights").write_text("w")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "notes.txt": "mine",
        "config.json": "new",
        "weights": "w",
    }


@pytest.mark.parametrize("pretrained", [True, False])
def test_the_stem_of_a_pretrained_resnet_is_left_alone(pretrained):
    model = tiny_model(freeze_batch_norm=pretrained)
    trained_before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    freeze_stem(model)
    frozen = trained_before - {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    first_layers = ("model.backbone.body.embedder.", "model.backbone.body.encoder.stages.0.")
    assert frozen == ({name for name in trained_before if name.startswith(first_layers)} if pretrained else set())
    assert bool(frozen) == pretrained


def test_image_sizes():
    assert parse_size(["800"]) == {"shortest_edge": 800, "longest_edge": 1333}
    assert parse_size(["480", "600"]) == {"shortest_edge": 480, "longest_edge": 600}
    assert parse_size(["192x256"]) == {"height": 192, "width": 256}


@pytest.mark.parametrize("size", ["axb", "8x", "8x8x8", "big", "800 1333 2000", "8x8 9"])
def test_what_is_no_image_size(size):
    with pytest.raises(InputError, match=f"--image-size {size}: expected SHORTEST, SHORTEST LONGEST or HEIGHTxWIDTH"):
        parse_size(size.split())


@pytest.mark.parametrize("size", ["0", "-5", "800 600", "0x8", "8x-8"])
def test_impossible_image_sizes(size):
    with pytest.raises(InputError, match=f"--image-size {size}: must be positive, and LONGEST not less than SHORTEST"):
        parse_size(size.split())
