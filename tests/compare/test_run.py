"""A comparison is trained alike whether it is interrupted or not, and shared by processes without work done twice."""

import inspect
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import comparisons
from helpers.command_line import exit_status
from helpers.comparisons import ROWS, SETTINGS
from hf_dino.cli.compare import compare as command
from hf_dino.compare import plan_runs
from hf_dino.compare.plan import (
    SIZES,
    ComparisonSettings,
    choose_rows,
    prepare_comparison,
    read_settings,
    run_arguments,
)
from hf_dino.data.shapes import generate_shapes
from hf_dino.family import FAMILY, tiny_fields
from hf_dino.training import FineTuner
from hf_dino.training.checkpoint import lock_directory
from hf_dino.utils.errors import InputError


pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals as POSIX has them")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return generate_shapes(folder, image_size=64, num_train=6, num_val=4, num_test=1)


@pytest.fixture(scope="module")
def processes():
    """Start processes quickly, as forks of one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        context.set_forkserver_preload(["helpers.comparisons"])
        forkserver.ensure_running()
    return context


def start(processes, function, *args):
    process = processes.Process(target=function, args=args)
    process.start()
    return process


@pytest.fixture(scope="module")
def uninterrupted(processes, dataset, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted") / "comparison"
    process = start(processes, comparisons.train, output, dataset)
    process.join()
    assert process.exitcode == 0
    return output


def results(output):
    """What must not depend on how a comparison came about."""
    names = ("measures.jsonl", "history.jsonl", "model.safetensors")
    return {
        f"{run.row} {name}": (run.folder / name).read_bytes() for run in plan_runs(output, ROWS, 1) for name in names
    }


def die_at(output, dataset, number):
    """Train, and die just before the `number`-th change to the files of the runs, or sync of one of them."""
    left = [number]
    events = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}

    def count(event, args):
        is_write = event == "open" and (args[1] is None or (isinstance(args[1], str) and set(args[1]) & set("wax+")))
        if (is_write or event in events) and str(output / "rows") in str(args[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    comparisons.train(output, dataset)


def test_killed_and_continued_a_comparison_ends_the_same(processes, dataset, uninterrupted, tmp_path):
    output = tmp_path / "comparison"
    for number in (50, 90):
        process = start(processes, die_at, output, dataset, number)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process = start(processes, comparisons.train, output, dataset)
    process.join()
    assert process.exitcode == 0
    assert results(output) == results(uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1, 12))
def test_killed_at_many_moments_a_comparison_ends_the_same(processes, dataset, uninterrupted, tmp_path, first):
    output, number = tmp_path / "comparison", first
    while (process := start(processes, die_at, output, dataset, number)).join() or process.exitcode:
        assert process.exitcode == -signal.SIGKILL
        number += 17
    assert results(output) == results(uninterrupted)


def test_a_finished_run_keeps_its_model_but_no_checkpoint(uninterrupted):
    for run in plan_runs(uninterrupted, ROWS, 1):
        assert run.is_finished
        assert (run.folder / "metrics.json").is_file()
        assert not list((run.folder / "checkpoints").glob("step_*"))


@pytest.mark.slow
def test_a_run_is_an_ordinary_run(dataset, uninterrupted, tmp_path):
    """Measures do not touch the training: `FineTuner` alone gives the same weights and the same history."""
    torch.set_num_threads(1)
    (measured,) = plan_runs(uninterrupted, ROWS[1:], 1)
    (alone,) = plan_runs(tmp_path, ROWS[1:], 1)
    FineTuner(run_arguments(alone, str(dataset), SETTINGS, dataloader_num_workers=0)).train()
    for name in ("history.jsonl", "model.safetensors"):
        assert (alone.folder / name).read_bytes() == (measured.folder / name).read_bytes()


def test_all_rows_are_measured_at_the_same_steps(uninterrupted):
    for run in plan_runs(uninterrupted, ROWS, 1):
        rows = [json.loads(line) for line in (run.folder / "measures.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [2, 4]
        assert rows[0]["instability"] is None
        assert rows[1]["instability_share"] >= 0
        assert (rows[1]["recall_points"] is None) == (run.row == "detr")
        assert (rows[1]["denoising_after"] is None) == (run.row == "detr")


@pytest.mark.slow
def test_processes_share_the_runs(processes, dataset, uninterrupted, tmp_path):
    output = tmp_path / "comparison"
    both = [start(processes, comparisons.train, output, dataset) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert results(output) == results(uninterrupted)
    owners = {run.row: (run.lock / ".lock").read_text().split()[1] for run in plan_runs(output, ROWS, 1)}
    assert set(owners.values()) == {str(process.pid) for process in both}


def hold(folder, seconds):
    with lock_directory(folder):
        (folder / "held").touch()
        time.sleep(seconds)


@pytest.fixture
def trained(monkeypatch):
    """Pretend to train: list the runs and the datasets, and finish the runs, but that of Conditional DETR."""
    done = []

    def train(run, dataset, settings, machine):
        done.append((run.row, run.seed, Path(dataset)))
        if run.row == "conditional_detr":
            raise FloatingPointError("the loss is not finite")
        run.folder.mkdir(parents=True)
        (run.folder / "config.json").touch()

    monkeypatch.setattr("hf_dino.compare.run._train", train)
    return done


def test_a_run_that_another_process_trains_is_left_to_it_until_it_dies(processes, dataset, trained, tmp_path):
    output = tmp_path / "comparison"
    first, second = plan_runs(output, ROWS, 1)
    holder = start(processes, hold, first.lock, 600)
    while not (first.lock / "held").exists():
        time.sleep(0.01)
    assert comparisons.train(output, dataset) == {}
    assert [name for name, *_ in trained] == [second.row]
    holder.kill()
    holder.join()
    assert comparisons.train(output, dataset) == {}
    assert [name for name, *_ in trained] == [second.row, first.row]


def test_a_run_that_fails_does_not_stop_the_others_and_is_tried_again(dataset, trained, tmp_path):
    rows = ["detr", "conditional_detr", "dab_detr"]
    for _ in range(2):
        failures = comparisons.train(tmp_path / "comparison", dataset, rows)
        assert {run.row: text for run, text in failures.items()} == {"conditional_detr": "the loss is not finite"}
    assert [name for name, *_ in trained] == [*rows, "conditional_detr"]


def test_seeds_come_one_after_the_other_and_shapes_are_the_default(trained, tmp_path, monkeypatch):
    def generate(output):
        return generate_shapes(output, image_size=64, num_train=6, num_val=4, num_test=1)

    monkeypatch.setattr("hf_dino.compare.plan.generate_shapes", generate)
    comparisons.train(tmp_path, None, seeds=2)
    assert trained == [(row, seed, tmp_path / "shapes") for seed in (0, 1) for row in ROWS]


def test_changed_settings_and_data_are_refused_and_the_message_tells_them(dataset, tmp_path, monkeypatch):
    output = tmp_path / "comparison"
    assert prepare_comparison(output, str(dataset), SETTINGS) == str(dataset)
    assert prepare_comparison(output, None, SETTINGS) == str(dataset), "the one that it began with"
    with pytest.raises(InputError, match=r"began with \(--learning_rate: 0\.0004 before, 0\.001 now\); use those"):
        prepare_comparison(output, None, replace(SETTINGS, learning_rate=1e-3))
    monkeypatch.setitem(SIZES, "tiny", lambda row: {**tiny_fields(row), "num_queries": 50 if row == "detr" else 60})
    with pytest.raises(InputError, match=r"began with \(fields of detr: '.*' before, '.*' now\)"):
        prepare_comparison(output, None, SETTINGS)
    monkeypatch.undo()
    copy = generate_shapes(tmp_path / "copy", image_size=64, num_train=6, num_val=4, num_test=1)
    prepare_comparison(output, str(copy), SETTINGS)  # the same data in another place
    annotations = json.loads((copy / "train.json").read_text())
    annotations["annotations"][0]["bbox"][2] /= 2
    (copy / "train.json").write_text(json.dumps(annotations))
    with pytest.raises(InputError, match=r"data: '.*' before, '.*' now"):
        prepare_comparison(output, str(copy), SETTINGS)


def test_settings_of_a_damaged_file_or_another_folder_are_refused(dataset, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="has files that are not of a comparison"):
        prepare_comparison(tmp_path, str(dataset), SETTINGS)
    for text in ("", "{", "[1]", "null"):
        (tmp_path / "comparison.json").write_text(text)
        with pytest.raises(InputError, match=r"comparison\.json: is damaged"):
            read_settings(tmp_path)


def test_the_matching_of_a_lost_file_is_said_to_be_unknown(dataset, uninterrupted, tmp_path, caplog):
    from hf_dino.compare.measures import _read_assignments

    folder = plan_runs(uninterrupted, ROWS, 1)[1].folder / "assignments"
    matching = np.load(folder / "step_00000004.npy")
    assert _read_assignments(folder.parent, 4, matching.shape).tolist() == matching.tolist()
    for damage in (b"", b"\x93NUMPY", (folder / "step_00000004.npy").read_bytes()[:-8]):
        (tmp_path / "assignments").mkdir(exist_ok=True)
        (tmp_path / "assignments" / "step_00000004.npy").write_bytes(damage)
        assert _read_assignments(tmp_path, 4, matching.shape) is None
        assert "the matching instability after it is unknown" in caplog.text
        caplog.clear()


@pytest.mark.slow
def test_two_processes_train_each_run_together(dataset, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "hf_dino"]
    options = f"compare --output_dir {tmp_path / 'out'} --dataset {dataset} --rows {' '.join(ROWS)} --seeds 1"
    options += " --max_train_steps 4 --evaluations 2 --image_size 128x128 --global_batch_size 2 --json"
    done = subprocess.run([*launch, *options.split()], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert {name: row["finished_seeds"] for name, row in facts["rows"].items()} == {name: [0] for name in ROWS}
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_path_of_a_run_is_in_its_arguments():
    (run,) = plan_runs(Path("out"), ["dino_4scale"], 1)
    arguments = run_arguments(run, "data", SETTINGS)
    assert arguments.architecture == "dino_4scale"
    assert arguments.output_dir == run.folder
    assert arguments.eval_steps == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"evaluations": 9, "max_train_steps": 4},
            "--evaluations 9: must be at least 1 and at most --max_train_steps, 4",
        ),
        ({"image_size": "160x"}, "160x"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_any_work(changed, message):
    with pytest.raises(InputError, match=message):
        ComparisonSettings(**changed)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--report_only", "--rows", "detr"], "--rows has no effect with --report_only"),
        (["--report_only", "--speed"], "--speed has no effect with --report_only"),
        (["--speed", "--max_train_steps", "8"], "--max_train_steps has no effect with --speed"),
    ],
)
def test_options_without_effect_are_refused(given, message, tmp_path, capsys):
    assert exit_status(["compare", "--output_dir", tmp_path / "none", *given]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_rows_are_chosen_by_name_in_the_order_of_the_family():
    assert choose_rows([]) == choose_rows(["all"]) == list(FAMILY)
    assert choose_rows(["dino_4scale", "detr"]) == ["detr", "dino_4scale"]
    with pytest.raises(InputError, match="--rows dino: must be all, or some of detr, "):
        choose_rows(["dino"])


def test_the_defaults_of_the_command_are_those_of_the_library():
    options = inspect.signature(command).parameters
    assert {each.name: options[each.name].default for each in fields(ComparisonSettings)} == asdict(
        ComparisonSettings()
    )
