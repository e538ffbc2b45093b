"""`make gpu` loses nothing to a stage that fails, crashes or hangs, and all of it can be rehearsed on a CPU."""

import doctest
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest


ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
STAGES = ["machine", "build", "correctness", "operator", "tests", "sanitizer", "models", "counters", "fine-tuning"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="GPU machines run Linux")


@pytest.fixture
def stages(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield lambda name: importlib.import_module(f"gpu_stages.{name}")
    for path in BENCHMARKS.rglob("*.py"):
        sys.modules.pop(".".join(path.relative_to(BENCHMARKS).with_suffix("").parts), None)


def run(script, *arguments, **options):
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def group_rows(result, stage):
    return {row["case"]: row for row in result["rows"] if row["stage"] == stage}


def test_the_dry_run_takes_every_stage_to_its_end(kernel, tmp_path):
    done = run(BENCHMARKS / "gpu.py", "--dry-run", "--output", tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + (tmp_path / "gpu.log").read_text()[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.jsonl", "gpu.log", "gpu.md"]
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: stage["ended"] for name, stage in result["stages"].items()} == dict.fromkeys(STAGES, "done")
    assert all(row["ok"] for row in result["rows"])
    assert len(group_rows(result, "correctness")) == 48
    for row in group_rows(result, "operator").values():
        assert row.get("forward_speedup", 1) > 0
    training = group_rows(result, "models")["training step bf16 compiled"]
    assert min(training[f"{name}_ms"] for name in ("hf_dino", "hf_dino_reference", "transformers")) > 0
    assert group_rows(result, "tests")["marked gpu"]["skipped"] > 50
    fine_tuning = group_rows(result, "fine-tuning")["from scratch on shapes"]
    assert fine_tuning["ended"] == "stopped by SIGTERM"
    assert fine_tuning["steps"] > 0
    table = (tmp_path / "gpu.md").read_text()
    assert done.stdout.rstrip().endswith(table.rstrip())
    assert "correctness: 48 of 48 right" in table
    assert table.rstrip().endswith("nothing failed")


@pytest.mark.parametrize(
    ("arguments", "given", "expected"), [(["--dry-run"], None, "1"), (["--dry-run"], "3", "3"), ([], None, None)]
)
def test_a_dry_run_has_one_thread_per_process_unless_told_otherwise(
    stages, tmp_path, monkeypatch, arguments, given, expected
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    gpu = importlib.import_module("gpu")
    run = gpu.Run(gpu.parse_arguments([*arguments, "--output", str(tmp_path)]), tmp_path)
    run.log.close()
    assert run.environment.get("OMP_NUM_THREADS") == expected


FAKES = {
    "stages": """
        from typing import NamedTuple

        class StageLimits(NamedTuple):
            module: str
            seconds: float
            stall: float
            group: str

        STAGES = {
            "first": StageLimits("crashing", 30, 20, "one"),
            "second": StageLimits("fine", 30, 20, "one"),
            "third": StageLimits("hanging", 30, 1, "three"),
            "fourth": StageLimits("endless", 2, 20, "four"),
            "fifth": StageLimits("broken", 30, 20, "five"),
            "sixth": StageLimits("fine", 30, 20, "six"),
        }
    """,
    "crashing": """
        import os

        def main(stage):
            for name in stage.todo(["a", "b", "c", "d"]):
                with stage.rows.case(name) as row:
                    if name == "b":
                        os.abort()
                    if name == "c":
                        raise ValueError("this one fails")
                    row["figure"] = 7
    """,
    "fine": """
        def main(stage):
            stage.rows.add("only", ok=True)
    """,
    "hanging": """
        import time

        def main(stage):
            for name in stage.todo(["hangs", "works"]):
                with stage.rows.case(name):
                    time.sleep(100 if name == "hangs" else 0)
    """,
    "endless": """
        import subprocess, time

        def main(stage):
            for number in range(10**6):
                stage.rows.add(str(number), ok=True)
                subprocess.run(["sleep", "0.3"])
    """,
    "broken": """
        import no_such_module
    """,
}


@pytest.fixture
def fakes(tmp_path):
    """The script with stages that misbehave, and no project around it."""
    directory = tmp_path / "fakes" / "benchmarks"
    shutil.copytree(BENCHMARKS / "gpu_stages", directory / "gpu_stages")
    shutil.copy(BENCHMARKS / "gpu.py", directory)
    for name, text in FAKES.items():
        lines = [line[8:] for line in text.splitlines()]
        (directory / "gpu_stages" / f"{name}.py").write_text("\n".join(lines))
    return directory / "gpu.py"


def test_stages_that_crash_hang_or_fail_cost_the_others_nothing(fakes, tmp_path):
    done = run(fakes, "--output", tmp_path / "out", "--seconds=60")
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert done.returncode == 1
    assert {name: stage["ended"] for name, stage in result["stages"].items()} == {
        "first": "done",
        "second": "done",
        "third": "done",
        "fourth": "stopped: its time was up",
        "fifth": "failed with exit code 1",
        "sixth": "done",
    }
    first = group_rows(result, "first")
    assert first["a"] == {"stage": "first", "case": "a", "ok": True, "figure": 7}
    assert first["b"]["error"] == "failed with exit code -6"
    assert first["c"]["error"] == "ValueError: this one fails"
    assert first["d"]["ok"]
    assert group_rows(result, "third")["hangs"]["error"] == "stopped: no news for 1 s"
    assert group_rows(result, "third")["works"]["ok"]
    assert len(group_rows(result, "fourth")) > 2
    assert "FAILED first | b | error=failed with exit code -6" in done.stdout
    assert "No module named 'no_such_module'" in (tmp_path / "out" / "gpu.log").read_text()


def test_a_run_that_is_ended_has_written_and_printed_what_it_measured(fakes, tmp_path):
    command = [sys.executable, fakes, "--output", tmp_path / "out", "--stages", "first", "fourth"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    rows = tmp_path / "out" / "gpu.jsonl"
    while not (rows.exists() and '"fourth", "case"' in rows.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    assert printed.count("first | d | figure=7") == 2  # when it came, and in the table
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert group_rows(result, "first")["d"]["ok"]
    assert "0" in group_rows(result, "fourth")


def test_the_time_limit_of_the_run_is_kept(fakes, tmp_path):
    started = time.monotonic()
    run(fakes, "--output", tmp_path / "out", "--seconds=8", "--stages", "third", "fourth", "sixth")
    assert time.monotonic() - started < 14


def test_the_counters_of_ncu_are_read(stages):
    counters = stages("counters")
    kernels = counters.read_report(counters.SAMPLE.read_text())
    assert kernels["0 forward float32"]["us"] == pytest.approx(98.77)
    assert kernels["1 backward bfloat16"]["dram_mb"] == pytest.approx(234.57)
    assert kernels["1 backward bfloat16"]["registers"] == 96
    command = counters.command_for("ncu", counters.METRIC_SETS[0], Path("ncu.csv"))
    assert command[command.index("--clock-control") + 1] == "none"


def test_what_ncu_says_instead_of_counting_is_passed_on(stages):
    said = "==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n==PROF== Disconnected"
    with pytest.raises(ValueError, match="ERR_NVGPUCTRPERM"):
        stages("counters").read_report(said)


@pytest.mark.parametrize(
    ("output", "exit_code", "expected"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, {"errors": 0, "ok": True}),
        ("========= ERROR SUMMARY: 1 error", 9, {"errors": 1, "ok": False}),
        ("========= ERROR SUMMARY: 0 errors", 1, {"errors": 0, "ok": False}),  # the program itself failed
        ("========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)", 9, {"errors": 2, "ok": False}),
        ("Device not supported", 1, {"ok": False, "error": "no summary, exit code 1: Device not supported"}),
    ],
)
def test_the_report_of_the_sanitizer_is_read(stages, output, exit_code, expected):
    assert stages("sanitizer").read_report(output, exit_code) == expected


@pytest.mark.parametrize("module", ["counters", "gpu_tests", "sanitizer", "wheels"])
def test_examples_in_docstrings(stages, module):
    results = doctest.testmod(stages(module))
    assert results.attempted
    assert not results.failed


def test_a_result_that_is_wrong_or_not_a_number_is_no_success(stages):
    check_errors, rows = stages("correctness").check_errors, []
    for errors in ((1e-6, 1e-6), (1e-6, 1e-4), (1e-4, 1e-6), (float("nan"), 1e-6)):
        rows.append({})
        check_errors(rows[-1], errors, (5e-6, 1e-5))
    assert [row["ok"] for row in rows] == [True, False, False, False]


HIDE = """
import importlib.machinery, socket

HIDDEN = {"pycocotools", "supervision", "datasets", "faster_coco_eval", "kernels"}
find_spec = importlib.machinery.PathFinder.find_spec

def find_visible(name, path=None, target=None):
    return None if name in HIDDEN else find_spec(name, path, target)

def connect(*arguments):
    raise OSError("no network")

importlib.machinery.PathFinder.find_spec = find_visible
socket.socket.connect = connect
"""


def test_the_tests_for_a_gpu_need_no_network_and_few_packages(stages, tmp_path):
    (tmp_path / "hide_packages.py").write_text(HIDE)
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    files = stages("gpu_tests").files_with_gpu_tests()
    assert "tests/kernels/test_cuda.py" in files
    command = ["-p", "hide_packages", "-p", "no:cacheprovider", "--collect-only", "-q", "-m", "gpu", *files]
    done = run("-m", "pytest", *command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "test_runs_on_the_current_stream" in done.stdout
    assert "TestGpu" in done.stdout


def test_wheels_that_are_too_large_are_refused(stages, tmp_path, monkeypatch):
    wheels = stages("wheels")
    monkeypatch.setattr(wheels.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 0))
    (tmp_path / "small.whl").write_bytes(b"x")
    wheels.fetch(tmp_path)
    with (tmp_path / "large.whl").open("wb") as file:
        file.truncate(51 * 2**20)
    with pytest.raises(SystemExit, match="the limit is 50"):
        wheels.fetch(tmp_path)


def test_a_package_that_is_not_among_the_wheels_is_named(stages, tmp_path, monkeypatch):
    wheels = stages("wheels")
    monkeypatch.setattr(wheels, "required", lambda: {"no_such_package": "no-such-package==1.0"})
    said = wheels.install_missing(tmp_path, tmp_path / "site")
    assert said.startswith(f"no-such-package==1.0 not installed from {tmp_path}")


class FakeCuda:
    """A GPU whose clock is told how long a call takes, and which can refuse to be captured into a graph."""

    def __init__(self, seconds, captures=True):
        self.seconds, self.captures, self.now, self.replays = seconds, captures, 0.0, 0

    def call(self):
        self.now += self.seconds

    def install(self, monkeypatch, cuda):
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.time = fake.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 1000 * (end.time - self.time)

        class Graph:
            def replay(self):
                fake.replays += 1
                fake.now += fake.captured

        @contextmanager
        def capture(graph):
            if not fake.captures:
                raise RuntimeError("operation not permitted when stream is capturing")
            before = fake.now
            yield
            fake.captured = fake.now - before

        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(cuda, "Event", Event)
        monkeypatch.setattr(cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(cuda, "graph", capture)
        monkeypatch.setattr(cuda, "Stream", lambda: stream)
        monkeypatch.setattr(cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(cuda, "stream", lambda given: nullcontext())
        monkeypatch.setattr(cuda, "synchronize", lambda: None)


@pytest.mark.parametrize(
    ("seconds", "captures", "replayed"), [(1e-4, True, True), (1e-4, False, False), (3e-3, True, False)]
)
def test_short_calls_are_timed_in_graphs_and_others_one_by_one(stages, monkeypatch, seconds, captures, replayed):
    timing, fake = stages("timing"), FakeCuda(seconds, captures)
    fake.install(monkeypatch, timing.torch.cuda)
    assert timing.median_seconds([fake.call] * 4, "cuda") == pytest.approx(seconds)
    assert bool(fake.replays) == replayed


def test_a_reference_without_enough_memory_leaves_our_times(stages, monkeypatch):
    timing = stages("timing")

    def fail(*given):
        raise timing.torch.cuda.OutOfMemoryError

    monkeypatch.setattr(timing, "fused_reference", fail)
    row = {}
    timing.measure(row, timing.Case("decoder-900", 1, "float32", (64, 96)), "cpu", 1e9, 1)
    assert row["forward_ms"] > 0
    assert row["training_speedup"] == "reference: out of memory"
