"""The benchmark of a training step's memory finds what is known to be needed, and stops what needs too much."""

import importlib
import sys
from pathlib import Path

import pytest

from helpers.models import tiny_config


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TOKENS = 16 * 16 + 8 * 8 + 4 * 4  # of a tiny model's levels, for an image of 256 x 256
FFN_DIM, D_MODEL, LAYERS = 2**17, 32, 2  # so wide that hardly anything else counts

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the memory of a process")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "")  # the benchmark sets it
    yield importlib.import_module("training_memory")
    for path in BENCHMARKS.rglob("*.py"):
        sys.modules.pop(".".join(path.relative_to(BENCHMARKS).with_suffix("").parts), None)


def tiny_fields(**overrides):
    """All but the names of the classes, of which the benchmark has its own number."""
    config = tiny_config(**overrides).to_diff_dict()
    return {name: value for name, value in config.items() if name not in ("id2label", "label2id")}


@pytest.mark.slow
def test_the_peak_is_what_the_widest_layers_need(benchmark):
    config = tiny_fields(encoder_ffn_dim=FFN_DIM)
    weights = 4 * 2 * D_MODEL * FFN_DIM / benchmark.GIB  # of one layer
    hidden = 4 * TOKENS * FFN_DIM / benchmark.GIB  # what one layer keeps for its backward pass
    state = 4 * LAYERS * weights
    moments_and_parameters = 3 * LAYERS * weights
    gradients_of_hidden = 2 * hidden  # before and behind the activation
    peaks = {
        # at the last layer, when no gradients of weights are there
        False: moments_and_parameters + LAYERS * hidden + gradients_of_hidden,
        # at the first layer, when those of all others are
        True: moments_and_parameters + (LAYERS - 1) * weights + hidden + gradients_of_hidden,
    }
    for checkpointing, peak in peaks.items():
        row = benchmark.Row(256, 256, checkpointing=checkpointing, config=config)
        measured = benchmark.measure_apart(row, limit_gib=4)
        assert measured["state_gib"] == pytest.approx(state, abs=0.02)
        assert measured["peak_gib"] == pytest.approx(peak, abs=0.05)


def test_a_step_beyond_the_limit_is_stopped(benchmark):
    row = benchmark.measure_apart(benchmark.Row(256, 256, config=tiny_fields()), limit_gib=0)
    assert row["peak_gib"] == "more than 0"


def test_a_process_that_fails_is_no_result(benchmark):
    row = benchmark.measure_apart(benchmark.Row(256, 256, config={"num_queries": 0}), limit_gib=4)
    assert row["peak_gib"] == "unknown: its process failed"
