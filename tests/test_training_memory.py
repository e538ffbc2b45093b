"""The benchmark of a training step's memory finds what is known to be needed, and stops what needs too much."""

import importlib
import sys
from pathlib import Path

import pytest

from conftest import tiny_config


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TOKENS = 16 * 16 + 8 * 8 + 4 * 4  # of a tiny model's levels, for a picture of 256 x 256
FFN_DIM, D_MODEL, LAYERS = 2**17, 32, 2  # so wide that hardly anything else counts

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the memory of a process")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "")  # the benchmark sets it
    yield importlib.import_module("training_memory")
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def tiny_fields(**overrides):
    """All but the names of the classes, of which the benchmark has its own number."""
    config = tiny_config(**overrides).to_diff_dict()
    return {name: value for name, value in config.items() if name not in ("id2label", "label2id")}


@pytest.mark.slow
def test_checkpointing_saves_the_activations_of_all_layers_but_one(benchmark):
    config = tiny_fields(encoder_ffn_dim=FFN_DIM)
    weights = 4 * LAYERS * 2 * D_MODEL * FFN_DIM / benchmark.GIB
    hidden = 4 * TOKENS * FFN_DIM / benchmark.GIB  # what one layer keeps for its backward pass
    kept, recomputed = (
        benchmark.measure_apart(benchmark.Row(256, 256, checkpointing=checkpointing, config=config), limit_gib=4)
        for checkpointing in (False, True)
    )
    assert kept["state_gib"] == recomputed["state_gib"] == pytest.approx(4 * weights, abs=0.02)
    assert 3 * weights + LAYERS * hidden < kept["peak_gib"] < 4 * weights + (LAYERS + 3) * hidden
    assert kept["peak_gib"] - recomputed["peak_gib"] == pytest.approx((LAYERS - 1) * hidden, rel=0.2)


def test_a_step_beyond_the_limit_is_stopped(benchmark):
    row = benchmark.measure_apart(benchmark.Row(256, 256, config=tiny_fields()), limit_gib=0)
    assert row["peak_gib"] == "more than 0"


def test_a_process_that_fails_is_no_result(benchmark):
    row = benchmark.measure_apart(benchmark.Row(256, 256, config={"num_queries": 0}), limit_gib=4)
    assert row["peak_gib"] == "unknown: its process failed"
