"""Nothing is lost: processes are killed, disks are full, and every run ends as an uninterrupted one does."""

import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from helpers import small_training
from hf_dino.data import InputError
from hf_dino.evaluation import DETECTION_DTYPE, write_coco_results
from hf_dino.training import get_last_checkpoint
from hf_dino.training.checkpoint import TrainingState, load_checkpoint, load_training_state, save_checkpoint
from hf_dino.utils.io import atomic_directory, atomic_update_directory, write_json


pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals as POSIX has them")
FILE_EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


@pytest.fixture(scope="module")
def processes():
    """Start processes quickly, as forks of one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        context.set_forkserver_preload(["helpers.small_training"])
        forkserver.ensure_running()
    return context


def run(processes, function, *args, **options):
    process = processes.Process(target=function, args=args, kwargs=options)
    process.start()
    return process


def finish(processes, output):
    """Let a run finish and return its output."""
    process = run(processes, small_training.train, output)
    process.join()
    assert process.exitcode == 0
    return torch.load(output / "weights_0.pt"), (output / "history.jsonl").read_text()


@pytest.fixture(scope="module")
def uninterrupted(processes, tmp_path_factory):
    return finish(processes, tmp_path_factory.mktemp("uninterrupted") / "run")


def assert_equal(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=0)
    assert one[1:] == other[1:]


def die_at(output, number):
    """Train, and die just before the `number`-th change to the files below `output`, or sync of one of them."""
    left = [number]

    def count(event, args):
        is_sync = event == "open" and args[1] is None  # `os.open`, which only `fsync` uses
        is_write = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if (is_sync or is_write or event in FILE_EVENTS) and str(output) in str(args[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    small_training.train(output)


def check_deaths(processes, uninterrupted, folder, numbers):
    """Kill a run at each of these changes until there are no more, and compare how it ends."""
    deaths = 0
    for number in numbers:
        process = run(processes, die_at, folder / str(number), number)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        deaths += 1
        assert_equal(finish(processes, folder / str(number)), uninterrupted)
    return deaths


def test_killed_between_any_two_changes_of_its_files_a_run_ends_the_same(processes, uninterrupted, tmp_path):
    assert check_deaths(processes, uninterrupted, tmp_path, range(3, 1000, 41)) >= 3


@pytest.mark.slow
def test_killed_at_every_change_of_its_files_a_run_ends_the_same(processes, uninterrupted, tmp_path):
    assert check_deaths(processes, uninterrupted, tmp_path, range(1, 1000)) >= 80


def kill_at_random(processes, output, longest, rng):
    """Start, kill and restart a run until it ends; return how often it was killed."""
    kills = 0
    while True:
        process = run(processes, small_training.train, output)
        process.join(rng.uniform(0, longest))
        process.kill()
        process.join()
        if process.exitcode == 0:
            return kills
        kills += 1
        longest *= 1.2  # so that it ends on a slow machine too


def test_killed_at_random_moments_a_run_ends_the_same(processes, uninterrupted, tmp_path):
    begin = time.perf_counter()
    finish(processes, tmp_path / "timed")
    seconds = time.perf_counter() - begin
    # three lives make at most 3.64 / 10 of the run, so a machine that is suddenly twice as fast kills often enough too
    assert kill_at_random(processes, tmp_path / "run", seconds / 10, random.Random(0)) >= 3
    assert_equal(finish(processes, tmp_path / "run"), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_many_random_moments_a_run_ends_the_same(processes, uninterrupted, tmp_path, seed):
    kill_at_random(processes, tmp_path / "run", 0.1, random.Random(seed))
    assert_equal(finish(processes, tmp_path / "run"), uninterrupted)


def send_at(step, number, now):
    if now == step:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_stops_the_run_after_the_step_with_the_usual_status(processes, uninterrupted, tmp_path, name):
    number = getattr(signal, name)
    process = run(processes, small_training.train, tmp_path, after_step=partial(send_at, 5, number))
    process.join()
    assert process.exitcode == 128 + number
    assert get_last_checkpoint(tmp_path / "checkpoints").name == "step_00000005", "not one that was due anyway"
    assert_equal(finish(processes, tmp_path), uninterrupted)


def send_twice(pause, now):
    if now == 3:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)


@pytest.mark.parametrize(("pause", "status"), [(0.0, 128 + signal.SIGTERM), (1.1, -signal.SIGTERM)])
def test_a_second_signal_stops_at_once_but_not_the_launchers_copy_of_the_first(processes, tmp_path, pause, status):
    process = run(processes, small_training.train, tmp_path, after_step=partial(send_twice, pause))
    process.join()
    assert process.exitcode == status


def train_as(rank, port, output, **options):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    small_training.train(output, **options)


def two(processes, output, options):
    """Run two processes that train together, each with its options, and return their exit statuses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [run(processes, train_as, rank, port, output, **options[rank]) for rank in (0, 1)]
    for process in both:
        process.join()
    return [process.exitcode for process in both]


