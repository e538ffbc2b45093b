"""The benchmark of the operator tells right from wrong, survives what crashes, and says what cannot take part."""

import importlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("HF_DINO_CPU_CAPABILITY", "")  # the benchmark sets both
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "")
    monkeypatch.setattr(importlib.import_module("common.machine"), "RESULTS", tmp_path)
    yield importlib.import_module("deformable_attention")
    forget_benchmarks()


def forget_benchmarks():
    for path in BENCHMARKS.rglob("*.py"):
        sys.modules.pop(".".join(path.relative_to(BENCHMARKS).with_suffix("").parts), None)


def test_a_quick_run_measures_what_is_right(benchmark, tmp_path):
    benchmark.main(["--quick", "--shapes", "encoder-4scale"])
    result = json.loads((tmp_path / "deformable_attention_cpu_quick.json").read_text())
    assert result["implementations"]["msda-triton"] == "for CUDA only"
    assert [(one["dtype"], one["pass"]) for one in result["measured"]] == [
        (dtype, which) for dtype in ("float32", "bfloat16") for which in ("forward", "forward+backward")
    ]
    for one in result["measured"]:
        assert one["bound_ms"] > 0
        for name, row in one["results"].items():
            # transformers' layer rounds locations to 16 bits, and grid_sample on the CPU then reads garbage or crashes
            is_right = (name, one["dtype"]) != ("transformers", "bfloat16")
            assert (row["verdict"] == "right") == is_right, (name, row)
            assert ("median_ms" in row) == is_right
    table = (tmp_path / "deformable_attention_cpu_quick.md").read_text()
    assert "- msda-triton: for CUDA only" in table
    assert table.count("| every byte once |") == 2
    assert (tmp_path / "deformable_attention_cpu_quick.png").stat().st_size > 10_000


@pytest.fixture
def case(benchmark):
    return benchmark.Case("decoder-900", 2, "float32", (64, 96))


def test_a_wrong_result_gets_no_time(benchmark, case, monkeypatch):
    baselines = importlib.import_module("deformable_attention_baselines")

    def make_wrong(options):
        return lambda levels, value, *points: (1.01 * baselines.reference(levels, value, *points)[0],)

    monkeypatch.setitem(baselines.IMPLEMENTATIONS, "mmcv", baselines.Implementation("plain", make_wrong))
    options = benchmark.parse(["--rounds=1"])
    options.implementations = [*baselines.REFERENCES.values(), "mmcv"]
    here = SimpleNamespace(examine=benchmark.examine)  # no child: it would not know the wrong one
    here.pool = SimpleNamespace(submit=lambda function, *given: SimpleNamespace(result=lambda: function(*given)))
    for one in benchmark.measure(case, options, 1e9, here):
        row = one["results"]["mmcv"]
        assert row["verdict"] == "wrong result"
        assert row["relative_error"] == pytest.approx(0.01, rel=0.01)
        assert "median_ms" not in row
        assert "median_ms" in one["results"]["reference"]


def test_one_wrong_number_among_many_is_found(benchmark, case):
    baselines = importlib.import_module("deformable_attention_baselines")
    inputs = benchmark.Inputs(case, "cpu")
    expected = benchmark.find_expected("plain", inputs)
    outputs, gradients = benchmark.run("reference", baselines.reference, inputs, True)
    assert benchmark.relative_error((outputs, gradients), expected, inputs.off_lines) < 1e-5

    for tensor in (*outputs, *gradients):
        first = tensor.detach()[(0,) * tensor.ndim]  # a view: what is written here is in the tensor
        kept = first.clone()
        for wrong in (torch.nan, kept + 100):
            first.fill_(wrong)
            assert not benchmark.relative_error((outputs, gradients), expected, inputs.off_lines) < 1e-4
        first.copy_(kept)
    assert benchmark.relative_error((outputs, gradients), expected, inputs.off_lines) < 1e-5


@pytest.mark.slow
def test_a_child_measures_memory_and_survives_failures_and_crashes(benchmark, case, monkeypatch):
    child, options = benchmark.Child(), benchmark.parse([])
    assert child.examine("no such", case, False, options) == {"verdict": "fails: KeyError: 'no such'"}
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "examine", os._exit)  # stands for a segmentation fault
        assert child.examine(3) == {"verdict": "fails: its process crashed"}
    rows = [child.examine("reference", case, backward, options) for backward in (False, True)]
    child.pool.shutdown()
    assert [row["verdict"] for row in rows] == ["right", "right"]
    if sys.platform == "linux":
        output = case.batch_size * 900 * 256 * 4 / 2**20
        assert output < rows[0]["peak_memory_mib"] < rows[1]["peak_memory_mib"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds=0"], "must be at least 1"),
        (["--batch-sizes", "0"], "must be at least 1"),
        (["--shapes=x"], "invalid choice: 'x'"),
    ],
)
def test_wrong_arguments(benchmark, capsys, arguments, message):
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert message in capsys.readouterr().err
