"""`hf-dino predict` in several processes equals one; interrupted, killed or on a full disk, it resumes exactly."""

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from torch.distributed import HashStore

from helpers.command_line import hf_dino
from helpers.models import tiny_model
from helpers.videos import make_video
from hf_dino import DinoDetrImageProcessor
from hf_dino.data import InputError
from hf_dino.inference import ImageInput, processes
from hf_dino.inference.processes import SharedInputQueue


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes and signals as POSIX has them")
NUM_IMAGES = 30
FORMATS = "--save=jsonl,csv,json,coco,labelstudio,yolo"


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """A directory with a model, images of two sizes, and the results of an uninterrupted run."""
    directory = tmp_path_factory.mktemp("reader")
    tiny_model().save_pretrained(directory / "model")
    DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(directory / "model")
    (directory / "images").mkdir()
    for number in range(NUM_IMAGES):
        size = (60, 40) if number % 3 else (40, 60)
        Image.effect_noise(size, 50).convert("RGB").save(directory / "images" / f"{number:03}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        assert run("whole") == 0
    return directory


@pytest.fixture
def folder(reader, tmp_path, monkeypatch):
    """A directory of one's own with the same model and images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(reader / "model")
    shutil.copytree(reader / "images", tmp_path / "images")
    return tmp_path


def arguments(output, *more):
    # alone in a batch, an image has the same detections to the last bit in every run
    return [
        "images",
        f"--output={output}",
        "--model=model",
        "--device=cpu",
        "--threshold=0.02",
        "--batch_size=1",
        *more,
    ]


def run(output, *more):
    return hf_dino(["predict", *arguments(output, FORMATS, *more)])


def start(output, *more, before=lambda: None, **environment):
    """Run the command in a fork, whose output goes to OUTPUT.log; return its process id."""
    if child := os.fork():
        return child
    status = 99
    try:
        log = os.open(f"{output}.{environment.get('RANK', 0)}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(log, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ.update(environment)
        before()
        try:
            status = run(output, *more)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
        except Exception:
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start_together(output, number, *more):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(number)}
    return [start(output, *more, RANK=str(rank), **place) for rank in range(number)]


def status_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def log(output, rank=0):
    return Path(f"{output}.{rank}.log").read_text()


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def num_finished(output):
    return sum(path.read_bytes().count(b"\n") for path in Path(output).glob("*results*.jsonl"))


def wait_for(output, number):
    deadline = time.monotonic() + 60
    while num_finished(output) < number:
        assert time.monotonic() < deadline, f"{num_finished(output)} images are finished"
        time.sleep(0.005)


def test_two_processes_write_what_one_does(reader, folder):
    Path("images/005.png").write_text("broken")
    expected = reader / "whole"
    assert [status_of(child) for child in start_together("out", 2, "--json")] == [1, 0]
    summary = json.loads(log("out").partition("error:")[0].partition("{")[2].join(["{", ""]))
    assert summary["images"] == NUM_IMAGES - 1
    assert list(summary["errors"]) == ["images/005.png"]
    assert "{" not in log("out", 1), "only the main process has a summary"
    shutil.copy(reader / "images/005.png", "images/005.png")
    assert run("out", "--resume") == 0, "one process continues what two began"
    assert content("out") == content(expected), "in the order of the inputs, too"


def test_two_processes_share_videos_too(reader, folder, monkeypatch):
    monkeypatch.setitem(globals(), "FORMATS", "--save=images,jsonl,csv,json,coco")
    videos = ["0.mp4", "1.mp4", "2.mp4"]

    def make_videos():
        for number, name in enumerate(videos):
            make_video(Path(name), 5 + number, size=(60, 40))

    # in a process of its own, since FFmpeg's threads must not be forked
    assert status_of(start("whole", *videos, before=make_videos)) == 0
    assert [status_of(child) for child in start_together("out", 2, *videos)] == [0, 0]
    expected = {name: data for name, data in content("whole").items() if not name.endswith(".mp4")}
    assert {name: data for name, data in content("out").items() if not name.endswith(".mp4")} == expected
    assert content("out").keys() == content("whole").keys()
    assert log("out").count("->") == 1, "only a summary"
    assert f"{NUM_IMAGES} images, 3 videos, 18 frames, " in log("out")
    assert "->" not in log("out", 1)


def test_a_single_drawing_is_of_one_process(folder, monkeypatch, capsys):
    monkeypatch.setattr("hf_dino.inference.join_processes", lambda: queues(2)[0])
    command = ["predict", "images/000.png", "--output=drawn.png", "--model=model", "--device=cpu"]
    assert hf_dino(command) == 2
    assert "drawn.png is drawn by one process; name a directory" in " ".join(capsys.readouterr().err.split())
    assert not Path("drawn.png").exists()


def test_a_dead_process_holds_up_no_other_and_its_images_are_resumed(reader, folder):
    main, other = start_together("out", 2)
    wait_for("out", 4)
    os.kill(other, signal.SIGKILL)
    assert status_of(other) == -signal.SIGKILL
    wait_for("out", NUM_IMAGES // 3)  # the dead process had taken a few
    os.kill(main, signal.SIGTERM)
    assert status_of(main) == 128 + signal.SIGTERM
    assert "interrupted; --resume continues" in log("out")
    assert [status_of(child) for child in start_together("out", 3, "--resume")] == [0, 0, 0]
    assert content("out") == content(reader / "whole")


def test_a_dead_main_process_ends_the_others(reader, folder):
    main, other = start_together("out", 2)
    wait_for("out", 4)
    os.kill(main, signal.SIGKILL)
    status_of(main)
    assert status_of(other) == 1
    assert "error: the main process cannot be reached any more" in log("out", 1)
    assert run("out", "--resume") == 0
    assert content("out") == content(reader / "whole")


def queues(number):
    store = HashStore()
    return [SharedInputQueue(store, rank, number) for rank in range(number)]


def test_each_image_is_taken_once_and_the_main_process_gathers_all(tmp_path):
    main, *others = queues(4)
    inputs = [ImageInput(Path(str(number)), str(number)) for number in range(100)]
    taken = {queue.rank: [] for queue in (main, *others)}
    gathered = {}

    def work(queue):
        queue.wait()
        for item in queue.take():
            taken[queue.rank].append(item)
            queue.finish()
            time.sleep(0.001)
        gathered[queue.rank] = queue.gather({"rank": queue.rank}, lambda finished: None)

    threads = [threading.Thread(target=work, args=[queue]) for queue in (main, *others)]
    for thread in threads:
        thread.start()
    main.put(inputs, 3)
    for thread in threads:
        thread.join()
    assert sorted(item for items in taken.values() for item in items) == sorted(inputs)
    assert all(taken.values())
    assert gathered[0] == [{"rank": rank} for rank in range(4)]
    assert main.finish(0) == 100


def test_a_silent_process_is_given_up_and_a_failed_one_is_named(monkeypatch):
    monkeypatch.setattr(processes, "STALL_SECONDS", 0.1)
    main, silent, failed = queues(3)
    failed.fail("out of memory")
    with pytest.raises(InputError, match=r"^no answer from process 1 of 3 for 0 s; --resume continues$"):
        main.gather({}, lambda finished: None)
    silent.gather({}, lambda finished: None)
    with pytest.raises(InputError, match=r"^process 2 of 3 failed \(out of memory\); --resume continues$"):
        main.gather({}, lambda finished: None)


def test_a_half_set_launcher_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match=r"WORLD_SIZE is 2, but .*RANK expected, but not set; unset it"):
        processes.join_processes()


def test_two_runs_do_not_share_a_directory(reader, folder):
    child = start("out")
    wait_for("out", 1)
    os.kill(child, signal.SIGSTOP)  # so that it is not done before the others ask
    for option in ("--resume", "--overwrite"):
        with pytest.raises(InputError, match=r"^out: used by another run; wait for it to finish, or use a different"):
            run("out", option)
    os.kill(child, signal.SIGKILL)
    status_of(child)
    assert run("out", "--resume") == 0, "the lock of a dead process holds nothing up"
    assert content("out") == content(reader / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_whole_results_and_one_line(reader, folder, number):
    child = start("out")
    wait_for("out", 7)
    os.kill(child, number)
    assert status_of(child) == 128 + number
    assert log("out").splitlines()[-1] == "interrupted; --resume continues"
    assert "Traceback" not in log("out")
    records = [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]
    assert 7 <= len(records) < NUM_IMAGES
    assert [*json.loads(Path("out/results.json").read_text())] == [record["image"] for record in records]
    assert len(json.loads(Path("out/coco.json").read_text())["images"]) == len(records)
    assert run("out", "--resume") == 0
    assert content("out") == content(reader / "whole")


def limit_files(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails, as with a quota
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("part", [0.3, 0.7])
def test_a_full_disk_is_one_error_and_resumable(reader, folder, part):
    size = int(part * (reader / "whole/results.jsonl").stat().st_size)
    assert status_of(start("out", before=lambda: limit_files(size))) == 1
    lines = [line for line in log("out").splitlines() if not line.startswith(("images/", "Loading", " "))]
    (error,) = [line for line in lines if "error" in line.lower()]
    assert error.startswith("error: [Errno 27] File too large: 'out/results.")
    assert error.endswith("; --resume continues once this is mended")
    assert "Traceback" not in log("out")
    assert Path("out/results.jsonl").read_bytes().endswith(b"\n"), "no line in part"
    assert run("out", "--resume") == 0
    assert content("out") == content(reader / "whole")


def test_damaged_lines_are_said_and_their_images_detected_again(reader, folder, caplog):
    assert run("out") == 0
    lines = Path("out/results.jsonl").read_bytes().splitlines(keepends=True)
    lines[3], lines[8] = bytes(40) + b"\n", lines[3]
    Path("out/results.jsonl").write_bytes(b"".join([*lines, lines[9]]))
    assert run("out", "--resume") == 0
    assert "out/results.jsonl: 1 line is damaged and left out" in caplog.text
    assert content("out") == content(reader / "whole")


@pytest.mark.slow
def test_killed_at_ten_random_moments_each_image_is_there_once(reader, folder):
    moments, begin = random.Random(0), time.monotonic()
    assert status_of(start("timed")) == 0
    seconds, kills = time.monotonic() - begin, 0
    while kills < 10:
        output = f"out{kills // 5}"
        children = start_together(output, 2, "--resume") if kills % 2 else [start(output, "--resume")]
        time.sleep(moments.uniform(0.02, 0.3) * seconds)
        for child in children:
            os.kill(child, signal.SIGKILL)
        kills += sum(status_of(child) == -signal.SIGKILL for child in children) > 0
    for output in ("out0", "out1"):
        assert run(output, "--resume") == 0
        images = [json.loads(line)["image"] for line in Path(output, "results.jsonl").read_text().splitlines()]
        assert Counter(images) == Counter(f"images/{number:03}.png" for number in range(NUM_IMAGES))
        assert content(output) == content(reader / "whole")


@pytest.mark.slow
def test_a_launcher_shares_one_run(reader, folder):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "hf_dino"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [*launch, "predict", *arguments("out", FORMATS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.count(f"{NUM_IMAGES} images, ") == 1
    assert content("out") == content(reader / "whole")
