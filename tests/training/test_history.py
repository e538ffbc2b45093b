"""The log of a run: history, curves, progress and trackers, the same after it was resumed."""

import io
import json
import math
from contextlib import suppress

import pytest
from accelerate import Accelerator
from PIL import Image
from rich.console import Console

from hf_dino.training.checkpoint import TrainingState
from hf_dino.training.logging import RunHistory, TrainingProgress, init_tracking, peak_memory_gib


ROWS = [
    {"step": 1, "loss": 2.5},
    {"step": 2, "loss": 1.5},
    {"step": 2, "ap": 0.25, "ap50": 0.5},
    {"step": 3, "loss": 1},
]


def read(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def new_history(folder):
    return RunHistory(folder, TrainingState({}), enabled=True)


def test_the_file_has_every_row_at_every_moment(tmp_path):
    history = new_history(tmp_path / "run")
    assert read(tmp_path / "run") == []
    for count, row in enumerate(ROWS, start=1):
        history.add(row)
        assert read(tmp_path / "run") == history.rows == ROWS[:count]
    history.sync()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["history.jsonl"]


@pytest.mark.parametrize(
    ("state", "kept"), [({"step": 2}, 2), ({"step": 2, "evaluated_step": 2}, 3), ({"step": 3}, 4)]
)
def test_a_resumed_run_cuts_what_its_checkpoint_does_not_know(tmp_path, state, kept):
    history = new_history(tmp_path)
    for row in ROWS:
        history.add(row)
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    resumed = RunHistory(tmp_path, TrainingState({}, **state), enabled=True)
    assert read(tmp_path) == ROWS[:kept]
    for row in ROWS[kept:]:
        resumed.add(row)
    assert read(tmp_path) == ROWS


def test_a_new_run_in_the_same_folder_starts_with_an_empty_history(tmp_path):
    new_history(tmp_path).add(ROWS[0])
    new_history(tmp_path)
    assert read(tmp_path) == []


def test_a_file_that_cannot_be_written_ends_no_run_and_is_completed_later(tmp_path, caplog):
    history = new_history(tmp_path)
    history.add(ROWS[0])
    (tmp_path / "history.jsonl").unlink()
    (tmp_path / "history.jsonl").mkdir()  # as unwritable as a file that another program locks
    history.add(ROWS[1])
    assert "history.jsonl" in caplog.text
    (tmp_path / "history.jsonl").rmdir()
    history.add(ROWS[2])
    assert read(tmp_path) == ROWS[:3]


def test_a_checkpoint_finds_the_rows_that_could_not_be_appended(tmp_path):
    history = new_history(tmp_path)
    (tmp_path / "history.jsonl").unlink()
    (tmp_path / "history.jsonl").mkdir()
    history.add(ROWS[0])
    (tmp_path / "history.jsonl").rmdir()
    history.sync()
    assert read(tmp_path) == ROWS[:1]


def test_a_file_that_cannot_be_written_at_the_start_ends_no_run(tmp_path, caplog):
    (tmp_path / "run").touch()  # where the directory should be
    history = new_history(tmp_path / "run")
    assert "the run continues" in caplog.text
    (tmp_path / "run").unlink()
    history.add(ROWS[0])
    assert read(tmp_path / "run") == ROWS[:1]


def test_rows_before_a_damaged_one_are_kept(tmp_path):
    history = new_history(tmp_path)
    for row in ROWS:
        history.add(row)
    lines = (tmp_path / "history.jsonl").read_bytes().splitlines(keepends=True)
    lines[2] = b"\xff\xfe" + bytes(30) + b"\n"  # not UTF-8: the disk lost a block
    (tmp_path / "history.jsonl").write_bytes(b"".join(lines))
    assert RunHistory(tmp_path, TrainingState({}, step=3), enabled=True).rows == ROWS[:2]


def test_other_processes_write_nothing(tmp_path):
    history = RunHistory(tmp_path, TrainingState({}), enabled=False)
    history.add(ROWS[0])
    history.sync()
    history.plot()
    assert history.rows == ROWS[:1]
    assert not list(tmp_path.iterdir())


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    history = new_history(tmp_path)
    for row in ROWS:
        history.add(row)
    history.plot()
    assert Image.open(tmp_path / "curves.png").format == "PNG"


LOSSES = {"loss": 1.25, "loss_ce": 0.5, "loss_bbox": 0.25, "loss_giou": 0.125}


def shown(is_terminal):
    progress = TrainingProgress(100, 10, enabled=True, global_batch_size=4)
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=160)
    progress.progress.live.console = console
    with progress:
        progress.set_ap(0.321)
        progress.step(1.5, LOSSES, 1e-4)
        with progress.track("validation", 5) as counted:
            counted(5)
        measured = progress.report(11, 1.5, LOSSES, 1e-4)
    return console.file.getvalue(), measured


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_shows_what_is_measured(is_terminal):
    text, measured = shown(is_terminal)
    for part in (
        "epoch 1.50",
        "loss 1.250, ce 0.500, bbox 0.250, giou 0.125",
        "lr 1.00e-04",
        "images/s",
        "AP 0.321",
    ):
        assert part in text
    assert "11/100" in text
    assert "GiB" in text
    assert ("step 11/100" in text) != is_terminal, "a line of its own only in a log file"
    assert measured["samples_per_second"] > 0
    assert 0.01 < measured["peak_memory_gib"] == pytest.approx(peak_memory_gib(), abs=0.1)


