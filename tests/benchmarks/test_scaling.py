"""The benchmark of growth finds the exponents of known curves, measures what grows, and keeps what it has measured."""

import importlib
import json
import sys
import time
from functools import partial
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZES = (1, 4, 16, 64, 256)
CHEAP = ["levels", "matcher", "losses", "self-attention", "mask"]


class Here:
    """Works in this process, and grows by 2 MiB with each run."""

    started = 0

    def __init__(self, environment):
        Here.started += 1
        self.runs = 0

    def start_building(self, build):
        self.work = build()

    def wait(self):
        pass

    def run(self):
        self.runs += 1
        start = time.perf_counter()
        self.work()
        return time.perf_counter() - start, 2.0 * self.runs

    def close(self):
        pass


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(importlib.import_module("common.machine"), "RESULTS", tmp_path)
    benchmark = importlib.import_module("scaling")
    monkeypatch.setattr(benchmark, "Worker", Here)
    monkeypatch.setattr(Here, "started", 0)
    yield benchmark
    for path in BENCHMARKS.rglob("*.py"):
        sys.modules.pop(".".join(path.relative_to(BENCHMARKS).with_suffix("").parts), None)


@pytest.mark.parametrize("power", [0, 0.5, 1, 1.5, 2, 3])
@pytest.mark.parametrize(("per_item", "unit"), [(1, 1), (3e-6, 1), (1, 1000)])
def test_a_power_law_has_its_exponent(benchmark, power, per_item, unit):
    found = benchmark.fit([unit * size for size in SIZES], [per_item * size**power for size in SIZES])
    assert found["exponent"] == found["exponent_at_the_end"] == power
    if power in (0, 1, 2):
        assert found["growth"] == power
        assert found["percent_at_the_end"][("constant", "linear", "quadratic")[power]] == 100


@pytest.mark.parametrize("terms", [(5, 1, 0), (50, 0, 0.01), (3, 2, 0.05), (0, 1, 0.5)])
def test_a_sum_is_taken_apart(benchmark, terms):
    """A constant part hides growth from the exponents, but not from the fit."""
    parts = [[term * size**power for size in SIZES] for power, term in enumerate(terms)]
    values = [sum(at_size) for at_size in zip(*parts)]
    found = benchmark.fit(SIZES, values)
    assert list(found["percent_at_the_end"].values()) == [round(100 * part[-1] / values[-1]) for part in parts]
    growing = (parts[1][-1] + 2 * parts[2][-1]) / (parts[1][-1] + parts[2][-1])
    assert found["growth"] == pytest.approx(growing, abs=0.006)
    assert found["quadratic_from"] == (pytest.approx(terms[1] / terms[2], abs=0.6) if terms[2] else None)
    assert found["exponent"] <= found["exponent_at_the_end"] <= found["growth"] + 0.01


def test_what_is_lost_in_noise_is_not_fitted(benchmark):
    assert benchmark.curve([1, 2, 4, 8], [0.4, 1.0, 2, 4], 1, benchmark.fit)["fit"] is None
    for describe in (benchmark.fit, benchmark.slopes):
        assert benchmark.curve([1, 2, 4, 8], [0.4, 2, 4, 8], 1, describe)["fit"]["exponent"] == 1


def test_tokens_are_those_of_the_model(benchmark):
    for levels in (1, 2, 3, 4, 5):
        model = benchmark.make_small(benchmark.make_ours, levels, num_queries=3)()
        images = importlib.import_module("forward").random_images(1, 96, 96)
        assert model(images).encoder_last_hidden_state.shape[1] == benchmark.count_tokens(96, levels)


def test_a_quick_run_measures_and_a_second_run_keeps_it(benchmark, tmp_path, capsys, monkeypatch):
    benchmark.main(["--quick", "--only", *CHEAP])
    result = json.loads((tmp_path / "scaling_quick.json").read_text())
    assert list(result["panels"]) == CHEAP
    for panel in result["panels"].values():
        for curve in panel["curves"].values():
            assert len(curve["seconds"]["values"]) == len(panel["sizes"]) == 3
            assert min(curve["seconds"]["values"]) > 0
            assert curve["mebibytes"]["values"] == sorted(curve["mebibytes"]["values"])
            assert curve["mebibytes"]["fit"]["exponent"] > 0
            assert sum(curve["seconds"]["fit"]["percent_at_the_end"].values()) == pytest.approx(100, abs=2)
    table = (tmp_path / "scaling_quick.md").read_text()
    assert "### matcher against objects per image, 1 to 16" in table
    assert (tmp_path / "scaling_quick.png").stat().st_size > 10_000

    monkeypatch.setattr(benchmark, "PANELS", {name: benchmark.PANELS[name] for name in CHEAP})
    benchmark.main(["--quick"])
    assert Here.started == 2  # of the first run
    assert json.loads((tmp_path / "scaling_quick.json").read_text()) == result

    monkeypatch.setattr(benchmark, "MEASURED", ())
    capsys.readouterr()
    with pytest.raises(SystemExit, match="its other panels are of another code; run without --only"):
        benchmark.main(["--quick", "--only", "mask"])
    assert json.loads((tmp_path / "scaling_quick.json").read_text()) == result
    benchmark.main(["--quick", "--only", *CHEAP])
    assert "its panels are measured again, because they are of another code" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "scaling_quick.json").read_text())["panels"]) == CHEAP


@pytest.mark.parametrize("text", ["", '{"panels": {"tok', "[]", "{}", '{"panels": 3}'])
def test_a_damaged_result_is_refused_and_left(benchmark, tmp_path, text):
    (tmp_path / "scaling_quick.json").write_text(text)
    with pytest.raises(SystemExit, match=r"scaling_quick\.json is damaged; move it away"):
        benchmark.main(["--quick"])
    assert (tmp_path / "scaling_quick.json").read_text() == text


@pytest.mark.slow
@pytest.mark.parametrize("panel", ["tokens", "queries", "objects", "denoising", "batch", "matcher-queries"])
def test_every_panel_can_be_measured(benchmark, panel):
    workers = {name: Here({}) for name in benchmark.ENVIRONMENTS}
    smallest = benchmark.PANELS[panel].quick[:1]
    measured = benchmark.measure_panel(benchmark.PANELS[panel], smallest, workers, rounds=1)
    assert all(curve["seconds"]["values"][0] > 0 for curve in measured["curves"].values())


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the memory of a process")
def test_one_process_measures_works_in_any_order(benchmark):
    """What an earlier work used does not count for a later one, nor is it hidden by it."""
    worker = importlib.import_module("common.interleave").Worker({})
    for mebibytes in (64, 256, 32, 128):
        worker.start_building(partial(partial, bytearray, mebibytes * 2**20))
        worker.wait()
        for _ in range(2):
            assert worker.run()[1] == pytest.approx(mebibytes, abs=2)
    worker.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--rounds=0"], "--rounds must be at least 1, not 0"), (["--only=x"], "invalid choice")],
)
def test_wrong_arguments(benchmark, capsys, arguments, message):
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert message in capsys.readouterr().err