def test_two_processes_stop_after_the_same_step_and_each_gets_its_random_numbers_back(processes, tmp_path):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    only_one_is_told = [{}, {"after_step": partial(send_at, 5, signal.SIGTERM)}]
    assert two(processes, stopped, only_one_is_told) == [143, 143]
    files = {path.name for path in get_last_checkpoint(stopped / "checkpoints").iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= files
    assert two(processes, stopped, [{}, {}]) == two(processes, whole, [{}, {}]) == [0, 0]
    for rank in (0, 1):
        ours, theirs = (torch.load(output / f"weights_{rank}.pt") for output in (stopped, whole))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def wait_indefinitely(now):
    time.sleep(600)


def test_two_runs_do_not_share_a_folder(processes, uninterrupted, tmp_path):
    first = run(processes, small_training.train, tmp_path, after_step=wait_indefinitely)
    try:
        while not (tmp_path / "history.jsonl").exists() or not (tmp_path / "history.jsonl").read_text():
            time.sleep(0.01)
        with pytest.raises(
            InputError, match=rf"used by another run \(process {first.pid} on .*; wait for it to finish"
        ):
            small_training.train(tmp_path)
    finally:
        first.kill()
        first.join()
    assert_equal(finish(processes, tmp_path), uninterrupted)


@pytest.fixture
def small_disk(tmp_path):
    """Return a folder with 400 KiB of space."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a tmpfs")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def trained(seed=0):
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(100, 100)  # 40 KiB, and twice that for the optimizer
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    return accelerator, model


@pytest.mark.parametrize("left", [0, 30, 70, 130])
def test_a_full_disk_costs_no_earlier_checkpoint(small_disk, left):
    """The KiB that are `left` decide whether torch, safetensors or Python finds the disk full."""
    accelerator, model = trained()
    state = TrainingState({}, step=1)
    save_checkpoint(accelerator, small_disk, state)
    before = {path.name: path.read_bytes() for path in (small_disk / "step_00000001").iterdir()}
    filler = small_disk / "filler"
    filler.write_bytes(bytes(max(0, shutil.disk_usage(small_disk).free - 1024 * left)))
    state.step = 2
    with pytest.raises(
        InputError, match=r"could not be written \(.*GiB were free.*Free disk space.* step_00000001 with --res"
    ):
        save_checkpoint(accelerator, small_disk, state)
    assert {path.name for path in small_disk.iterdir()} == {"filler", "step_00000001"}
    assert {path.name: path.read_bytes() for path in (small_disk / "step_00000001").iterdir()} == before

    expected = model.weight.detach().clone()
    filler.unlink()
    save_checkpoint(accelerator, small_disk, state)
    nn.init.zeros_(model.weight)
    load_checkpoint(accelerator, small_disk / "step_00000002")
    assert torch.equal(model.weight, expected)
    assert load_training_state(get_last_checkpoint(small_disk), {}).step == 2


def train_with_small_files(output, limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails, as with a quota
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    small_training.train(output)


def test_a_run_on_a_full_disk_resumes_once_there_is_space(processes, uninterrupted, tmp_path):
    process = run(processes, small_training.train, tmp_path, after_step=partial(send_at, 5, signal.SIGKILL))
    process.join()
    last = get_last_checkpoint(tmp_path / "checkpoints")
    largest = max(path.stat().st_size for path in last.iterdir())
    process = run(processes, train_with_small_files, tmp_path, largest - 1)
    process.join()
    assert process.exitcode == 1
    assert get_last_checkpoint(tmp_path / "checkpoints") == last
    assert_equal(finish(processes, tmp_path), uninterrupted)


@pytest.mark.slow
def test_a_launcher_forwards_signals_and_the_run_is_resumed(tmp_path):
    """As from a job scheduler: a signal to every process that the job has started."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    script = [str(Path(small_training.__file__)), str(tmp_path)]
    job = subprocess.Popen(
        [*launch, *script], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    for line in job.stdout:
        if line.startswith("step 1 "):
            os.killpg(job.pid, signal.SIGTERM)
            break
    told = job.stdout.read()
    job.wait()
    stopped = re.search(r"SIGTERM: stopped after step (\d+)", told)
    assert get_last_checkpoint(tmp_path / "checkpoints").name == f"step_{int(stopped[1]):08d}"
    subprocess.run([*launch, *script], env=environment, check=True, capture_output=True)
    assert (tmp_path / "weights_1.pt").exists()


def test_an_error_of_a_full_disk_names_the_file(small_disk):
    path = small_disk / "numbers.json"
    with pytest.raises(OSError, match=r"No space left on device: '.*numbers\.json'"):
        write_json(path, list(range(100_000)))
    for folder_of in (atomic_directory, partial(atomic_update_directory, last="config.json")):
        with (
            pytest.raises(OSError, match=rf"No space left on device: '{small_disk / 'model'}'"),
            folder_of(small_disk / "model") as temporary,
        ):
            (temporary / "weights").write_bytes(bytes(500_000))
        shutil.rmtree(small_disk / "model", ignore_errors=True)
    path = small_disk / "results.json"
    with pytest.raises(OSError, match=r"No space left on device: '.*results\.json'"):
        write_coco_results(path, np.zeros(10_000, DETECTION_DTYPE))
    assert not list(small_disk.iterdir())