def test_evaluations_do_not_count_as_slow_training(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("hf_dino.training.logging.time.monotonic", lambda: clock[0])
    progress = TrainingProgress(100, 0, enabled=False, global_batch_size=6)
    for _ in range(2):
        clock[0] += 1
        progress.step(0.1, LOSSES, 1e-4)
    with progress.track("validation", 1):
        clock[0] += 1000
    assert progress.samples_per_second == pytest.approx(6)
    progress.report(2, 0.1, LOSSES, 1e-4)
    clock[0] += 2
    progress.step(0.1, LOSSES, 1e-4)
    assert progress.samples_per_second == pytest.approx(3)


def scalars(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_resumed_run_continues_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")

    def log(state, steps, value):
        accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path / "run"))
        settings = {"lr": 1e-4, "output": tmp_path, "model": None}
        with suppress(KeyboardInterrupt), init_tracking(accelerator, state, tmp_path / "run", settings):
            for step in steps:
                accelerator.log({"loss": value}, step=step)
            raise KeyboardInterrupt

    log(TrainingState({}), range(1, 6), 1.0)
    log(TrainingState({}, step=3), range(4, 7), 2.0)
    found = scalars(tmp_path / "run" / "hf_dino", "loss")
    assert found == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    (settings,) = (tmp_path / "run").glob("hf_dino/*/hparams.yml")
    assert "lr: 0.0001" in settings.read_text()


class FakeAccelerator:
    trackers = ()

    def init_trackers(self, project, config, init_kwargs):
        self.call = project, config, init_kwargs


def test_a_run_has_its_folders_name_and_one_identity_in_every_tracker(tmp_path):
    state, accelerator = TrainingState({}), FakeAccelerator()
    with init_tracking(accelerator, state, tmp_path / "cells", {"num_train_epochs": 3, "max_grad_norm": math.inf}):
        pass
    project, config, options = accelerator.call
    assert (project, config) == ("hf_dino", {"num_train_epochs": 3, "max_grad_norm": math.inf})
    assert options["wandb"] == {"name": "cells", "id": state.run_id, "resume": "allow"}
    state.step = 5
    again = FakeAccelerator()
    with init_tracking(again, state, tmp_path / "cells", {"num_train_epochs": 3}):
        pass
    assert again.call[2]["wandb"] == options["wandb"]
    assert state.run_id != TrainingState({}).run_id


@pytest.mark.parametrize(("gib", "said"), [(0.05, "51 MiB"), (0.25, "0.2 GiB"), (12.0, "12.0 GiB")])
def test_little_memory_is_more_than_none(monkeypatch, gib, said):
    monkeypatch.setattr("hf_dino.training.logging.peak_memory_gib", lambda: gib)
    assert f"  {said}" in shown(is_terminal=False)[0]
